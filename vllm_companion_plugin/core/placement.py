"""Where each storage goes: offsets, and the chunks in which they are copied. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 512
"""At least what CUDA allocations guarantee, so that no kernel sees a worse address than before."""

CHUNK_BYTES = 960 << 20
"""Upper bound of a chunk, unless one storage alone is larger. Below 1 GiB, so that with what torch cannot
return of partly used segments the extra memory of packing stays below it."""


@dataclass(frozen=True)
class Chunk:
    """Storages `first` to `last` (exclusive), copied together into one block."""

    first: int
    last: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Placement:
    """Offset of each storage, in the order given, and the chunks, in address order."""

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
    """Place storages of `sizes` bytes one behind the other.

    Args:
        sizes: bytes of each storage.
        misalignments: address of each storage modulo `ALIGNMENT`, which is kept: kernels are
            chosen by alignment, and a better one could choose another kernel than before.
        granularity: chunk sizes are multiples of this many bytes.
        chunk_bytes: a chunk holds at most this, or one larger storage.
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
