"""What stands for a CUDA IPC allocation: one end of a socket pair whose other end the keeper watches.

The memory lives until the last copy of that end is closed, as with the descriptors of other kinds
of arenas. The handle waits in the socket's buffer, and is read without being taken out of it.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import dataclass

from vllm_companion_plugin.errors import ArenaError

_MAGIC = b"vllmcipc"
_STRUCT = struct.Struct("!8sQi64s")


@dataclass(frozen=True)
class Tag:
    """An allocation of a keeper's.

    Attributes:
        handle: the 64 bytes of CUipcMemHandle.
    """

    size_bytes: int
    keeper_pid: int
    handle: bytes


def make(tag: Tag) -> tuple[socket.socket, int]:
    """The keeper's end, which ends when the memory is not needed any more, and the descriptor to hand on.

    The caller owns both.
    """
    # A stream: on a packet socket, an empty packet from anybody would look like the end.
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    mine.sendall(_STRUCT.pack(_MAGIC, tag.size_bytes, tag.keeper_pid, tag.handle))
    mine.setblocking(False)
    return mine, theirs.detach()


def read(fd: int) -> Tag:
    """The tag behind `fd`, which stays the caller's. Raises `ArenaError` if it is something else."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):  # else the duplicate would stay open
            raise ArenaError("The descriptor of a cuda_ipc arena is something else (no socket).")
        with socket.socket(fileno=os.dup(fd)) as sock:
            data = sock.recv(_STRUCT.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        magic, size_bytes, keeper_pid, handle = _STRUCT.unpack(data)
    except (OSError, struct.error) as error:
        raise ArenaError(f"The descriptor of a cuda_ipc arena is something else ({error}).") from error
    if magic != _MAGIC:
        raise ArenaError("The descriptor of a cuda_ipc arena is something else.")
    return Tag(size_bytes, keeper_pid, handle)
