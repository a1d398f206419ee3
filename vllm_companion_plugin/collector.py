"""A pause for Python's garbage collector while many objects are made at once.

A full collection walks all of vLLM's millions of objects: up to 100 ms, in the middle of an
attach that takes 30.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic collection while open. May be nested; also works as a decorator."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
