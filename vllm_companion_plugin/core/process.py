"""Settings of this process: pauses of Python during work that takes milliseconds, and the limit of open files."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_INTERVAL_S = 1e-4


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
