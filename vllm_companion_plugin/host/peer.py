"""The identity of the process at the other end of a Unix socket."""

from __future__ import annotations

import errno
import os
import socket
import struct

from vllm_companion_plugin.errors import RuntimeDirError

_UCRED = struct.Struct("iII")
_TIMEVAL = struct.Struct("@ll")
_NOBODY_YET = 0xFFFFFFFF


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the other end, as the kernel knows them; pid 0 if our container cannot see the process.

    Raises:
        OSError: ENOTCONN: no process is connected; a signal interrupted the connect, and Python reported success.
    """
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid == _NOBODY_YET:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return pid, uid


def connect(sock: socket.socket, path: str, timeout_s: float) -> None:
    """Connect to whoever listens at `path`, and wait a while if its queue is full; `sock` stays a blocking one.

    With `settimeout` a full queue would be an error at once, as the socket does not block then.

    Raises:
        BlockingIOError: the time is over.
        OSError: as `socket.connect`.
    """
    seconds, rest = divmod(timeout_s, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(rest * 1e6)))
    sock.connect(path)


def check_listener(sock: socket.socket, path: str) -> int:
    """Return the pid of the process that listens at `path`, to which `sock` is connected.

    Raises:
        RuntimeDirError: another user's process listens there.
    """
    pid, uid = credentials(sock)
    if uid != os.getuid():
        raise RuntimeDirError(
            f"A process of uid {uid} listens at {path}, and we are uid {os.getuid()}: nothing was sent to it.",
            remedy="Set COMPANION_RUNTIME_DIR to a directory that only you can write.",
        )
    return pid
