"""A file lock lets one process at a time load on a device; the lock is released when its holder dies.

The companion elects one loader per key; this lock keeps two different models from being
loaded onto one device at the same time, where each would see the other's temporary memory.
The lock is flock(2), so the kernel frees it when the holder is killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from filelock import FileLock, Timeout

from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import RuntimeDirError, WaitTimeoutError
from vllm_companion_plugin.host.runtime_dir import DevicePaths, read_file, replace_file

POLL_S = 0.05


class LoaderElection:
    """The right to load on a device. Not reentrant; release from any thread of this process."""

    def __init__(self, paths: DevicePaths) -> None:
        self._device = paths.device
        self._path = paths.loader_lock
        self._holder_path = paths.loader_lock + ".holder"
        # thread_local: a lock taken in one thread must be released in another (vLLM loads in
        # a worker thread). Not a singleton: two elections of one process exclude each other.
        self._lock = FileLock(self._path, thread_local=False)

    def acquire(
        self,
        timeout_s: float,
        holder_text: str = "",
        on_wait: Callable[[str], None] | None = None,
        on_silence: Callable[[float], None] | None = None,
    ) -> LoaderElection:
        """Wait until no other process loads on this device; return self, for `with`.

        Args:
            timeout_s: longest silence of a holder; a new holder or a sign of life restarts the time.
            holder_text: a description of this process, for the messages of waiting processes.
            on_wait: called with the holder's text when waiting begins, and with each sign of life.
            on_silence: called at every look at a holder without a new sign of life, with the seconds since the last.

        Raises:
            WaitTimeoutError: a holder kept the lock for `timeout_s` without a sign of life.
            RuntimeDirError: the lock file cannot be opened.
        """
        if self._lock.is_locked:
            raise RuntimeError(f"This election of {self._device} is already held; it is not reentrant.")
        holder: str | None = None
        sign = 0
        deadline = 0.0
        while not self._try():
            current, last_sign = self.holder(), self._last_sign()
            if (current, last_sign) != (holder, sign):
                holder, sign, deadline = current, last_sign, time.monotonic() + timeout_s
                if on_wait is not None:
                    on_wait(current)
            elif on_silence is not None:
                on_silence(time.monotonic() - (deadline - timeout_s))
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(
                    f"Waited for {holder or 'another process'} to finish loading on {self._device}, the last "
                    f"{timeout_s:g} s without progress.",
                    remedy="Stop that process, or raise COMPANION_WAIT_TIMEOUT_S.",
                )
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        self._write_holder(f"pid {os.getpid()}" + (f" ({holder_text})" if holder_text else ""))
        return self

    def sign_of_life(self) -> None:
        """Tell the waiting processes that the holder makes progress. Never fails: only a file's time is set."""
        with contextlib.suppress(OSError):
            os.utime(self._holder_path)

    def _last_sign(self) -> int:
        try:
            return os.stat(self._holder_path).st_mtime_ns
        except OSError:
            return 0

    def _try(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise RuntimeDirError(f"Cannot lock {self._path}: {error.strerror or error}.") from error
        return True

    def holder(self) -> str:
        """Return the text of the last holder, or "". Use it in messages only: the text may be out of date."""
        try:
            return printable(read_file(self._holder_path, 500).decode(errors="replace"))[:500]
        except OSError:
            return ""

    def _write_holder(self, text: str) -> None:
        try:
            replace_file(self._holder_path, text)
        except OSError as error:
            self._lock.release()
            raise RuntimeDirError(f"Cannot write {self._holder_path}: {error.strerror}.") from error

    def release(self) -> None:
        """Let the next process load. Does nothing if the lock is not held."""
        self._lock.release()

    def __enter__(self) -> LoaderElection:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
