"""Writing tensors into an arena that is being made, by names of a model that vLLM has loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

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
        check_finite: refuse tensors with values that are infinite or no numbers.

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
        self.infos = _by_name(manifest)
        self.sources = {name: each for name, each in sources_from_bytes(manifest.sources).items() if each.copies}

    def load(self, weights: Weights) -> int:
        """Write tensors by name, a checkpoint's or the model's; how many.

        Of a module, parameters are written, and buffers that the checkpoint has; of a mapping, all items. Both are
        looked at before anything is written. Of an iterator each item is looked at when it comes.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, all of them.
        """
        count = 0
        for name, tensor in checked(weights, {*self.infos, *self.sources}, self._problem, self._label):
            if (source := self.sources.get(name)) is not None and source.shape == tuple(tensor.shape):
                self._place(source, tensor)
            else:
                self._write(self.infos[name], tensor)
            count += 1
        return count

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        known = [each for each in (self.sources.get(name), self.infos.get(name)) if each is not None]
        if not known:
            return f"{name}, which it does not have, or not by a copy"
        return misfit(name, tensor, known) or (not_finite(name, tensor) if self._check_finite else "")

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


def is_placed(manifest: Manifest) -> bool:
    """Whether vLLM only copied when it loaded a model, as far as was observed: then copies are all that it takes.

    Raises:
        ManifestError: the manifest is damaged.
    """
    return all(source.copies for source in sources_from_bytes(manifest.sources).values())


def checked(
    weights: Weights, known: Collection[str], problem: Callable[[str, torch.Tensor], str], label: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `weights`, each whole, by name. Of a module, buffers are taken whose names are `known`.

    Those of a module or a mapping are all looked at before the first one comes; those of an iterator one by one.

    Args:
        problem: what is wrong with a tensor; empty if nothing is.
        label: what does not take it, for the error.

    Raises:
        BadRequestError: with all problems.
    """
    if isinstance(weights, nn.Module):
        buffers = {name: buffer for name, buffer in weights.named_buffers() if name in known}
        weights = {**dict(weights.named_parameters()), **buffers}
    if isinstance(weights, Mapping):
        refuse([problem(name, tensor) for name, tensor in weights.items()], label)
        weights = weights.items()
    for name, shard in weights:
        tensor = shard.full_tensor() if hasattr(shard, "full_tensor") else shard  # of FSDP: all ranks take part
        refuse([problem(name, tensor)], label)
        yield name, tensor


def refuse(problems: Iterable[str], label: str) -> None:
    """Raise `BadRequestError` with those that are not empty, if there are any."""
    found = [text for text in problems if text]
    if found:
        rest = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise BadRequestError(f"{label} cannot take {'; '.join(found[:_SHOWN])}{rest}.")


def misfit(name: str, tensor: torch.Tensor, known: Sequence[TensorInfo | Source]) -> str:
    """How `tensor` differs in shape or dtype from all that it may be like; empty if it is like one of them."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if shape not in [each.shape for each in known]:
        return f"{name} of shape {shape} instead of {known[0].shape}"
    if (shape, dtype) not in [(each.shape, each.dtype) for each in known]:
        return f"{name} of {tensor.dtype} instead of torch.{known[0].dtype}"
    return ""


def not_finite(name: str, tensor: torch.Tensor) -> str:
    """Say so if values of `tensor` are infinite or no numbers. One that is sharded is looked at when it is whole."""
    if hasattr(tensor, "full_tensor") or not tensor.is_floating_point():
        return ""
    numbers = tensor.float() if tensor.element_size() == 1 else tensor
    return "" if bool(torch.isfinite(numbers).all()) else f"{name}, whose values are not all finite"


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
