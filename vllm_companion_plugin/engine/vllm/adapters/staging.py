"""An adapter's tensors as an engine on a GPU takes them: in its dtype, in one piece of page-locked memory.

vLLM casts and page-locks each tensor by itself, which takes seconds for the hundreds that an adapter has. Here the
file goes to the GPU in pieces, which adds up the checksums, casts, and hands back what vLLM then finds done.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.adapter_leases import NOTHING, AdapterFile
from vllm_companion_plugin.client.adapters import DTYPES
from vllm_companion_plugin.core.arena import PIECE_BYTES, piece_count
from vllm_companion_plugin.errors import ManifestError
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.wire.adapter_file import read_header


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

    Takes up to 32 MiB of the device meanwhile.

    Args:
        file: borrowed.
        dtype: of the result; None: as in the file.
        verify: as the setting.

    Raises:
        IntegrityError: its bytes are not those that were published.
        ManifestError: it is none of ours.
    """
    tensors, size_bytes = _planned(file, dtype, label)
    locked = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with contextlib.closing(arenas.open_arena(file.info, file.fds.dup())) as arena:
        views = _OnDevice(ArenaViews(arena, file.info.size_bytes, torch.device("cpu")), device)
        verification = Verification(views, file.info, verify, device, at_once=False)
        runs = _runs(list(tensors.values()))
        for piece in range(piece_count(file.info.size_bytes)):
            begin = piece * PIECE_BYTES
            end = min(begin + PIECE_BYTES, file.info.size_bytes)
            views.load(begin, end)
            verification.add(piece)
            for first, last in runs:
                start, stop = max(begin, first.start), min(end, last.stop)
                if start < stop:
                    values = views.bytes_at(start, stop - start).view(first.source).to(first.dtype).view(torch.uint8)
                    offset = first.target_of(start)
                    locked[offset : offset + values.nbytes].copy_(values, non_blocking=True)
        verification.check(NOTHING, label)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return {
        name: locked[each.target : each.target_of(each.stop)].view(each.dtype).view(each.shape)
        for name, each in tensors.items()
    }


class _OnDevice:
    """One part of an arena at a time, on a device. What is computed of it there is computed before the next one comes:
    both are in the order of one stream."""

    def __init__(self, host: ArenaViews, device: torch.device) -> None:
        self._host = host
        self._device = device
        self._begin = 0
        self._part = torch.empty(0, dtype=torch.uint8)

    def load(self, begin: int, end: int) -> None:
        self._begin = begin
        self._part = self._host.bytes_at(begin, end - begin).to(self._device)

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        return self._part.narrow(0, offset_bytes - self._begin, size_bytes)


def _planned(file: AdapterFile, dtype: torch.dtype | None, label: str) -> tuple[dict[str, _Tensor], int]:
    """What is in the file, in its order, and how many bytes that will be."""
    header, begin = read_header(file.fds[0], label)
    tensors: dict[str, _Tensor] = {}
    target = 0
    try:
        named = {name: each for name, each in header.items() if name != "__metadata__"}
        for name, each in sorted(named.items(), key=lambda pair: pair[1]["data_offsets"]):
            source = DTYPES[each["dtype"]]
            start, stop = (begin + offset for offset in each["data_offsets"])
            tensor = _Tensor(tuple(each["shape"]), source, start, stop, dtype or source, target)
            if start % source.itemsize or not 0 <= start <= stop <= file.info.size_bytes:
                raise ManifestError(f"{label} has {name} at {start} to {stop} of {file.info.size_bytes} bytes.")
            tensors[name] = tensor
            target = tensor.target_of(stop)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{label} is no adapter of this version: {error!r}.") from error
    return tensors, target


def _runs(tensors: list[_Tensor]) -> list[tuple[_Tensor, _Tensor]]:
    """First and last of those that follow each other without gaps in one dtype."""
    runs: list[tuple[_Tensor, _Tensor]] = []
    for tensor in tensors:
        if runs and (runs[-1][1].stop, runs[-1][1].source) == (tensor.start, tensor.source):
            runs[-1] = runs[-1][0], tensor
        else:
            runs.append((tensor, tensor))
    return runs
