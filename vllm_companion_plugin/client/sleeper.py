"""Keeps companions told that this process sleeps on an entry, of which it has nothing but the name."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack

from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.client.lease import Lease
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.settings import Settings

logger = logging.getLogger("vllm.companion.client")

POLL_S = 1.0


class Sleeper:
    """A lease that sleeps, across the deaths of companions, until `close`.

    It starts no companion: who sleeps has nothing to lose.

    Args:
        lease: has fallen asleep; owned from now on.
        with_it: closed with the lease.
    """

    def __init__(
        self,
        device: str,
        settings: Settings,
        key: EntryKey,
        level: int,
        lease: Lease,
        client_name: str,
        with_it: ExitStack,
    ) -> None:
        self._device = device
        self._settings = settings
        self._key = key
        self._level = level
        self._client_name = client_name
        self._closed = threading.Event()
        self._mutex = threading.Lock()
        self._open = ExitStack()
        self._open.push(with_it)
        self._open.callback(lease.release, wait=False)
        lease.on_lost(self._on_lost)

    def close(self) -> None:
        """End the lease; its thread ends some milliseconds later, as somebody wakes just now. Idempotent."""
        with self._mutex:
            self._closed.set()
            ending = self._open.pop_all()
        ending.close()

    def _on_lost(self, error: CompanionError) -> None:
        if isinstance(error, CompanionUnavailableError) and not self._closed.is_set():
            threading.Thread(target=self._tell_next, name="companion-sleeper", daemon=True).start()

    def _tell_next(self) -> None:
        paths = device_paths(self._device, self._settings)
        while not self._closed.wait(POLL_S):
            if not is_listening(paths):
                continue
            with ExitStack() as undo:
                try:
                    connection = undo.enter_context(connect(self._device, self._settings, spawn=False))
                    lease = connection.attach(
                        self._key, may_load=False, client_name=self._client_name, asleep=self._level
                    )
                    undo.callback(lease.release, wait=False)
                except CompanionError as error:
                    logger.debug("The next companion of %s was not told who sleeps: %s", self._device, error)
                    continue
                with self._mutex:
                    if self._closed.is_set():
                        return
                    self._open.close()
                    self._open = undo.pop_all()
                lease.on_lost(self._on_lost)
                return
