"""Threads that a load begins: what they do belongs to the load, as what its own thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CodeType
from typing import Any

from vllm_companion_plugin.engine.vllm import patches


class Threads:
    """The thread of one load, those that it or they begin, and tasks that they give to an executor."""

    def __init__(self) -> None:
        self._around: Callable[[], AbstractContextManager[None]] = nullcontext
        self._working: set[int] = set()

    @property
    def is_here(self) -> bool:
        """Whether this thread works for the load."""
        return threading.get_ident() in self._working

    def surround(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """From now on `around()` is open in each other thread as long as that works for the load."""
        self._around = around

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While open, this thread loads, and what it begins elsewhere is followed."""
        with (
            self._works(),
            patches.STARTS.on(threading.Thread, self._starting),
            patches.TASKS.on(patches.TASKS.find_owner(), self._submitting),
        ):
            yield

    @contextmanager
    def _works(self) -> Iterator[None]:
        self._working.add(threading.get_ident())
        try:
            yield
        finally:
            self._working.discard(threading.get_ident())

    def _run(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.is_here:  # an executor may run a task at once
            return work(*args, **kwargs)
        with self._works(), self._around():
            return work(*args, **kwargs)

    def _starting(self, inner: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        def start(thread: threading.Thread) -> None:
            target = getattr(thread, "_target", None)
            # A worker of an executor serves whoever comes: its tasks are followed, one by one.
            if self.is_here and getattr(target, "__module__", "") != _EXECUTORS:

                def wrap(run: Callable[[], None]) -> Callable[[], None]:
                    def followed() -> None:
                        replaced.undo()
                        self._run(run)

                    return followed

                replaced = patches.RUNS.on_for_good(thread, wrap)
                try:
                    inner(thread)
                except BaseException:  # it was not begun
                    replaced.undo()
                    raise
                return
            inner(thread)

        return start

    def _submitting(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def submit(executor: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if self.is_here:
                return inner(executor, self._run, work, *args, **kwargs)
            return inner(executor, work, *args, **kwargs)

        return submit


_EXECUTORS = "concurrent.futures.thread"


def begins_work(code: CodeType) -> bool:
    """Tell whether this code runs what a load has begun in another thread: it is on the stack of all that does."""
    return code is Threads._run.__code__
