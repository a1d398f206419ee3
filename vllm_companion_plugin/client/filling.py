"""Writing tensors into an arena that is being made, by names of a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import Manifest, TensorInfo
from vllm_companion_plugin.core.placements import Placed, Source
from vllm_companion_plugin.errors import BadRequestError, ManifestError
from vllm_companion_plugin.memory import ArenaWriter
from vllm_companion_plugin.memory.tensors.views import dtype_of
from vllm_companion_plugin.wire.manifest import sources_from_bytes

Weights = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
_SHOWN = 8
"""Most names in an error."""


class Filling:
    """Fills an arena as a manifest describes it.

    Args:
        writer: of the arena, whose blocks are all there; borrowed.
        size_bytes: of the arena.
        label: what it is, for errors.

    Attributes:
        infos: what can be written as it is in the arena, by name.
        sources: what can be written as a checkpoint has it, by name.

    Raises:
        ManifestError: the manifest is damaged.
    """

    def __init__(
        self, writer: ArenaWriter, size_bytes: int, manifest: Manifest, device: torch.device, label: str
    ) -> None:
        self._writer = writer
        self._size_bytes = size_bytes
        self._manifest = manifest
        self._device = device
        self._label = label
        self.infos = _by_name(manifest)
        self.sources = sources_from_bytes(manifest.sources)

    def load(self, weights: Weights) -> int:
        """Write tensors by name, a checkpoint's or the model's; how many.

        Of a module, parameters are written, and buffers that the checkpoint has; of a mapping, all items. Both are
        looked at before anything is written. Of an iterator each item is looked at when it comes.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, all of them.
        """
        if isinstance(weights, nn.Module):
            known = {*self.infos, *self.sources}
            buffers = {name: buffer for name, buffer in weights.named_buffers() if name in known}
            weights = {**dict(weights.named_parameters()), **buffers}
        if isinstance(weights, Mapping):
            self._check(weights.items())
            weights = weights.items()
        count = 0
        for name, shard in weights:
            tensor = shard.full_tensor() if hasattr(shard, "full_tensor") else shard  # of FSDP: all ranks take part
            self._check([(name, tensor)])
            if (source := self.sources.get(name)) is not None and source.shape == tuple(tensor.shape):
                self._place(source, tensor)
            else:
                self._write(self.infos[name], tensor)
            count += 1
        return count

    def _check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        problems = [text for name, tensor in weights if (text := self._problem(name, tensor))]
        if problems:
            rest = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise BadRequestError(f"{self._label} cannot take {'; '.join(problems[:_SHOWN])}{rest}.")

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        known = [each for each in (self.sources.get(name), self.infos.get(name)) if each is not None]
        if not known:
            return f"{name}, which it does not have, or not by a copy"
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if shape not in [each.shape for each in known]:
            return f"{name} of shape {shape} instead of {known[0].shape}"
        if (shape, dtype) not in [(each.shape, each.dtype) for each in known]:
            return f"{name} of {tensor.dtype} instead of torch.{known[0].dtype}"
        return ""

    def _place(self, source: Source, tensor: torch.Tensor) -> None:
        """Copy a checkpoint's tensor as it was copied when the checkpoint was loaded."""
        for placed in source.copies:
            part = tensor.detach()
            for step in placed.steps:
                part = part.contiguous()
                part = part.as_strided(step.shape, step.stride, int(part.storage_offset()) + step.offset)
            self._put(part.to(self._device), placed)

    def _put(self, part: torch.Tensor, placed: Placed) -> None:
        dtype = dtype_of(placed.dtype)
        if _is_dense(placed.shape, placed.stride):
            laid_out = torch.empty_strided(placed.shape, placed.stride, dtype=dtype, device=part.device).copy_(part)
            self._copy(placed.offset_bytes, laid_out)
            return
        rows = part.to(dtype)  # of a target with gaps: what is dense in it, one by one
        for index in range(placed.shape[0]):
            offset = placed.offset_bytes + index * placed.stride[0] * dtype.itemsize
            self._put(rows[index], Placed((), offset, placed.shape[1:], placed.stride[1:], placed.dtype))

    def _write(self, info: TensorInfo, tensor: torch.Tensor) -> None:
        source = tensor.detach()
        if source.device != self._device or source.stride() != info.stride:
            laid_out = torch.empty_strided(info.shape, info.stride, dtype=source.dtype, device=self._device)
            source = laid_out.copy_(source)
        storage = self._manifest.storages[info.storage]
        offset = storage.offset_bytes + info.storage_offset * source.element_size()
        self._copy(offset, source)

    def _copy(self, offset_bytes: int, source: torch.Tensor) -> None:
        if offset_bytes + source.nbytes > self._size_bytes:
            raise ManifestError(f"{self._label} places {source.nbytes} bytes at {offset_bytes} of {self._size_bytes}.")
        self._writer.write(offset_bytes, source.data_ptr(), source.nbytes)
        self._writer.flush()  # the source may go


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


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements fill what they span."""
    last = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != last:
            return False
        last *= size
    return True
