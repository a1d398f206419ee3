"""Keeps companions told that this process sleeps on an entry, of which it has nothing but the name."""

from __future__ import annotations

import contextlib
import logging
import threading

from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.client.lease import Lease, Ready
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.settings import Settings

logger = logging.getLogger("vllm.companion.client")

POLL_S = 1.0


class Sleeper:
    """A lease that sleeps, across the deaths of companions, until `close`.

    It starts no companion: who sleeps has nothing to lose.

    Args:
        lease: has fallen asleep; owned from now on.
        connection: of the lease, if it has one of its own; owned, too.
    """

    def __init__(
        self,
        device: str,
        settings: Settings,
        key: EntryKey,
        level: int,
        lease: Lease,
        client_name: str,
        connection: CompanionConnection | None = None,
    ) -> None:
        self._device = device
        self._settings = settings
        self._key = key
        self._level = level
        self._client_name = client_name
        self._closed = threading.Event()
        self._mutex = threading.Lock()
        self._lease = lease
        self._connection = connection
        lease.on_lost(self._on_lost)

    def wake(self, manifest: bytes) -> tuple[Lease, Ready, Descriptors] | None:
        """What this process maps from now on, its descriptors, and the lease, which stays this one's until `hand_over`.

        Returns:
            None: the companion has to be asked in another way, by attaching.

        Args:
            manifest: of what it mapped.
        """
        with self._mutex:
            lease = self._lease
        try:
            woken = lease.wake(self._key, manifest)
        except CompanionError as error:  # who attaches is told the same, or that this companion is of before this
            logger.debug("%s was not woken by its lease: %s", self._key.short_title, error)
            self.sleep_again(lease)
            return None
        return None if woken is None else (lease, *woken)

    def sleep_again(self, lease: Lease) -> None:
        """What `wake` has told the companion has come to nothing."""
        with contextlib.suppress(CompanionError):  # it has died, or the lease has ended
            lease.sleep_on(self._level)

    def connection_of(self, lease: Lease) -> CompanionConnection | None:
        """The lease's own one, if it has one; this one's until `hand_over`."""
        with self._mutex:
            return self._connection if lease is self._lease else None

    def hand_over(self, lease: Lease) -> None:
        """End, and leave the lease that has woken, and its connection, to the caller."""
        with self._mutex:
            self._closed.set()
            lease.forget(self._on_lost)
            if lease is not self._lease:  # the companion has died just now, and the next one was told that we sleep
                self._end()

    def close(self) -> None:
        """End the lease; its thread ends some milliseconds later, as somebody wakes just now. Idempotent."""
        with self._mutex:
            self._closed.set()
            self._end()

    def _end(self) -> None:
        self._lease.release(wait=False)
        if self._connection is not None:
            self._connection.close()

    def _on_lost(self, error: CompanionError) -> None:
        if isinstance(error, CompanionUnavailableError) and not self._closed.is_set():
            threading.Thread(target=self._tell_next, name="companion-sleeper", daemon=True).start()

    def _tell_next(self) -> None:
        paths = device_paths(self._device, self._settings)
        while not self._closed.wait(POLL_S):
            with contextlib.ExitStack() as undo:
                try:
                    if not is_listening(paths):
                        continue
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
                    self._end()
                    self._lease, self._connection = lease, connection
                    undo.pop_all()
                lease.on_lost(self._on_lost)
                return
