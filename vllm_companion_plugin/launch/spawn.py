"""Starting a companion that outlives whoever needed it first."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import site
import socket
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec

from filelock import FileLock, Timeout

from vllm_companion_plugin.errors import CompanionUnavailableError, RuntimeDirError
from vllm_companion_plugin.launch.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.settings import Settings, to_environment

logger = logging.getLogger("vllm.companion.spawn")

# LD_LIBRARY_PATH because some Pythons need it to find libpython. Nothing of CUDA, no LD_PRELOAD:
# a companion must not be able to touch a GPU.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("LC_", "PYTHON")
LOG_TAIL_BYTES = 2000


def is_listening(paths: DevicePaths) -> bool:
    """Does a process accept connections at the companion's socket? A leftover file does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        try:
            sock.connect(paths.grpc_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise CompanionUnavailableError(f"Cannot connect to {paths.grpc_socket}: {error.strerror}.") from error
    return True


def ensure_companion(device: str, settings: Settings, *, linger_s: float | None = None) -> None:
    """Return once a companion of `device` answers; start one if there is none.

    Args:
        linger_s: of a companion started here, instead of the setting; negative: until stopped.

    Raises:
        RuntimeDirError: the runtime directory is unsafe or not writable.
        CompanionUnavailableError: none could be started in `settings.spawn_timeout_s`; says why,
            with the end of its log.
    """
    paths = device_paths(device, settings)
    if is_listening(paths):
        return
    deadline = time.monotonic() + settings.spawn_timeout_s
    lock = FileLock(paths.spawn_lock, thread_local=False)
    try:
        lock.acquire(timeout=settings.spawn_timeout_s)
    except Timeout:
        raise CompanionUnavailableError(
            f"Another process has been starting the companion of {device} for {settings.spawn_timeout_s:g} s. "
            f"Its log: {paths.log}"
        ) from None
    except OSError as error:
        raise RuntimeDirError(f"Cannot lock {paths.spawn_lock}: {error.strerror or error}.") from error
    try:
        if not is_listening(paths):
            _spawn(paths, settings, settings.linger_s if linger_s is None else linger_s, deadline)
    finally:
        lock.release()


def child_environment(settings: Settings) -> dict[str, str]:
    """What a companion needs of our environment, and the way to the packages it imports."""
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    environment.update(to_environment(settings))
    given = [os.path.abspath(p) for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    wanted = given + [root for root in _import_roots() if root not in given]
    if wanted:
        environment["PYTHONPATH"] = os.pathsep.join(wanted)
    # The child's working directory is "/", which must not become an import path.
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def _import_roots() -> list[str]:
    """Directories outside the interpreter's own where this process found what the child imports."""
    own = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
    own.add(sysconfig.get_path("platlib"))
    roots: list[str] = []
    for name in ("vllm_companion_plugin", "grpc", "google.protobuf", "grpc_health", "filelock"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        root = os.path.abspath(spec.origin)
        for _ in range(name.count(".") + 2):
            root = os.path.dirname(root)
        if root not in own and root not in roots:
            roots.append(root)
    return roots


def _spawn(paths: DevicePaths, settings: Settings, linger_s: float, deadline: float) -> None:
    if not sys.executable:
        raise CompanionUnavailableError("This process does not know its Python interpreter (sys.executable).")
    started = time.monotonic()
    read_fd, write_fd = os.pipe()
    try:
        command = [sys.executable, "-m", "vllm_companion_plugin.companion", "--device", paths.device]
        command += [f"--linger-s={linger_s}", "--detach", "--ready-fd", str(write_fd)]
        try:
            with open(paths.log, "ab", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW, 0o600)) as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=child_environment(settings),
                    pass_fds=(write_fd,),
                    start_new_session=True,
                )
        finally:
            os.close(write_fd)
        answer = _read_until_closed(read_fd, deadline)
        _reap(child)
    except OSError as error:
        raise CompanionUnavailableError(f"Cannot start a companion of {paths.device}: {error}.") from error
    finally:
        os.close(read_fd)
    if answer == "ok":
        logger.info("Started the companion of %s in %.1f s.", paths.device, time.monotonic() - started)
        return
    if answer is not None and answer.startswith("already_running "):
        # It holds the lock but did not listen yet: started by hand a moment ago, or stopping.
        while not is_listening(paths):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    reason = "gave no answer in time" if answer is None else answer.partition(" ")[2] or "ended at once"
    raise CompanionUnavailableError(
        f"The companion of {paths.device} could not be started: {reason}\nEnd of {paths.log}:\n{_log_tail(paths.log)}"
    )


def _read_until_closed(fd: int, deadline: float) -> str | None:
    """What the child wrote until it closed its end, "" if nothing; None if the time is over."""
    data = b""
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(fd, 4096)
        if not chunk:
            return data.decode(errors="replace")
        data += chunk
    return None


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect the intermediate process, which ends as soon as it has forked."""
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _log_tail(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
    return "(no log)"
