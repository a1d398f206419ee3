"""What a trainer and vLLM's headless process say to each other, on a Unix socket that the one inherits from the other.

One packet is one JSON object, with the descriptors of an arena if it hands over tensors:

    trainer                                  headless process
    {"device", "key_id", "flags"}        ->  {"pid"}             it has built the model
    {"version", "base"}                  ->  {}                  it is the entry's writer
    {"pieces", "kind", "block_sizes"}    ->  {}                  it has copied what is in the arena
    {"end": true}                        ->  {"generation"}      it has committed
    {"end": false}                       ->  {}                  it has stopped writing; only before the first pieces

Instead of any answer {"error", "text", "ends"} may come: an error by its code, and whether the headless process ends,
too. Either side ends when the other one has gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from vllm_companion_plugin.core.polling import readable
from vllm_companion_plugin.errors import BadRequestError, UpdateError, WaitTimeoutError
from vllm_companion_plugin.memory.descriptors import Descriptors, receive

PACKET_BYTES = 128 << 10
"""Linux sends packets of at most net.core.wmem_default bytes, 208 KiB unless it was changed."""
MOST_PIECES_BYTES = PACKET_BYTES - (4 << 10)
"""Of all pieces in a packet, as `Piece.most_bytes` counts them; the rest is what describes the arena."""
MOST_FDS = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor in an arena, contiguous as all of the tensor is.

    Attributes:
        dtype, shape: of the tensor.
        start: its first byte in the tensor; pieces of a tensor come in order, and without gaps.
        offset: its first byte in the arena.
        size_bytes: of the piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    offset: int
    size_bytes: int

    def to_json(self) -> list[Any]:
        return list(astuple(self))

    @staticmethod
    def most_bytes(name: str) -> int:
        """The most bytes that a piece of the tensor `name` takes in a packet."""
        return len(json.dumps(name)) + 256

    @classmethod
    def from_json(cls, value: Any) -> Piece:
        """Raises `BadRequestError`."""
        try:
            name, dtype, shape, start, offset, size_bytes = value
            return cls(str(name), str(dtype), tuple(map(int, shape)), int(start), int(offset), int(size_bytes))
        except (TypeError, ValueError) as error:
            raise BadRequestError(f"{str(value)[:200]!r} is no piece of a tensor.") from error


class Channel:
    """One end of the socket. It owns it.

    Args:
        sock: of type SOCK_SEQPACKET.
        who: the process at the other end, for errors.
        pid: of that process, whose end is noticed although a fork of it has the socket, too. None: the socket's end
            alone is.
    """

    def __init__(self, sock: socket.socket, who: str, pid: int | None = None) -> None:
        self._sock = sock
        self._who = who
        self._process = Descriptors([os.pidfd_open(pid)] if pid is not None else [])

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Raises `UpdateError` if the other process has gone."""
        packet = json.dumps(message).encode()
        assert len(packet) <= PACKET_BYTES
        try:
            socket.send_fds(self._sock, [packet], fds)
        except OSError as error:
            raise self._gone() from error

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], Descriptors]:
        """The next message, and its descriptors, which the caller owns.

        Raises:
            UpdateError: the other process has gone.
            WaitTimeoutError: nothing came for `timeout_s`.
            BadRequestError: what came is no message.
        """
        late = None if timeout_s is None else time.monotonic() + timeout_s
        while not (ready := self._readable(late)):
            if late is not None and time.monotonic() >= late:
                raise WaitTimeoutError(f"Waited {timeout_s:g} s for {self._who}, which has said nothing.")
        if self._sock.fileno() not in ready:
            raise self._gone()
        try:
            packet, fds, _ = receive(self._sock, PACKET_BYTES, MOST_FDS)
        except OSError as error:
            raise self._gone() from error
        if not packet:
            raise self._gone()
        try:
            message = json.loads(packet)
            if not isinstance(message, dict):
                raise ValueError("no object")
        except ValueError as error:
            fds.close()
            raise BadRequestError(f"A packet of {self._who} is no message: {error}.") from error
        return message, fds

    def _readable(self, late: float | None) -> set[int]:
        left_s = None if late is None else max(0.0, late - time.monotonic())
        return readable([self._sock.fileno(), *self._process], left_s)

    def _gone(self) -> UpdateError:
        return UpdateError(f"{self._who} has ended.")

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()
        self._process.close()
