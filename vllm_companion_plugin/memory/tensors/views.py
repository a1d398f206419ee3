"""Tensors that view an arena, without a copy. Each keeps the arena's mapping in use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

import torch

from vllm_companion_plugin.core.module_tree import Manifest, StorageInfo, TensorInfo
from vllm_companion_plugin.errors import ManifestError
from vllm_companion_plugin.memory import Arena, ArenaWriter


class _DeviceBytes:
    """Device memory for `torch.as_tensor`, by the CUDA array interface (version 3).

    PyTorch rejects the interface's read-only flag, so it is not set: the mapping itself
    refuses writes.
    """

    def __init__(self, address: int, size_bytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class Flat:
    """A dense uint8 tensor, whose bytes are taken as those of an arena."""

    def __init__(self, whole: torch.Tensor) -> None:
        self._whole = whole

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """As `ArenaViews.bytes_at`, but for the storage."""
        return self._whole.narrow(0, offset_bytes, size_bytes)


def host_bytes(address: int, size_bytes: int) -> torch.Tensor:
    """A uint8 tensor on memory of this process, which is to stay mapped as long as the tensor is used."""
    return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)


class ArenaViews:
    """Makes tensors on an arena. Storages are created once, so ties share them.

    Args:
        arena: sealed, or still being written; its first block is there.
        size_bytes: of the arena, when it is complete.
        device: where the arena's memory is; an attribute, too.
    """

    def __init__(self, arena: Arena | ArenaWriter, size_bytes: int, device: torch.device) -> None:
        self._arena = arena
        self._size_bytes = size_bytes
        self.device = device
        self._storages: dict[int, torch.UntypedStorage] = {}

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A uint8 tensor of `size_bytes` at `offset_bytes`; its storage is exactly that."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        return empty.set_(self._part(offset_bytes, size_bytes))

    @functools.cached_property
    def _whole(self) -> torch.UntypedStorage:
        """The storage that all others are parts of. PyTorch loses 160 bytes with each array interface it reads."""
        address, size_bytes = self._arena.address, self._size_bytes
        if self.device.type == "cpu":
            buffer: Any = (ctypes.c_ubyte * size_bytes).from_address(address)
            buffer._owner = self._arena
            return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
        whole = torch.as_tensor(_DeviceBytes(address, size_bytes, self._arena), device=self.device)
        return whole.untyped_storage()

    def tensor(self, info: TensorInfo, storage: StorageInfo) -> torch.Tensor:
        """The tensor that `info` describes, viewing `storage` in the arena."""
        known = self._storages.get(info.storage)
        if known is None:
            known = self._storages[info.storage] = self._part(storage.offset_bytes, storage.size_bytes)
        return view(known, info, self.device)

    def renew(self, clones: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Give clones the arena's bytes again, as they are mapped now.

        Args:
            clones: the first byte in the arena of each, and the clone, of dtype uint8.
        """
        for start, clone in clones:
            clone.copy_(self.bytes_at(start, clone.nbytes))

    def addresses(self) -> set[int]:
        """The addresses of the storages made so far."""
        return {storage.data_ptr() for storage in self._storages.values()}

    def _part(self, offset_bytes: int, size_bytes: int) -> torch.UntypedStorage:
        if offset_bytes < 0 or offset_bytes + size_bytes > self._size_bytes:  # a slice would just be shorter
            raise ManifestError(f"Bytes {offset_bytes} to {offset_bytes + size_bytes} of {self._size_bytes}.")
        part: torch.UntypedStorage = self._whole[offset_bytes : offset_bytes + size_bytes]
        return part


def view(storage: torch.UntypedStorage, info: TensorInfo, device: torch.device) -> torch.Tensor:
    """A tensor of `info`'s dtype, shape and stride on `storage`."""
    empty = torch.empty(0, dtype=dtype_of(info.dtype), device=device)
    return empty.set_(storage, info.storage_offset, info.shape, info.stride)


def without_storage(info: TensorInfo, device: torch.device) -> torch.Tensor:
    """The host tensor whose bytes travel in the manifest, or one without elements on the model's `device`."""
    dtype = dtype_of(info.dtype)
    if not info.inline:
        where = device if info.inline is None else torch.device("cpu")
        return torch.empty_strided(info.shape, info.stride, dtype=dtype, device=where)
    flat = torch.frombuffer(bytearray(info.inline), dtype=dtype)
    return flat.as_strided(info.shape, info.stride)


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of that name. Raises `ManifestError` for a name that this torch does not know."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ManifestError(f"torch {torch.__version__} has no dtype {name!r}, in which tensors were published.")
    return dtype


def check_dtypes(manifest: Manifest) -> None:
    """Raises `ManifestError` for a dtype that this torch does not know, before anything is mapped."""
    for name in {info.dtype for info in manifest.tensors}:
        dtype_of(name)
