"""Tensors that a model can reach and that `capture` did not find.

A model restored without them would run, and answer nonsense: the code that makes such a tensor
had only placeholders to make it from. Captured values of functions, objects written in C and
anything else that the garbage collector can follow are searched here. The search does not
find another view of memory that `capture` has found; `Restorer.finish` refuses a model that keeps one.
Views that are no tensors, such as NumPy's, the publisher refuses.
"""

from __future__ import annotations

import array
import bisect
import gc
import itertools
import types
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.values import class_name, dtype_name

# What everything leads to, and what belongs to no model.
_NOT_PARTS = (type, types.ModuleType, types.FrameType, types.CodeType, str, bytes, int, float, bool, type(None))
_WITHOUT_PARTS = frozenset(_NOT_PARTS)
_CONTAINERS = frozenset((dict, list, tuple, set, OrderedDict))


def storage_bytes(tree: Tree, device_type: str, *, besides: Iterable[torch.Tensor] = ()) -> int:
    """The bytes of all storages on such a device under the tensors of `tree` and those `besides`. Each counts once."""
    tensors = itertools.chain((slot.tensor for slot in tree.slots()), besides)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device_type)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(slots=True)
class Known:
    """Tensors of captured trees, and where their storages are now: they may be bound to other memory later."""

    objects: set[int]
    addresses: set[int]

    @classmethod
    def of(cls, *trees: Tree) -> Known:
        tensors = [slot.tensor for tree in trees for slot in tree.slots()]
        return cls(set(map(id, tensors)), {tensor.untyped_storage().data_ptr() for tensor in tensors})


def hidden_tensors(
    model: nn.Module, known: Known, device_type: str, *, among: Container[int] | None = None
) -> list[str]:
    """Tensors on such a device that can be reached from `model` and share no storage with what is `known`.

    Each is described by the objects that lead to it. Takes milliseconds for Llama-8B, up to a second for a large model.

    Args:
        known: what was found. For a draft of an engine it has the target, too: the engine's config leads there.
        among: addresses of the only storages to look for; None for all.
    """
    found = set(known.addresses)
    hidden = []
    for child, came_from in _reached(model):
        if id(child) in known.objects:
            continue
        if issubclass(type(child), torch.Tensor) and child.device.type == device_type and child.numel():
            pointer = _pointer(child)
            if pointer not in found and (among is None or pointer in among):
                found.add(pointer)
                hidden.append(_describe(child, came_from))
    return hidden


def other_views(model: nn.Module, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What can be reached from `model`, is no tensor, and views host memory between these addresses.

    A tensor that is bound to other memory leaves such a view behind: on memory that is not the tensor's, or is freed.

    Args:
        spans: first and last address (exclusive) of each storage, in their order.
    """
    starts = [start for start, _ in spans]
    views = []
    for child, came_from in _reached(model):
        if issubclass(type(child), _VIEWS):
            start, size = _memory_of(child)
            before = bisect.bisect_left(starts, start + size)
            if size and before and start < spans[before - 1][1]:
                views.append(f"a {class_name(type(child))} in {' of '.join(_chain(child, came_from))}")
    return views


_VIEWS = (np.ndarray, memoryview, bytearray, array.array, torch.UntypedStorage, torch.TypedStorage)


def _memory_of(value: Any) -> tuple[int, int]:
    """First address and size of the memory that an object of `_VIEWS` shows; size 0 if it is not the host's."""
    if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
        return (value.data_ptr(), value.nbytes()) if value.device.type == "cpu" else (0, 0)
    try:
        seen = np.asarray(value)
    except (TypeError, ValueError, BufferError):  # it has been released
        return 0, 0
    reaches = [(size - 1) * stride for size, stride in zip(seen.shape, seen.strides, strict=True)]
    start = seen.__array_interface__["data"][0] + sum(reach for reach in reaches if reach < 0)
    return start, sum(map(abs, reaches)) + seen.itemsize if seen.size else 0


def _reached(model: nn.Module) -> Iterator[tuple[Any, dict[int, Any]]]:
    """All that the garbage collector sees from `model`, each with what led to it and to those before, by their ids."""
    came_from: dict[int, Any] = {id(model): None}
    level: list[Any] = [model]
    while level:
        following = []
        for parent in level:
            for child in _parts(parent):
                # By `type`: a weak reference whose object is gone cannot be asked for its class.
                kind = type(child)
                if kind in _WITHOUT_PARTS or id(child) in came_from:
                    continue
                if kind in _CONTAINERS and not child and not gc.get_referents(child):  # most are tables of hooks
                    continue
                if issubclass(kind, _NOT_PARTS):
                    continue
                came_from[id(child)] = parent
                following.append(child)
                yield child, came_from
        level = following


def _pointer(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or a wrapper around others: nothing that is captured
        return -id(tensor)


def _parts(value: Any) -> Iterable[Any]:
    if type(value) is types.FunctionType:  # not its globals, which are the whole program
        return value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}, value.__dict__
    return gc.get_referents(value)


def _describe(tensor: torch.Tensor, came_from: dict[int, Any]) -> str:
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)} in {' of '.join(_chain(tensor, came_from))}"


def _chain(reached: Any, came_from: dict[int, Any]) -> list[str]:
    chain: list[str] = []
    value = came_from[id(reached)]
    while value is not None and len(chain) < 4:
        if not isinstance(value, (dict, list, tuple, types.CellType)):
            chain.append(getattr(value, "__qualname__", None) or class_name(type(value)))
        value = came_from[id(value)]
    return chain
