"""What gRPC must finish once it has begun it, though a signal's handler raises meanwhile (Ctrl-C).

Python runs handlers in the main thread, wherever that is. One that raises inside gRPC may leave a lock that nobody
frees, a call that nobody looks after, or a channel that is half closed. Whoever closes the channel then waits for ever,
or the collection of garbage does (seen with gRPC 1.85). So the main thread has other threads act, and waits for them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Helper:
    """A thread that does what the main thread gives it, in order, until it is given None."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="companion-calls", daemon=True).start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            with contextlib.suppress(Exception):  # the one who waits has been told
                job()
            del job  # and what it refers to


_idle: list[_Helper] = []
"""Used by the main thread alone."""

os.register_at_fork(after_in_child=_idle.clear)  # threads do not come along


def undisturbed(act: Callable[[], T], undo: Callable[[T], object] = lambda _: None) -> T:
    """What `act` returns, called where no signal's handler runs. If one raises meanwhile, `act` goes on all the same.

    Args:
        undo: given what `act` returned, if nobody waits for that any more.
    """
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        return act()
    try:
        helper = _idle.pop() if _idle else _Helper()
    except RuntimeError:  # the interpreter ends, and begins no thread any more
        return act()
    returned: list[T] = []
    raised: list[BaseException] = []
    done = threading.Lock()
    done.acquire()

    def run() -> None:
        try:
            returned.append(act())
        except BaseException as error:
            raised.append(error)
        finally:
            done.release()

    try:
        helper.jobs.put(run)
        done.acquire()
    except BaseException:
        helper.jobs.put(lambda: [undo(each) for each in returned])
        helper.jobs.put(None)
        raise
    _idle.append(helper)
    if raised:
        raise raised.pop()
    return returned.pop()
