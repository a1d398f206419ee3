"""An adapter's tensors as an engine on a GPU takes them: in its dtype, in one piece of page-locked memory.

vLLM casts and page-locks each tensor by itself, which takes seconds for the hundreds that an adapter has. Here the
file goes to the GPU in pieces, which adds up the checksums, casts, and hands back what vLLM then finds done.
"""

from __future__ import annotations

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
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


@dataclass(frozen=True)
class _Tensor:
    """One of the file: where its bytes are there, and where they will be, in `dtype`."""

    shape: tuple[int, ...]
    source: torch.dtype
    start: int
    stop: int
    dtype: torch.dtype
    target: int

    def target_of(self, position: int) -> int:
        return self.target + (position - self.start) // self.source.itemsize * self.dtype.itemsize


def stage(
    file: AdapterFile, dtype: torch.dtype | None, device: torch.device, verify: str, label: str
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file by name, in host memory that the device reads directly.

    Takes up to 48 MiB of the device meanwhile.

    Args:
        file: borrowed.
        dtype: of the result; None: as in the file.
        verify: as the setting.

    Raises:
        IntegrityError: its bytes are not those that were published.
        ManifestError: it is none of ours.
    """
    try:
        tensors, runs, size_bytes = _planned(read_text(file.fds[0], label), file.info.size_bytes, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{label} is no adapter of this version: {error!r}.") from error
    locked = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with contextlib.closing(_Reading(file, device)) as reading:
        verification = Verification(reading, file.info, verify, device, at_once=False)
        for piece in range(piece_count(file.info.size_bytes)):
            begin, end = reading.load(piece)
            verification.add(piece)
            for first, last in runs:
                start, stop = max(begin, first.start), min(end, last.stop)
                if start < stop:
                    values = reading.bytes_at(start, stop - start).view(first.source).to(first.dtype).view(torch.uint8)
                    offset = first.target_of(start)
                    locked[offset : offset + values.nbytes].copy_(values, non_blocking=True)
        verification.check(NOTHING, label)
    return {
        name: locked[each.target : each.target_of(each.stop)].view(each.dtype).view(each.shape)
        for name, each in tensors.items()
    }


class _Reading:
    """Pieces of a file on a device, one at a time, in order; threads read the next ones meanwhile.

    What is computed of a piece there is computed before the next one comes: all of it is in the order of one stream.
    """

    def __init__(self, file: AdapterFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        size_bytes = min(PIECE_BYTES, file.info.size_bytes)
        count = piece_count(file.info.size_bytes)
        self._buffers = [
            torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(min(AHEAD, count))
        ]
        self._landed: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._threads = ThreadPoolExecutor(len(self._buffers), "companion-adapter")
        self._reads = {piece: self._threads.submit(self._read, piece) for piece in range(len(self._buffers))}
        self._begin = 0
        self._part = torch.empty(0, dtype=torch.uint8)

    def load(self, piece: int) -> tuple[int, int]:
        """Have a piece on the device; where it begins and ends in the file. Raises `ManifestError`: it is cut off."""
        size_bytes = self._reads.pop(piece).result()
        number = piece % len(self._buffers)
        self._begin = piece * PIECE_BYTES
        self._part = self._buffers[number][:size_bytes].to(self._device, non_blocking=True, copy=True)
        if self._device.type == "cuda":
            self._landed[number] = torch.cuda.current_stream(self._device).record_event()
        following = piece + len(self._buffers)
        if following < piece_count(self._file.info.size_bytes):
            self._reads[following] = self._threads.submit(self._read, following)
        return self._begin, self._begin + size_bytes

    def _read(self, piece: int) -> int:
        landed = self._landed[piece % len(self._buffers)]
        if landed is not None:
            landed.synchronize()
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
def _planned(
    text: bytes, size_bytes: int, dtype: torch.dtype | None
) -> tuple[dict[str, _Tensor], list[tuple[_Tensor, _Tensor]], int]:
    """What is in a file of such a header, in its order; first and last of each run; and how many bytes that will be.

    Generations of an adapter have the same header.

    Raises:
        ManifestError, KeyError, TypeError, ValueError: it is no header of ours.
    """
    header, begin = parse(text, "The adapter")
    tensors: dict[str, _Tensor] = {}
    target = 0
    named = {name: each for name, each in header.items() if name != "__metadata__"}
    for name, each in sorted(named.items(), key=lambda pair: pair[1]["data_offsets"]):
        source = DTYPES[each["dtype"]]
        start, stop = (begin + offset for offset in each["data_offsets"])
        if start % source.itemsize or not 0 <= start <= stop <= size_bytes:
            raise ValueError(f"{name} is at {start} to {stop} of {size_bytes} bytes")
        tensors[name] = tensor = _Tensor(tuple(each["shape"]), source, start, stop, dtype or source, target)
        target = tensor.target_of(stop)
    return tensors, _runs(list(tensors.values())), target


def _runs(tensors: list[_Tensor]) -> list[tuple[_Tensor, _Tensor]]:
    """First and last of those that follow each other without gaps in one dtype."""
    runs: list[tuple[_Tensor, _Tensor]] = []
    for tensor in tensors:
        if runs and (runs[-1][1].stop, runs[-1][1].source) == (tensor.start, tensor.source):
            runs[-1] = runs[-1][0], tensor
        else:
            runs.append((tensor, tensor))
    return runs
