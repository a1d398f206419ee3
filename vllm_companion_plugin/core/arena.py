"""Shape and checksums of an arena, as data. This data owns no memory."""

from __future__ import annotations

from dataclasses import dataclass

ARENA_CHECKSUM = "rows-columns-64"

PIECE_BYTES = 16 << 20
"""Bytes of an arena that one checksum of `ARENA_CHECKSUM` covers."""


def piece_count(size_bytes: int) -> int:
    """Return the number of pieces of an arena; the last piece may be shorter."""
    return -(-size_bytes // PIECE_BYTES)


@dataclass(frozen=True)
class Checksums:
    """Checksums of an arena's bytes at their publication; empty if the publisher computed none.

    Attributes:
        algorithm: `ARENA_CHECKSUM`, or the name in another version, whose values this version cannot compare.
        values: unsigned 64-bit numbers, one for each piece.
    """

    algorithm: str = ""
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArenaInfo:
    """Shape of an arena. This is data and no handle: it owns no memory.

    Attributes:
        kind: of memory, a name in `memory.kinds.KINDS`.
        block_sizes: bytes of each allocation, in address order. Each allocation has one descriptor.
        trained: whether one process, its owner, goes on writing while others map it. It has no checksums then.
    """

    kind: str
    block_sizes: tuple[int, ...]
    checksums: Checksums = Checksums()
    trained: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(self.block_sizes)
