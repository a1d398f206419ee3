"""Framing and client side of the fd socket: file descriptors for tickets.

gRPC cannot carry descriptors, so they cross on a Unix socket beside it (SOCK_SEQPACKET: one
send is one packet). A client opens a connection for one exchange:

    redeem   R ticket            ->   F count + fds, as often as needed, or E code NUL text
    deposit  D ticket count      ->   O (the companion waits for descriptors), or E ...
             F count + fds ...   ->   O (it has them all), or E ...

The kernel passes at most 253 descriptors a packet (SCM_MAX_FD in linux/net/scm.h).
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    RuntimeDirError,
    WaitTimeoutError,
    from_code,
)
from vllm_companion_plugin.host import peer
from vllm_companion_plugin.memory.descriptors import Descriptors, receive

TICKET_BYTES = 16
FDS_PER_PACKET = 253
PACKET_BYTES = 4096
REDEEM, DEPOSIT, FDS, OK, ERROR = b"R", b"D", b"F", b"O", b"E"
_COUNT = struct.Struct("!I")


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


def unpack_request(packet: bytes) -> tuple[bytes, bytes, int]:
    """Verb, ticket and number of descriptors (0 to redeem). Raises `BadRequestError`."""
    verb, ticket, rest = packet[:1], packet[1 : 1 + TICKET_BYTES], packet[1 + TICKET_BYTES :]
    expected = {REDEEM: 0, DEPOSIT: _COUNT.size}.get(verb)
    if expected != len(rest) or len(ticket) != TICKET_BYTES:
        raise BadRequestError(f"A packet of {len(packet)} bytes on the fd socket is no request.")
    return verb, ticket, _COUNT.unpack(rest)[0] if rest else 0


def receive_packet(
    sock: socket.socket, close: Callable[[Descriptors], None] = Descriptors.close
) -> tuple[bytes, Descriptors]:
    """One packet and the descriptors it carries, which the caller then owns (close-on-exec).

    Args:
        close: what becomes of descriptors that are refused.

    Raises:
        BadRequestError: truncated, or a count that contradicts the descriptors.
        OSError: from the socket, e.g. BlockingIOError.
    """
    packet, fds, flags = receive(sock, PACKET_BYTES, FDS_PER_PACKET)
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
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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

    def receive(self) -> tuple[bytes, Descriptors]:
        try:
            self._arm()
            packet, fds = receive_packet(self._sock)
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


def redeem(path: str, ticket: bytes, count: int, timeout_s: float) -> Descriptors:
    """The `count` descriptors that `ticket` stands for, in order; the caller owns them.

    Raises:
        TicketError: unknown, spent or expired ticket, or the entry was unloaded meanwhile.
        BadRequestError: not `count` descriptors came. None stays open.
        RuntimeDirError: somebody else listens there.
        CompanionUnavailableError, WaitTimeoutError: nobody answers, or not in `timeout_s`.
    """
    received = Descriptors()
    try:
        with _Exchange(path, timeout_s) as exchange:
            exchange.send(REDEEM + ticket)
            while len(received) < count:
                packet, fds = exchange.receive()
                is_answer = packet[:1] == FDS and len(fds) > 0
                received = Descriptors(received.take() + fds.take())
                if not is_answer or len(received) > count:
                    raise BadRequestError(f"Expected {count} descriptors from {path}; got {len(received)}.")
    except BaseException:
        received.close()
        raise
    return received


def deposit(path: str, ticket: bytes, fds: Sequence[int], timeout_s: float) -> None:
    """Give the companion duplicates of `fds`, in order. The caller keeps and closes its own.

    Raises:
        TicketError: unknown or spent ticket.
        BadRequestError, LimitError: the companion refuses the descriptors.
        RuntimeDirError: somebody else listens there; it got none.
        CompanionUnavailableError, WaitTimeoutError: nobody answers, or not in `timeout_s`.
    """
    with _Exchange(path, timeout_s) as exchange:
        exchange.send(pack_deposit(ticket, len(fds)))
        exchange.receive_ok()
        for batch in batches(fds):
            exchange.send(pack_fds(len(batch)), batch)
        exchange.receive_ok()
