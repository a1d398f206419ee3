"""A copy in host memory that this process has made, and will read again: its pages stay locked for the device.

Locking the pages of shared memory takes longer than copying them (measured on H200: 0.5 s for 8 GiB, and 0.16 s to
copy them then, instead of 0.35 s through buffers). So it is done in a thread, while the process sleeps.
"""

from __future__ import annotations

import logging
import threading

from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing
from vllm_companion_plugin.memory.cuda_driver import PrimaryContext, call, driver
from vllm_companion_plugin.memory.mapping import Mapping

logger = logging.getLogger("vllm.companion.memory")

_READ_ONLY = 8
"""CU_MEMHOSTREGISTER_READ_ONLY"""


class HostCopy(Closing):
    """Sealed host memory, mapped read-only and page-locked once `lock` is done.

    Args:
        mapping: of the memory; owned from now on.
        context: of the device that will read it.
    """

    def __init__(self, mapping: Mapping, context: PrimaryContext) -> None:
        self._mapping = mapping
        self._context = context
        self._mutex = threading.Lock()
        self._is_locked = self._is_closed = False

    def lock(self) -> None:
        """Begin to lock the pages, in a thread."""
        threading.Thread(target=self._lock, name="companion-locking", daemon=True).start()

    def _lock(self) -> None:
        with self._mutex:
            if self._is_closed or self._is_locked:
                return
            try:
                with self._context:
                    size_bytes = self._mapping.size_bytes
                    registered = driver.cuMemHostRegister(self._mapping.address, size_bytes, _READ_ONLY)
                    call("Page-locking the copy in host memory", registered)
                self._is_locked = True
            except ArenaError as error:  # then it is read through buffers
                logger.debug("%s", error)

    @property
    def address(self) -> int | None:
        """Where the device can read it; None if its pages are not locked. Waits for a lock that has begun."""
        with self._mutex:
            return self._mapping.address if self._is_locked else None

    def close(self) -> None:
        """Unlock and unmap. Idempotent."""
        with self._mutex:
            if self._is_locked:
                try:
                    with self._context:
                        driver.cuMemHostUnregister(self._mapping.address)
                except ArenaError as error:  # the context has gone, and the lock with it
                    logger.debug("%s", error)
            self._is_locked, self._is_closed = False, True
            self._mapping.close()
