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
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of

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
        """Of all tensors that can be written, as `CompanionClient.attach` has them."""
        return list(self._infos)

    def load(self, weights: Weights) -> int:
        """Write tensors by name; how many.

        Of a module, parameters and buffers are written, and of a mapping all items; both are looked at before anything
        is written. Of an iterator each item is looked at when it comes.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, all of them.
        """
        if isinstance(weights, nn.Module):
            weights = {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
        if isinstance(weights, Mapping):
            self._check(weights.items())
            weights = weights.items()
        count = 0
        for name, tensor in weights:
            self._check([(name, tensor)])
            self._write(self._infos[name], tensor)
            count += 1
        return count

    def _check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        problems = [text for name, tensor in weights if (text := self._problem(name, tensor))]
        if problems:
            rest = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise BadRequestError(f"{self._attachment.label} cannot take {'; '.join(problems[:_SHOWN])}{rest}.")

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        info = self._infos.get(name)
        if info is None:
            return f"{name}, which it does not have"
        if tuple(tensor.shape) != info.shape:
            return f"{name} of shape {tuple(tensor.shape)} instead of {info.shape}"
        if tensor.dtype != dtype_of(info.dtype):
            return f"{name} of {tensor.dtype} instead of torch.{info.dtype}"
        return ""

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
def updating(attachment: Attachment, version: str) -> Iterator[Update]:
    """The next generation of what `attachment` maps; committed at the end of `with`, unless that raises.

    Raises:
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it.
        CompanionError: as `Update.commit`.
    """
    lease = attachment.lease
    lease.stage()
    try:
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
                if info.storage >= 0 and _is_dense(info):
                    infos[f"{path}.{slot.name}" if path else slot.name] = info
    return infos


def _is_dense(info: TensorInfo) -> bool:
    last = 1
    for size, stride in sorted(zip(info.shape, info.stride, strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != last:
            return False
        last *= size
    return True
