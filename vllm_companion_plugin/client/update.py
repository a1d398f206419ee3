"""Writing the next generation of an entry, while engines serve the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.lease import Lease
from vllm_companion_plugin.core.module_tree import TensorInfo
from vllm_companion_plugin.core.placements import Placed, Source
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.manifest import sources_from_bytes

Weights = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
_SHOWN = 8
"""Most names in an error."""


class Update:
    """The next generation of an entry: a copy of the current one, of which tensors are overwritten by name.

    Only the changed ones need to be written. Nothing is seen of it before `commit`.

    Args:
        attachment: of the writer, to the current generation; borrowed.
        lease: of that attachment, which is the entry's writer.

    Raises:
        ArenaError: there is no memory for a second generation.
    """

    def __init__(self, attachment: Attachment, lease: Lease) -> None:
        self._attachment = attachment
        self._lease = lease
        held = attachment.held.arena
        self._infos = _by_name(attachment)
        self._sources = sources_from_bytes(attachment.manifest.sources)
        self._writer = memory.create(held.kind, held.size_bytes, attachment.device.index)
        try:
            offset = 0
            for size_bytes in held.block_sizes:
                self._writer.add_block(size_bytes)
                self._writer.write(offset, attachment.arena.address + offset, size_bytes)
                offset += size_bytes
        except BaseException:
            self._writer.abort()
            raise

    @property
    def names(self) -> list[str]:
        """Of all tensors that can be written as `CompanionClient.attach` has them."""
        return list(self._infos)

    @property
    def checkpoint_names(self) -> list[str]:
        """Of all tensors that can be written as a checkpoint has them: by a copy, without processing."""
        return list(self._sources)

    def load(self, weights: Weights) -> int:
        """Write tensors by name, a checkpoint's or the model's; how many.

        Of a module, parameters are written, and buffers that the checkpoint has; of a mapping, all items. Both are
        looked at before anything is written. Of an iterator each item is looked at when it comes.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, all of them.
        """
        if isinstance(weights, nn.Module):
            known = {*self._infos, *self._sources}
            buffers = {name: buffer for name, buffer in weights.named_buffers() if name in known}
            weights = {**dict(weights.named_parameters()), **buffers}
        if isinstance(weights, Mapping):
            self._check(weights.items())
            weights = weights.items()
        count = 0
        for name, tensor in weights:
            self._check([(name, tensor)])
            if (source := self._sources.get(name)) is not None and source.shape == tuple(tensor.shape):
                self._place(source, tensor)
            else:
                self._write(self._infos[name], tensor)
            count += 1
        return count

    def _check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        problems = [text for name, tensor in weights if (text := self._problem(name, tensor))]
        if problems:
            rest = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise BadRequestError(f"{self._attachment.label} cannot take {'; '.join(problems[:_SHOWN])}{rest}.")

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        known = [each for each in (self._sources.get(name), self._infos.get(name)) if each is not None]
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
        device = self._attachment.device
        for placed in source.copies:
            part = tensor.detach()
            for step in placed.steps:
                part = part.contiguous()
                part = part.as_strided(step.shape, step.stride, int(part.storage_offset()) + step.offset)
            self._put(part.to(device), placed)

    def _put(self, part: torch.Tensor, placed: Placed) -> None:
        dtype = dtype_of(placed.dtype)
        if _is_dense(placed.shape, placed.stride):
            laid_out = torch.empty_strided(placed.shape, placed.stride, dtype=dtype, device=part.device).copy_(part)
            self._writer.write(placed.offset_bytes, laid_out.data_ptr(), laid_out.nbytes)
            self._writer.flush()
            return
        rows = part.to(dtype)  # of a target with gaps: what is dense in it, one by one
        for index in range(placed.shape[0]):
            offset = placed.offset_bytes + index * placed.stride[0] * dtype.itemsize
            self._put(rows[index], Placed((), offset, placed.shape[1:], placed.stride[1:], placed.dtype))

    def _write(self, info: TensorInfo, tensor: torch.Tensor) -> None:
        source = tensor.detach()
        if source.device != self._attachment.device or source.stride() != info.stride:
            laid_out = torch.empty_strided(info.shape, info.stride, dtype=source.dtype, device=self._attachment.device)
            source = laid_out.copy_(source)
        storage = self._attachment.manifest.storages[info.storage]
        offset = storage.offset_bytes + info.storage_offset * source.element_size()
        self._writer.write(offset, source.data_ptr(), source.nbytes)
        self._writer.flush()  # the source may go

    def commit(self, version: str) -> int:
        """Publish it as the current generation; its number.

        Raises:
            CompanionError: the companion does not take it. Nothing of it stays.
        """
        held, device = self._attachment.held.arena, self._attachment.device
        self._writer.flush()
        summing = Summing(ArenaViews(self._writer, held.size_bytes, device), held.size_bytes, device)
        summing.extend(held.size_bytes)
        checksums = summing.checksums()
        with contextlib.closing(self._writer.seal()) as arena:
            return self._lease.commit_staged(replace(arena.info, checksums=checksums), arena.fds, version)

    def abort(self) -> None:
        """Forget what was written. Idempotent."""
        self._writer.abort()


@contextlib.contextmanager
def updating(attachment: Attachment, version: str, settings: Settings) -> Iterator[Update]:
    """The next generation of what `attachment` maps; committed at the end of `with`, unless that raises.

    The attachment advances to the current generation first, if another client has committed one meanwhile.

    Raises:
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it.
        CompanionError: as `Update.commit`.
    """
    lease = attachment.lease
    lease.stage()
    try:
        with contextlib.closing(attachment.prepare(0, settings)) as current:
            if current.ready.generation != attachment.generation:
                attachment.advance(current)
        update = Update(attachment, lease)
        try:
            yield update
            update.commit(version)
        finally:
            update.abort()
    except BaseException:
        lease.abort_staged()
        raise


def _by_name(attachment: Attachment) -> dict[str, TensorInfo]:
    """What can be written: tensors whose elements fill their part of the arena. Tied ones under each name."""
    infos: dict[str, TensorInfo] = {}
    for module in attachment.manifest.modules:
        for path in (module.path, *module.aliases):
            for slot in module.slots:
                info = attachment.manifest.tensors[slot.tensor]
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
