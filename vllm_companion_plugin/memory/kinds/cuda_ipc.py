"""Device memory by CUDA IPC, for devices whose memory cannot leave a process as a descriptor.

Only an allocation of a living process can be opened, so a keeper (`vllm_companion_plugin.keeper`)
makes it and stays. Price: the keeper's context, one allocation an arena instead of one a chunk,
and mappings that can be written to, because CUDA IPC has no others.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing
from vllm_companion_plugin.memory.cuda_driver import call, copy_to_device, primary_context, wait_for_copies
from vllm_companion_plugin.memory.kinds import ipc_tag

GRANULARITY = 2 << 20
"""Smaller allocations may share one whose start is all that a handle names."""

_LAZY_PEER_ACCESS = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


def allocate(size_bytes: int) -> tuple[int, bytes]:
    """Address and handle of a new allocation on device 0, which is this process's until `free`."""
    with primary_context(0):
        address = int(call(f"Allocating {size_bytes} bytes", driver.cuMemAlloc(size_bytes)))
        try:
            return address, to_bytes(call("Exporting memory", driver.cuIpcGetMemHandle(address)))
        except BaseException:
            free(address)
            raise


def free(address: int) -> None:
    """End an allocation that nobody has open: its tag ends only after the last mapping."""
    with primary_context(0):
        call("Freeing memory", driver.cuMemFree(address))


def to_bytes(handle: Any) -> bytes:
    """The 64 bytes of a CUipcMemHandle, whose attribute for them went away with cuda-bindings 13.4."""
    return ctypes.string_at(int(handle.getPtr()), driver.CU_IPC_HANDLE_SIZE)


def from_bytes(data: bytes) -> Any:
    """The CUipcMemHandle of `to_bytes`."""
    handle = driver.CUipcMemHandle()
    ctypes.memmove(int(handle.getPtr()), data, driver.CU_IPC_HANDLE_SIZE)
    return handle


class CudaIpcArena(Closing):
    """An arena of a keeper's memory, mapped in this process. Nothing but good manners makes it read-only."""

    def __init__(self, info: ArenaInfo, fds: Sequence[int], device_index: int) -> None:
        self.info = info
        self._fds = tuple(fds)
        self._address = 0
        try:
            if len(fds) != 1 or len(info.block_sizes) != 1:
                raise ArenaError(f"A cuda_ipc arena is one block; got {len(info.block_sizes)}, {len(fds)} descriptors.")
            tag = ipc_tag.read(fds[0])
            if tag.size_bytes != info.size_bytes:
                raise ArenaError(f"The arena should have {info.size_bytes} bytes; its memory has {tag.size_bytes}.")
            self._context = primary_context(device_index)
            what = f"Opening memory of the keeper (pid {tag.keeper_pid}; has it ended?)"
            with self._context:
                self._address = int(call(what, driver.cuIpcOpenMemHandle(from_bytes(tag.handle), _LAZY_PEER_ACCESS)))
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        return self._address

    @property
    def fds(self) -> tuple[int, ...]:
        return self._fds

    def close(self) -> None:
        """Unmap it. Kernels that use it must be done: synchronizes first."""
        if self._address:
            with contextlib.suppress(ArenaError), self._context:  # in a process that forked, or ends, there is none
                driver.cuCtxSynchronize()
                driver.cuIpcCloseMemHandle(self._address)
        for fd in self._fds:
            os.close(fd)
        self._address, self._fds = 0, ()


class CudaIpcWriter:
    """Fills an arena that a keeper allocated as a whole.

    Args:
        allocate: asks the keeper for so many bytes; the writer owns the descriptor that it returns.
    """

    def __init__(self, size_bytes: int, device_index: int, allocate: Callable[[int], int]) -> None:
        self._context = primary_context(device_index)
        info = ArenaInfo("cuda_ipc", (size_bytes,))
        self._arena: CudaIpcArena | None = CudaIpcArena(info, [allocate(size_bytes)], device_index)
        self._free_bytes = size_bytes
        self._sealed: CudaIpcArena | None = None  # which tensors view that refer to us

    @property
    def address(self) -> int:
        assert self._arena is not None
        return self._arena.address

    def add_block(self, size_bytes: int) -> None:
        if size_bytes > self._free_bytes:
            raise ArenaError(f"A block of {size_bytes} bytes exceeds the {self._free_bytes} left of the allocation.")
        self._free_bytes -= size_bytes

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        with self._context:
            copy_to_device(self.address + offset_bytes, source_address, size_bytes)

    def flush(self) -> None:
        with self._context:
            wait_for_copies()

    def seal(self) -> CudaIpcArena:
        self.flush()
        assert self._arena is not None
        self._sealed, self._arena = self._arena, None
        return self._sealed

    def abort(self) -> None:
        if self._arena is not None:
            self._arena.close()
        self._arena = None
