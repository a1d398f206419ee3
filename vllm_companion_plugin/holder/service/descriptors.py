"""What the companion checks about deposited descriptors before it vouches for them."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import threading
from collections.abc import Sequence

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.wire import fd_channel

# linux/fcntl.h
F_SEAL_SHRINK, F_SEAL_WRITE = 0x2, 0x8
CLOSING = "companion-close"


def check_descriptors(arena: ArenaInfo, fds: Sequence[int]) -> None:
    """Raise `BadRequestError` unless there is one fit descriptor for each block.

    Host memory must be sealed: a writer, or a shrink under a mapping, would reach every engine.
    Device memory is opaque here, but for whether its keeper lives; its importers check it.
    """
    if len(fds) != len(arena.block_sizes):
        raise BadRequestError(f"The arena has {len(arena.block_sizes)} blocks; {len(fds)} descriptors were deposited.")
    if arena.kind == "cuda_ipc":
        _check_tags(fds)
    if memory_is_lost(arena, fds):
        raise BadRequestError("The keeper of the arena's memory has ended.")
    if arena.kind != "memfd":
        return
    for index, (fd, size_bytes) in enumerate(zip(fds, arena.block_sizes, strict=True)):
        try:
            # First of all: of files other than memfds, even to ask for the size may wait for somebody's file system.
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise BadRequestError(f"Descriptor {index} is not a memfd: {error.strerror}.") from error
        if not (seals & F_SEAL_WRITE and seals & F_SEAL_SHRINK):
            raise BadRequestError(f"Memfd {index} is not sealed against write and shrink (seals {seals:#x}).")
        actual = os.fstat(fd).st_size
        if actual < size_bytes:
            raise BadRequestError(f"Block {index} of the arena should have {size_bytes} bytes; the memfd has {actual}.")


def _check_tags(fds: Sequence[int]) -> None:
    """They will be polled, which may block for anything but a socket."""
    for index, fd in enumerate(fds):
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise BadRequestError(f"Descriptor {index} is no socket: {error.strerror}.") from error
        sock.detach()
        if sock.family != socket.AF_UNIX:
            raise BadRequestError(f"Descriptor {index} is no Unix socket.")


def close_aside(fds: Sequence[int]) -> None:
    """Close what clients gave us in a thread: closing may block (SO_LINGER, a file system that hangs)."""
    if not fds:
        return
    try:
        threading.Thread(target=fd_channel.close_all, args=(tuple(fds),), name=CLOSING, daemon=True).start()
    except RuntimeError:  # no more threads
        fd_channel.close_all(fds)


def memory_is_lost(arena: ArenaInfo, fds: Sequence[int]) -> bool:
    """Whether nobody can map the arena any more: the process that a `cuda_ipc` arena depends on has ended."""
    if arena.kind != "cuda_ipc":
        return False
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
