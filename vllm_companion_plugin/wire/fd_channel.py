"""Framing and client side of the fd socket: file descriptors for tickets.

gRPC cannot carry descriptors, so they cross on a Unix socket beside it (SOCK_SEQPACKET: one
send is one packet). A client opens a connection for one exchange:

    redeem   R ticket            ->   F count + fds, as often as needed, or E code NUL text
    deposit  D ticket count      ->   O (the companion waits for descriptors), or E ...
             F count + fds ...   ->   O (it has them all), or E ...
    wake     W token sum         ->   A left bytes, as often as needed, then F count + fds as above, or E ...

A client that wakes shows the token of its lease and the sha256 of the manifest that it has. The bytes are a `Ready`;
`left` says how many of them follow; none at all tell that the client sleeps on. So waking takes one round trip, not
one over gRPC and one more with the ticket that it brings.

The kernel passes at most 253 descriptors a packet (SCM_MAX_FD in linux/net/scm.h).
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from google.protobuf.message import DecodeError

from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    RuntimeDirError,
    WaitTimeoutError,
    from_code,
)
from vllm_companion_plugin.host import peer
from vllm_companion_plugin.memory.descriptors import Descriptors, receive
from vllm_companion_plugin.wire import messages

TICKET_BYTES = 16
"""Of a token, too."""
SUM_BYTES = 32
FDS_PER_PACKET = 253
PACKET_BYTES = 4096
READY_PACKET_BYTES = 64 << 10
MAX_READY_BYTES = 64 << 20
"""Most of it are checksums: 8 bytes for each 16 MiB."""
REDEEM, DEPOSIT, WAKE, FDS, OK, READY, ERROR = b"R", b"D", b"W", b"F", b"O", b"A", b"E"
_COUNT = struct.Struct("!I")
_REQUEST_BYTES = {REDEEM: 0, DEPOSIT: _COUNT.size, WAKE: SUM_BYTES}
"""What follows a ticket or a token."""


def pack_fds(count: int) -> bytes:
    """The packet that goes with `count` descriptors, at most `FDS_PER_PACKET`."""
    return FDS + _COUNT.pack(count)


def batches(fds: Sequence[int]) -> list[Sequence[int]]:
    return [fds[start : start + FDS_PER_PACKET] for start in range(0, len(fds), FDS_PER_PACKET)]


def pack_error(error: CompanionError) -> bytes:
    return (ERROR + error.code.encode() + b"\0" + str(error).encode(errors="backslashreplace"))[:PACKET_BYTES]


def unpack_error(packet: bytes) -> CompanionError:
    code, _, text = packet[1:].partition(b"\0")
    return from_code(code.decode(errors="replace"), text.decode(errors="replace"))


def pack_deposit(ticket: bytes, count: int) -> bytes:
    return DEPOSIT + ticket + _COUNT.pack(count)


def pack_ready(ready: bytes) -> list[bytes]:
    """The packets that tell a client that it has woken; of b"": that it sleeps on."""
    chunk = READY_PACKET_BYTES - 1 - _COUNT.size
    return [
        READY + _COUNT.pack(max(0, len(ready) - start - chunk)) + ready[start : start + chunk]
        for start in range(0, max(1, len(ready)), chunk)
    ]


def unpack_request(packet: bytes) -> tuple[bytes, bytes, bytes]:
    """Verb, ticket or token, and what else: a count (`count_of`) or a sum. Raises `BadRequestError`."""
    verb, ticket, rest = packet[:1], packet[1 : 1 + TICKET_BYTES], packet[1 + TICKET_BYTES :]
    if _REQUEST_BYTES.get(verb) != len(rest) or len(ticket) != TICKET_BYTES:
        raise BadRequestError(f"A packet of {len(packet)} bytes on the fd socket is no request.")
    return verb, ticket, rest


def count_of(rest: bytes) -> int:
    """How many descriptors a deposit brings, by what `unpack_request` returned."""
    return int(_COUNT.unpack(rest)[0])


def receive_packet(
    sock: socket.socket, close: Callable[[Descriptors], None] = Descriptors.close, most_bytes: int = PACKET_BYTES
) -> tuple[bytes, Descriptors]:
    """One packet and the descriptors it carries, which the caller then owns (close-on-exec).

    Args:
        close: what becomes of descriptors that are refused.
        most_bytes: that the packet may have.

    Raises:
        BadRequestError: truncated, or a count that contradicts the descriptors.
        OSError: from the socket, e.g. BlockingIOError.
    """
    packet, fds, flags = receive(sock, most_bytes, FDS_PER_PACKET)
    arrived = len(fds)
    if flags & socket.MSG_CTRUNC:
        # The kernel dropped descriptors that did not fit: mostly this process is at RLIMIT_NOFILE.
        close(fds)
        raise BadRequestError(
            f"Only {arrived} descriptors of a packet arrived; raise the limit of open files (ulimit -n)."
        )
    announced = _COUNT.unpack(packet[1:])[0] if packet[:1] == FDS and len(packet) == 1 + _COUNT.size else 0
    if flags & socket.MSG_TRUNC or announced != arrived:
        close(fds)
        raise BadRequestError(f"A packet announced {announced} descriptors and carried {arrived}.")
    return packet, fds


class _Exchange:
    """One connection with a deadline. Every error leaves typed."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ArenaError(
                f"A socket to {path} cannot be opened: {error.strerror}.",
                remedy="Raise the limit of open files (ulimit -n).",
            ) from error
        try:
            peer.connect(self._sock, path, timeout_s)
            peer.check_listener(self._sock, path)
        except OSError as error:
            self._sock.close()
            self._fail(error)
        except RuntimeDirError:
            self._sock.close()
            raise

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def _fail(self, error: OSError) -> NoReturn:
        if isinstance(error, (TimeoutError, BlockingIOError)):
            raise WaitTimeoutError(
                f"The companion's fd socket {self._path} did not answer within {self._timeout_s:g} s."
            ) from error
        raise CompanionUnavailableError(
            f"The companion's fd socket {self._path} failed: {error.strerror or error}."
        ) from error

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        while True:
            try:
                self._arm()
                socket.send_fds(self._sock, [packet], fds)
                return
            except OSError as error:
                # The kernel bounds descriptors in flight (RLIMIT_NOFILE); the receiver drains them.
                if error.errno != errno.ETOOMANYREFS:
                    self._fail(error)
                time.sleep(0.001)

    def receive(self, most_bytes: int = PACKET_BYTES) -> tuple[bytes, Descriptors]:
        try:
            self._arm()
            packet, fds = receive_packet(self._sock, most_bytes=most_bytes)
        except OSError as error:
            self._fail(error)
        if packet[:1] == ERROR:
            raise unpack_error(packet)
        if not packet:
            raise CompanionUnavailableError(f"The companion closed its fd socket {self._path} without an answer.")
        return packet, fds

    def receive_ok(self) -> None:
        packet, fds = self.receive()
        count = len(fds)
        fds.close()
        if packet != OK:
            raise BadRequestError(f"Expected {OK!r} from {self._path}; got {packet[:1]!r} with {count} descriptors.")

    def receive_ready(self) -> bytes:
        ready, left = b"", -1
        while left:
            packet, fds = self.receive(READY_PACKET_BYTES)
            count = len(fds)
            fds.close()
            if packet[:1] != READY or len(packet) < 1 + _COUNT.size or count:
                raise BadRequestError(
                    f"Expected {READY!r} from {self._path}; got {packet[:1]!r} with {count} descriptors."
                )
            chunk = packet[1 + _COUNT.size :]
            ready, (left,) = ready + chunk, _COUNT.unpack_from(packet, 1)
            if len(ready) + left > MAX_READY_BYTES or (left and not chunk):
                raise BadRequestError(f"{self._path} tells with {len(ready) + left} bytes what it has.")
        return ready

    def receive_fds(self, count: int) -> Descriptors:
        received = Descriptors()
        try:
            while len(received) < count:
                packet, fds = self.receive()
                is_answer = packet[:1] == FDS and len(fds) > 0
                received = Descriptors(received.take() + fds.take())
                if not is_answer or len(received) > count:
                    raise BadRequestError(f"Expected {count} descriptors from {self._path}; got {len(received)}.")
        except BaseException:
            received.close()
            raise
        return received


def redeem(path: str, ticket: bytes, count: int, timeout_s: float) -> Descriptors:
    """The `count` descriptors that `ticket` stands for, in order; the caller owns them.

    Raises:
        TicketError: unknown, spent or expired ticket, or the entry was unloaded meanwhile.
        BadRequestError: not `count` descriptors came. None stays open.
        RuntimeDirError: somebody else listens there.
        ArenaError: this process has no descriptors left.
        CompanionUnavailableError, WaitTimeoutError: nobody answers, or not in `timeout_s`.
    """
    with _Exchange(path, timeout_s) as exchange:
        exchange.send(REDEEM + ticket)
        return exchange.receive_fds(count)


def wake(
    path: str, token: bytes, known_manifest_sha256: bytes, timeout_s: float
) -> tuple[messages.Ready, Descriptors] | None:
    """What a client that sleeps maps from now on, and the descriptors of that, in order; the caller owns them.

    Returns:
        None: it sleeps on.

    Raises:
        BadRequestError: the lease with this token does not sleep, or the answer is none. No descriptor stays open.
        RuntimeDirError, CompanionUnavailableError, WaitTimeoutError, ArenaError: as `redeem`. The companion may take
            the client for awake, unless it refused.
    """
    with _Exchange(path, timeout_s) as exchange:
        exchange.send(WAKE + token + known_manifest_sha256)
        answer = exchange.receive_ready()
        if not answer:
            return None
        try:
            ready = messages.Ready.FromString(answer)
        except DecodeError as error:
            raise BadRequestError(f"{path} answers {len(answer)} bytes that tell nothing.") from error
        return ready, exchange.receive_fds(len(ready.arena.block_sizes))


def deposit(path: str, ticket: bytes, fds: Sequence[int], timeout_s: float) -> None:
    """Give the companion duplicates of `fds`, in order. The caller keeps and closes its own.

    Raises:
        TicketError: unknown or spent ticket.
        BadRequestError, LimitError: the companion refuses the descriptors.
        RuntimeDirError: somebody else listens there; it got none.
        ArenaError: this process has no descriptors left.
        CompanionUnavailableError, WaitTimeoutError: nobody answers, or not in `timeout_s`.
    """
    with _Exchange(path, timeout_s) as exchange:
        exchange.send(pack_deposit(ticket, len(fds)))
        exchange.receive_ok()
        for batch in batches(fds):
            exchange.send(pack_fds(len(batch)), batch)
        exchange.receive_ok()
