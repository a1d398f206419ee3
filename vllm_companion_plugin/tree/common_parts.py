"""Which plain values of a model have a part in common that can be changed in place, which changes all of them.

Texts of values say nothing of it. Values that are one object as a whole are told by references (`Snapshot.aliases`).
"""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vllm_companion_plugin.tree.classes import MUTABLE
from vllm_companion_plugin.tree.values import is_literal

Place = tuple[str, str]
"""Path of a module, and name of a value."""
Group = frozenset[tuple[Place, tuple[Any, ...]]]
"""The places that have one part, each with the way to that part in it."""


def common_parts(values: Iterable[tuple[Place, Any, bool]]) -> set[Group]:
    """The groups of `values` (place, value, and whether it is noted elsewhere which places have this very object)."""
    found: dict[int, dict[tuple[Any, ...], tuple[Place, tuple[Any, ...]]]] = {}
    for place, value, is_noted in values:
        whole = (id(value),) if is_noted else place
        for part, way in _parts(value, () if is_noted else ("",)):
            found.setdefault(id(part), {}).setdefault((*whole, *way), (place, way))
    groups = (each.values() for each in found.values() if len(each) > 1)
    return {frozenset(group) for group in groups if any(way for _, way in group)}


def _parts(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The objects in a plain value that can be changed in place, itself among them, each with the way to it."""
    kind = type(value)
    if kind is np.ndarray:
        owner = _owner(value)
        yield owner, way if owner is value else (*way, "base")
        return
    if kind in MUTABLE:
        yield value, way
    if kind in (np.random.Generator, np.random.RandomState):
        yield value._bit_generator, (*way, "bits")
    items: Iterable[Any] = ()
    if issubclass(kind, (list, tuple, collections.deque)):
        items = value
    elif issubclass(kind, dict):
        items = value.values()
    elif kind is types.SimpleNamespace:
        items = vars(value).values()
    if items and not is_literal(items):
        for position, item in enumerate(items):
            yield from _parts(item, (*way, position))


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """Whose memory it is."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner
