"""After an error of one worker, vLLM's executor of several processes reads what the others answer, too.

It raises at the first error that it reads. What it leaves unread is taken for the answer to the next call: a refused
update would be followed by one that seems to be refused and is not, or the other way round.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.engine.vllm import naming, patches

logger = logging.getLogger("vllm.companion.answers")

TIMEOUT_S = 60.0
"""For the answers of workers that are still busy with the call in which another one has failed."""
CALLS = ("companion_", "start_weight_update", "update_weights", "finish_weight_update", "init_weight_transfer_engine")
"""How the names of methods begin that may fail in one worker, whose engine goes on."""
ADD_LORA = "add_lora"
"""Fails so, too, in engines of any load format: in all workers, with an adapter that does not fit the engine."""


def read_all_answers() -> None:
    """Of `vllm.v1.executor.multiproc_executor`, which has just been imported."""
    patches.ANSWERS.apply(_reading_all)


class _Counted:
    """A queue of one worker's answers, and how many of them have been read."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.count = 0

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._queue.dequeue(*args, **kwargs)
        self.count += 1
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def _reading_all(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_one = kwargs.get("non_block") or kwargs.get("unique_reply_rank") is not None
        method = args[0] if args else kwargs.get("method")
        of_one |= not (isinstance(method, str) and method.startswith((*CALLS, ADD_LORA)))
        queues = self.response_mqs
        is_ours = method == ADD_LORA or self.vllm_config.load_config.load_format == naming.LOAD_FORMAT
        if of_one or len(queues) < 2 or not is_ours:
            return inner(self, *args, **kwargs)
        self.response_mqs = counted = [_Counted(queue) for queue in queues]
        try:
            return inner(self, *args, **kwargs)
        except RuntimeError:
            if any(queue.count for queue in counted):  # else it is no answer
                _read_rest([queue for queue in counted if not queue.count])
            raise
        finally:
            self.response_mqs = queues

    return collective_rpc


def _read_rest(queues: list[_Counted]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    for queue in queues:
        try:
            queue.dequeue(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            logger.warning("A worker has not answered for %g s after another one had failed.", TIMEOUT_S)
