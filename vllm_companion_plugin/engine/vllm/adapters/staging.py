"""An adapter's tensors as an engine on a GPU takes them: in its dtype, in few pieces of page-locked memory.

vLLM casts and page-locks each tensor by itself, which takes seconds for the hundreds that an adapter has. Here the
file goes to the GPU in pieces, which adds up the checksums, casts, and hands back what vLLM then finds done.
"""

from __future__ import annotations

import contextlib
import functools
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

AHEAD = 4
"""Pieces that are read at once, each by a thread."""
LOCKED_BYTES = 32 << 20
"""Of page-locked memory in one piece: PyTorch takes the next power of two, and keeps it while a tensor is in it."""


class Unaligned(ValueError):
    """Tensors do not begin at multiples of their width, so nothing can be staged."""


@dataclass(frozen=True)
class _Tensor:
    """One of the file: where its bytes are there, and where they will be, in `dtype`."""

    shape: tuple[int, ...]
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


def stage(
    file: AdapterFile,
    names: Collection[str] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    verify: str,
    label: str,
) -> dict[str, torch.Tensor]:
    """These tensors of an adapter's file by name, in host memory that the device reads directly.

    Takes up to 80 MiB of the device meanwhile.

    Args:
        file: borrowed.
        names: None: all of them.
        dtype: of the result; None: as in the file.
        verify: as the setting.

    Raises:
        IntegrityError: its bytes are not those that were published.
        ManifestError: it is none of ours.
        Unaligned: it cannot be read so.
    """
    text = read_text(file.fds[0], label)
    try:
        plan = _planned(text, file.info.size_bytes, dtype, None if names is None else frozenset(names))
    except Unaligned:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{label} is no adapter of this version: {error!r}.") from error
    lock = device.type == "cuda"
    memory = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=lock) for size in plan.sizes]
    here = torch.cuda.device(device) if lock else contextlib.nullcontext()
    with here, contextlib.closing(_Reading(file, device)) as reading:
        verification = Verification(reading, file.info, verify, device, at_once=False)
        for piece in range(piece_count(file.info.size_bytes)):
            begin, end = reading.load(piece)
            verification.add(piece)
            for first, last in plan.runs:
                start, stop = max(begin, first.start), min(end, last.stop)
                if start < stop:
                    values = reading.bytes_at(start, stop - start).view(first.source).to(first.dtype).view(torch.uint8)
                    memory[first.memory].narrow(0, first.target_of(start), values.nbytes).copy_(
                        values, non_blocking=True
                    )
        verification.check(NOTHING, label)
    return {
        name: memory[each.memory][each.target : each.target_of(each.stop)].view(each.dtype).view(each.shape)
        for name, each in plan.tensors.items()
    }


class _Reading:
    """Pieces of a file on a device, one at a time, in order; threads read the next ones meanwhile.

    What is computed of a piece there is computed before the next one comes: all of it is in the order of one stream.
    The threads know nothing of the device.
    """

    def __init__(self, file: AdapterFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        size_bytes, count = min(PIECE_BYTES, file.info.size_bytes), piece_count(file.info.size_bytes)
        self._buffers = [
            torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
            for _ in range(min(AHEAD, count))
        ]
        self._threads = ThreadPoolExecutor(len(self._buffers), "companion-adapter")
        self._reads: dict[int, Future[int]] = {}
        for piece in range(len(self._buffers)):
            self._reads[piece] = self._threads.submit(self._read, piece)
        self._begin = 0
        self._part = torch.empty(0, dtype=torch.uint8, device="cpu")

    def load(self, piece: int) -> tuple[int, int]:
        """Have a piece on the device; where it begins and ends in the file. Raises `ManifestError`: it is cut off."""
        size_bytes = self._reads.pop(piece).result()
        self._begin = piece * PIECE_BYTES
        buffer = self._buffers[piece % len(self._buffers)]
        self._part = buffer[:size_bytes].to(self._device, non_blocking=True, copy=True)
        following = piece + len(self._buffers)
        if following < piece_count(self._file.info.size_bytes):
            if self._device.type == "cuda":  # it leaves the buffer before that is read into
                torch.cuda.current_stream(self._device).record_event().synchronize()
            self._reads[following] = self._threads.submit(self._read, following)
        return self._begin, self._begin + size_bytes

    def _read(self, piece: int) -> int:
        begin = piece * PIECE_BYTES
        size_bytes = min(PIECE_BYTES, self._file.info.size_bytes - begin)
        target = memoryview(cast(Any, self._buffers[piece % len(self._buffers)].numpy()))[:size_bytes]
        done = 0
        while done < size_bytes:
            count = os.preadv(self._file.fds[0], [target[done:]], begin + done)
            if not count:
                raise ManifestError(f"An adapter's file ends at {begin + done} of {self._file.info.size_bytes} bytes.")
            done += count
        return size_bytes

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        return self._part.narrow(0, offset_bytes - self._begin, size_bytes)

    def close(self) -> None:
        """Nothing is on its way any more."""
        self._threads.shutdown(cancel_futures=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@functools.lru_cache(maxsize=4)
def _planned(text: bytes, size_bytes: int, dtype: torch.dtype | None, names: frozenset[str] | None) -> _Plan:
    """What these tensors of a file with such a header become. Generations of an adapter have the same header.

    Raises:
        ManifestError, KeyError, TypeError, ValueError: it is no header of ours, or lacks some.
        Unaligned: as `stage`.
    """
    header, begin = parse(text, "The adapter")
    names = names if names is not None else frozenset(header) - {"__metadata__"}
    plan = _Plan({}, [], [])
    for name, each in sorted(((name, header[name]) for name in names), key=lambda pair: pair[1]["data_offsets"]):
        source = DTYPES[each["dtype"]]
        start, stop = (begin + offset for offset in each["data_offsets"])
        if not 0 <= start <= stop <= size_bytes:
            raise ValueError(f"{name} is at {start} to {stop} of {size_bytes} bytes")
        if start % source.itemsize:
            raise Unaligned(f"{name} is at {start}")
        wanted = dtype or source
        size = (stop - start) // source.itemsize * wanted.itemsize
        if not plan.sizes or plan.sizes[-1] + wanted.itemsize + size > LOCKED_BYTES:
            plan.sizes.append(0)
        target = -(-plan.sizes[-1] // wanted.itemsize) * wanted.itemsize
        tensor = _Tensor(tuple(each["shape"]), source, start, stop, wanted, len(plan.sizes) - 1, target)
        plan.sizes[-1] = target + size
        plan.tensors[name] = tensor
        last = plan.runs[-1][1] if plan.runs else None
        follows = last is not None and (last.stop, last.source, last.memory) == (start, source, tensor.memory)
        if last is not None and follows and last.target_of(last.stop) == target:
            plan.runs[-1] = plan.runs[-1][0], tensor
        else:
            plan.runs.append((tensor, tensor))
    return plan
