"""Constants that loading sets beside a model, such as a flag that it has warned: set here as they were set there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeGuard

import torch

from vllm_companion_plugin.core.module_tree import CommonValue
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.descriptions import describe_value
from vllm_companion_plugin.tree.holders import Holder, find, name_of, users_of
from vllm_companion_plugin.tree.values import value_of

set_here: MutableMapping[Holder, Set[str]] = weakref.WeakKeyDictionary()
"""Names of what loading has set in this process: an engine that is new has something else there."""


@contextmanager
def as_loaded(values: Sequence[CommonValue]) -> Iterator[None]:
    """Set `values` as loading did. If what goes on inside fails, all is as before.

    Raises:
        ParityError: one is not here what it was for the publisher; nothing was set.
    """
    places = [(_holder(value), value) for value in values]
    for one, value in places:
        here = describe_value(vars(one)[value.name]) or "no plain value" if value.name in vars(one) else None
        if here != value.before:
            where = f"{name_of(one)}.{value.name}"
            shown, published = here or "absent", value.before or "absent"
            text = f"{where}, which {users_of(one)}, is {shown} here before loading, and was {published} there."
            raise ParityError(text, where, shown)
    before = [vars(one).get(value.name) for one, value in places]
    for one, value in places:
        setattr(one, value.name, value_of(value.after))
        set_here[one] = set_here.get(one, frozenset()) | {value.name}
    try:
        yield
    except BaseException:
        for (one, value), there in zip(places, before, strict=True):
            if value.before is None:
                delattr(one, value.name)
            else:
                setattr(one, value.name, there)
        raise


def _holder(value: CommonValue) -> Holder:
    """Return what has a value here.

    Raises:
        ParityError: nothing that is loaded here.
    """
    found = find(value.holder)
    if found is None:
        where = f"{value.holder}.{value.name}"
        raise ParityError(
            f"{where}, which loading set for the publisher, is no part of the model here.", where, "absent"
        )
    return found


def is_constant(text: Any) -> TypeGuard[str]:
    """Whether a text is that of a value that can be made, and that nobody can change."""
    try:
        return isinstance(text, str) and _cannot_change(value_of(text))
    except ValueError:
        return False


def _cannot_change(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_cannot_change, value))
    return isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, Enum))
