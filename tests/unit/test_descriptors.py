"""File descriptors have one owner, which closes them once."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable

import pytest

from tests.support.left import none_left_open
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.descriptors import Descriptors, receive


def opened(count: int = 2) -> Descriptors:
    return Descriptors(os.open(os.devnull, os.O_RDONLY) for _ in range(count))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def close_at_once(fds: Descriptors) -> list[OSError]:
    """What four threads raise that close at the same time."""
    errors: list[OSError] = []
    barrier = threading.Barrier(4)

    def close() -> None:
        barrier.wait()
        try:
            fds.close()
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


class TestDescriptors:
    def test_sequence(self) -> None:
        """It reads like the numbers that it owns."""
        with opened(3) as fds:
            numbers = list(fds)
            assert (len(fds), fds[0], fds[-1], fds[1:]) == (3, numbers[0], numbers[2], tuple(numbers[1:]))
            assert all(map(is_open, fds))
        assert not any(map(is_open, numbers))

    def test_close_is_idempotent(self) -> None:
        """A number that was closed may be another file's already."""
        fds = opened(1)
        number = fds[0]
        fds.close()
        other = os.open(os.devnull, os.O_RDONLY)
        assert other == number
        fds.close()
        assert is_open(other)
        os.close(other)

    def test_threads_close_once(self) -> None:
        """Whichever comes first; a second `os.close` would be EBADF."""
        for _ in range(50):
            fds = opened(2)
            errors = close_at_once(fds)
            assert (errors, fds.closed) == ([], True)

    @pytest.mark.parametrize("end", [Descriptors.close, Descriptors.take], ids=["closed", "taken"])
    @pytest.mark.parametrize("use", [len, list, Descriptors.dup, Descriptors.take, lambda fds: fds[0]])
    def test_use_after_the_end(
        self, end: Callable[[Descriptors], object], use: Callable[[Descriptors], object]
    ) -> None:
        """The numbers are nobody's, or somebody else's."""
        fds = opened()
        numbers = tuple(fds)
        end(fds)
        with pytest.raises(ArenaError, match="closed"):
            use(fds)
        assert fds.closed
        for number in filter(is_open, numbers):
            os.close(number)

    def test_take(self) -> None:
        """Ownership moves out; what was taken stays open."""
        fds = opened()
        numbers = fds.take()
        del fds
        gc.collect()
        assert all(map(is_open, numbers))
        Descriptors(numbers).close()

    def test_dup(self) -> None:
        """Duplicates are another's, and not inherited by children."""
        fds = opened()
        copies = fds.dup()
        fds.close()
        assert all(is_open(fd) and not os.get_inheritable(fd) for fd in copies)
        copies.close()

    def test_dup_fails_whole(self) -> None:
        """If one cannot be duplicated, no duplicate stays open."""
        bad = pytest.raises(OSError, match="Bad file descriptor")
        with none_left_open(), opened() as fds, bad:
            Descriptors.duplicates([*fds, 1 << 20])

    def test_collected(self) -> None:
        """What nobody refers to is closed."""
        fds = opened()
        numbers = tuple(fds)
        del fds
        gc.collect()
        assert not any(map(is_open, numbers))


class TestReceive:
    def test_not_inherited(self) -> None:
        """No child that starts meanwhile gets them."""
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ends[0], ends[1], opened(2) as fds:
            socket.send_fds(ends[0], [b"word"], fds)
            packet, got, flags = receive(ends[1], 100, 2)
            assert (packet, flags & socket.MSG_CTRUNC) == (b"word", 0)
            assert [os.get_inheritable(fd) for fd in got] == [False, False]
            got.close()

    def test_too_many(self) -> None:
        """The kernel drops what there is no room for, and says so."""
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with none_left_open():
            with opened(6) as fds:
                socket.send_fds(ends[0], [b"word"], fds)
                _, got, flags = receive(ends[1], 100, 2)
            assert flags & socket.MSG_CTRUNC
            assert len(got) == 2
            got.close()
        for end in ends:
            end.close()
