"""`vllm-companion upgrade` replaces running companions by ones of this installation, while engines serve."""

from __future__ import annotations

import argparse
import contextlib

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.devices import running
from vllm_companion_plugin.cli.exits import NothingRunsError
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.client.mirror import hold
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.process import raise_file_limit
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, EntryStatus
from vllm_companion_plugin.errors import CompanionUnavailableError
from vllm_companion_plugin.host.spawn import replace_companion
from vllm_companion_plugin.settings import Settings

NAME = "vllm-companion upgrade"
BACK_TIMEOUT_S = 30.0


def upgrade(parsed: argparse.Namespace) -> int:
    settings = settings_of(parsed)
    raise_file_limit()  # meanwhile this process holds all that the companions hold
    with running(settings, parsed.device) as connections:
        if not connections:
            raise NothingRunsError(table.NOBODY)
        for connection in connections:
            _upgrade(connection, settings)
    return 0


def _upgrade(connection: CompanionConnection, settings: Settings) -> None:
    """Hold all entries in this process, so that nothing depends on engines; then hand them to the new companion."""
    connection.check_protocol()
    before = connection.status()
    ready = [entry for entry in before.entries if entry.state is EntryState.READY]
    with contextlib.ExitStack() as undo:
        for entry in ready:
            undo.callback(hold(connection, entry.key, settings, f"{NAME} {__version__}").close)
        replace_companion(
            connection.device,
            settings,
            lambda: shut_down(connection, replaced=True),
            # The owner's linger time does not count here: the owner will set that time again.
            settings.linger_s if before.owner_pid else before.linger_s,
        )
        after = _wait_until_back(connection.device, ready, settings)
    say(
        f"The companion of {connection.device} is now pid {after.pid}, version {after.version} "
        f"(was pid {before.pid}, version {before.version}); entries handed over: {len(ready)}."
    )


def _wait_until_back(device: str, ready: list[EntryStatus], settings: Settings) -> CompanionStatus:
    """Wait until the new companion holds all of `ready`; return its status. Raises `WaitTimeoutError`."""
    wanted = {(entry.key.id, entry.generation) for entry in ready}
    with connect(device, settings, spawn=False) as connection:
        for status in connection.watch(BACK_TIMEOUT_S):
            if wanted <= {(e.key.id, e.generation) for e in status.entries if e.state is EntryState.READY}:
                return status
    raise CompanionUnavailableError(f"The new companion of {device} ended at once.")
