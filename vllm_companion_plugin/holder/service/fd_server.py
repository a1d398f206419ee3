"""Server side of the fd socket: descriptors out for redeem tickets and to who wakes, in for deposit tickets.

Runs on the companion's event loop and never blocks it: sockets are non-blocking, a connection
has a deadline, and a peer of another user is refused before it can say anything. Descriptors that
are not wanted, and connections, in which there may be unread ones, are closed aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_companion_plugin.errors import BadRequestError, CompanionError, CompanionUnavailableError
from vllm_companion_plugin.holder.service.descriptors import close_aside
from vllm_companion_plugin.holder.service.journal import level_of
from vllm_companion_plugin.host.peer import credentials
from vllm_companion_plugin.wire import fd_channel
from vllm_companion_plugin.wire.codec import MAX_BLOCKS

logger = logging.getLogger("vllm.companion.descriptors")

CONNECTION_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 256
ACCEPT_RETRY_S = 1.0


@dataclass(frozen=True)
class Woken:
    """What a client that wakes is told, and given.

    Attributes:
        ready: b"": it sleeps on.
        current: as of `FdServer`'s `redeem`.
        settle: is told whether the client has been sent all of it; else it sleeps on.
    """

    ready: bytes = b""
    current: Callable[[], Sequence[int]] = tuple
    settle: Callable[[bool], None] = lambda told: None


class FdServer:
    """The listening socket and its connections.

    Args:
        redeem: spends a ticket, and returns a function that returns the descriptors to send. They stay whose they are.
        check_deposit: spends the ticket of a deposit, given how many descriptors come, and returns a function that
            takes them. They are its own if it returns, and the caller's if it raises. All raise `CompanionError`.
        wake: wakes the client whose lease has a token, given the sum of the manifest that it has.
    """

    def __init__(
        self,
        path: str,
        *,
        redeem: Callable[[bytes], Callable[[], Sequence[int]]],
        check_deposit: Callable[[bytes, int], Callable[[Sequence[int]], None]],
        wake: Callable[[bytes, bytes], Woken],
    ) -> None:
        self._path = path
        self._redeem = redeem
        self._check_deposit = check_deposit
        self._wake = wake
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Connections that have not shown a ticket, in order of arrival.
        self._strangers: dict[socket.socket, asyncio.Task[None]] = {}
        self._retry: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Listen, replacing a socket file that a killed companion left. Call from the event loop."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if os.path.lexists(self._path):
                os.unlink(self._path)
            listener.bind(self._path)
            os.chmod(self._path, 0o600)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise CompanionUnavailableError(f"Cannot listen at {self._path}: {error.strerror}.") from error
        self._listener = listener
        self._listen()

    def _listen(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """Stop listening, drop all connections, remove the socket file."""
        if self._listener is None:
            return
        if self._retry is not None:
            self._retry.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        os.unlink(self._path)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            # The listener stays readable: without a pause we would try for ever, and do nothing else.
            logger.warning("The fd socket cannot accept: %s", error)
            loop.remove_reader(self._listener)
            self._retry = loop.call_later(ACCEPT_RETRY_S, self._listen)
            return
        peer.setblocking(False)
        if len(self._tasks) >= MAX_CONNECTIONS and not self._drop_stranger():
            peer.close()
            return
        task = self._strangers[peer] = loop.create_task(self._serve(peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _drop_stranger(self) -> bool:
        """Make room at the cost of who has been connected longest without showing a ticket."""
        for peer, task in self._strangers.items():
            del self._strangers[peer]
            self._tasks.discard(task)
            return task.cancel()
        return False

    async def _serve(self, peer: socket.socket) -> None:
        try:
            await asyncio.wait_for(self._exchange(peer), CONNECTION_TIMEOUT_S)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            logger.warning("A client of the fd socket did not finish within %g s.", CONNECTION_TIMEOUT_S)
        except CompanionError as error:
            logger.log(level_of(error), "Refused on the fd socket: %s", error)
            try:
                peer.send(fd_channel.pack_error(error))
            except OSError:
                logger.debug("The refused client is gone.")
        except OSError as error:
            logger.info("A client of the fd socket went away: %s", error)
        finally:
            self._strangers.pop(peer, None)
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            close_aside([peer.detach()])

    async def _exchange(self, peer: socket.socket) -> None:
        _, uid = credentials(peer)
        if uid != os.getuid():
            raise BadRequestError(f"This companion belongs to uid {os.getuid()}; the caller is uid {uid}.")
        packet, fds = await _receive(peer)
        if fds:
            close_aside(fds)
            raise BadRequestError("Descriptors came before a ticket.")
        if not packet:
            return
        verb, ticket, rest = fd_channel.unpack_request(packet)
        if verb == fd_channel.REDEEM:
            current = self._redeem(ticket)
            self._strangers.pop(peer, None)
            await _send_fds(peer, current)
        elif verb == fd_channel.WAKE:
            woken = self._wake(ticket, rest)
            self._strangers.pop(peer, None)
            await _send_woken(peer, woken)
        else:
            await self._take(peer, ticket, fd_channel.count_of(rest))

    async def _take(self, peer: socket.socket, ticket: bytes, count: int) -> None:
        if not 1 <= count <= MAX_BLOCKS:
            raise BadRequestError(f"A deposit of {count} descriptors; 1 to {MAX_BLOCKS} are allowed.")
        take = self._check_deposit(ticket, count)
        self._strangers.pop(peer, None)
        await _send(peer, lambda: (fd_channel.OK, ()))
        received: list[int] = []
        try:
            while len(received) < count:
                _, fds = await _receive(peer)
                received += fds
                if not fds or len(received) > count:
                    raise BadRequestError(f"A deposit announced {count} descriptors and brought {len(received)}.")
            take(received)
        except BaseException:
            close_aside(received)
            raise
        await _send(peer, lambda: (fd_channel.OK, ()))


async def _send_woken(peer: socket.socket, woken: Woken) -> None:
    try:
        for packet in fd_channel.pack_ready(woken.ready):
            await _send(peer, lambda packet=packet: (packet, ()))  # type: ignore[misc]
        await _send_fds(peer, woken.current)
    except BaseException:
        woken.settle(False)
        raise
    woken.settle(True)


async def _send_fds(peer: socket.socket, current: Callable[[], Sequence[int]]) -> None:
    for number in range(len(fd_channel.batches(current()))):
        await _send(peer, partial(_packet, current, number))


def _packet(current: Callable[[], Sequence[int]], number: int) -> tuple[bytes, Sequence[int]]:
    """Made anew at each try: an unload closes the descriptors, and their numbers come to mean something else."""
    batch = fd_channel.batches(current())[number]
    return fd_channel.pack_fds(len(batch)), batch


async def _receive(peer: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    while True:
        try:
            packet, fds = fd_channel.receive_packet(peer, lambda refused: close_aside(refused.take()))
            return packet, fds.take()
        except BlockingIOError:
            await _ready(peer, asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)


async def _send(peer: socket.socket, make: Callable[[], tuple[bytes, Sequence[int]]]) -> None:
    while True:
        try:
            packet, fds = make()
            socket.send_fds(peer, [packet], fds)
            return
        except BlockingIOError:
            await _ready(peer, asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer)
        except OSError as error:
            # The kernel bounds descriptors in flight (RLIMIT_NOFILE); the receiver drains them.
            if error.errno != errno.ETOOMANYREFS:
                raise
            await asyncio.sleep(0.001)


async def _ready(peer: socket.socket, add: Callable[..., None], remove: Callable[[socket.socket], bool]) -> None:
    waiter = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    add(peer, wake)
    try:
        await waiter
    finally:
        remove(peer)
