"""A range of addresses, apart from the memory behind it.

What views the range (tensors, captured CUDA graphs) knows addresses. So memory can go from there and come back, or
other memory take its place, as long as it is laid out alike and nobody uses the range meanwhile.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing


@dataclass(frozen=True)
class Blocks:
    """What can be mapped, one block behind the other.

    Attributes:
        sizes: bytes of each block.
        fds: a descriptor of each; borrowed, and needed for as long as they are mapped.
        writable: whether this process may write to them.
    """

    sizes: tuple[int, ...]
    fds: Sequence[int]
    writable: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)


class Mapping(Closing, ABC):
    """A range of addresses of this process, with memory mapped into it. It owns the addresses, no descriptor."""

    _address: int | None = None  # also if making it failed

    def __init__(self, address: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._address = address

    @property
    def address(self) -> int:
        """Where the range begins. Raises `ArenaError` after `close`."""
        return self._require_open()

    @property
    @abstractmethod
    def is_mapped(self) -> bool:
        """Whether there is memory behind the addresses."""

    @abstractmethod
    def map(self, blocks: Blocks) -> None:
        """Map `blocks` from the start of the range, where nothing is mapped.

        Raises:
            ArenaError: something is mapped, the blocks exceed the range, or they cannot be mapped. Nothing is changed.
        """

    @abstractmethod
    def unmap(self) -> None:
        """Take the memory out of the range, whose addresses stay reserved: whoever reads there faults. Idempotent.

        Nothing may use the range; on a GPU this waits until the device is idle.

        Raises:
            ArenaError: closed, or the kind of memory cannot do that. Nothing is changed.
        """

    @abstractmethod
    def replace(self, fds: Sequence[int], *, writable: bool | None = None) -> None:
        """Map other memory of the same block sizes in place of what is mapped.

        Nothing may use the range meanwhile; on a GPU this waits until the device is idle.

        Args:
            fds: one a block; borrowed as those of `map`.
            writable: whether this process may write to it; None: if it may write to what is mapped.

        Raises:
            ArenaError: nothing is mapped, or the other memory cannot be. What was mapped still is, unless the error
                says that it could not be mapped again.
        """

    def allow_writes(self, allowed: bool) -> None:
        """Let this process write to what is mapped, or not any more; on a GPU this waits until the device is idle.

        Raises:
            ArenaError: nothing is mapped, this process may not write to it, or the kind of memory cannot do that.
        """
        raise ArenaError("This kind of memory cannot be protected against writes.")

    @property
    def private_blocks(self) -> frozenset[int]:
        """Numbers of the blocks that are this process's own."""
        return frozenset()

    @property
    def is_private(self) -> bool:
        """Whether the memory, or a part of it, is this process's own, and may be written to."""
        return bool(self.private_blocks)

    def privatize(self, release: Callable[[int], None]) -> None:
        """Map memory of this process's own, writable and with the same bytes, in place of what is mapped.

        Block by block, so that the most memory that it takes beside what it makes is one block. Nothing may use the
        range meanwhile; on a GPU this waits until the device is idle. After an error every block has its bytes, and
        this may be tried again, unless the error says that a block could not be mapped again: then nothing is mapped.

        Args:
            release: called with the number of each block that is not needed any more.

        Raises:
            ArenaError: nothing is mapped, there is no memory for a block, or the kind of memory cannot do that.
        """
        raise ArenaError("This kind of memory cannot be replaced at its addresses.")

    def map_private(self, sizes: tuple[int, ...]) -> None:
        """Map new memory of this process's own, writable, in blocks of these sizes, where nothing is mapped.

        Its bytes are anything. Raises `ArenaError`; then nothing is mapped.
        """
        raise ArenaError("This kind of memory cannot be replaced at its addresses.")

    def close(self) -> None:
        """Unmap, and give the addresses back. Idempotent."""
        if self._address is not None:
            self._free()
        self._address = None

    def _require_open(self) -> int:
        if self._address is None:
            raise ArenaError("The mapping is closed; its addresses may be anybody's.")
        return self._address

    @abstractmethod
    def _free(self) -> None:
        """Unmap, and give the addresses back, for good and without an error."""


class Reservation(Mapping):
    """Reserved addresses, which memory can leave, and come back to.

    A kind of memory says how: `_prepare` gets hold of blocks, `_wait` lets their users finish, `_put` maps what was
    prepared, `_take_out` unmaps. What `_prepare` got is given back after each change: what is mapped stays alive.
    """

    def __init__(self, address: int, size_bytes: int) -> None:
        super().__init__(address, size_bytes)
        self._mapped: Blocks | None = None
        self._private: set[int] = set()  # numbers of the mapped blocks that are this process's own

    @property
    def is_mapped(self) -> bool:
        return self._mapped is not None

    @property
    def private_blocks(self) -> frozenset[int]:
        return frozenset(self._private)

    def map(self, blocks: Blocks) -> None:
        self._require_open()
        if self.is_mapped:
            raise ArenaError("Memory is mapped at these addresses already; unmap or replace it.")
        if blocks.size_bytes > self.size_bytes:
            raise ArenaError(f"Blocks of {blocks.size_bytes} bytes exceed the {self.size_bytes} reserved.")
        with contextlib.ExitStack() as undo:
            self._put(self._prepare(undo, blocks), blocks)
        self._mapped = blocks

    def unmap(self) -> None:
        self._require_open()
        if self._mapped is not None:
            self._wait()
            self._take_out()
            self._mapped = None
            self._private.clear()

    def allow_writes(self, allowed: bool) -> None:
        self._require_open()
        if self._mapped is None or self.is_private:
            raise ArenaError("No memory is mapped at these addresses that others map too.")
        self._wait()
        self._protect(self._mapped.size_bytes, writable=allowed)

    def privatize(self, release: Callable[[int], None]) -> None:
        address, blocks = self._require_open(), self._mapped
        if blocks is None:
            raise ArenaError("No memory is mapped at these addresses that could become this process's own.")
        self._wait()
        for number, size_bytes in enumerate(blocks.sizes):
            if number not in self._private:
                self._make_private(number, address, size_bytes)
                self._private.add(number)
                release(number)
            address += size_bytes

    def map_private(self, sizes: tuple[int, ...]) -> None:
        self._require_open()
        if self.is_mapped:
            raise ArenaError("Memory is mapped at these addresses already.")
        self._put_private(sizes)
        self._mapped = Blocks(sizes, (), writable=True)
        self._private.update(range(len(sizes)))

    def replace(self, fds: Sequence[int], *, writable: bool | None = None) -> None:
        self._require_open()
        before = self._mapped
        if before is None or self.is_private:
            raise ArenaError("No memory is mapped at these addresses that other memory could replace.")
        blocks = Blocks(before.sizes, fds, before.writable if writable is None else writable)
        with contextlib.ExitStack() as undo:
            new = self._prepare(undo, blocks)
            way_back = self._prepare(undo, before)
            self._wait()
            try:
                self._put(new, blocks)
            except BaseException as error:
                try:
                    self._put(way_back, before)
                except ArenaError as again:
                    self._mapped = None
                    raise ArenaError(f"{error} And what was mapped could not be mapped again: {again}") from error
                raise
        self._mapped = blocks

    @abstractmethod
    def _prepare(self, undo: contextlib.ExitStack, blocks: Blocks) -> list[Any]:
        """Get hold of each block, changing nothing that is mapped; `undo` gives all back that `_put` did not use.

        Raises:
            ArenaError: a descriptor is not of such memory, or there is no room for it.
        """

    @abstractmethod
    def _put(self, prepared: list[Any], blocks: Blocks) -> None:
        """Map what was prepared, in place of whatever is mapped.

        Raises:
            ArenaError: from the system or the driver. Nothing is mapped then.
        """

    def _wait(self) -> None:
        """Return once nothing uses what is mapped; the caller lets nothing begin to. Raises `ArenaError`."""

    @abstractmethod
    def _take_out(self) -> None:
        """Unmap all that is mapped. Raises `ArenaError`."""

    @abstractmethod
    def _protect(self, size_bytes: int, *, writable: bool) -> None:
        """Change what this process may do to what is mapped. Raises `ArenaError`; it is as before then."""

    @abstractmethod
    def _make_private(self, number: int, address: int, size_bytes: int) -> None:
        """Map private memory with the same bytes in place of one block.

        Raises:
            ArenaError: it is as before; or nothing is mapped any more, if it could not be mapped again.
        """

    @abstractmethod
    def _put_private(self, sizes: tuple[int, ...]) -> None:
        """Map new private memory. Raises `ArenaError`; then nothing is mapped."""
