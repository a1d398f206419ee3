"""Follows tensors of a checkpoint while vLLM loads them, to know where in the model each one went.

vLLM's models copy slices of checkpoint tensors into slices of parameters. Where only such copies were seen, new weights
can be written in the same way without vLLM. A tensor has no known place if it was changed before it was copied, if
anything else wrote to that place afterwards, or if anything was computed from the tensor or from its place. It is
known all the same, because only vLLM can load such tensors, and has to be given all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_companion_plugin.core.placements import Placed, Source, View

_COPY = torch.ops.aten.copy_.default
_WHOLE = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default)


@dataclass(slots=True)
class _Read:
    name: str
    steps: tuple[View, ...]


@dataclass(slots=True)
class _Write:
    name: str
    steps: tuple[View, ...]
    address: int
    end: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


class Placing:
    """What was read, and where it was copied. Storages are told apart by the address of their C++ object."""

    def __init__(self) -> None:
        self._read: dict[int, _Read] = {}
        self._sources: dict[str, tuple[tuple[int, ...], str]] = {}
        self._writes: dict[int, list[_Write]] = {}
        self._lost: set[str] = set()
        self._used: set[str] = set()
        self._followed: set[str] = set()  # copied, or cloned to be copied
        self._given: set[int] = set()  # storages that others than operators may read and write
        self._names: dict[int, set[str]] = {}  # of all tensors that were read from a storage
        self._shared: dict[int, set[str]] = {}  # if a copy from the storage may mean several of them: these
        # No other storage gets the address of one that is freed meanwhile.
        self._addresses: list[StorageWeakRef] = []

    def read(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` comes from the checkpoint."""
        if name in self._sources or tensor.layout is not torch.strided:
            self._lost.add(name)
            return
        storage = tensor.untyped_storage()
        self._addresses.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self._sources[name] = tuple(tensor.shape), _dtype(tensor)
        before = self._read.get(storage._cdata)
        if before is not None and before.name not in self._followed:
            self._shared.setdefault(storage._cdata, {before.name}).add(name)
        self._names.setdefault(storage._cdata, set()).add(name)
        self._read[storage._cdata] = _Read(name, ())
        if tensor.storage_offset() or not tensor.is_contiguous():
            self._lost.add(name)

    def note(self, func: Any, args: Any, read: Iterable[int], written: Iterable[torch.Tensor], result: Any) -> None:
        """An operation wrote to tensors, or made some.

        Args:
            read: storages of all that it was given and did not write to.
        """
        targets = list(written)
        for target in targets:
            self._overwritten(target)
        source: Any = args[1] if func is _COPY else args[0] if func in _WHOLE else None
        # A number may be copied, too.
        followed = isinstance(source, torch.Tensor) and _storage(source) in self._read
        if followed and (self._copied(targets[0], source) if func is _COPY else self._cloned(source, result)):
            return
        for storage in read:
            self._computed_from(storage)

    def looked_at(self, storages: Iterable[int]) -> None:
        """Python has read data of these storages, so that anything may depend on it."""
        for storage in storages:
            self._computed_from(storage)

    def given(self, storages: Iterable[int]) -> None:
        """Python or NumPy has these storages' memory, and may read and write it from now on, which nobody sees."""
        for storage in storages:
            self._given.add(storage)
            self._computed_from(storage)

    def _overwritten(self, target: torch.Tensor) -> None:
        """What was copied to the same place is there no more; a tensor of the checkpoint is not what was read."""
        storage = _storage(target)
        if (known := self._read.get(storage)) is not None:
            self._lost |= self._names.get(storage, {known.name})
        if writes := self._writes.get(storage):
            start, end = _span(target)
            gone = [write for write in writes if write.address < end and start < write.end]
            self._lost.update(write.name for write in gone)
            self._writes[storage] = [write for write in writes if write not in gone]

    def _computed_from(self, storage: int) -> None:
        """Something else depends on what is there: a copy to the same place would leave that as it was."""
        if storage in self._read:
            self._lose(storage)
        self._lost.update(write.name for write in self._writes.get(storage, ()))

    def _lose(self, storage: int) -> None:
        """What loading did with the checkpoint's tensors in `storage` was more than copying."""
        name = self._read[storage].name
        self._lost |= self._names.get(storage, {name})
        self._used |= self._shared.get(storage, {name})

    def made(self, storage: int) -> None:
        """An operation made a storage, which holds nothing that is followed."""
        self._read.pop(storage, None)
        self._writes.pop(storage, None)
        self._names.pop(storage, None)
        self._shared.pop(storage, None)
        self._given.discard(storage)

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Whether a part of a checkpoint's tensor was copied as it is."""
        storage = _storage(target)
        if target.shape != source.shape or target.is_meta or storage in self._read or self._is_cast(source):
            return False
        if _storage(source) in self._shared or not self._given.isdisjoint((storage, _storage(source))):
            return False
        known = self._read[_storage(source)]
        self._used.add(known.name)
        self._followed.add(known.name)
        steps = (*known.steps, _view(source))
        place = (*_span(target), tuple(target.shape), tuple(target.stride()), _dtype(target))
        self._writes.setdefault(storage, []).append(_Write(known.name, steps, *place))
        return True

    def _cloned(self, source: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether `result` is a contiguous copy of a part of a checkpoint's tensor."""
        if not result.is_contiguous() or result.shape != source.shape or result.dtype != source.dtype:
            return False
        if self._is_cast(source) or _storage(source) in self._shared or _storage(source) in self._given:
            return False
        known = self._read[_storage(source)]
        self._followed.add(known.name)
        self._addresses.append(StorageWeakRef(result.untyped_storage()))  # type: ignore[no-untyped-call]
        self._read[_storage(result)] = _Read(known.name, (*known.steps, _view(source)))
        return True

    def _is_cast(self, source: torch.Tensor) -> bool:
        """Whether it has the bits of a checkpoint's tensor as another type: a copy would convert its numbers."""
        return _dtype(source) != self._sources[self._read[_storage(source)].name][1]

    def sources(
        self, storages: Mapping[int, Callable[[int, int], int | None]], held: Iterable[int]
    ) -> dict[str, Source]:
        """The tensors of the checkpoint that loading used, by name, in the order in which they were read.

        Those have copies whose every copy is in a model that is about to be published.

        Args:
            storages: of the model, by the address of the C++ object: the place in the arena of a range of addresses
                in it, None if not all of that is in the arena.
            held: all storages of the model.
        """
        copies: dict[str, list[Placed]] = {name: [] for name in self._sources}
        for storage in self._read.keys() & {*held}:  # the model has it as it was read, and not by a copy
            self._lose(storage)
        lost = set(self._lost)
        for storage, writes in self._writes.items():
            place = storages.get(storage)
            for write in writes:
                offset = None if place is None else place(write.address, write.end)
                if offset is None:
                    lost.add(write.name)
                else:
                    copies[write.name].append(Placed(write.steps, offset, write.shape, write.stride, write.dtype))
        return {
            name: Source(
                *self._sources[name],
                () if name in lost else tuple(sorted(found, key=lambda placed: placed.offset_bytes)),
            )
            for name, found in copies.items()
            if name in self._used
        }


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address (exclusive) of its elements; if it has none, twice the start of its storage."""
    if not tensor.numel():
        return (start := tensor.untyped_storage().data_ptr()), start
    start = tensor.data_ptr()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (int(last) + 1) * tensor.element_size()


def _view(tensor: torch.Tensor) -> View:
    return View(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
