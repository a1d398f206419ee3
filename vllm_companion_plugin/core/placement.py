"""A pure rule for the places of storages in an arena: their offsets, and the chunks in which they are copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 512
"""Alignment of a storage in bytes, at least that of CUDA allocations: no kernel gets a worse address than before."""

HOST_ALIGNMENT = 64
"""What PyTorch gives host memory. Beyond it an address is chance, and places must be the same after another load."""

CHUNK_BYTES = 960 << 20
"""Upper bound of a chunk in bytes, unless one storage alone is larger. Torch cannot return segments that are partly
used; with these the extra memory of packing stays below 1 GiB."""


@dataclass(frozen=True)
class Chunk:
    """Storages `first` to `last` (exclusive), which are copied together into one block."""

    first: int
    last: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Placement:
    """The offset of each storage, in the given order, and the chunks, in address order."""

    offsets: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return self.chunks[-1].offset_bytes + self.chunks[-1].size_bytes if self.chunks else 0


def plan(
    sizes: Sequence[int],
    misalignments: Sequence[int],
    granularity: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> Placement:
    """Place storages one behind the other.

    Args:
        sizes: bytes of each storage.
        misalignments: address of each storage modulo `ALIGNMENT` (or `HOST_ALIGNMENT`), which the plan keeps: PyTorch
            and vLLM choose kernels by alignment, and a better alignment could select another kernel than before.
        granularity: chunk sizes are multiples of this many bytes.
        chunk_bytes: a chunk holds at most this many bytes, or one larger storage.
    """
    offsets: list[int] = []
    chunks: list[Chunk] = []
    first, start, position = 0, 0, 0
    for index, (size, misalignment) in enumerate(zip(sizes, misalignments, strict=True)):
        offset = _align(position, ALIGNMENT) + misalignment
        if index > first and _align(offset + size, granularity) - start > chunk_bytes:
            chunks.append(Chunk(first, index, start, _align(position, granularity) - start))
            first, start = index, chunks[-1].offset_bytes + chunks[-1].size_bytes
            offset = _align(start, ALIGNMENT) + misalignment
        offsets.append(offset)
        position = offset + size
    if sizes:
        chunks.append(Chunk(first, len(sizes), start, max(_align(position, granularity) - start, granularity)))
    return Placement(tuple(offsets), tuple(chunks))


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
