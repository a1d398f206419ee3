"""Writing tensors into an arena that is being made, by names of a model that vLLM has loaded."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_companion_plugin.client.fitting import Weights, checked, is_plain, misfit, refuse
from vllm_companion_plugin.core.intervals import Intervals
from vllm_companion_plugin.core.module_tree import Manifest, TensorInfo
from vllm_companion_plugin.core.placements import Placed, Source
from vllm_companion_plugin.errors import BadRequestError, ManifestError
from vllm_companion_plugin.memory import ArenaWriter
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.wire.manifest import sources_from_bytes

BATCH_BYTES = 256 << 20
"""Sources that nobody else keeps, until their copies have landed: waiting for each of them would take longer than to
copy it, and waiting for none of them would keep all that an iterator gathers."""


@dataclass
class _Begun:
    """Tensors that begin at one place: whether each has what was written there last."""

    names: dict[str, bool] = field(default_factory=dict)
    size_bytes: int = 0


class Filling:
    """Fills an arena as a manifest describes it.

    Args:
        writer: of the arena, whose blocks are all there; borrowed.
        size_bytes: of the arena.
        label: what it is, for errors.
        check_finite: refuse tensors with NaN or infinity.

    Attributes:
        infos: what can be written as it is in the arena, by name.
        sources: what can be written as a checkpoint has it, by name.

    Raises:
        ManifestError: the manifest is damaged.
    """

    def __init__(
        self,
        writer: ArenaWriter,
        size_bytes: int,
        manifest: Manifest,
        device: torch.device,
        label: str,
        *,
        check_finite: bool = False,
    ) -> None:
        self._writer = writer
        self._size_bytes = size_bytes
        self._manifest = manifest
        self._device = device
        self._label = label
        self._check_finite = check_finite
        self._written = Intervals()
        self._sources: list[torch.Tensor] = []  # that nobody else keeps, of copies that may be on their way
        self._sources_bytes = 0
        self._name = ""  # of the tensor that is written
        self._begun: dict[int, _Begun] = {}  # by the offset
        self._lasting = 0  # address of the memory of the tensor that is written, if it is kept until `load` ends
        self.infos = _by_name(manifest)
        sources = sources_from_bytes(manifest.sources)
        self.sources = {name: each for name, each in sources.items() if each.copies}
        # Loading computed something from them, which a copy would leave as it was.
        self._more_than_copied = sources.keys() - self.sources.keys()

    def load(self, weights: Weights) -> int:
        """Write tensors by name, a checkpoint's or the model's; how many. They may be changed afterwards.

        Of a module, parameters are written, and buffers that the checkpoint has; of a mapping, all items. Both are
        looked at before anything is written. Of an iterator each item is looked at when it comes.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, or values that are not finite, all of them; a name
                that an iterator gives twice.
        """
        count, lasting = 0, _is_kept(weights)
        try:
            with in_order(self._device):
                known = {*self.infos, *self.sources}
                for name, tensor in checked(weights, known, self._problem, self._label, self._are_one):
                    self._lasting = tensor.untyped_storage().data_ptr() if lasting else 0
                    self._name = name
                    self._load(name, tensor)
                    count += 1
        finally:
            self._name = ""
            self._flush()
        return count

    def complete(self, source_address: int) -> None:
        """Write all that nothing has written yet, padding included, from an arena that is laid out alike.

        Args:
            source_address: where that is mapped in this process, on the same device.

        Raises:
            BadRequestError: names of one place have different values.
        """
        for begun in self._begun.values():
            if not all(begun.names.values()):
                names = " and ".join(sorted(begun.names))
                raise BadRequestError(
                    f"{self._label} has {names} in one place, and was given different values for them.",
                    remedy="Tie them in the trainer, too, or give one of them.",
                )
        for start, stop in self._written.gaps(self._size_bytes):
            self._writer.write(start, source_address + start, stop - start)
        self._writer.flush()
        self._written.add(0, self._size_bytes)

    def _are_one(self, name: str, other: str) -> bool:
        """Whether a tensor that is given under `other` need not be given under `name`, too."""
        ours, theirs = self._places(name), self._places(other)
        if any(start < end and first < stop for start, stop in ours for first, end in theirs):
            return True  # e.g. tied, and one of them known by vLLM's padded shape alone
        here, there = self.infos.get(name), self.infos.get(other)
        return name not in self.sources and (here is None or there is None or here.shape != there.shape)

    def _places(self, name: str) -> list[tuple[int, int]]:
        """First byte of each place, and the one after the last."""
        if (source := self.sources.get(name)) is not None:
            return [_range(placed.offset_bytes, placed.shape, placed.stride, placed.dtype) for placed in source.copies]
        return [self._place_of(info)] if (info := self.infos.get(name)) is not None else []

    def _place_of(self, info: TensorInfo) -> tuple[int, int]:
        offset = info.storage_offset * dtype_of(info.dtype).itemsize
        start = self._manifest.storages[info.storage].offset_bytes + offset
        return _range(start, info.shape, info.stride, info.dtype)

    def _load(self, name: str, tensor: torch.Tensor) -> None:
        source = self.sources.get(name)
        if source is not None and _is_as_read(source, tensor):
            self._place(source, tensor)
        else:
            self._write(self.infos[name], tensor)

    def check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raise `BadRequestError` for what does not fit, all of it. Tensors on the meta device will do."""
        refuse([self._problem(name, tensor) for name, tensor in weights], self._label)

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        source, info = self.sources.get(name), self.infos.get(name)
        known = [each for each in (source, info) if each is not None]
        if not known or name in self._more_than_copied:
            return f"{name}, which it does not have, or not by a copy"
        if source is not None and info is not None and not _is_as_read(source, tensor):
            start, stop = self._place_of(info)
            elsewhere = [each for each in self._places(name) if not start <= each[0] <= each[1] <= stop]
            if elsewhere and tuple(tensor.shape) == info.shape:
                return f"{name} in vLLM's form, because loading copied the checkpoint's tensor to other places, too"
        return misfit(name, tensor, known, check_finite=self._check_finite)

    def _place(self, source: Source, tensor: torch.Tensor) -> None:
        """Copy a checkpoint's tensor as it was copied when the checkpoint was loaded."""
        for placed in source.copies:
            part = tensor
            for step in placed.steps:
                part = part.contiguous()
                part = part.as_strided(step.shape, step.stride, int(part.storage_offset()) + step.offset)
            self._put(part, placed)

    def _put(self, part: torch.Tensor, placed: Placed) -> None:
        dtype = dtype_of(placed.dtype)
        if _is_dense(placed.shape, placed.stride):
            self._copy(placed.offset_bytes, self._laid_out(part, placed.shape, placed.stride, dtype))
            return
        rows = part.to(self._device, dtype)  # of a target with gaps: what is dense in it, one by one
        for index in range(placed.shape[0]):
            offset = placed.offset_bytes + index * placed.stride[0] * dtype.itemsize
            self._put(rows[index], Placed((), offset, placed.shape[1:], placed.stride[1:], placed.dtype))

    def _write(self, info: TensorInfo, tensor: torch.Tensor) -> None:
        storage = self._manifest.storages[info.storage]
        offset = storage.offset_bytes + info.storage_offset * tensor.element_size()
        self._copy(offset, self._laid_out(tensor, info.shape, info.stride, tensor.dtype))

    def _laid_out(
        self, tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The tensor itself if its bytes are on the device as they shall be, else a copy that is."""
        if (tensor.device, tensor.dtype, tuple(tensor.shape)) == (self._device, dtype, shape):
            steps = zip(shape, tensor.stride(), stride, strict=True)
            if all(size == 1 or here == there for size, here, there in steps):
                return tensor
        return torch.empty_strided(shape, stride, dtype=dtype, device=self._device).copy_(tensor)

    def _copy(self, offset_bytes: int, source: torch.Tensor) -> None:
        """Start to copy a dense tensor. It is kept until that has landed."""
        stop = offset_bytes + source.nbytes
        if stop > self._size_bytes:
            raise ManifestError(f"{self._label} places {source.nbytes} bytes at {offset_bytes} of {self._size_bytes}.")
        if not source.nbytes:
            return
        self._note(offset_bytes, source)
        self._written.add(offset_bytes, stop)
        if source.untyped_storage().data_ptr() == self._lasting:
            self._writer.write(offset_bytes, source.data_ptr(), source.nbytes)
            return
        with in_order(self._device):  # it was made just now
            self._writer.write(offset_bytes, source.data_ptr(), source.nbytes)
        self._sources.append(source)
        self._sources_bytes += source.nbytes
        if self._sources_bytes >= BATCH_BYTES:
            self._flush()

    def _note(self, offset_bytes: int, source: torch.Tensor) -> None:
        """Remember which names begin at a place, and whether what is there from now on is what each was given."""
        if not self._name:
            return
        begun, name = self._begun.setdefault(offset_bytes, _Begun()), self._name
        if begun.names.keys() - {name}:
            self._flush()
            size_bytes = min(begun.size_bytes, source.nbytes)
            there = ArenaViews(self._writer, self._size_bytes, self._device).bytes_at(offset_bytes, size_bytes)
            new = source.as_strided((source.numel(),), (1,)).view(torch.uint8)[:size_bytes]
            if not torch.equal(there, new):
                begun.names = dict.fromkeys(begun.names, False)
        begun.names[name], begun.size_bytes = True, max(begun.size_bytes, source.nbytes)

    def _flush(self) -> None:
        self._writer.flush()
        self._sources.clear()
        self._sources_bytes = 0


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """Copies run on the default stream: have it wait for what the caller's stream has computed, and the other way.

    So whoever uses another stream may change a tensor as soon as `load` has asked for the next one.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current != default:
        default.wait_stream(current)
    yield
    if current != default:
        current.wait_stream(default)


def _is_kept(weights: Weights) -> bool:
    """Whether the caller has all tensors already, and keeps them. Another kind of mapping may make them as it goes."""
    if isinstance(weights, nn.Module):
        tensors = [*weights.parameters(), *weights.buffers()]
    elif isinstance(weights, dict) and type(weights) in (dict, collections.OrderedDict):
        tensors = list(weights.values())
    else:
        return False
    return all(isinstance(tensor, torch.Tensor) and is_plain(tensor) for tensor in tensors)


def is_placed(manifest: Manifest) -> bool:
    """Whether vLLM only copied when it loaded a model, as far as was observed: then copies are all that it takes.

    Raises:
        ManifestError: the manifest is damaged.
    """
    return all(source.copies for source in sources_from_bytes(manifest.sources).values())


def _is_as_read(source: Source, tensor: torch.Tensor) -> bool:
    """Whether a tensor is in the checkpoint's form; if neither that nor a copy of it has its dtype, it is in vLLM's."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return source.shape == tuple(tensor.shape) and dtype in (source.dtype, *(placed.dtype for placed in source.copies))


def _range(start: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """First byte of the elements, and the one after the last."""
    if 0 in shape:
        return start, start
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return start, start + (last + 1) * dtype_of(dtype).itemsize


def _by_name(manifest: Manifest) -> dict[str, TensorInfo]:
    """What can be written: tensors whose elements fill their part of the arena. Tied ones under each name."""
    infos: dict[str, TensorInfo] = {}
    for module in manifest.modules:
        for path in (module.path, *module.aliases):
            for slot in module.slots:
                info = manifest.tensors[slot.tensor]
                if info.storage >= 0 and _is_dense(info.shape, info.stride):
                    infos[f"{path}.{slot.name}" if path else slot.name] = info
    return infos


@functools.cache
def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements fill what they span."""
    last = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != last:
            return False
        last *= size
    return True
