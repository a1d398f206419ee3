"""After an error of one worker, the answers of all are read, so that none is taken for that to the next call."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_companion_plugin.engine.vllm import answers


class Answers:
    """What one worker has said and nobody has read yet."""

    def __init__(self, *said: str) -> None:
        self.left = deque(said)

    def dequeue(self, timeout: float | None = None) -> str:
        return self.left.popleft()


def inner(self: Any, method: str, **_: Any) -> list[str]:
    """As vLLM reads: one after the other, until one is an error."""
    read = []
    for queue in self.response_mqs:
        read.append(queue.dequeue())
        if read[-1] == "error":
            raise RuntimeError("a worker failed")
    return read


@pytest.mark.parametrize(
    ("load_format", "method", "left"),
    [
        ("companion", "add_lora", 0),
        ("auto", "add_lora", 0),
        ("companion", "companion_update", 0),
        ("auto", "companion_update", 1),
        ("companion", "execute_model", 1),
    ],
)
def test_rest(load_format: str, method: str, left: int) -> None:
    """Of adapters in engines of any load format, of updates in ours; of nothing else, whose errors end the engine."""
    queues = [Answers("error"), Answers("error")]
    executor = SimpleNamespace(
        response_mqs=queues, vllm_config=SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    )
    with pytest.raises(RuntimeError, match="a worker failed"):
        answers._reading_all(inner)(executor, method)
    assert [len(queue.left) for queue in queues] == [0, left]
    assert executor.response_mqs is queues
