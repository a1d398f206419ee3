"""Tensors that go from one process to another of the same device, through arenas of the one that gives them.

Each arena is filled, sealed, mapped by the other process, copied from and closed. So neither process has more than one
at a time, whatever comes, and a tensor may take several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.filling import in_order
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.wire.handover import MOST_PIECES_BYTES, Piece

_ALIGNMENT = 256
"""Of each piece in an arena, so that a device copies it at full speed."""

HandOver = Callable[[Sequence[Piece], memory.Arena], None]
"""Tells the other process what is in an arena, and returns once that has copied it."""


class Giving:
    """The end that gives tensors.

    Args:
        kind: of the arenas' memory.
        size_bytes: of each arena; rounded up to what the kind allocates.

    Attributes:
        began: whether anything was handed over.

    Raises:
        ArenaError: the device does not answer.
    """

    def __init__(self, kind: str, size_bytes: int, device: torch.device, hand_over: HandOver) -> None:
        self._kind = kind
        self._device = device
        self._hand_over = hand_over
        granularity = memory.granularity(kind, device.index)
        self._size_bytes = -(-size_bytes // granularity) * granularity
        self._writer: memory.ArenaWriter | None = None
        self._pieces: list[Piece] = []
        self._used = self._pieces_bytes = 0
        self.began = False

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor, wherever it is; the caller may change it afterwards.

        Raises:
            ArenaError: there is no memory for an arena.
            CompanionError: as `hand_over`.
        """
        source = tensor.detach().to(self._device).contiguous()
        dtype, shape, start = str(source.dtype).removeprefix("torch."), tuple(source.shape), 0
        while True:
            self._used = -(-self._used // _ALIGNMENT) * _ALIGNMENT
            if self._used >= self._size_bytes or self._pieces_bytes + Piece.most_bytes(name) > MOST_PIECES_BYTES:
                self.flush()
            size_bytes = min(source.nbytes - start, self._size_bytes - self._used)
            if size_bytes:
                with in_order(self._device):
                    self._open().write(self._used, source.data_ptr() + start, size_bytes)
            self._pieces.append(Piece(name, dtype, shape, start, self._used, size_bytes))
            self._pieces_bytes += Piece.most_bytes(name)
            self._used += size_bytes
            start += size_bytes
            if start == source.nbytes:
                break
        self._open().flush()  # the source may go

    def _open(self) -> memory.ArenaWriter:
        if self._writer is None:
            self._writer = memory.create(self._kind, self._size_bytes, self._device.index)
            self._writer.add_block(self._size_bytes)
        return self._writer

    def flush(self) -> None:
        """Hand over what has come, and wait until it was copied. Raises as `hand_over`."""
        if self._pieces:
            with contextlib.closing(self._open().seal()) as arena:
                self.began = True
                self._hand_over(self._pieces, arena)
            self.close()

    def close(self) -> None:
        """Forget what was not handed over. Idempotent."""
        if self._writer is not None:
            self._writer.abort()
        self._writer, self._pieces = None, []
        self._used = self._pieces_bytes = 0


class Taking:
    """The end that takes them: each into memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._partial: dict[str, tuple[torch.Tensor, int]] = {}  # with the bytes that have come

    def take(self, message: dict[str, Any], fds: Descriptors) -> list[tuple[str, torch.Tensor]]:
        """Copy what an arena has; the tensors that are complete then, in order.

        Args:
            message: of the other process, which describes pieces and arena.
            fds: of the arena; owned from now on.

        Raises:
            ArenaError: they are no such arena.
            BadRequestError: the pieces do not fit each other.
            ManifestError: a dtype that this torch does not have, or a piece outside the arena.
        """
        with fds:
            try:
                info = ArenaInfo(str(message["kind"]), tuple(map(int, message["block_sizes"])))
                pieces = list(map(Piece.from_json, message["pieces"]))
            except (KeyError, TypeError, ValueError) as error:
                raise BadRequestError(f"What was handed over is not described: {error!r}.") from error
            taken = Descriptors(fds.take())
        complete = []
        with contextlib.closing(memory.open_arena(info, taken, self._device.index)) as arena:
            views = ArenaViews(arena, info.size_bytes, self._device)
            for piece in pieces:
                tensor = self._put(piece, views)
                if tensor is not None:
                    complete.append((piece.name, tensor))
        return complete

    def _put(self, piece: Piece, views: ArenaViews) -> torch.Tensor | None:
        """The tensor if it is complete."""
        tensor, come = self._partial.pop(piece.name, (None, 0))
        if tensor is None:
            tensor = torch.empty(piece.shape, dtype=dtype_of(piece.dtype), device=self._device)
        end = piece.start + piece.size_bytes
        if not come == piece.start <= end <= tensor.nbytes:
            raise BadRequestError(f"Bytes {piece.start} to {end} of {piece.name} came after {come} of {tensor.nbytes}.")
        if piece.size_bytes:
            target = tensor.reshape(-1).view(torch.uint8)[piece.start : end]
            target.copy_(views.bytes_at(piece.offset, piece.size_bytes))
        if end == tensor.nbytes:
            return tensor
        self._partial[piece.name] = tensor, end
        return None

    def end(self) -> None:
        """Raise `BadRequestError` if a tensor is not complete."""
        if self._partial:
            raise BadRequestError(f"Of {', '.join(self._partial)} not all bytes came.")
