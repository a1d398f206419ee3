"""A manifest as bytes and back. Whoever maps an arena trusts what passes `manifest_from_bytes`.

Nothing read here is believed: a tensor that reaches outside its storage would read another
tensor's bytes or fault the engine. The reading is written for speed (an engine attaches in
tens of milliseconds and a large MoE has 100,000 tensors): what tensors have in common, or modules,
is a type of theirs, checked once, and the garbage collector, which would walk the growing result
again and again, pauses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.module_tree import (
    NOTHING_OBSERVED,
    AddedSlot,
    CommonValue,
    Manifest,
    ModuleInfo,
    Observed,
    SlotInfo,
    Stage,
    StorageInfo,
    TensorInfo,
    TensorKind,
)
from vllm_companion_plugin.core.placements import Placed, Source, View
from vllm_companion_plugin.core.process import collector_paused
from vllm_companion_plugin.errors import ManifestError
from vllm_companion_plugin.wire import messages

MAX_MANIFEST_BYTES = 64 << 20
"""Eight times that of 100,000 tensors. Hostile bytes grow 100 times where protobuf makes objects of them."""
MAX_TENSORS = 1_000_000
"""And modules, and types of both. Two bytes can be a tensor, which makes an object of a hundred."""
MAX_ATTRIBUTES = 10_000_000
"""Of all modules: a module of few bytes has as many as its type."""
MAX_STORAGE_END = 1 << 50
"""Bounds lengths, strides and numbers of elements as well: torch's own arithmetic overflows further up."""
MAX_DIMENSIONS = 64

ITEM_SIZES: dict[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8", "float4_e2m1fn_x2", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one element by torch's dtype name."""

_TYPE = ("dtype", "shape", "stride", "class_name", "requires_grad", "private", "own", "meta", "conj", "neg")
_type_of = attrgetter(*_TYPE)
_KINDS = {kind.value: kind for kind in TensorKind}
# A frozen dataclass's own __init__ takes twice as long as setting its slots.
_SET_STORAGE, _SET_TENSOR, _SET_SLOT, _SET_MODULE = (
    tuple(getattr(cls, f.name).__set__ for f in fields(cls)) for cls in (StorageInfo, TensorInfo, SlotInfo, ModuleInfo)
)


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Equal manifests give equal bytes within one protobuf version."""
    message = messages.Manifest(stage=manifest.stage.value, is_observed=manifest.is_observed)
    with collector_paused():
        for storage in manifest.storages:
            message.storages.add(offset_bytes=storage.offset_bytes, size_bytes=storage.size_bytes)
        types: dict[tuple[Any, ...], int] = {}
        for tensor in manifest.tensors:
            message.tensors.add(
                storage=tensor.storage,
                storage_offset=tensor.storage_offset,
                type=types.setdefault((_type_of(tensor), frozenset(tensor.attributes.items())), len(types)),
                inline=tensor.inline,
            )
        for of, attributes in types:
            message.types.add(**dict(zip(_TYPE, of, strict=True)), attributes=dict(attributes))
        _write_modules(message, manifest.modules)
        for path, class_name in manifest.added_modules.items():
            message.added_modules.add(path=path, class_name=class_name)
        message.removed_modules.extend(manifest.removed_modules)
        message.emptied_modules.extend(manifest.emptied_modules)
        message.retied_modules.update(manifest.retied_modules)
        message.moved_modules.update(manifest.moved_modules)
        for value in manifest.common_values:
            message.common_values.add(holder=value.holder, name=value.name, before=value.before, after=value.after)
        message.files.update(manifest.files)
        message.flags.update(manifest.flags)
        message.used.update(manifest.used)
        message.set_by_building.update(manifest.set_by_building)
        message.sources = manifest.sources
        return bytes(message.SerializeToString(deterministic=True))


def sources_to_bytes(sources: Mapping[str, Source]) -> bytes:
    """What `Manifest.sources` holds."""
    message = messages.Sources()
    for name, source in sources.items():
        of = message.sources.add(name=name, shape=source.shape, dtype=source.dtype)
        for placed in source.copies:
            target = of.copies.add(
                offset_bytes=placed.offset_bytes, shape=placed.shape, stride=placed.stride, dtype=placed.dtype
            )
            for view in placed.steps:
                target.steps.add(shape=view.shape, stride=view.stride, offset=view.offset)
    return bytes(message.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=8)
def sources_from_bytes(data: bytes) -> Mapping[str, Source]:
    """The sources of a manifest, by name. Raises `ManifestError` for bytes that are none.

    A trainer asks for those of the same entry with each update.
    """
    try:
        message = messages.Sources.FromString(data)
    except DecodeError as error:
        raise ManifestError(f"The sources of a manifest are damaged: {error}.") from error
    sources = {
        source.name: Source(
            tuple(source.shape),
            source.dtype,
            tuple(
                Placed(
                    tuple(View(tuple(step.shape), tuple(step.stride), step.offset) for step in placed.steps),
                    placed.offset_bytes,
                    tuple(placed.shape),
                    tuple(placed.stride),
                    placed.dtype,
                )
                for placed in source.copies
            ),
        )
        for source in message.sources
    }
    return MappingProxyType(sources)  # which all callers share


def _write_modules(message: messages.Manifest, modules: Iterable[ModuleInfo]) -> None:
    """Each with what it has of its own; the first of a type says what the type is."""
    types: dict[tuple[Any, ...], tuple[int, ModuleInfo]] = {}
    for module in modules:
        slots = tuple((slot.name, slot.kind.value) for slot in module.slots)
        number, first = types.setdefault((module.class_name, slots, frozenset(module.attributes)), (len(types), module))
        if first is module:
            of = message.module_types.add(class_name=module.class_name, attributes=module.attributes)
            for name, kind in slots:
                of.slots.add(name=name, kind=kind)
            if module.observed != NOTHING_OBSERVED:
                _write_observed(of.observed, module.observed)
        own = dict(module.attributes.items() - first.attributes.items())
        target = message.modules.add(
            path=module.path,
            aliases=module.aliases,
            type=number,
            tensors=[slot.tensor for slot in module.slots],
            attributes=own or None,  # an empty map costs as much as a small one
        )
        if module.observed != first.observed:
            _write_observed(target.observed, module.observed)


def _write_observed(target: messages.Observed, observed: Observed) -> None:
    target.SetInParent()
    for name, (built, loaded) in observed.values.items():
        target.values.add(name=name, built=built, loaded=loaded)
    for slot in observed.added:
        target.added.add(
            name=slot.name,
            kind=slot.kind.value,
            dtype=slot.dtype,
            shape=slot.shape,
            stride=slot.stride,
            class_name=slot.class_name,
            requires_grad=slot.requires_grad,
        )
    for name in ("removed", "untouched", "processed"):
        getattr(target, name).extend(getattr(observed, name))
    target.retied.update(observed.retied)
    target.measured = observed.measured


def manifest_from_bytes(data: bytes) -> Manifest:
    """The manifest in `data`, with every index, size and layout checked.

    Raises:
        ManifestError: anything that no correct manifest says.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"Manifest of {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed.")
    with collector_paused():
        try:
            message = messages.Manifest.FromString(bytes(data))
        except (DecodeError, UnicodeDecodeError) as error:  # the second by protobuf in pure Python
            raise ManifestError(f"Manifest of {len(data)} bytes cannot be decoded: {error}.") from error
        try:
            stage = Stage(message.stage)
        except ValueError:
            raise ManifestError(f"Manifest of unknown stage {message.stage!r}.") from None
        counts = len(message.types), len(message.tensors), len(message.module_types), len(message.modules)
        if (count := max(counts)) > MAX_TENSORS:
            raise ManifestError(f"Manifest of {count} tensors, modules or types; at most {MAX_TENSORS} are allowed.")
        storages = tuple(_storages(message))
        tensors = tuple(_tensors(message, storages))
        modules = tuple(_modules(message, len(tensors)))
        return Manifest(
            *(stage, storages, tensors, modules),
            added_modules={module.path: module.class_name for module in message.added_modules},
            removed_modules=tuple(message.removed_modules),
            emptied_modules=tuple(message.emptied_modules),
            retied_modules=dict(message.retied_modules),
            moved_modules=dict(message.moved_modules),
            common_values=tuple(_common_values(message)),
            files=dict(message.files),
            flags=dict(message.flags),
            used=dict(message.used),
            set_by_building=dict(message.set_by_building),
            is_observed=message.is_observed,
            sources=message.sources,
        )


def _common_values(message: messages.Manifest) -> Iterator[CommonValue]:
    for value in message.common_values:
        before = value.before if value.HasField("before") else None
        yield CommonValue(value.holder, value.name, before, value.after)


def check_manifest_fits(manifest: Manifest, arena: ArenaInfo) -> None:
    """Raises `ManifestError` unless every storage lies inside `arena`."""
    # Storages are in address order, so the last one ends last.
    if not manifest.storages:
        return
    last = manifest.storages[-1]
    end = last.offset_bytes + last.size_bytes
    if end > arena.size_bytes:
        raise ManifestError(f"Manifest reaches byte {end} of an arena of {arena.size_bytes} bytes.")


def _storages(message: messages.Manifest) -> Iterator[StorageInfo]:
    end = 0
    new = object.__new__
    set_offset, set_size = _SET_STORAGE
    for index, item in enumerate(message.storages):
        offset, size = item.offset_bytes, item.size_bytes
        if offset < end:
            raise ManifestError(f"Storage {index} begins at byte {offset}, before the previous one ends ({end}).")
        end = offset + size
        if end > MAX_STORAGE_END:
            raise ManifestError(f"Storage {index} ends at byte {end}; no arena is larger than {MAX_STORAGE_END}.")
        if size == 0:
            raise ManifestError(f"Storage {index} is empty; tensors without elements are inline.")
        storage = new(StorageInfo)
        set_offset(storage, offset)
        set_size(storage, size)
        yield storage


def _extent(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Bytes an element, elements from the first to the last one inclusive, number of elements."""
    item_size = ITEM_SIZES.get(dtype)
    if item_size is None:
        raise ManifestError(f"unknown dtype {dtype!r}")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ManifestError(f"{len(shape)} dimensions and {len(stride)} strides")
    count, span, longest = 1, 1, 0
    for length, step in zip(shape, stride, strict=True):
        if step < 0:
            raise ManifestError(f"negative stride {step}")
        count *= length or 1  # torch multiplies the other lengths of an empty tensor, too
        span += (length - 1) * step
        longest = max(longest, length, step)
    if max(count, span, longest) > MAX_STORAGE_END:
        raise ManifestError(f"absurd shape {shape} with stride {stride}")
    return (item_size, 0, 0) if 0 in shape else (item_size, span, count)


def _types(message: messages.Manifest) -> list[tuple[Any, ...]]:
    """Of each type `_extent`, and then what a `TensorInfo` has of it."""
    types = []
    for index, item in enumerate(message.types):
        dtype, shape, stride = item.dtype, tuple(item.shape), tuple(item.stride)
        try:
            extent = _extent(dtype, shape, stride)
        except ManifestError as error:
            raise ManifestError(f"Tensor type {index}: {error}.") from None
        flags = (item.requires_grad, item.private, item.own, item.meta, item.conj, item.neg)
        types.append((*extent, dtype, shape, stride, item.class_name, *flags, dict(item.attributes)))
    return types


def _tensors(message: messages.Manifest, storages: tuple[StorageInfo, ...]) -> Iterator[TensorInfo]:
    new = object.__new__
    (
        set_storage, set_offset, set_dtype, set_shape, set_stride,
        set_class, set_grad, set_private, set_own, set_meta, set_conj, set_neg, set_inline, set_attributes,
    ) = _SET_TENSOR  # fmt: skip
    sizes = [storage.size_bytes for storage in storages]
    starts = [storage.offset_bytes for storage in storages]
    storage_count = len(sizes)
    types = _types(message)
    for index, item in enumerate(message.tensors):
        storage, offset, number = item.storage, item.storage_offset, item.type
        if number >= len(types):
            raise ManifestError(f"Tensor {index} is of type {number} of {len(types)}.")
        item_size, span, count, dtype, shape, stride, class_name, *flags = types[number]
        requires_grad, private, own, meta, conj, neg, attributes = flags
        inline = item.inline if item.HasField("inline") else None
        if 0 <= storage < storage_count and inline is None:
            if (offset + span) * item_size > sizes[storage]:
                raise ManifestError(
                    f"Tensor {index} ({dtype}, shape {shape}, stride {stride}, offset {offset}) reaches byte "
                    f"{(offset + span) * item_size} of storage {storage}, which has {sizes[storage]}."
                )
            if starts[storage] % item_size:
                raise ManifestError(
                    f"Tensor {index} ({dtype}) is in storage {storage} from byte {starts[storage]}: misaligned."
                )
        elif storage != -1 or (inline is None and count and not own):
            raise ManifestError(
                f"Tensor {index} is in storage {storage} of {storage_count}, "
                f"{'with' if inline is not None else 'without'} inline bytes."
            )
        elif (inline is not None or not own) and (len(inline or b"") != count * item_size or offset != 0):
            raise ManifestError(
                f"Tensor {index} ({dtype}, shape {shape}) needs {count * item_size} inline bytes from offset 0; "
                f"it has {len(inline or b'')} and offset {offset}."
            )
        elif inline is not None and span != count:
            raise ManifestError(f"Tensor {index} ({dtype}, shape {shape}, stride {stride}) is inline with gaps.")
        tensor = new(TensorInfo)
        set_storage(tensor, storage)
        set_offset(tensor, offset)
        set_dtype(tensor, dtype)
        set_shape(tensor, shape)
        set_stride(tensor, stride)
        set_class(tensor, class_name)
        set_grad(tensor, requires_grad)
        set_private(tensor, private)
        set_own(tensor, own)
        set_meta(tensor, meta)
        set_conj(tensor, conj)
        set_neg(tensor, neg)
        set_inline(tensor, inline)
        set_attributes(tensor, attributes)
        yield tensor


_ModuleType = tuple[str, list[tuple[str, TensorKind]], dict[str, str], Observed]


def _module_types(message: messages.Manifest) -> Iterator[_ModuleType]:
    """Class, slots, attributes, and what was observed."""
    for index, item in enumerate(message.module_types):
        slots: dict[str, TensorKind] = {}
        for slot in item.slots:  # a slice would make objects of all before the first is looked at
            name, kind = slot.name, _KINDS.get(slot.kind)
            if kind is None:
                raise ManifestError(f"Slot {name!r} of module type {index} has the unknown kind {slot.kind!r}.")
            slots[name] = kind
        if len(slots) != len(item.slots) or "" in slots:
            raise ManifestError(f"Slots of module type {index} are unnamed or share a name.")
        observed = _observed(item.observed) if item.HasField("observed") else NOTHING_OBSERVED
        yield item.class_name, list(slots.items()), dict(item.attributes), observed


def _modules(message: messages.Manifest, tensor_count: int) -> Iterator[ModuleInfo]:
    paths: set[str] = set()
    if not message.modules or message.modules[0].path:
        raise ManifestError("The first module is not the model itself.")
    new = object.__new__
    set_name, set_kind, set_tensor = _SET_SLOT
    set_path, set_aliases, set_class, set_slots, set_attributes, set_observed = _SET_MODULE
    types = list(_module_types(message))
    attribute_count = 0
    for item in message.modules:
        path, aliases, number, tensors = item.path, tuple(item.aliases[:]), item.type, item.tensors
        for name in (path, *aliases):
            if name in paths:
                raise ManifestError(f"Two modules have the path {name!r}.")
            paths.add(name)
        if number >= len(types):
            raise ManifestError(f"Module {path!r} is of type {number} of {len(types)}.")
        class_name, kinds, attributes, observed = types[number]
        if len(tensors) != len(kinds):
            raise ManifestError(f"Module {path!r} has {len(tensors)} tensors for {len(kinds)} slots.")
        slots: list[SlotInfo] = []
        for (name, kind), tensor in zip(kinds, tensors, strict=True):
            if tensor >= tensor_count:
                raise ManifestError(f"Slot {name!r} of module {path!r} holds tensor {tensor} of {tensor_count}.")
            info = new(SlotInfo)
            set_name(info, name)
            set_kind(info, kind)
            set_tensor(info, tensor)
            slots.append(info)
        if own := item.attributes:
            attributes = {**attributes, **own}
            attribute_count += len(attributes)
            if attribute_count > MAX_ATTRIBUTES:
                raise ManifestError(f"Manifest of more than {MAX_ATTRIBUTES} attributes of modules.")
        module = new(ModuleInfo)
        set_path(module, path)
        set_aliases(module, aliases)
        set_class(module, class_name)
        set_slots(module, tuple(slots))
        set_attributes(module, attributes)
        set_observed(module, _observed(item.observed) if item.HasField("observed") else observed)
        yield module


def _observed(item: messages.Observed) -> Observed:
    return Observed(
        values={change.name: (_text(change, "built"), _text(change, "loaded")) for change in item.values},
        added=tuple(map(_added, item.added)),
        removed=tuple(item.removed),
        retied=dict(item.retied),
        untouched=tuple(item.untouched),
        processed=tuple(item.processed),
        measured=item.measured,
    )


def _text(change: messages.ValueChange, name: str) -> str | None:
    return getattr(change, name) if change.HasField(name) else None


def _added(item: messages.AddedSlot) -> AddedSlot:
    kind, shape, stride = _KINDS.get(item.kind), tuple(item.shape), tuple(item.stride)
    if kind is None:
        raise ManifestError(f"Slot {item.name!r} that loading added has the unknown kind {item.kind!r}.")
    try:
        _extent(item.dtype, shape, stride)
    except ManifestError as error:
        raise ManifestError(f"Slot {item.name!r} that loading added: {error}.") from None
    return AddedSlot(item.name, kind, item.dtype, shape, stride, item.class_name, item.requires_grad)
