"""`serve`: companions in the foreground, and a model in them before any engine exists."""

from __future__ import annotations

import argparse
import os
import sys
import time

from vllm_companion_plugin.cli import metrics, table
from vllm_companion_plugin.cli.children import Child, Signals, Stopped, end, run_to_end
from vllm_companion_plugin.cli.devices import devices_named, visible_gpus
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client import connect
from vllm_companion_plugin.errors import (
    AlreadyRunningError,
    CompanionError,
    CompanionUnavailableError,
    SettingsError,
)
from vllm_companion_plugin.launch.runtime_dir import device_paths
from vllm_companion_plugin.launch.spawn import is_listening
from vllm_companion_plugin.settings import Settings, to_environment
from vllm_companion_plugin.types import CompanionStatus, EntryState, model_name


def serve(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Run until a signal ends it (0), all companions have ended, or something failed (1)."""
    model, flags = _model_and_flags(rest)
    settings = settings_of(parsed)
    devices = devices_named(parsed.device)
    children: list[Child] = []
    with Signals() as signals:
        try:
            new = [device for device in devices if not _joined(device, settings, may_join=model is not None)]
            for device in new:
                children.append(Child(device, settings, settings.linger_s if parsed.linger_s is not None else None))
            for child in children:
                child.wait_ready(signals, settings.spawn_timeout_s)
            metrics.serve_beside(settings)
            if model is not None:
                _warm(model, flags, _environment(parsed.device, devices, settings), signals)
                _show_held(model, devices, settings)
            print("Ready", flush=True)
            return _supervise(children, signals)
        except Stopped:
            return 0
        finally:
            end([child.process for child in children])


def _model_and_flags(rest: list[str]) -> tuple[str | None, list[str]]:
    if not rest:
        return None, []
    if rest[0].startswith("-"):
        raise SettingsError(
            f"serve: {rest[0]} is not known here; flags of vLLM follow a model: serve MODEL {rest[0]} ..."
        )
    return rest[0], rest[1:]


def _joined(device: str, settings: Settings, *, may_join: bool) -> bool:
    """Whether a companion of `device` runs already and may be used."""
    if not is_listening(device_paths(device, settings)):
        return False
    with connect(device, settings, spawn=False) as connection:
        status = connection.status()
    if not may_join:
        raise AlreadyRunningError(
            f"A companion of {device} runs already (pid {status.pid}); end it: vllm-companion stop --device {device}"
        )
    print(f"Using the companion of {device} (pid {status.pid}); it stays: {_stay(status)}.", flush=True)
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
    print(f"Loading {model} ...", flush=True)
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
                what = model if entry.key in targets else entry.key.title
                print(
                    f"{device} holds {what} ({entry.key.rank}): {entry.size_bytes / table.GIB:.2f} GiB, "
                    f"{entry.tensor_count} tensors, generation {entry.generation}; stays: {_stay(status)}.",
                    flush=True,
                )
    if not held:
        raise CompanionError(f"{model} was loaded, but is not shared on {', '.join(devices)}; see vLLM's lines above.")


def _supervise(children: list[Child], signals: Signals) -> int:
    """Wait for the end of all children; at once if every companion is somebody else's."""
    code = 0
    while children:
        for child in list(children):
            status = child.process.poll()
            if status is None:
                continue
            children.remove(child)
            code = code or int(status != 0)
            how = "was stopped" if status == 0 else f"ended with status {status}"
            print(f"The companion of {child.device} {how}.", file=sys.stderr, flush=True)
        if children:
            signals.wait()
    return code
