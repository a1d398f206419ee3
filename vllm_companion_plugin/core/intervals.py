"""Which parts of a range of bytes were written, in any order and perhaps twice, and which were not. Pure."""

from __future__ import annotations


class Intervals:
    """Parts of a range, each from its first byte to the one after its last."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> None:
        """Mark a part. One that continues the part before it costs nothing."""
        if self._parts and self._parts[-1][1] == start:
            start = self._parts.pop()[0]
        self._parts.append((start, stop))

    def gaps(self, size_bytes: int) -> list[tuple[int, int]]:
        """The parts of `size_bytes` bytes that nobody has marked, in order."""
        found, done = [], 0
        for start, stop in sorted(self._parts):
            if start > done:
                found.append((done, start))
            done = max(done, stop)
        if done < size_bytes:
            found.append((done, size_bytes))
        return found
