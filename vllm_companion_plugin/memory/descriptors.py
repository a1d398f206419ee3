"""Who owns file descriptors: one object, which closes them once.

A parameter `fds: Sequence[int]` borrows descriptors. One of type `Descriptors` takes them over.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable, Sequence
from typing import overload

from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing


class Descriptors(Closing, Sequence[int]):
    """File descriptors of this process, in order, owned until `close`, `take` or the last reference to this object.

    It reads like a sequence of numbers, which are borrowed: they mean nothing once it is closed.

    Args:
        fds: open descriptors, which this object owns from now on.

    Raises:
        ArenaError: at any use but `close` and `closed`, after `close` or `take`.
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        # In a list, because `pop` is atomic: threads that close at the same time close once.
        self._owned: list[tuple[int, ...]] = []
        self._owned.append(tuple(fds))

    @classmethod
    def duplicates(cls, fds: Iterable[int]) -> Descriptors:
        """New descriptors of what `fds` are, close-on-exec; the caller of this method keeps `fds`.

        Raises:
            OSError: one of `fds` is not open, or there are no numbers left. No new one stays open.
        """
        made: list[int] = []
        try:
            for fd in fds:
                made.append(os.dup(fd))
        except BaseException:
            _close(made)
            raise
        return cls(made)

    def dup(self) -> Descriptors:
        """Duplicates of all, another object's own. Raises as `duplicates`, and `ArenaError`."""
        return self.duplicates(self)

    def take(self) -> tuple[int, ...]:
        """The numbers, which the caller owns from now on; this object is closed, and they are not."""
        try:
            return self._owned.pop()
        except IndexError:
            raise _closed() from None

    def close(self) -> None:
        """Close all. Idempotent.

        Raises:
            OSError: EBADF, if somebody else has closed one of them.
        """
        try:
            fds = self._owned.pop()
        except IndexError:
            return
        _close(fds)

    def close_one(self, number: int) -> None:
        """Close one of them, which reads as -1 from now on. Idempotent, but not at the same time as `close`."""
        fds = self._numbers()
        if fds[number] >= 0:
            self._owned[0] = (*fds[:number], -1, *fds[number + 1 :])
            _close([fds[number]])

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return not self._owned

    def __len__(self) -> int:
        return len(self._numbers())

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        return self._numbers()[index]

    def __repr__(self) -> str:
        return f"Descriptors({list(self._owned[0]) if self._owned else 'closed'})"

    def _numbers(self) -> tuple[int, ...]:
        try:
            return self._owned[0]
        except IndexError:
            raise _closed() from None


def _closed() -> ArenaError:
    return ArenaError("The descriptors are closed, or somebody else owns them now.")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd < 0:
            continue
        try:
            os.close(fd)
        except OSError as error:
            # Linux releases the descriptor even when close reports an error of the file.
            if error.errno == errno.EBADF:
                raise


def receive(sock: socket.socket, packet_bytes: int, most: int) -> tuple[bytes, Descriptors, int]:
    """A packet of at most `packet_bytes`, up to `most` descriptors that came with it, and recvmsg's flags.

    The descriptors are close-on-exec, and the caller's. Not by `socket.recv_fds`: it drops its flags, MSG_CMSG_CLOEXEC
    among them (https://github.com/python/cpython/issues/107898), so a child that is started meanwhile inherited them.

    Raises:
        OSError: from the socket, e.g. BlockingIOError.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(most * fds.itemsize)
    packet, ancillary, flags, _ = sock.recvmsg(packet_bytes, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, Descriptors(fds), flags
