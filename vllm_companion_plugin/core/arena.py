"""Shape and checksums of an arena: data, which owns nothing."""

from __future__ import annotations

from dataclasses import dataclass

ARENA_CHECKSUM = "rows-columns-64"

PIECE_BYTES = 16 << 20
"""What one checksum of `ARENA_CHECKSUM` is about."""


def piece_count(size_bytes: int) -> int:
    """Pieces of an arena, the last one maybe shorter."""
    return -(-size_bytes // PIECE_BYTES)


@dataclass(frozen=True)
class Checksums:
    """What an arena's bytes were when they were published; empty if nobody computed them.

    Attributes:
        algorithm: `ARENA_CHECKSUM`, or one of another version, which cannot be compared here.
        values: unsigned 64-bit numbers, one a piece.
    """

    algorithm: str = ""
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArenaInfo:
    """Shape of an arena: data, not a handle; it owns nothing.

    Attributes:
        kind: of memory, a name in `memory.kinds.KINDS`.
        block_sizes: bytes of each allocation, in address order; one descriptor each.
    """

    kind: str
    block_sizes: tuple[int, ...]
    checksums: Checksums = Checksums()

    @property
    def size_bytes(self) -> int:
        return sum(self.block_sizes)
