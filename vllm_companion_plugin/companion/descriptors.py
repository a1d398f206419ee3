"""What the companion checks about deposited descriptors before it vouches for them."""

from __future__ import annotations

import fcntl
import os
import select
from collections.abc import Sequence

from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.types import ArenaInfo

# linux/fcntl.h
F_SEAL_SHRINK, F_SEAL_WRITE = 0x2, 0x8


def check_descriptors(arena: ArenaInfo, fds: Sequence[int]) -> None:
    """Raise `BadRequestError` unless there is one fit descriptor for each block.

    Host memory must be sealed: a writer, or a shrink under a mapping, would reach every engine.
    Device memory is opaque here, but for whether its keeper lives; its importers check it.
    """
    if len(fds) != len(arena.block_sizes):
        raise BadRequestError(f"The arena has {len(arena.block_sizes)} blocks; {len(fds)} descriptors were deposited.")
    if memory_is_lost(arena, fds):
        raise BadRequestError("The keeper of the arena's memory has ended.")
    if arena.kind != "memfd":
        return
    for index, (fd, size_bytes) in enumerate(zip(fds, arena.block_sizes, strict=True)):
        actual = os.fstat(fd).st_size
        if actual < size_bytes:
            raise BadRequestError(f"Block {index} of the arena should have {size_bytes} bytes; the memfd has {actual}.")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise BadRequestError(f"Descriptor {index} is not a memfd: {error.strerror}.") from error
        if not (seals & F_SEAL_WRITE and seals & F_SEAL_SHRINK):
            raise BadRequestError(f"Memfd {index} is not sealed against write and shrink (seals {seals:#x}).")


def memory_is_lost(arena: ArenaInfo, fds: Sequence[int]) -> bool:
    """Whether nobody can map the arena any more: the process that a `cuda_ipc` arena depends on has ended."""
    if arena.kind != "cuda_ipc":
        return False
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
