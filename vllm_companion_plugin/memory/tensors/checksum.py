"""Checksums of an arena, computed where its memory is: by torch, or by a kernel of memory/tensors/cuda_sums.py.

The arena is taken in pieces of 16 MiB, a piece as a matrix of 64-bit words. Its checksum is the sum of all words,
each times a weight of its row plus one of its column, modulo 2**64. The weights are fixed random numbers whose sum is
odd, so one damaged word is always found; random damage of more words passes with a chance of about 2**-63. Not found
is what cancels in such sums: the highest bit of an even number of words, or the same change in two corners of a
rectangle and its opposite in the other two. This guards against accidents (memory errors, a stray kernel, blocks in
the wrong order), not against a forger, who could publish what he likes.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, PIECE_BYTES, ArenaInfo, Checksums, piece_count
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.errors import ArenaError, IntegrityError

logger = logging.getLogger("vllm.companion")

ROW_WORDS = 512
ROW_BYTES = ROW_WORDS * 8
ROWS = PIECE_BYTES // ROW_BYTES
BATCH = 16
"""Pieces at once. Larger batches need more than 1 MiB of sums, for which torch reserves 20 MiB instead of 2."""
SAMPLED_SHARE = 16
"""`sample` checks one of so many pieces, and never less than `SAMPLED_AT_LEAST`."""
SAMPLED_AT_LEAST = 4
_SIGN = 1 << 63


@functools.cache
def prepare(device: torch.device) -> None:
    """Compile the kernel in a thread, once in a process, so that the first arena need not wait for the compiler."""
    if device.type == "cuda":
        threading.Thread(target=_has_kernel, args=(device,), name="companion-kernel", daemon=True).start()


class Bytes(Protocol):
    """What checksums are computed of, where it is: an arena's bytes, or a copy of them."""

    def bytes_at(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """A dense uint8 tensor of these bytes."""


class Summing:
    """Computes checksums of an arena. A GPU computes in the order of the current stream, and nobody waits."""

    def __init__(self, views: Bytes, size_bytes: int, device: torch.device) -> None:
        self._views = views
        self._size_bytes = size_bytes
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._done = 0
        self._count = 0
        with self._in_order():
            self._sums = torch.zeros(piece_count(size_bytes), dtype=torch.int64, device=device)
            self._weights = None if _has_kernel(device) else _weights(device)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """While open, the device is current, and its current stream comes behind all that was summed so far.

        The caller may work on another GPU, or change streams meanwhile. `torch.cuda.stream` would do, but after it
        vLLM takes the default stream for one that was chosen, and captures CUDA graphs on it, which fails.
        """
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            if self._stream is not None:
                current.wait_stream(self._stream)
            self._stream = current
            yield

    def extend(self, until_bytes: int) -> None:
        """Sum the pieces that end by `until_bytes`, from where the last call ended."""
        whole = until_bytes // PIECE_BYTES if until_bytes < self._size_bytes else piece_count(self._size_bytes)
        if whole > self._done:
            self.add(range(self._done, whole))
            self._done = whole

    def add(self, pieces: Iterable[int]) -> None:
        """Sum these pieces, each once. Pieces that follow each other are summed together."""
        with self._in_order():
            for first, last in _runs(pieces):
                start, stop = first * PIECE_BYTES, min(last * PIECE_BYTES, self._size_bytes)
                # Our arenas are multiples of 4 KiB.
                words = self._views.bytes_at(start, stop - start - stop % ROW_BYTES).view(torch.int64)
                sums = self._sums.narrow(0, self._count, last - first)  # raises where a slice would be shorter
                self._count += last - first
                if not words.numel():
                    continue
                if self._weights is not None:
                    _sum(words, *self._weights, sums)
                    continue
                from vllm_companion_plugin.memory.tensors import cuda_sums

                assert self._stream is not None
                index, rows, stream = self._device.index, words.numel() // ROW_WORDS, self._stream.cuda_stream
                cuda_sums.launch(index, ROWS, words.data_ptr(), rows, sums.data_ptr(), stream)

    def values(self) -> tuple[int, ...]:
        """The sums of the pieces that were added, in that order. Waits for the device."""
        with self._in_order():
            return tuple(value % (1 << 64) for value in self._sums[: self._count].tolist())

    def checksums(self) -> Checksums:
        """The checksums of the whole arena, after `extend` to its end. Waits for the device."""
        return Checksums(ARENA_CHECKSUM, self.values())


class Verification:
    """Compares an arena with the checksums it was published with, while its caller does something else.

    Args:
        mode: "full", "sample" (pieces chosen anew each time) or "off".
        at_once: the whole arena is there; else `add` is told of each piece, in order, while that is there.

    Attributes:
        pieces: which are compared; empty if there is nothing to compare with.
    """

    def __init__(self, views: Bytes, info: ArenaInfo, mode: str, device: torch.device, *, at_once: bool = True) -> None:
        self._info = info
        self.pieces = _chosen(info, mode)
        self._summing = Summing(views, info.size_bytes, device) if self.pieces else None
        if self._summing is not None and at_once:
            self._summing.add(self.pieces)

    def add(self, piece: int) -> None:
        """Sum this piece if it is one of those that are compared."""
        if self._summing is not None and piece in self.pieces:
            self._summing.add([piece])

    def check(self, manifest: Manifest, label: str) -> str:
        """Raise `IntegrityError` unless all sums are equal. Returns what was done. Waits for the device."""
        known = self._info.checksums.values
        if self._summing is None:
            return "not verified: it is trained, and has no checksums" if self._info.trained else "not verified"
        sums = zip(self.pieces, self._summing.values(), strict=True)
        damaged = [piece for piece, value in sums if value != known[piece]]
        if damaged:
            names = _names(manifest, damaged[0] * PIECE_BYTES, (damaged[0] + 1) * PIECE_BYTES)
            raise IntegrityError(
                f"{len(damaged)} of {len(self.pieces)} pieces of {label} are not what was published; the first holds "
                f"{', '.join(names) or 'padding'}. Nobody should use this copy: `vllm-companion unload MODEL --force` "
                "drops it, and the next engine loads anew."
            )
        return f"verified {len(self.pieces)} of {len(known)} pieces"


def _chosen(info: ArenaInfo, mode: str) -> list[int]:
    if mode == "off" or info.checksums.algorithm != ARENA_CHECKSUM:
        return []
    count = len(info.checksums.values)
    if mode == "full":
        return list(range(count))
    # Not the module's generator, which vLLM seeds with the same number in every engine.
    chosen = random.SystemRandom().sample(range(count), min(count, max(SAMPLED_AT_LEAST, count // SAMPLED_SHARE)))
    return sorted(chosen)


def _has_kernel(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        from vllm_companion_plugin.memory.tensors import cuda_sums

        cuda_sums.compiled(device.index, ROWS)
    except (ArenaError, ImportError) as error:
        logger.info("torch computes checksums, in two readings and with 264 MiB more: %s", error)
        return False
    return True


def _sum(words: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, sums: torch.Tensor) -> None:
    """Sum pieces with torch. The last piece may be shorter."""
    whole = words.numel() // (ROWS * ROW_WORDS)
    pieces = words[: whole * ROWS * ROW_WORDS].view(whole, ROWS, ROW_WORDS)
    batches = [pieces[at : at + BATCH] for at in range(0, whole, BATCH)]
    if rest := words.numel() - pieces.numel():
        batches.append(words[-rest:].view(1, rest // ROW_WORDS, ROW_WORDS))
    done = 0
    for batch in batches:
        by_row, by_column = batch.sum(2), batch.sum(1)
        sums[done : done + len(batch)] = (by_row * rows[: by_row.shape[1]]).sum(1) + (by_column * columns).sum(1)
        done += len(batch)


def _weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the rows, which are even, and of the columns, which are odd; int64."""
    numbers = torch.arange(1, ROWS + ROW_WORDS + 1, dtype=torch.int64, device=device)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # as SplitMix64 mixes a counter
        numbers = numbers * (factor - 2 * _SIGN if factor >= _SIGN else factor)
        numbers = numbers ^ (numbers >> 31)
    return numbers[:ROWS] * 2, numbers[ROWS:] * 2 + 1


def _runs(pieces: Iterable[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece:
            runs[-1] = (runs[-1][0], piece + 1)
        else:
            runs.append((piece, piece + 1))
    return runs


def _names(manifest: Manifest, start: int, stop: int, limit: int = 3) -> list[str]:
    """The names of tensors with bytes in this part of the arena."""
    inside = {
        index
        for index, storage in enumerate(manifest.storages)
        if storage.offset_bytes < stop and start < storage.offset_bytes + storage.size_bytes
    }
    found = (
        f"{module.path}.{slot.name}".lstrip(".")
        for module in manifest.modules
        for slot in module.slots
        if manifest.tensors[slot.tensor].storage in inside
    )
    return [name for name, _ in zip(found, range(limit), strict=False)]
