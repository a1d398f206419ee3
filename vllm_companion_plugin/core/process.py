"""Settings of this process: pauses of Python in work of milliseconds, the limit of open files, standard streams."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_INTERVAL_S = 1e-4
_STANDARD_FDS = 3


def open_closed_streams() -> None:
    """Open standard input, output and error on nothing, if the parent process closed them (`>&-`).

    Otherwise child processes have none of these, and vLLM ends; or the next file that is opened becomes one of them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null < _STANDARD_FDS:  # the kernel gives the lowest number that is free
        os.set_inheritable(null, True)
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause automatic garbage collection while open. May be nested; also works as a decorator.

    A full collection walks all of vLLM's millions of objects: up to 100 ms, in the middle of an
    attach that takes 30.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StartFreeze:
    """What exists when a start begins is taken out of garbage collection until that start is over. Once a process.

    vLLM collects about fifteen times until an engine is up, and each time walks the million objects that its imports
    have made. When it is up it freezes them itself, with all that has come since, and unfreezes them when it shuts
    down. A start that fails does not get there: the next full collection from outside of it sees everything again.

    Args:
        package: whose code runs a start: one goes on as long as a function of it is on the stack of its thread.
    """

    def __init__(self, package: str) -> None:
        self._start = f"{package}."
        self._thread = 0
        self._younger: list[object] = []
        self._is_ours = False
        self._was_used = False

    def begin(self) -> None:
        """A start begins in this thread. Only the first one freezes: later ones would freeze engines before them."""
        if self._was_used:
            if self._thaw():
                gc.collect()  # a start failed, and its engine is in the way of this one
            return
        self._was_used = self._is_ours = True
        self._thread = threading.get_ident()
        gc.freeze()
        self._younger = []
        gc.callbacks.append(self._collecting)

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        if self._is_ours and phase == "start" and info["generation"] == 2 and not self._goes_on():
            self._thaw()

    def _goes_on(self) -> bool:
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(self._start):
                return True
            frame = frame.f_back
        return False

    def _thaw(self) -> bool:
        """Undo the freezing, unless somebody has frozen more since: then all is theirs. Returns whether it was ours."""
        was_ours, self._is_ours = self._is_ours and self._is_collected(), False
        if was_ours:
            gc.unfreeze()
        return was_ours

    def _is_collected(self) -> bool:
        """Whether what was made after our freezing takes part in collection, so that nobody has frozen since.

        Counting what is frozen says the same, and takes 0.1 s for what vLLM's imports have made.
        """
        return any(each is self._younger for each in gc.get_objects())


@contextmanager
def quick_switches() -> Iterator[None]:
    """Switch threads every 0.1 ms instead of 5 while open, so that a thread back from the device waits less."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, because a descriptor stays open for every block."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
