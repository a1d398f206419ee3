"""Constants that loading sets beside a model, such as a flag that it has warned: set here as they were set there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, TypeGuard

import torch

from vllm_companion_plugin.core.module_tree import CommonValue
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.descriptions import describe_value
from vllm_companion_plugin.tree.holders import Holder, find, name_of, users_of
from vllm_companion_plugin.tree.values import value_of

set_here: MutableMapping[Holder, dict[str, tuple[Any, str, Any]]] = weakref.WeakKeyDictionary()
"""By name, what loading has set in this process: what was there before, the model's class, and what it set."""


@contextmanager
def as_loaded(values: Sequence[CommonValue], model: str) -> Iterator[None]:
    """Set `values` as loading did. If what goes on inside fails, all is as before.

    Args:
        model: name of the model's class.

    Raises:
        ParityError: one is not here what it was for the publisher, or cannot be made here; nothing was set.
    """
    places = [(_holder(value), value) for value in values]
    made = [_made(value) for value in values]
    for one, value in places:
        here = describe_value(vars(one)[value.name]) or "no plain value" if value.name in vars(one) else None
        if here != value.before:
            where = f"{name_of(one)}.{value.name}"
            shown, published = here or "absent", value.before or "absent"
            text = f"{where}, which {users_of(one)}, is {shown} here before loading, and was {published} there."
            raise ParityError(text, where, shown)
    with ExitStack() as undo:
        for (one, value), new in zip(places, made, strict=True):
            if value.before is None:
                undo.callback(delattr, one, value.name)
            else:
                undo.callback(setattr, one, value.name, vars(one)[value.name])
            setattr(one, value.name, new)
            set_here.setdefault(one, {})[value.name] = value.before, model, value.after
        yield
        undo.pop_all()


def _made(value: CommonValue) -> Any:
    try:
        return value_of(value.after)
    except ValueError as error:
        where = f"{value.holder}.{value.name}"
        raise ParityError(f"{where} is {value.after} there, and cannot be here: {error}.", where, "absent") from error


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
