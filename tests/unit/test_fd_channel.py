"""Waking over the fd socket: one exchange tells what to map, and brings the descriptors of that."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.left import none_left_open
from tests.support.place import listens, memfd, until
from vllm_companion_plugin.errors import BadRequestError, CompanionError, TicketError
from vllm_companion_plugin.holder.service.fd_server import FdServer, Woken
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.wire import fd_channel, messages

TOKEN, SUM = b"t" * 16, b"s" * 32


class Server:
    """An fd socket in a thread, which answers whoever wakes.

    Attributes:
        ready, fds: the answer; `fds` may be an error.
        settled: what it was told of each answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.ready = b""
        self.fds: Sequence[int] | CompanionError = ()
        self.settled: list[bool] = []
        self._loop = asyncio.new_event_loop()
        self._server = FdServer(self.path, redeem=self._nothing, check_deposit=self._nothing, wake=self._wake)
        self._loop.call_soon(self._server.start)
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        until(lambda: listens(self.path), 5, "it listens")

    def _nothing(self, *_: object) -> object:
        raise TicketError("nobody has one")

    def _wake(self, token: bytes, known_manifest: bytes) -> Woken:
        if (token, known_manifest) != (TOKEN, SUM):
            raise BadRequestError("nobody sleeps so")
        return Woken(self.ready, self._current, self.settled.append)

    def _current(self) -> Sequence[int]:
        if isinstance(self.fds, CompanionError):
            raise self.fds
        return self.fds

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "fd.sock")
    yield made
    made.close()


def wake(server: Server, token: bytes = TOKEN) -> tuple[messages.Ready, Descriptors] | None:
    return fd_channel.wake(server.path, token, SUM, 5.0)


@pytest.mark.parametrize("blocks", [1, fd_channel.FDS_PER_PACKET + 1])
@pytest.mark.parametrize("checksums", [0, 3 * fd_channel.READY_PACKET_BYTES // 8])
def test_all_of_it_arrives(server: Server, blocks: int, checksums: int) -> None:
    """In as many packets as it takes, and in order."""
    arena = messages.ArenaDescriptor(kind="memfd", block_sizes=[7] * blocks)
    arena.checksums.values.extend(range(checksums))
    said = messages.Ready(generation=3, arena=arena)
    with Descriptors(memfd(b"%07d" % number) for number in range(blocks)) as there:
        server.ready, server.fds = said.SerializeToString(), there
        woken = wake(server)
        assert woken is not None
        heard, fds = woken
        with fds:
            assert heard == said
            assert [os.pread(fd, 7, 0) for fd in fds] == [b"%07d" % number for number in range(blocks)]
        until(lambda: server.settled == [True], 5, "it knows that the client was told")


def test_it_sleeps_on(server: Server) -> None:
    assert wake(server) is None


def test_a_refusal_is_typed(server: Server) -> None:
    with pytest.raises(BadRequestError, match="nobody sleeps so"):
        wake(server, b"x" * 16)
    assert server.settled == []


@pytest.mark.parametrize("ready", [b"\xff" * 9, b"x" * (fd_channel.MAX_READY_BYTES + 1)])
def test_what_tells_nothing_is_refused(server: Server, ready: bytes) -> None:
    server.ready = ready
    with pytest.raises(BadRequestError, match="bytes"):
        wake(server)


def test_descriptors_that_end_meanwhile(server: Server) -> None:
    """The client is told, and the companion knows that it has not woken; nothing stays open."""
    server.ready = messages.Ready(arena=messages.ArenaDescriptor(block_sizes=[7])).SerializeToString()
    server.fds = TicketError("dropped")
    with none_left_open():
        with pytest.raises(TicketError, match="dropped"):
            wake(server)
        until(lambda: server.settled == [False], 5, "it knows")


def test_a_client_that_has_gone(server: Server) -> None:
    """Nobody is taken for awake who was not told."""
    server.ready = b"x" * (8 << 20)  # more than a socket holds
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(server.path)
        sock.send(fd_channel.WAKE + TOKEN + SUM)
        sock.recv(16)
    until(lambda: server.settled == [False], 5, "it knows")
