"""`vllm-companion upgrade`: a companion of this installation takes over what runs, while engines serve."""

from __future__ import annotations

import argparse
import contextlib
import os

from vllm_companion_plugin import __version__
from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.devices import running
from vllm_companion_plugin.cli.look import shut_down
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client import CompanionConnection, connect
from vllm_companion_plugin.errors import CompanionUnavailableError, EntryInUseError, LeaseLostError
from vllm_companion_plugin.holder import Held, Holder
from vllm_companion_plugin.launch.spawn import replace_companion
from vllm_companion_plugin.lease import Ready
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.types import CompanionStatus, EntryState, EntryStatus

NAME = "vllm-companion upgrade"
BACK_TIMEOUT_S = 30.0


def upgrade(parsed: argparse.Namespace) -> int:
    settings = settings_of(parsed)
    with running(settings, parsed.device) as connections:
        if not connections:
            raise CompanionUnavailableError(table.NOBODY)
        for connection in connections:
            _upgrade(connection, settings)
    return 0


def _upgrade(connection: CompanionConnection, settings: Settings) -> None:
    """Hold everything ourselves, so that nothing depends on engines, and let the new companion take it from us."""
    connection.check_protocol()
    before = connection.status()
    for entry in before.entries:
        if entry.state is EntryState.LOADING:
            loader = f" by pid {entry.loader.pid}" if entry.loader else ""
            raise EntryInUseError(
                f"{entry.key.title} is being loaded on {connection.device}{loader}; upgrade afterwards."
            )
    ready = [entry for entry in before.entries if entry.state is EntryState.READY]
    with contextlib.ExitStack() as undo:
        for entry in ready:
            _hold(connection, entry, settings, undo)
        replace_companion(
            connection.device,
            settings,
            lambda: shut_down(connection, replaced=True),
            before.linger_s,
        )
        after = _wait_until_back(connection.device, ready, settings)
    print(
        f"The companion of {connection.device} is now pid {after.pid}, version {after.version} "
        f"(was pid {before.pid}, version {before.version}), with {len(ready)} entries."
    )


def _hold(connection: CompanionConnection, entry: EntryStatus, settings: Settings, undo: contextlib.ExitStack) -> None:
    lease = connection.attach(entry.key, may_load=False, client_name=f"{NAME} {__version__}")
    undo.callback(lease.release)
    outcome = lease.wait(settings.wait_timeout_s)
    if not isinstance(outcome, Ready):
        raise LeaseLostError(f"{entry.key.title} was unloaded meanwhile; upgrade again.")
    fds = outcome.redeem()
    for fd in fds:
        undo.callback(os.close, fd)
    held = Held(outcome.key, outcome.generation, outcome.arena, fds, outcome.manifest, outcome.published)
    undo.callback(Holder(connection.device, settings, held, lease, f"{NAME} {__version__}").close)


def _wait_until_back(device: str, ready: list[EntryStatus], settings: Settings) -> CompanionStatus:
    """The new companion's status with all of `ready` in it. Raises `WaitTimeoutError` if it does not come to that."""
    wanted = {(entry.key.id, entry.generation) for entry in ready}
    with connect(device, settings, spawn=False) as connection:
        for status in connection.watch(BACK_TIMEOUT_S):
            if wanted <= {(e.key.id, e.generation) for e in status.entries if e.state is EntryState.READY}:
                return status
    raise CompanionUnavailableError(f"The new companion of {device} ended at once.")
