"""Copy a captured tree into an arena, chunk by chunk, and rebind the model to the copy.

After each chunk the originals of that chunk are dropped, so packing needs at most one chunk of
extra memory: a model that fills most of a device can still be packed.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import PIECE_BYTES
from vllm_companion_plugin.core.module_tree import (
    NOTHING_OBSERVED,
    Manifest,
    ModuleInfo,
    SlotInfo,
    Stage,
    StorageInfo,
    TensorInfo,
    TensorKind,
)
from vllm_companion_plugin.core.placement import ALIGNMENT, HOST_ALIGNMENT, Chunk, Placement, plan
from vllm_companion_plugin.core.placements import Source
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.memory.kind import Keeper
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree.descriptions import tensor_attributes
from vllm_companion_plugin.tree.hidden import other_views
from vllm_companion_plugin.tree.live import LiveSlot, Tree, full_name
from vllm_companion_plugin.tree.observe import Loaded, Observation, check_plain
from vllm_companion_plugin.tree.operators import storage_of
from vllm_companion_plugin.tree.values import class_name, dtype_name

_name_of: Callable[[type], str] = functools.cache(class_name)
_PARAMETER, _ATTRIBUTE = TensorKind.PARAMETER, TensorKind.ATTRIBUTE

INLINE_BYTES = 64 << 10
"""Host tensors beside a device model travel in the manifest up to this size."""

PRIVATE_ATTRIBUTE_BYTES = 1 << 20
"""Tensors in plain attributes are cloned by each engine up to this size, and shared above it."""


_LARGEST_TABLE = 1 << 20
_ADDRESSES = (torch.int64, torch.uint64)
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)
_SHORTEST = 9
_LONG_NUMBER = re.compile(rf"(?<![\w.])\d{{{_SHORTEST},19}}(?![\w.])")


@dataclass(slots=True)
class _Storage:
    """The part of one storage that tensors of the tree use."""

    start: int  # address
    stop: int
    tensors: list[int] = field(default_factory=list)
    private: bool = True


@dataclass(slots=True)
class Packing:
    """What will be packed: unique tensors, the storages under them, and their description."""

    tensors: list[torch.Tensor]
    storages: list[_Storage]
    infos: list[TensorInfo]


def survey(tree: Tree, device: torch.device, observation: Observation | None) -> Packing:
    """Describe every tensor of `tree` and group them by the memory they use.

    Args:
        observation: tells where tensors came from; without one all are taken for the checkpoint's.

    Raises:
        NotShareableError: a tensor that cannot be placed in an arena of `device`.
    """
    check_plain(tree)
    tensors: list[torch.Tensor] = []
    index_of: dict[int, int] = {}
    first_slots: list[LiveSlot] = []
    private: list[bool] = []
    parameters: set[int] = set()
    for slot in tree.slots():
        index = index_of.setdefault(id(slot.tensor), len(tensors))
        if index == len(tensors):
            tensors.append(slot.tensor)
            first_slots.append(slot)
            private.append(True)
        private[index] &= is_private(slot, observation)
        if slot.kind is _PARAMETER:
            parameters.add(index)
    own = {index for index, tensor in enumerate(tensors) if observation is not None and observation.is_own(tensor)}

    by_storage: dict[int, _Storage] = {}
    placed: list[_Storage | None] = []
    for index, tensor in enumerate(tensors):
        slot = first_slots[index]
        if tensor.is_meta and observation is not None:
            own.add(index)
        if index in own and (tensor.is_meta or index not in parameters):
            placed.append(None)
            continue
        start, stop = _span(tensor, tree, slot)
        if start == stop or (tensor.device.type == "cpu" and device.type != "cpu"):
            if stop - start > INLINE_BYTES:
                name = tree.describe(slot)
                raise NotShareableError(f"{name}: a host tensor of {stop - start} bytes beside a {device.type} model.")
            placed.append(None)
            continue
        if tensor.device.type != device.type:
            raise NotShareableError(f"{tree.describe(slot)} is on {tensor.device}, not on {device}.")
        storage = by_storage.setdefault(tensor.untyped_storage().data_ptr(), _Storage(start, stop))
        storage.start, storage.stop = min(storage.start, start), max(storage.stop, stop)
        storage.tensors.append(index)
        storage.private &= private[index]
        placed.append(storage)
    for storage in by_storage.values():  # a weight that is work space, too; a large one stays a weight
        is_small = storage.stop - storage.start <= PRIVATE_ATTRIBUTE_BYTES
        storage.private |= is_small and any(private[index] for index in storage.tensors)

    # Largest first: a tensor larger than a chunk is copied while nothing is lost yet to partly used
    # segments of torch's allocator, and the small tensors that share such segments go together.
    storages = sorted(by_storage.values(), key=lambda storage: storage.start - storage.stop)
    number = {id(storage): position for position, storage in enumerate(storages)}
    infos = [
        _describe(tensor, storage, number[id(storage)] if storage else -1, device, own=index in own)
        for index, (tensor, storage) in enumerate(zip(tensors, placed, strict=True))
    ]
    return Packing(tensors, storages, infos)


def describe_modules(tree: Tree, packing: Packing, loaded: Loaded) -> tuple[ModuleInfo, ...]:
    """Describe the modules of `tree`; their slots have indexes of tensors."""
    index_of = {id(tensor): index for index, tensor in enumerate(packing.tensors)}
    return tuple(
        ModuleInfo(
            live.path,
            tuple(live.aliases),
            _name_of(type(live.module)),
            tuple(SlotInfo(slot.name, slot.kind, index_of[id(slot.tensor)]) for slot in live.slots),
            live.attributes,
            loaded.modules.get(live.path, NOTHING_OBSERVED),
        )
        for live in tree.modules
    )


def is_private(slot: LiveSlot, observation: Observation | None) -> bool:
    """Whether engines may write to this tensor while serving, so that each needs its own.

    What was not made from the checkpoint is a cache or work space. So are buffers and small tensors in
    attributes (scales, maps), wherever they came from; weights are parameters, or large attributes that were
    parameters, or that loading or processing made, and that were seen to be filled from the checkpoint.
    """
    tensor = slot.tensor
    if observation is not None and (observation.is_own(tensor) or not observation.is_derived(tensor)):
        return True
    if tensor.is_conj() or tensor.is_neg():  # what is bound in place of it would lose that
        return True
    if slot.kind is _PARAMETER:
        return False
    if slot.kind is not _ATTRIBUTE or tensor.nbytes <= PRIVATE_ATTRIBUTE_BYTES:
        return True
    return observation is not None and not observation.is_computed(tensor)


def _check_addresses(tree: Tree, packing: Packing) -> None:
    """No value says where a weight is: it will be elsewhere, in each engine at another place.

    Raises:
        NotShareableError: naming a number, or a tensor of numbers, that is such an address.
    """
    spans = sorted((storage.start, storage.stop) for storage in packing.storages)
    starts, stops = (np.array(side, dtype=np.uint64) for side in zip(*spans, strict=True))

    def is_address(numbers: Any) -> bool:
        numbers = np.asarray(numbers, dtype=np.uint64)
        before = np.searchsorted(starts, numbers, side="right")
        return bool(((before > 0) & (numbers < stops[before - 1])).any())

    for live in tree.modules:
        for name, text in live.attributes.items():
            numbers = _LONG_NUMBER.findall(text) if len(text) >= _SHORTEST else ()
            if numbers and is_address([int(number) for number in numbers]):
                raise NotShareableError(f"{full_name(live.path, name)} holds the address of a weight")
    tables = {
        id(slot.tensor): slot
        for slot in tree.slots()
        if slot.tensor.dtype in _ADDRESSES and 0 < slot.tensor.nbytes <= _LARGEST_TABLE and not slot.tensor.is_meta
    }
    if not tables:
        return
    flat = [slot.tensor.detach().reshape(-1).view(torch.int64).cpu() for slot in tables.values()]
    if is_address(torch.cat(flat).numpy().view(np.uint64)):
        for slot, table in zip(tables.values(), flat, strict=True):
            if is_address(table.numpy().view(np.uint64)):
                raise NotShareableError(f"{tree.describe(slot)} holds the address of a weight")


def _check_views(tree: Tree, packing: Packing) -> None:
    """Nothing but tensors views memory that is packed: NumPy's arrays and storages would stay on what tensors leave.

    Raises:
        NotShareableError: naming what leads to such a view.
    """
    spans: set[tuple[int, int]] = set()
    is_exported = any(isinstance(value, _STORAGES) for value in tree.opaque.values())
    for tensor, info in zip(packing.tensors, packing.infos, strict=True):
        if tensor.device.type == "cpu" and not info.own and tensor.numel():
            storage = tensor.untyped_storage()
            spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
            # PyTorch lets no storage grow that is NumPy's, too.
            is_exported |= not storage.resizable()
    if is_exported and (views := other_views(tree.modules[0].module, sorted(spans))):
        raise NotShareableError(
            f"{len(views)} objects view memory of tensors that loading filled, the first is {views[0]}"
        )


def _span(tensor: torch.Tensor, tree: Tree, slot: LiveSlot) -> tuple[int, int]:
    """First and last address (exclusive) that `tensor` can touch."""
    if tensor.is_meta or is_lazy(tensor):
        raise NotShareableError(f"{tree.describe(slot)} has no data (it is on the meta device).")
    if tensor.numel() == 0:
        return 0, 0
    if tensor.is_contiguous():
        start = tensor.data_ptr()
        return start, start + tensor.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _describe(
    tensor: torch.Tensor, storage: _Storage | None, number: int, device: torch.device, *, own: bool
) -> TensorInfo:
    inline, offset = None, 0
    if storage is None and own:
        pass  # each engine has its own
    elif storage is None:
        if tensor.numel() and not tensor.is_contiguous():
            raise NotShareableError("a host tensor beside a device model is not contiguous.")
        if tensor.device.type != device.type:  # else it has no elements, and no bytes
            inline = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    else:
        offset, rest = divmod(tensor.data_ptr() - storage.start, tensor.element_size())
        if rest:
            raise NotShareableError("tensors of different dtypes overlap at odd addresses.")
        if storage.start % tensor.element_size():
            raise NotShareableError(f"a tensor of {dtype_name(tensor.dtype)} begins at an odd address.")
    return TensorInfo(
        storage=number,
        storage_offset=offset,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        class_name=_name_of(type(tensor)),
        requires_grad=tensor.requires_grad,
        private=storage.private if storage else True,
        own=own,
        meta=tensor.is_meta,
        conj=tensor.is_conj(),
        neg=tensor.is_neg(),
        inline=inline,
        attributes=tensor_attributes(tensor),
    )


@dataclass(slots=True)
class Packed:
    """A tree that is ready to be copied: what it will look like in an arena, and where."""

    packing: Packing
    placement: Placement
    manifest: Manifest


def prepare(
    tree: Tree, stage: Stage, kind: str, device: torch.device, observation: Observation | None = None
) -> Packed:
    """Place all tensors of `tree` in an arena of `kind` that does not exist yet.

    Args:
        observation: of how the model came about; without one all of it is taken for the checkpoint's.

    Raises:
        NotShareableError: a tensor cannot be placed; nothing was changed.
    """
    if observation is not None:
        observation.look_at(tree)
    packing = survey(tree, device, observation)
    if not packing.storages:
        raise NotShareableError("the model has no tensors.")
    _check_addresses(tree, packing)
    _check_views(tree, packing)
    placement = plan(
        [s.stop - s.start for s in packing.storages],
        [s.start % (ALIGNMENT if device.type == "cuda" else HOST_ALIGNMENT) for s in packing.storages],
        arenas.granularity(kind, device.index),
    )
    places = zip(placement.offsets, packing.storages, strict=True)
    storages = tuple(StorageInfo(offset, s.stop - s.start) for offset, s in places)
    loaded = observation.finish(tree) if observation is not None else Loaded()
    modules = describe_modules(tree, packing, loaded)
    manifest = Manifest(
        stage,
        storages,
        tuple(packing.infos),
        modules,
        loaded.added_modules,
        loaded.removed_modules,
        loaded.retied_modules,
        emptied_modules=loaded.emptied_modules,
        moved_modules=loaded.moved_modules,
        common_values=loaded.common_values,
        is_observed=observation is not None,
        used=observation.uses.used() if observation is not None else {},
        set_by_building=observation.uses.set_by_building if observation is not None else {},
    )
    return Packed(packing, placement, manifest)


def sources_of(packed: Packed, observation: Observation) -> dict[str, Source]:
    """Where tensors of the checkpoint are in the arena that `packed` will be copied to, by their names."""

    def placing(start: int, stop: int, offset: int) -> Callable[[int, int], int | None]:
        return lambda first, end: offset + first - start if start <= first <= end <= stop else None

    places = {
        packed.packing.tensors[index].untyped_storage()._cdata: placing(storage.start, storage.stop, offset)
        for storage, offset in zip(packed.packing.storages, packed.placement.offsets, strict=True)
        for index in storage.tensors
    }
    held = {number for tensor in packed.packing.tensors if (number := storage_of(tensor)) is not None}
    return observation.sources(places, held)


def copy(
    packed: Packed,
    kind: str,
    device: torch.device,
    *,
    rebind: bool,
    release: Callable[[], None],
    keeper: Keeper | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    before_rebinding: Callable[[], None] = lambda: None,
) -> arenas.Arena:
    """Copy the tensors into a new arena, chunk by chunk.

    Args:
        kind: of the arena.
        device: of the model.
        rebind: let the model's shared tensors view the arena and drop the originals. Private
            ones stay as they are.
        release: returns freed memory to the device, called after each chunk.
        keeper: as for `memory.create`.
        report: told bytes done and in all.
        before_rebinding: called once, while nothing is changed yet; what it raises ends the copying.

    Returns:
        The sealed arena, which the caller owns, with the checksums of its bytes.

    Raises:
        ArenaError: no memory; the model is back in memory of its own.
    """
    packing, placement = packed.packing, packed.placement
    if device.type == "cuda":
        # vLLM with several ranks works on a stream of its own, for which the arena's copies do not wait.
        torch.cuda.synchronize(device)
    if arenas.KINDS[kind].is_made_at_once:
        release()  # all of its memory is about to be taken
    writer = arenas.create(kind, placement.size_bytes, device.index, keeper)
    rebound: list[torch.Tensor] = []
    try:
        views = ArenaViews(writer, placement.size_bytes, device)
        summing = Summing(views, placement.size_bytes, device)
        for chunk in placement.chunks:
            writer.add_block(chunk.size_bytes)
            for index in range(chunk.first, chunk.last):
                storage = packing.storages[index]
                writer.write(placement.offsets[index], storage.start, storage.stop - storage.start)
            replacements = _replacements(packed, chunk, views) if rebind else []  # while the device copies
            writer.flush()
            # On a GPU freeing would wait for all sums; the first shows that there will be some.
            until = chunk.offset_bytes + chunk.size_bytes
            summing.extend(until if device.type == "cpu" else min(until, PIECE_BYTES))
            if not chunk.offset_bytes:
                before_rebinding()
            for tensor, replacement in replacements:
                tensor.data = replacement
                rebound.append(tensor)
            del replacements
            release()
            report(until, placement.size_bytes)
        summing.extend(placement.size_bytes)
        checksums = summing.checksums()
        arena = writer.seal()
        arena.info = replace(arena.info, checksums=checksums)
        return arena
    except BaseException as error:
        try:
            for tensor in rebound:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
        except torch.OutOfMemoryError:
            raise error from None  # the rest of the model stays where it is: the arena is mapped until the process ends
        writer.abort()
        raise


def private_bytes(packed: Packed) -> list[tuple[int, torch.Tensor]]:
    """What the publisher keeps for itself of what it has published: where it begins in the arena, and its own memory.

    As `Attachment.keep_private` takes it: other generations have other bytes for it.
    """
    found = []
    for storage, offset in zip(packed.packing.storages, packed.placement.offsets, strict=True):
        if storage.private and not any(packed.packing.infos[number].own for number in storage.tensors):
            whole = packed.packing.tensors[storage.tensors[0]].untyped_storage()
            first, size_bytes = storage.start - whole.data_ptr(), storage.stop - storage.start
            mine = torch.empty(0, dtype=torch.uint8, device=whole.device)
            found.append((offset, mine.set_(whole, first, (size_bytes,), (1,))))
    return found


def published_addresses(packed: Packed) -> set[int]:
    """Where the storages begin that were published, as the model's tensors have them by now."""
    infos, tensors = packed.packing.infos, packed.packing.tensors
    numbers = (number for storage in packed.packing.storages for number in storage.tensors if not infos[number].own)
    return {tensors[number].untyped_storage().data_ptr() for number in numbers}


def _replacements(packed: Packed, chunk: Chunk, views: ArenaViews) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The shared tensors of a chunk, each with its view of the arena."""
    packing = packed.packing
    return [
        (packing.tensors[number], views.tensor(packing.infos[number], packed.manifest.storages[index]))
        for index in range(chunk.first, chunk.last)
        if not packing.storages[index].private
        for number in packing.storages[index].tensors
    ]
