"""What is behind values that no publication carries, so that a change of any of it is seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from vllm_companion_plugin.tree.capture import capture_values
from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.states import fingerprints, is_cache, parts_of, remembered_tensors, state_of

_MOST_BYTES = 1 << 30
"""Of more, the content of the largest tensors is not compared: other models, which somebody else loads."""
_DEEPEST = 4


@dataclass(slots=True)
class Same:
    """Equal to itself alone, whatever its class says, with the same `state`."""

    value: Any
    state: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value and self.state == other.state


@dataclass(slots=True)
class Cached(Same):
    """A tensor that a cache of results keeps. Whether it is there at all says nothing."""


def behind(held: Sequence[tuple[str, Mapping[str, Any]]], known: Tree) -> list[dict[str, Any]]:
    """For each of `held` (a name, and values by name): texts of all that is behind the values, and what tells objects
    and tensors from others, by name. It has no entry for what `known` holds, too, but for tensors.
    """
    whole = _behind(held, known, 0)
    _add_content([entry for found in whole for entry in found.values()])
    return whole


def _behind(held: Sequence[tuple[str, Mapping[str, Any]]], known: Tree, depth: int) -> list[dict[str, Any]]:
    found = capture_values(held, known)
    whole: list[dict[str, Any]] = [dict(live.attributes) for live in found.modules]
    opaque = [(index, name, value) for (index, name), value in found.opaque.items()]
    for index, (_, values) in enumerate(held):
        opaque += [(index, name, value) for name, value in values.items() if is_cache(value)]
    inside: list[tuple[int, str, Mapping[str, Any]]] = []
    for index, name, value in opaque:
        whole[index][name] = Same(value, state_of(value))
        if is_cache(value):
            whole[index] |= {f"{name}({id(each)})": Cached(each) for each in remembered_tensors(value)}
        if depth < _DEEPEST and (parts := parts_of(value)):
            inside.append((index, name, parts))
    for slot in found.slots():
        whole[slot.module][slot.name] = Same(slot.tensor)
        texts = found.hung.get(id(slot.tensor), {})
        whole[slot.module] |= {f"{slot.name}.{name}": Same(slot.tensor, text) for name, text in texts.items()}
    if inside:
        deeper = _behind(
            [(found.modules[index].path, parts) for index, _, parts in inside], replace(known, met=found.met), depth + 1
        )
        for (index, name, _), entries in zip(inside, deeper, strict=True):
            whole[index] |= {f"{name}.{part}": entry for part, entry in entries.items()}
    return whole


def _add_content(entries: Iterable[Any]) -> None:
    """Note of tensors what becomes another one when somebody writes to them, by whatever way."""
    tensors = [each for each in entries if isinstance(each, Same) and issubclass(type(each.value), torch.Tensor)]
    storages: dict[int, torch.Tensor] = {}
    sizes: dict[int, int] = {}
    for each in tensors:
        if (storage := _storage_of(each.value)) is not None:
            storages[storage._cdata], sizes[storage._cdata] = each.value, storage.nbytes()
    left = _MOST_BYTES
    for number in sorted(sizes, key=sizes.__getitem__):
        left -= sizes[number]
        if left < 0:
            del storages[number]
    content = fingerprints(storages)
    for each in tensors:
        tensor, storage = each.value, _storage_of(each.value)
        writes = None if tensor.is_inference() else tensor._version  # of what was made for inference none are counted
        form = None
        if storage is not None:
            form = content.get(storage._cdata), tensor.storage_offset(), tuple(tensor.stride())
        each.state = each.state, writes, str(tensor.dtype), form, None if is_lazy(tensor) else tuple(tensor.shape)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor, if it has memory of its own that can be read."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.nbytes() and storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):  # a wrapper around others
        return None


def different(before: Mapping[str, Any], after: Mapping[str, Any], tensors: set[int]) -> Iterator[str]:
    """The names whose entries differ.

    Args:
        tensors: ids of those that a model has. Loading may fill them, wherever else they are.
    """
    for name in before.keys() | after.keys():
        then, now = (_entry(each.get(name), tensors) for each in (before, after))
        is_new = then is None or now is None
        if then != now and not (is_new and isinstance(then or now, Cached)):
            yield name


def _entry(entry: Any, tensors: set[int]) -> Any:
    return Same(entry.value) if isinstance(entry, Same) and id(entry.value) in tensors else entry
