"""End a companion, and wait until it has ended."""

from __future__ import annotations

import contextlib
import os
import time

from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.polling import readable
from vllm_companion_plugin.errors import WaitTimeoutError
from vllm_companion_plugin.host.locks import is_locked
from vllm_companion_plugin.host.runtime_dir import DevicePaths
from vllm_companion_plugin.host.spawn import listener_pid

STOP_TIMEOUT_S = 5.0


def shut_down(connection: CompanionConnection, *, replaced: bool = False) -> int:
    """End the companion and return, with its pid, when it has ended: its exit frees the memory, not its answer."""
    visible = listener_pid(connection.paths)  # its own idea of its pid is that of its container
    with contextlib.ExitStack() as undo:
        pidfd = -1
        with contextlib.suppress(ProcessLookupError):
            if visible:
                pidfd = os.pidfd_open(visible)
                undo.callback(os.close, pidfd)
        pid = connection.shutdown(replaced=replaced)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not _ended(connection.paths, pidfd):
            if time.monotonic() > deadline:
                remedy = f"End it: kill -9 {visible}" if visible else "It runs in another container."
                raise WaitTimeoutError(
                    f"The companion of {connection.device} (pid {pid}) did not end within {STOP_TIMEOUT_S:g} s.",
                    remedy=remedy,
                )
    return pid


def _ended(paths: DevicePaths, pidfd: int) -> bool:
    """Wait a moment for a companion to end, by its lock if it runs in another container."""
    if pidfd >= 0:
        return bool(readable([pidfd], 0.05))
    time.sleep(0.05)
    return not is_locked(paths.companion_lock)
