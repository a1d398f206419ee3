"""Server side of the fd socket: descriptors out for redeem tickets, in for deposit tickets.

Runs on the companion's event loop and never blocks it: sockets are non-blocking, a connection
has a deadline, and a peer of another user is refused before it can say anything.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence

from vllm_companion_plugin.errors import ArenaError, BadRequestError, CompanionError
from vllm_companion_plugin.protocol import fd_channel
from vllm_companion_plugin.protocol.mapping import MAX_BLOCKS

logger = logging.getLogger(__name__)

CONNECTION_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 256
_UCRED = struct.Struct("iII")


class FdServer:
    """The listening socket and its connections.

    Args:
        redeem: ticket to descriptors, which stay the giver's; raises `CompanionError`.
        check_deposit: spends the ticket of a deposit and returns what takes the descriptors.
            Only if that returns have they a new owner.
    """

    def __init__(
        self,
        path: str,
        *,
        redeem: Callable[[bytes], Sequence[int]],
        check_deposit: Callable[[bytes], Callable[[Sequence[int]], None]],
    ) -> None:
        self._path = path
        self._redeem = redeem
        self._check_deposit = check_deposit
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen, replacing a socket file that a killed companion left. Call from the event loop."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if os.path.lexists(self._path):
                os.unlink(self._path)
            listener.bind(self._path)
            os.chmod(self._path, 0o600)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    async def close(self) -> None:
        """Stop listening, drop all connections, remove the socket file."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        os.unlink(self._path)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            logger.warning("The fd socket cannot accept: %s", error)
            return
        if len(self._tasks) >= MAX_CONNECTIONS:
            peer.close()
            return
        peer.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: socket.socket) -> None:
        try:
            await asyncio.wait_for(self._exchange(peer), CONNECTION_TIMEOUT_S)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            logger.warning("A client of the fd socket did not finish within %g s.", CONNECTION_TIMEOUT_S)
        except CompanionError as error:
            logger.warning("Refused on the fd socket: %s", error)
            try:
                peer.send(fd_channel.pack_error(error))
            except OSError:
                logger.debug("The refused client is gone.")
        except OSError as error:
            logger.info("A client of the fd socket went away: %s", error)
        finally:
            peer.close()

    async def _exchange(self, peer: socket.socket) -> None:
        _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.getuid():
            raise BadRequestError(f"This companion belongs to uid {os.getuid()}; the caller is uid {uid}.")
        packet, fds = await _receive(peer)
        if fds:
            fd_channel.close_all(fds)
            raise BadRequestError("Descriptors came before a ticket.")
        if not packet:
            return
        verb, ticket, count = fd_channel.unpack_request(packet)
        if verb == fd_channel.REDEEM:
            # Duplicates: an unload between two packets closes the originals, and their numbers
            # could come to mean something else.
            duplicates: list[int] = []
            try:
                _duplicate(self._redeem(ticket), duplicates)
                for batch in fd_channel.batches(duplicates):
                    await _send(peer, *fd_channel.pack_fds(batch))
            finally:
                fd_channel.close_all(duplicates)
            return
        if not 1 <= count <= MAX_BLOCKS:
            raise BadRequestError(f"A deposit of {count} descriptors; 1 to {MAX_BLOCKS} are allowed.")
        take = self._check_deposit(ticket)
        await _send(peer, fd_channel.OK)
        received: list[int] = []
        try:
            while len(received) < count:
                packet, fds = await _receive(peer)
                received += fds
                if not fds or len(received) > count:
                    raise BadRequestError(f"A deposit announced {count} descriptors and brought {len(received)}.")
            take(received)
        except BaseException:
            fd_channel.close_all(received)
            raise
        await _send(peer, fd_channel.OK)


def _duplicate(fds: Sequence[int], into: list[int]) -> None:
    """Append a duplicate of each. Raises `ArenaError`; those made so far are the caller's to close."""
    try:
        for fd in fds:
            into.append(os.dup(fd))
    except OSError as error:
        raise ArenaError(
            f"The companion cannot hand out {len(fds)} descriptors: {error.strerror}. Raise its limit of open files "
            "(ulimit -Hn) and start it anew."
        ) from error


async def _receive(peer: socket.socket) -> tuple[bytes, list[int]]:
    while True:
        try:
            return fd_channel.receive_packet(peer)
        except BlockingIOError:
            await _ready(peer, asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)


async def _send(peer: socket.socket, packet: bytes, ancillary: Sequence[tuple[int, int, bytes]] = ()) -> None:
    while True:
        try:
            peer.sendmsg([packet], ancillary)
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
