"""What loading changed in a value is the same in an attached engine, in all of its parts; or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.test_origins import Model, attach, publish
from vllm_companion_plugin.errors import NotShareableError


class Node:
    """A part of a chain."""

    def __init__(self, value: float, next: Any = None) -> None:
        self.value = value
        self.next = next


def _in_a_list(node: Any) -> Any:
    return [node]


def _in_a_function(node: Any) -> Any:
    def get() -> Any:
        return node

    return get


def _unpacked(held: Any) -> Any:
    return held if isinstance(held, Node) else held() if callable(held) else held[0]


@pytest.mark.parametrize("around", [lambda node: node, _in_a_list, _in_a_function], ids=["object", "list", "function"])
@pytest.mark.parametrize("length", [60, 200, 450])
def test_a_change_many_objects_deep(length: int, around: Callable[[Any], Any]) -> None:
    def build(m: Model, flag: float) -> None:
        node = None
        for number in range(length):
            node = around(Node(float(number), node))
        m.chain = node

    def last(held: Any) -> Any:
        while (inner := _unpacked(held)).next is not None:
            held = inner.next
        return inner

    def load(m: Model) -> None:
        last(m.chain).value = 77.0

    assert last(attach(publish(build, load), build).chain).value == 77.0


def test_what_is_too_deep_is_refused_by_name() -> None:
    def build(m: Model, flag: float) -> None:
        m.chain = None
        for number in range(2000):
            m.chain = Node(float(number), m.chain)

    with pytest.raises(NotShareableError, match=r"chain\.next\S* has objects inside of more than 960 others"):
        publish(build)
