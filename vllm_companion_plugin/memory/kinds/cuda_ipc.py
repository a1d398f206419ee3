"""Device memory by CUDA IPC, for devices whose memory cannot leave a process as a descriptor.

Only an allocation of a living process can be opened, so a keeper (`vllm_companion_plugin.keeper`)
makes it and stays. Price: the keeper's context, one allocation an arena instead of one a chunk,
and mappings that can be written to, because CUDA IPC has no others.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.arena import Arena
from vllm_companion_plugin.memory.cuda_driver import call, copy_to_device, driver, primary_context, wait_for_copies
from vllm_companion_plugin.memory.kind import Keeper, Kind, required_index
from vllm_companion_plugin.memory.kinds import ipc_tag
from vllm_companion_plugin.memory.mapping import Blocks, Mapping

GRANULARITY = 2 << 20
"""Smaller allocations may share one whose start is all that a handle names."""


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


class CudaIpcMapping(Mapping):
    """A keeper's memory, where CUDA IPC has put it. Nothing but good manners makes it read-only.

    Args:
        size_bytes: what the memory should have.
        fd: what stands for it; borrowed.
    """

    def __init__(self, size_bytes: int, fd: int, device_index: int) -> None:
        tag = ipc_tag.read(fd)
        if tag.size_bytes != size_bytes:
            raise ArenaError(f"The arena should have {size_bytes} bytes; its memory has {tag.size_bytes}.")
        self.context = primary_context(device_index)
        what = f"Opening memory of the keeper (pid {tag.keeper_pid}; has it ended?)"
        with self.context:
            lazily = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            address = int(call(what, driver.cuIpcOpenMemHandle(from_bytes(tag.handle), lazily)))
        super().__init__(address, size_bytes)

    @property
    def is_mapped(self) -> bool:
        return self._address is not None

    def map(self, blocks: Blocks) -> None:
        self._refuse()

    def unmap(self) -> None:
        self._refuse()

    def replace(self, fds: Sequence[int], *, writable: bool | None = None) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        self._require_open()
        raise _cannot_choose()

    def _free(self) -> None:
        """Kernels that use it must be done: synchronizes first."""
        with contextlib.suppress(ArenaError), self.context:  # in a process that forked, or ends, there is none
            driver.cuCtxSynchronize()
            driver.cuIpcCloseMemHandle(self._address)


def _cannot_choose() -> ArenaError:
    return ArenaError(
        "CUDA IPC chooses other addresses each time, so a keeper's memory stays mapped until its arena is closed. "
        "Where GPU and driver can, publish with the setting arena=cuda_vmm; else close the arena and attach anew."
    )


class CudaIpc(Kind):
    name = "cuda_ipc"
    device_type = "cuda"
    is_read_only = False
    can_remap = False
    is_made_at_once = True

    def granularity(self, device_index: int | None) -> int:
        return GRANULARITY

    def create(self, size_bytes: int, device_index: int | None, keeper: Keeper | None) -> CudaIpcWriter:
        if keeper is None:
            raise ArenaError("A cuda_ipc arena needs a keeper.")
        return CudaIpcWriter(size_bytes, required_index(self.name, device_index), keeper)

    def reserve(self, size_bytes: int, device_index: int | None) -> NoReturn:
        raise _cannot_choose()

    def _map(self, info: ArenaInfo, fds: Sequence[int], device_index: int | None) -> CudaIpcMapping:
        if len(info.block_sizes) != 1:
            raise ArenaError(f"A cuda_ipc arena is one block; this one has {len(info.block_sizes)}.")
        return CudaIpcMapping(info.size_bytes, fds[0], required_index(self.name, device_index))

    def check(self, info: ArenaInfo, fds: Sequence[int]) -> None:
        """They are Unix sockets: they will be polled, which may block for anything else."""
        super().check(info, fds)
        for index, fd in enumerate(fds):
            try:
                sock = socket.socket(fileno=fd)
            except OSError as error:
                raise ArenaError(f"Descriptor {index} is no socket: {error.strerror}.") from error
            sock.detach()
            if sock.family != socket.AF_UNIX:
                raise ArenaError(f"Descriptor {index} is no Unix socket.")

    def is_lost(self, fds: Sequence[int]) -> bool:
        """The keeper has ended. Its end of the socket is then closed."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLRDHUP)
        return bool(poll.poll(0))


class CudaIpcWriter:
    """Fills an arena that a keeper allocated as a whole."""

    def __init__(self, size_bytes: int, device_index: int, keeper: Keeper) -> None:
        primary_context(device_index)  # before the keeper takes memory
        self._free_bytes = size_bytes
        self._fds = keeper(size_bytes)
        self._sealed: Arena | None = None  # which tensors view that refer to us
        try:
            self._mapping: CudaIpcMapping | None = CudaIpcMapping(size_bytes, self._fds[0], device_index)
        except BaseException:
            self._fds.close()
            raise

    @property
    def address(self) -> int:
        assert self._mapping is not None
        return self._mapping.address

    @property
    def fds(self) -> Sequence[int]:
        return self._fds

    def add_block(self, size_bytes: int) -> None:
        if size_bytes > self._free_bytes:
            raise ArenaError(f"A block of {size_bytes} bytes exceeds the {self._free_bytes} left of the allocation.")
        self._free_bytes -= size_bytes

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        assert self._mapping is not None
        with self._mapping.context:
            copy_to_device(self.address + offset_bytes, source_address, size_bytes)

    def flush(self) -> None:
        assert self._mapping is not None
        with self._mapping.context:
            wait_for_copies()

    def seal(self, *, trained: bool = False) -> Arena:
        if trained:
            raise ArenaError("Memory of kind cuda_ipc cannot be trained: engines cannot map another generation of it.")
        self.flush()
        assert self._mapping is not None
        info = ArenaInfo(CudaIpc.name, (self._mapping.size_bytes,))
        self._sealed = Arena(info, self._fds, self._mapping, CudaIpc().check)
        self._mapping = None
        return self._sealed

    def abort(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._fds.close()
        self._mapping = None
