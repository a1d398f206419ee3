"""`serve`: companions in the foreground, and a model in them before any engine exists."""

from __future__ import annotations

import argparse
import os
import sys
import time

from vllm_companion_plugin.cli import metrics, table
from vllm_companion_plugin.cli.children import Signals, Stopped, run_to_end
from vllm_companion_plugin.cli.devices import devices_named, visible_gpus
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.cli.ward import RETRY_S, Ward
from vllm_companion_plugin.client import connect
from vllm_companion_plugin.errors import (
    AlreadyRunningError,
    CompanionError,
    CompanionReplacedError,
    CompanionUnavailableError,
    SettingsError,
)
from vllm_companion_plugin.interpreter import raise_file_limit
from vllm_companion_plugin.logs import printable
from vllm_companion_plugin.settings import Settings, to_environment
from vllm_companion_plugin.types import CompanionStatus, EntryState, model_name


def serve(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Run until a signal or `stop` ends all companions (0), or something failed (1)."""
    model, flags = _model_and_flags(rest)
    raise_file_limit()  # what the companions hold we hold, too
    settings = settings_of(parsed)
    devices = devices_named(parsed.device)
    wards: list[Ward] = []
    with Signals() as signals:
        try:
            for device in devices:
                ward = Ward(device, settings, settings.linger_s if parsed.linger_s is not None else -1.0)
                wards.append(ward)
                if not _own(ward, signals, may_join=model is not None):
                    wards.remove(ward)
            metrics.serve_beside(settings)
            if model is not None:
                _warm(model, flags, _environment(parsed.device, devices, settings), signals)
                _show_held(model, devices, settings)
            print("Ready", flush=True)
            return _supervise(wards, signals)
        except Stopped:
            return 0
        except CompanionError:
            for ward in wards:
                if not ward.started:  # an engine did, and it may go on without us
                    ward.let_go()
            raise
        finally:
            for ward in wards:
                ward.stop()


def _model_and_flags(rest: list[str]) -> tuple[str | None, list[str]]:
    if not rest:
        return None, []
    if rest[0].startswith("-"):
        raise SettingsError(
            f"serve: {rest[0]} is not known here; flags of vLLM follow a model: serve MODEL {rest[0]} ..."
        )
    return rest[0], rest[1:]


def _own(ward: Ward, signals: Signals, *, may_join: bool) -> bool:
    """Whether the companion of this device is ours; if not, it is another `serve`'s, and used as it is."""
    try:
        ward.start(signals)
    except AlreadyRunningError as error:
        if not may_join:
            raise
        print(f"Using the companion of {ward.device}: {error}", flush=True)
        return False
    if not ward.started:
        print(f"Using the companion of {ward.device} (pid {ward.pid}); from now on it ends with us.", flush=True)
    return True


def _stay(status: CompanionStatus) -> str:
    return table.linger_text(status, time.time())


def _environment(named: str | None, devices: list[str], settings: Settings) -> dict[str, str]:
    """Of the loading process: it sees only the GPU that was named, if one was."""
    environment = {**os.environ, **to_environment(settings)}
    if named not in (None, "all", "cpu"):
        # By position, because vLLM expects numbers here.
        gpus, visible = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(len(gpus))]
        chosen = [names[gpus.index(device)] if device in gpus else device for device in devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment


def _warm(model: str, flags: list[str], environment: dict[str, str], signals: Signals) -> None:
    """Load `model` as an engine would, in a process of its own, and wait for it."""
    print(f"Loading {printable(model)} ...", flush=True)
    command = [sys.executable, "-m", "vllm_companion_plugin.engine.warm", model, *flags]
    status = run_to_end(command, environment, signals)
    if status != 0:
        raise CompanionUnavailableError(
            f"{model} was not loaded: vLLM ended with status {status}; see its lines above."
        )


def _show_held(model: str, devices: list[str], settings: Settings) -> None:
    held, name = 0, model_name(model)
    for device in devices:
        with connect(device, settings, spawn=False) as connection:
            status = connection.status()
        ready = [entry for entry in status.entries if entry.state is EntryState.READY]
        targets = [entry.key for entry in ready if (entry.key.model, entry.key.role) == (name, "target")]
        for entry in ready:
            if entry.key in targets or any(entry.key.is_draft_of(target) for target in targets):
                held += 1
                what = printable(model) if entry.key in targets else entry.key.title
                print(
                    f"{device} holds {what} ({entry.key.rank}): {entry.size_bytes / table.GIB:.2f} GiB, "
                    f"{entry.tensor_count} tensors, generation {entry.generation}; stays: {_stay(status)}.",
                    flush=True,
                )
    if not held:
        raise CompanionError(f"{model} was loaded, but is not shared on {', '.join(devices)}; see vLLM's lines above.")


def _supervise(wards: list[Ward], signals: Signals) -> int:
    """Until all companions were stopped; at once if every one is another `serve`'s. Those that die are followed."""
    while wards:
        failed = []
        for ward in [ward for ward in wards if ward.ended]:
            if ward.error is None:
                wards.remove(ward)
                print(f"The companion of {ward.device} was stopped.", file=sys.stderr, flush=True)
            elif isinstance(ward.error, CompanionUnavailableError):
                how = "was replaced" if isinstance(ward.error, CompanionReplacedError) else "has died"
                before = ward.pid
                try:
                    ward.start(signals)
                except CompanionError as error:
                    if len(wards) == 1:
                        raise
                    print(f"vllm-companion: error: {error} Trying again.", file=sys.stderr, flush=True)
                    failed.append(ward)  # the other devices go on
                    continue
                print(
                    f"The companion of {ward.device} (pid {before}) {how}; it is now pid {ward.pid}.",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                raise ward.error
        # One that ended meanwhile has woken somebody else, who waited for a lock or a child.
        if wards and not any(ward.ended and ward not in failed for ward in wards):
            signals.wait(timeout_s=RETRY_S if failed else None)
    return 0
