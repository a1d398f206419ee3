"""A live model as a walk finds it: its modules, their tensors and values, and where each of them is."""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import TensorKind

NO_PARAMETER = "no parameter"
NO_BUFFER = "no buffer"
"""The text of a name that a module keeps for a tensor, if there is no tensor."""


@dataclass(slots=True)
class LiveSlot:
    """A tensor and the place it was found. `module` is the index of its module; `holder` has the tensor as `key`."""

    name: str
    kind: TensorKind
    tensor: torch.Tensor
    module: int
    holder: Any = None
    key: Any = None


@dataclass(slots=True)
class LiveModule:
    """One module object with what was found in it."""

    module: nn.Module
    path: str
    index: int
    aliases: list[str] = field(default_factory=list)
    slots: list[LiveSlot] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Place:
    """Where a value lives, so that it can be changed.

    Attributes:
        steps: the way to the value, the outermost step first; each step is a holder and the key in it.
    """

    steps: tuple[tuple[Any, Any], ...]
    value: Any

    def set(self, value: Any) -> None:
        """Put `value` here. Raises `TypeError` or `AttributeError` if nothing can be put here."""
        first = len(self.steps) - 1
        while isinstance(self.steps[first][0], tuple):
            first -= 1
            if first < 0:
                raise TypeError("it is a part of nothing that can be changed")
        holder, key = self.steps[first]
        keys = [key for _, key in self.steps[first + 1 :]]
        # Another item may have been put into the same tuples: what is there now counts.
        _set_item(holder, key, _with_item(_item(holder, key), keys, value) if keys else value)

    def delete(self) -> None:
        """Remove what is here. Raises `TypeError` or `AttributeError` if nothing can be removed here."""
        holder, key = self.steps[-1]
        if isinstance(holder, types.MemberDescriptorType):
            holder.__delete__(key)
        elif isinstance(holder, dict):
            del holder[key]
        elif isinstance(holder, (list, tuple, collections.deque, types.CellType, functools.partial)):
            raise TypeError(f"a {type(holder).__name__} cannot do without it")
        else:
            object.__delattr__(holder, key)


def _with_item(held: Any, keys: list[Any], value: Any) -> Any:
    """A tuple, in tuples, with `value` where `keys` lead, which may be its end."""
    if not keys:
        return value
    if not isinstance(held, tuple):
        raise TypeError(f"a {type(held).__name__} is there and no tuple")
    key = keys[0]
    items = (*held[:key], _with_item(held[key] if key < len(held) else None, keys[1:], value), *held[key + 1 :])
    return items if type(held) is tuple else tuple.__new__(type(held), items)


def _item(holder: Any, key: Any) -> Any:
    if isinstance(holder, types.MemberDescriptorType):
        return holder.__get__(key)
    if isinstance(holder, (dict, list, collections.deque)):
        return holder[key]
    return holder.cell_contents if isinstance(holder, types.CellType) else object.__getattribute__(holder, key)


def _set_item(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, types.MemberDescriptorType):  # a slot of what has items, and the object
        holder.__set__(key, value)
    elif isinstance(holder, (dict, list, collections.deque)):
        holder[key] = value
    elif isinstance(holder, types.CellType):
        holder.cell_contents = value
    elif isinstance(holder, functools.partial) and key == "args":
        holder.__setstate__((holder.func, value, holder.keywords, vars(holder)))  # type: ignore[attr-defined]
    else:
        object.__setattr__(holder, key, value)


@dataclass(slots=True)
class Tree:
    """A captured model: live references, to be described, packed or rebound.

    Attributes:
        opaque: objects that are noted by their class alone, by module and name. Only the object itself shows whether
            another one has replaced it.
        mutable: plain values that can be changed in place, by module and name.
        tuples: plain values that are tuples of more than numbers and strings, by module and name.
        orders: texts of the keys of dicts that hold more than plain values, in their order, by module and name.
        fixed: values in whose place nothing else can be put (keys, members of sets, the object of a method), by module
            and name; and whether no part of them can change either, because they are found by their hash.
        places: where the wanted values live, by module and name.
        classes: the classes of all objects that the walk looked into, besides modules, and all enums.
        code: the functions, classes and modules of Python that the model holds.
        named: functions, classes (also those of objects), modules and members of enums, of which the text says no more
            than a name, by module and name.
        hung: what was hung on tensors, as `tensor_attributes` says it, by id of the tensor.
        met: where each object was met first (path of the module, name), by its id. The model keeps objects alive.
    """

    modules: list[LiveModule]
    opaque: dict[tuple[int, str], Any] = field(default_factory=dict)
    mutable: dict[tuple[int, str], Any] = field(default_factory=dict)
    tuples: dict[tuple[int, str], tuple[Any, ...]] = field(default_factory=dict)
    orders: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)
    fixed: dict[tuple[int, str], bool] = field(default_factory=dict)
    places: dict[tuple[int, str], Place] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    code: list[Any] = field(default_factory=list)
    named: dict[tuple[int, str], Any] = field(default_factory=dict)
    hung: dict[int, dict[str, str]] = field(default_factory=dict)
    met: dict[int, tuple[str, str]] = field(default_factory=dict)

    def slots(self) -> Iterator[LiveSlot]:
        for module in self.modules:
            yield from module.slots

    def describe(self, slot: LiveSlot) -> str:
        """The full name of a slot, for messages."""
        return full_name(self.modules[slot.module].path, slot.name)


def full_name(path: str, name: str) -> str:
    """How a message names something in a module."""
    return f"{path}.{name}" if path else name


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same as `model.named_modules(remove_duplicate=False)`, without one generator for each level.

    Raises:
        RecursionError: a module is inside of itself.
    """
    deepest = sys.getrecursionlimit()
    waiting: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    while waiting:
        path, module, depth = waiting.pop()
        if depth > deepest:
            raise RecursionError("a module is inside of itself")
        if type(module).named_modules is not nn.Module.named_modules:  # it has its own names
            yield from module.named_modules(prefix=path, remove_duplicate=False)
            continue
        yield path, module
        if children := module._modules:
            start = f"{path}." if path else ""
            depth += 1
            waiting += [(start + name, child, depth) for name, child in reversed(children.items()) if child is not None]


def plain_tensors() -> AbstractContextManager[None]:
    """While open, tensors of any class answer like plain ones. Else vLLM's parameters run Python code for each answer.

    https://docs.pytorch.org/docs/stable/notes/extending.html
    """
    plain: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return plain
