"""An adapter's tensors as an engine on a GPU takes them: in its dtype, in few pieces of page-locked memory.

vLLM casts and page-locks each tensor by itself, which takes seconds for the hundreds that an adapter has. Here the
file goes to the GPU in pieces, which adds up the checksums, casts, and hands back what vLLM then finds done.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch

from vllm_companion_plugin.client.adapter_leases import NOTHING, AdapterFile
from vllm_companion_plugin.client.adapters import DTYPES
from vllm_companion_plugin.core.arena import PIECE_BYTES, piece_count
from vllm_companion_plugin.errors import ManifestError
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.wire.adapter_file import parse, read_text

AHEAD = 8
"""Pieces that are read before anybody waits for one."""
THREADS = 4
WIDEST = 8
"""Bytes of the widest element."""
LOCKED_BYTES = 32 << 20
"""Of page-locked memory in one piece: PyTorch takes the next power of two, and keeps it while a tensor is in it."""


class CannotStage(Exception):
    """Tensors do not begin at multiples of their width, or there is no page-locked memory. vLLM can load them."""


@dataclass(frozen=True)
class _Tensor:
    """One of the file: where its bytes are there, and where they will be, in `dtype`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source: torch.dtype
    start: int
    stop: int
    dtype: torch.dtype
    memory: int
    target: int

    def target_of(self, position: int) -> int:
        return self.target + (position - self.start) // self.source.itemsize * self.dtype.itemsize


@dataclass(frozen=True)
class _Plan:
    """What a file's tensors become.

    Attributes:
        runs: first and last of tensors that follow each other without gaps, here and there.
        sizes: of each piece of memory, in bytes.
    """

    tensors: dict[str, _Tensor]
    runs: list[tuple[_Tensor, _Tensor]]
    sizes: list[int]


class Staging:
    """An adapter's file that is read by threads from now on, for a device.

    Each thread makes one long call, so that whoever made this can do something else in Python meanwhile. The device
    computes in the thread that calls `tensors`, in the order of its current stream. Takes up to 128 MiB of page-locked
    memory, which PyTorch keeps for the next one, and 80 MiB of the device in `tensors`.

    Args:
        file: borrowed until `close`.
        label: of the adapter, for errors.

    Raises:
        CannotStage: there is no page-locked memory.
    """

    def __init__(self, file: AdapterFile, device: torch.device, label: str) -> None:
        self._file = file
        self._device = device
        self._label = label
        self._count = piece_count(file.info.size_bytes)
        size_bytes, ahead = min(PIECE_BYTES, file.info.size_bytes), min(AHEAD, self._count)
        self._buffers = [self._locked(size_bytes) for _ in range(ahead)]
        self._threads = ThreadPoolExecutor(THREADS, "companion-adapter")
        self._reads: dict[int, Future[None]] = {}
        share = -(-ahead // THREADS)
        for first in range(0, ahead, share):
            self._begin_to_read(range(first, min(first + share, ahead)))
        self._begin = 0
        self._part = torch.empty(0, dtype=torch.uint8, device="cpu")

    def tensors(self, names: Collection[str], dtype: torch.dtype | None, verify: str) -> dict[str, torch.Tensor]:
        """These tensors by name, in host memory that the device reads directly. Works once.

        Args:
            dtype: of the result; None: as in the file.
            verify: as the setting.

        Raises:
            IntegrityError: its bytes are not those that were published.
            ManifestError: it is none of ours.
            CannotStage: it cannot be read so.
            torch.OutOfMemoryError: the device has no room.
        """
        text = read_text(self._file.fds[0], self._label)
        try:
            plan = _planned(text, self._file.info.size_bytes, dtype, frozenset(names))
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{self._label} is no adapter of this version: {error!r}.") from error
        memory = [self._locked(size) for size in plan.sizes]
        verification = Verification(self, self._file.info, verify, self._device, at_once=False)
        for piece in range(self._count):
            begin, end = self._load(piece)
            verification.add(piece)
            for first, last in plan.runs:
                start, stop = max(begin, first.start), min(end, last.stop)
                if start < stop:
                    values = self.bytes_at(start, stop - start).view(first.source).to(first.dtype).view(torch.uint8)
                    memory[first.memory].narrow(0, first.target_of(start), values.nbytes).copy_(
                        values, non_blocking=True
                    )
        verification.check(NOTHING, self._label)
        self._wait()
        kinds = {(each.memory, each.dtype) for each in plan.tensors.values()}
        typed = {(number, kind): memory[number].view(kind) for number, kind in kinds}
        return {
            name: typed[each.memory, each.dtype].as_strided(
                each.shape, each.strides, each.target // each.dtype.itemsize
            )
            for name, each in plan.tensors.items()
        }

    def _locked(self, size_bytes: int) -> torch.Tensor:
        """Host memory that the device reads directly."""
        locked = self._device.type == "cuda"
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=locked)
        except RuntimeError as error:
            raise CannotStage(f"{size_bytes} bytes cannot be page-locked: {error}") from error

    def _load(self, piece: int) -> tuple[int, int]:
        """Have a piece on the device; where it begins and ends in the file. Raises `ManifestError`: it is cut off.

        What is computed of a piece there is computed before the next one comes: all of it is in the order of one
        stream.
        """
        self._reads.pop(piece).result()
        self._begin = piece * PIECE_BYTES
        size_bytes = self._size_of(piece)
        buffer = self._buffers[piece % len(self._buffers)]
        self._part = buffer[:size_bytes].to(self._device, non_blocking=True, copy=True)
        following = piece + len(self._buffers)
        if following < self._count:
            self._wait()  # it leaves the buffer before that is read into
            self._begin_to_read(range(following, following + 1))
        return self._begin, self._begin + size_bytes

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Of the piece that was loaded last, on the device."""
        return self._part.narrow(0, offset_bytes - self._begin, size_bytes)

    def _size_of(self, piece: int) -> int:
        return min(PIECE_BYTES, self._file.info.size_bytes - piece * PIECE_BYTES)

    def _begin_to_read(self, pieces: range) -> None:
        """Into their buffers, by one thread. The threads know nothing of the device."""
        buffers = [self._buffers[piece % len(self._buffers)] for piece in pieces]
        targets = [
            memoryview(cast(Any, buffer.numpy()))[: self._size_of(piece)]
            for piece, buffer in zip(pieces, buffers, strict=True)
        ]
        reading = self._threads.submit(_read, self._file.fds[0], targets, pieces.start * PIECE_BYTES)
        self._reads.update(dict.fromkeys(pieces, reading))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Nothing is read any more, or on its way. Idempotent."""
        self._threads.shutdown(cancel_futures=True)
        self._wait()


def _read(fd: int, targets: list[memoryview], begin: int) -> None:
    """Fill memory with what follows in a file. Raises `ManifestError`: it ends before."""
    while targets:
        count = os.preadv(fd, targets, begin)
        if not count:
            raise ManifestError(f"An adapter's file ends at {begin}.")
        begin += count
        while targets and count >= len(targets[0]):
            count -= len(targets.pop(0))
        if count:
            targets[0] = targets[0][count:]


@functools.lru_cache(maxsize=4)
def _planned(text: bytes, size_bytes: int, dtype: torch.dtype | None, names: frozenset[str]) -> _Plan:
    """What these tensors of a file with such a header become. Generations of an adapter have the same header.

    Raises:
        ManifestError, KeyError, TypeError, ValueError: it is no header of ours, or lacks some.
        CannotStage: as `Staging.tensors`.
    """
    header, begin = parse(text, "The adapter")
    plan = _Plan({}, [], [])
    for name, each in sorted(((name, header[name]) for name in names), key=lambda pair: pair[1]["data_offsets"]):
        source = DTYPES[each["dtype"]]
        start, stop = (begin + offset for offset in each["data_offsets"])
        if not 0 <= start <= stop <= size_bytes:
            raise ValueError(f"{name} is at {start} to {stop} of {size_bytes} bytes")
        if start % source.itemsize:
            raise CannotStage(f"{name} is at {start}")
        wanted = dtype or source
        size = (stop - start) // source.itemsize * wanted.itemsize
        if not plan.sizes or plan.sizes[-1] + wanted.itemsize + size > LOCKED_BYTES:
            plan.sizes.append(0)
        target = -(-plan.sizes[-1] // wanted.itemsize) * wanted.itemsize
        shape = tuple(each["shape"])
        if math.prod(shape) * source.itemsize != stop - start:
            raise ValueError(f"{name} has {stop - start} bytes for {list(shape)}")
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensor = _Tensor(shape, strides, source, start, stop, wanted, len(plan.sizes) - 1, target)
        plan.sizes[-1] = target + size
        plan.tensors[name] = tensor
        last = plan.runs[-1][1] if plan.runs else None
        follows = last is not None and (last.stop, last.source, last.memory) == (start, source, tensor.memory)
        if last is not None and follows and last.target_of(last.stop) == target:
            plan.runs[-1] = plan.runs[-1][0], tensor
        else:
            plan.runs.append((tensor, tensor))
    plan.sizes[:] = [-(-size // WIDEST) * WIDEST for size in plan.sizes]
    return plan
