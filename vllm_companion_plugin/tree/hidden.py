"""Tensors that a model can reach and that `capture` did not find.

A model restored without them would run, and answer nonsense: the code that makes such a tensor
had only placeholders to make it from. Captured values of functions, objects written in C and
anything else that the garbage collector can follow are searched here. The search does not
find another view of memory that `capture` has found; `Restorer.finish` refuses a model that keeps one.
"""

from __future__ import annotations

import gc
import itertools
import types
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.pack import dtype_name
from vllm_companion_plugin.tree.values import class_name

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
    came_from: dict[int, Any] = {id(model): None}
    level: list[Any] = [model]
    hidden = []
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
                if id(child) in known.objects:
                    continue
                if issubclass(kind, torch.Tensor) and child.device.type == device_type and child.numel():
                    pointer = _pointer(child)
                    if pointer not in found and (among is None or pointer in among):
                        found.add(pointer)
                        hidden.append(_describe(child, came_from))
        level = following
    return hidden


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
    chain: list[str] = []
    value = came_from[id(tensor)]
    while value is not None and len(chain) < 4:
        if not isinstance(value, (dict, list, tuple, types.CellType)):
            chain.append(getattr(value, "__qualname__", None) or class_name(type(value)))
        value = came_from[id(value)]
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)} in {' of '.join(chain)}"
