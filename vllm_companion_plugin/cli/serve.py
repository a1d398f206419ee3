"""`serve` runs companions in the foreground, and loads a model into them before any engine exists."""

from __future__ import annotations

import argparse
import os
import sys
import time

from vllm_companion_plugin.cli import metrics, table
from vllm_companion_plugin.cli.devices import devices_named, visible_gpus
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.parser import model_and_flags
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.output import relayed, say, say_warnings
from vllm_companion_plugin.core.process import raise_file_limit
from vllm_companion_plugin.core.status import CompanionStatus, EntryState
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import (
    AlreadyRunningError,
    CompanionError,
    CompanionReplacedError,
    CompanionUnavailableError,
    LeaseLostError,
    SettingsError,
)
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.settings import Settings, to_environment
from vllm_companion_plugin.supervise.children import Signals, Stopped, run_to_end
from vllm_companion_plugin.supervise.ward import Ward

RETRY_S, RETRY_MOST_S = 0.5, 30.0
"""Seconds between attempts to start a companion: at first, and after many attempts."""


def serve(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Run until a signal or `stop` ends all companions; return 0, or 1 after a failure."""
    model, flags = model_and_flags("serve", rest, parsed.flags)
    raise_file_limit()  # this process holds all that the companions hold
    say_warnings()
    settings = settings_of(parsed)
    devices = devices_named(parsed.device)
    wards: list[Ward] = []
    with Signals() as signals:
        try:
            for device in devices:
                linger_s = settings.linger_s if parsed.linger_s is not None else -1.0
                ward = Ward(device, settings, linger_s, expects_client=model is not None)
                wards.append(ward)
                if not _own(ward, signals, may_join=model is not None):
                    wards.remove(ward)
            metrics.serve_beside(settings)
            if model is not None:
                _warm(model, flags, _environment(parsed.device, devices, settings), signals)
                _try_to_show_held(model, devices, settings)
                for ward in wards:
                    ward.expects_client = False
            say("Ready")
            return _supervise(wards, signals)
        except Stopped:
            return 0
        except CompanionError:
            for ward in wards:
                if not ward.started:  # an engine started the companion, which may go on without us
                    ward.let_go()
            raise
        finally:
            for ward in wards:
                ward.stop()


def _own(ward: Ward, signals: Signals, *, may_join: bool) -> bool:
    """Own the companion of this device. Returns False if another `serve` owns it; then this one only uses it."""
    try:
        ward.start(signals)
    except AlreadyRunningError:
        if not may_join:
            raise
        say(f"Using the companion of {ward.device}, which another `vllm-companion serve` has.")
        return False
    if not ward.started:
        say(f"Using the companion of {ward.device} (pid {ward.pid}); from now on it ends with this process.")
    return True


def _stay(status: CompanionStatus) -> str:
    return table.linger_text(status, time.time())


def _environment(named: str | None, devices: list[str], settings: Settings) -> dict[str, str]:
    """Return the environment of the loading process, which sees only the named GPU if one was named."""
    environment = {**os.environ, **to_environment(settings)}
    if named not in (None, "all", "cpu"):
        # The variable holds positions, because vLLM expects numbers here.
        gpus, visible = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(len(gpus))]
        chosen = [names[gpus.index(device)] if device in gpus else device for device in devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment


def _warm(model: str, flags: list[str], environment: dict[str, str], signals: Signals) -> None:
    """Load `model` as an engine would, in another process, and wait for that process."""
    say(f"Loading {printable(model)} ...")
    command = [sys.executable, "-m", "vllm_companion_plugin.engine.run.warm", model, *flags]
    with relayed() as (stdout, stderr):
        status = run_to_end(command, environment, signals, stdout, stderr)
    if status == Exit.USAGE:
        raise SettingsError(f"{model} was not loaded: vLLM refuses these flags; see its line above.")
    if status != 0:
        raise CompanionUnavailableError(
            f"{model} was not loaded: vLLM ended with status {status}; see its lines above."
        )


def _try_to_show_held(model: str, devices: list[str], settings: Settings) -> None:
    """Show what is held. If a companion has died since, a new one follows with all that this process holds."""
    try:
        _show_held(model, devices, settings)
    except (CompanionUnavailableError, LeaseLostError) as error:
        say(f"vllm-companion: {error}", error=True)


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
                say(
                    f"{device} holds {what} ({entry.key.rank}): {entry.size_bytes / table.GIB:.2f} GiB, "
                    f"{entry.tensor_count} tensors, generation {entry.generation}; stays: {_stay(status)}."
                )
    if not held:
        raise CompanionError(f"{model} was loaded, but is not shared on {', '.join(devices)}; see vLLM's lines above.")


class _Restart:
    """The time of the next attempt to start a ward's companion, and why the last attempt failed."""

    def __init__(self) -> None:
        self.due = 0.0
        self._pause_s = RETRY_S
        self._told = ""

    def failed(self, ward: Ward, error: Exception) -> None:
        """Schedule the next attempt. Prints one line for each new reason only, because attempts may go on for days."""
        self.due = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RETRY_MOST_S)
        reason = error.code if isinstance(error, CompanionError) else type(error).__name__
        if reason != self._told:
            self._told = reason
            text = " ".join(str(error).split())
            say(
                f"vllm-companion: error: {text} This process keeps what the companion of {ward.device} held, and is "
                "trying again until a companion starts, or until this process is told to end.",
                error=True,
            )


def _supervise(wards: list[Ward], signals: Signals) -> int:
    """Replace companions that die, until all were stopped. Returns at once if other `serve` processes own all of them.

    This process may hold the last copy of the weights. So it lets go only after a signal, or if a user stopped the
    companion.
    """
    restarts: dict[str, _Restart] = {}
    while wards:
        for ward in [ward for ward in wards if ward.ended]:
            if ward.error is None:
                wards.remove(ward)
                say(ward.farewell, error=True)
                continue
            restart = restarts.setdefault(ward.device, _Restart())
            if time.monotonic() < restart.due:
                continue
            before, how = ward.pid, _ending(ward.error)
            try:
                ward.start(signals)
            except Stopped:
                raise
            except Exception as error:  # any error may be over later
                restart.failed(ward, error)
                continue
            del restarts[ward.device]
            say(f"The companion of {ward.device} (pid {before}) {how}; it is now pid {ward.pid}.", error=True)
        # A companion that ended meanwhile woke another wait, for a lock or a child, and not the one below.
        due = [restarts[ward.device].due if ward.device in restarts else 0.0 for ward in wards if ward.ended]
        if wards:
            signals.wait(timeout_s=max(0.0, min(due) - time.monotonic()) if due else None)
    return 0


def _ending(error: CompanionError) -> str:
    if isinstance(error, CompanionReplacedError):
        return "was replaced"
    return "has died" if isinstance(error, CompanionUnavailableError) else f"could not be followed ({error})"
