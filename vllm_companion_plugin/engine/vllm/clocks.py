"""Clocks that tell, while a model is loaded, that what is left of them in the model is a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.tree.times import from_clock


@contextmanager
def marked_times() -> Iterator[None]:
    """While open, numbers that this thread reads from a clock of Python are known as such (tree/times.py).

    Modules that are imported meanwhile may keep these clocks; afterwards they give plain numbers.
    """
    loading: int | None = threading.get_ident()

    def mark(clock: Callable[[], Any]) -> Callable[[], Any]:
        def read() -> Any:
            return from_clock(clock()) if threading.get_ident() == loading else clock()

        return read

    try:
        with ExitStack() as stack:
            for clock in patches.CLOCKS:
                stack.enter_context(clock.on(clock.find_owner(), mark))
            yield
    finally:
        loading = None
