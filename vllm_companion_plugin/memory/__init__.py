"""Where bytes are: arenas of each kind of memory, and (in `tensors`) views and checksums of them. It knows no model.

An arena is one contiguous range of memory, mapped read-only by every process but its writer. It is made of blocks,
one file descriptor each, mapped one behind the other. A writer fills blocks in order and seals them; from then on
nobody writes, unless the arena is trained: then the process that filled it owns it, and goes on writing in place. All
kinds are used through the functions below, so everything but the driver calls runs anywhere. Only
`memory/cuda_driver.py` and `memory/tensors/cuda_sums.py` import the CUDA driver, and not before it is used.

May import: core, errors.
Of other packages: cuda.
"""

from __future__ import annotations

import functools

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.arena import Arena, ArenaWriter
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kind import Keeper, Kind
from vllm_companion_plugin.memory.kinds import KINDS, names

__all__ = [
    "CUDA_IPC",
    "CUDA_VMM",
    "KINDS",
    "MEMFD",
    "Arena",
    "ArenaWriter",
    "Descriptors",
    "best_kind",
    "create",
    "cuda_device",
    "granularity",
    "open_arena",
]

MEMFD = "memfd"
CUDA_VMM = "cuda_vmm"
CUDA_IPC = "cuda_ipc"


@functools.cache
def best_kind(device_type: str, device_index: int | None = None) -> str:
    """What this device can share memory by: the first kind of its type that it supports, else the last.

    Raises:
        ArenaError: the device does not answer.
    """
    *better, last = names(device_type)
    supported = (name for name in better if KINDS[name].unsupported_reason(device_index or 0) is None)
    return next(supported, last)


def cuda_device(device_index: int) -> str:
    """The UUID of a visible GPU: the name of its companion, in engines and in the command line."""
    from vllm_companion_plugin.memory import cuda_driver

    return cuda_driver.device_uuid(device_index)


def granularity(kind: str, device_index: int | None) -> int:
    """Bytes that block sizes must be a multiple of. Raises `ArenaError`."""
    return _kind(kind).granularity(device_index)


def create(kind: str, size_bytes: int, device_index: int | None = None, keeper: Keeper | None = None) -> ArenaWriter:
    """A writer with `size_bytes` of address space reserved, and no memory yet unless the kind `is_made_at_once`.

    Args:
        keeper: for `cuda_ipc`: gives a descriptor for an allocation of so many bytes (`keeper/client.py`).

    Raises:
        ArenaError: the device cannot do it, or the kind is unknown.
    """
    return _kind(kind).create(size_bytes, device_index, keeper)


def open_arena(info: ArenaInfo, fds: Descriptors, device_index: int | None = None) -> Arena:
    """Map a sealed arena, read-only where the kind can.

    Args:
        fds: one a block; owned by the arena from now on, and closed on failure.

    Raises:
        ArenaError: the descriptors are not what `info` says, or cannot be mapped.
    """
    try:
        kind = _kind(info.kind)
    except ArenaError:
        fds.close()
        raise
    return kind.open(info, fds, device_index)


def _kind(name: str) -> Kind:
    try:
        return KINDS[name]
    except KeyError:
        raise ArenaError(f"Unknown arena kind {name!r}; this version knows {', '.join(KINDS)}.") from None
