"""Where bytes are: arenas of each kind of memory, and (in `tensors`) views and checksums of them. It knows no model,
and only `memory/cuda_driver.py`, `memory/kinds/cuda_*.py` and `memory/tensors/cuda_sums.py` call the CUDA driver.

An arena is one contiguous range of memory, mapped read-only by every process but its writer. It is made of blocks,
one file descriptor each, mapped one behind the other. A writer fills blocks in order and seals them; from then on
nobody writes. All kinds are used through the two protocols below, so everything but the driver calls runs anywhere.

May import: core, errors.
Of other packages: cuda.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError

MEMFD = "memfd"
CUDA_VMM = "cuda_vmm"
CUDA_IPC = "cuda_ipc"


class Arena(Protocol):
    """A sealed arena, mapped read-only in this process.

    It owns its mapping and its descriptors, which keep the memory alive and can be handed on.
    A tensor that views the arena must not outlive `close`; nobody has to call that: an arena that
    nothing refers to any more, no tensor either, is closed.
    """

    info: ArenaInfo

    @property
    def address(self) -> int:
        """Where offset 0 is mapped; stays reserved until `close`."""

    @property
    def fds(self) -> tuple[int, ...]:
        """One descriptor a block, owned by the arena."""

    def close(self) -> None:
        """Unmap and close. Idempotent."""


class ArenaWriter(Protocol):
    """An arena that is being filled. `address` is where it will stay mapped."""

    @property
    def address(self) -> int:
        """Where offset 0 is, or will be, mapped."""

    def add_block(self, size_bytes: int) -> None:
        """Allocate the next `size_bytes` and map them behind the blocks so far.

        Raises:
            ArenaError: no memory, or more than what was reserved.
        """

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        """Copy from this process's memory (of the arena's device) into a block. May be asynchronous."""

    def flush(self) -> None:
        """Wait until every write has landed."""

    def seal(self) -> Arena:
        """Finish: nobody can write any more, this process included. The writer is spent, and keeps the arena in use."""

    def abort(self) -> None:
        """Free everything. Idempotent; harmless after `seal`."""


@functools.cache
def cuda_kind(device_index: int) -> str:
    """What this GPU can share memory by: `cuda_vmm` if it can, else `cuda_ipc`."""
    from vllm_companion_plugin.memory.kinds import cuda_vmm

    return CUDA_IPC if cuda_vmm.unsupported_reason(device_index) else CUDA_VMM


def cuda_device(device_index: int) -> str:
    """The UUID of a visible GPU: the name of its companion, in engines and in the command line."""
    from vllm_companion_plugin.memory import cuda_driver

    return cuda_driver.device_uuid(device_index)


def granularity(kind: str, device_index: int | None) -> int:
    """Bytes that block sizes must be a multiple of."""
    if kind == CUDA_VMM:
        from vllm_companion_plugin.memory.kinds import cuda_vmm

        return cuda_vmm.granularity(_device(kind, device_index))
    if kind == CUDA_IPC:
        from vllm_companion_plugin.memory.kinds import cuda_ipc

        return cuda_ipc.GRANULARITY
    return 4096


def create(
    kind: str, size_bytes: int, device_index: int | None = None, keeper: Callable[[int], int] | None = None
) -> ArenaWriter:
    """A writer with `size_bytes` of address space reserved, and no memory yet unless it is a keeper's.

    Args:
        keeper: for `cuda_ipc`: gives a descriptor for an allocation of so many bytes (`keeper/client.py`).

    Raises:
        ArenaError: the device cannot do it, or the kind is unknown.
    """
    if kind == CUDA_VMM:
        from vllm_companion_plugin.memory.kinds import cuda_vmm

        return cuda_vmm.CudaVmmWriter(size_bytes, _device(kind, device_index))
    if kind == CUDA_IPC:
        from vllm_companion_plugin.memory.kinds import cuda_ipc

        if keeper is None:
            raise ArenaError("A cuda_ipc arena needs a keeper.")
        return cuda_ipc.CudaIpcWriter(size_bytes, _device(kind, device_index), keeper)
    from vllm_companion_plugin.memory.kinds import memfd

    _require_memfd(kind)
    return memfd.MemfdWriter(size_bytes)


def open_arena(info: ArenaInfo, fds: Sequence[int], device_index: int | None = None) -> Arena:
    """Map a sealed arena, read-only where the kind can. Takes ownership of `fds`, also on failure.

    Raises:
        ArenaError: the descriptors are not what `info` says, or cannot be mapped.
    """
    arena: Callable[[], Arena]
    try:
        if info.kind == CUDA_VMM:
            from vllm_companion_plugin.memory.kinds import cuda_vmm

            arena = functools.partial(cuda_vmm.CudaVmmArena, info, fds, _device(info.kind, device_index))
        elif info.kind == CUDA_IPC:
            from vllm_companion_plugin.memory.kinds import cuda_ipc

            arena = functools.partial(cuda_ipc.CudaIpcArena, info, fds, _device(info.kind, device_index))
        else:
            from vllm_companion_plugin.memory.kinds import memfd

            _require_memfd(info.kind)
            arena = functools.partial(memfd.MemfdArena, info, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return arena()


def _device(kind: str, device_index: int | None) -> int:
    if device_index is None:
        raise ArenaError(f"A {kind} arena needs a device index.")
    return device_index


def _require_memfd(kind: str) -> None:
    if kind != MEMFD:
        raise ArenaError(f"Unknown arena kind {kind!r}; this version knows {MEMFD}, {CUDA_VMM} and {CUDA_IPC}.")
