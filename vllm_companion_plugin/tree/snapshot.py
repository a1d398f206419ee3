"""A model as it is at one moment, to be compared with what it is later."""

from __future__ import annotations

import functools
import types
import weakref
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from vllm_companion_plugin.core.module_tree import AddedSlot
from vllm_companion_plugin.tree.behind import behind
from vllm_companion_plugin.tree.classes import MUTABLE
from vllm_companion_plugin.tree.common_parts import Group, common_parts
from vllm_companion_plugin.tree.descriptions import tensor_attributes
from vllm_companion_plugin.tree.live import LiveSlot, Tree
from vllm_companion_plugin.tree.states import parts_of, state_of
from vllm_companion_plugin.tree.values import class_name, text_of


@dataclass(slots=True)
class Snapshot:
    """A model's values and structure at one moment, without keeping its tensors alive."""

    modules: dict[str, weakref.ref[nn.Module]]
    tensors: set[int]
    """Their ids."""
    attributes: dict[str, dict[str, str]]
    opaque: dict[str, dict[str, Any]]
    mutable: dict[tuple[str, str], Any]
    slots: dict[str, dict[str, AddedSlot]]
    ties: dict[str, str]
    owners: dict[tuple[str, str], str]
    """Where the module is whose method a value is, for values that are methods of modules in the tree."""
    children: dict[str, list[str]]
    orders: dict[tuple[str, str], tuple[str, ...]]
    named: dict[str, dict[str, tuple[Any, ...]]]
    """By path of the module: objects of which a text says no more than a name, each with what it takes along unseen."""
    fixed: dict[str, dict[str, bool]]
    """As of `Tree`, by path of the module."""
    in_common: set[Group]
    """Which plain values have parts in common."""
    aliases: dict[tuple[str, str], str]
    """Where the walk met a value before, for values that can be changed in place and that it met before."""
    states: dict[tuple[str, str], str | None]
    """What only C code sees of the state of opaque objects."""
    insides: dict[tuple[str, str], dict[str, Any]]
    """What is in opaque objects, as of `behind`."""
    classes: dict[str, type]

    @classmethod
    def of(cls, model: nn.Module, tree: Tree) -> Snapshot:
        first: dict[int, str] = {}
        ties: dict[str, str] = {}
        for slot in tree.slots():
            name = f"{tree.modules[slot.module].path}:{slot.name}"
            ties[name] = first.setdefault(id(slot.tensor), name)
        named = dict(model.named_modules(remove_duplicate=False))
        attributes = {live.path: live.attributes for live in tree.modules}
        paths = {id(live.module): live.path for live in tree.modules}
        owners: dict[tuple[str, str], str] = {}
        for live in tree.modules:
            for name, text in live.attributes.items():
                if name.endswith(".__self__") and text.endswith(":") and " @" in text:
                    owners[live.path, name.removesuffix(".__self__")] = text.partition(" @")[2][:-1]
        by_name: dict[str, dict[str, tuple[Any, ...]]] = {}
        for (index, name), value in tree.named.items():
            if not (type(value) is types.FunctionType and "<" in value.__qualname__):  # the text has a digest of it
                by_name.setdefault(tree.modules[index].path, {})[name] = (value,)
        plain: list[tuple[tuple[str, str], Any, bool]] = [
            ((tree.modules[index].path, name), value, values is tree.mutable)
            for values in (tree.mutable, tree.tuples)
            for (index, name), value in values.items()
        ]
        seen: set[int] = set()
        for slot in tree.slots():
            path = tree.modules[slot.module].path
            if slot.tensor.__dict__ and id(slot.tensor) not in seen:
                seen.add(id(slot.tensor))
                hung = slot.tensor.__dict__.items()
                plain += [((path, f"{slot.name}.{name}"), value, False) for name, value in hung if _is_plain(value)]
            for name, text in tensor_attributes(slot.tensor).items():
                attributes[path][f"{slot.name}.{name}"] = text
                value = slot.tensor.__dict__[name]
                if parts := _taken_along(value):
                    by_name.setdefault(path, {})[f"{slot.name}.{name}"] = parts
                owner = paths.get(id(getattr(value, "__self__", None)))
                if owner is not None:
                    owners[path, f"{slot.name}.{name}"] = owner
        places = {(tree.modules[index].path, name): value for (index, name), value in tree.mutable.items()}
        met: dict[int, str] = {}
        first_places = {place: met.setdefault(id(value), ":".join(place)) for place, value in places.items()}
        fixed: dict[str, dict[str, bool]] = {}
        for (index, name), is_hashed in tree.fixed.items():
            fixed.setdefault(tree.modules[index].path, {})[name] = is_hashed
        opaque: dict[str, dict[str, Any]] = {}
        for (index, name), value in tree.opaque.items():
            opaque.setdefault(tree.modules[index].path, {})[name] = value
        return cls(
            modules={path: weakref.ref(module) for path, module in named.items()},
            tensors={id(slot.tensor) for slot in tree.slots()},
            attributes=attributes,
            opaque=opaque,
            mutable=places,
            slots={live.path: {slot.name: _added(slot) for slot in live.slots} for live in tree.modules},
            ties=ties,
            owners=owners,
            children={live.path: list(live.module._modules) for live in tree.modules},
            orders={(tree.modules[index].path, name): keys for (index, name), keys in tree.orders.items()},
            named=by_name,
            fixed=fixed,
            in_common=common_parts(plain),
            aliases={place: first for place, first in first_places.items() if first != ":".join(place)},
            states={(tree.modules[index].path, name): state_of(value) for (index, name), value in tree.opaque.items()},
            insides=_insides_of(tree),
            classes={live.path: type(live.module) for live in tree.modules},
        )


def _is_plain(value: Any) -> bool:
    return (type(value) in MUTABLE or isinstance(value, tuple)) and text_of(value) is not None


def _taken_along(value: Any) -> tuple[Any, ...]:
    """What tells a function or a class that hangs on a tensor from others. No walk looks into it."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords, *value.keywords.values()
    return (value,) if isinstance(value, (type, types.FunctionType, Enum)) else ()


def _insides_of(tree: Tree) -> dict[tuple[str, str], dict[str, Any]]:
    parts = {
        (tree.modules[index].path, name): found
        for (index, name), value in tree.opaque.items()
        if (found := parts_of(value))
    }
    return dict(zip(parts, behind([(":".join(place), found) for place, found in parts.items()], tree), strict=True))


def _added(slot: LiveSlot) -> AddedSlot:
    tensor = slot.tensor
    has_form = not is_lazy(tensor)  # else loading gives it one
    return AddedSlot(
        slot.name,
        slot.kind,
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape) if has_form else (),
        tuple(tensor.stride()) if has_form and tensor.layout is torch.strided else (),
        class_name(type(tensor)),
        bool(tensor.requires_grad),
    )
