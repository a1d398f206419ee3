"""An arena as its users see it, whatever memory it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.mapping import Blocks, Mapping


class Arena(Closing):
    """A sealed arena: what it is, the descriptors that keep its memory alive, and where it is mapped in this process.

    It owns descriptors and mapping. A tensor that views the arena must not outlive `close`; nobody has to call that: an
    arena that nothing refers to any more, no tensor either, is closed.

    Args:
        fds: one a block, owned from now on.
        mapping: with the blocks mapped into it, owned from now on.
        check: raises `ArenaError` unless descriptors are what a description says, as `Kind.check`.
        is_owner: whether this process may write to a trained arena, as it has filled it.

    Attributes:
        info: of what is mapped, or was mapped last.
        fds: closed while nothing is mapped.
    """

    def __init__(
        self,
        info: ArenaInfo,
        fds: Descriptors,
        mapping: Mapping,
        check: Callable[[ArenaInfo, Sequence[int]], None],
        *,
        is_owner: bool = False,
    ) -> None:
        self.info = info
        self.fds = fds
        self.mapping = mapping
        self._check = check
        self._is_owner = is_owner

    @property
    def address(self) -> int:
        """Where offset 0 is mapped; stays reserved until `close`. Raises `ArenaError` after it."""
        return self.mapping.address

    def unmap(self) -> None:
        """Let go of the memory: unmap it, and close the descriptors. The addresses stay reserved. Idempotent.

        Whatever views the arena faults if it is used, until `map_again`. On a GPU this waits until the device is idle.

        Raises:
            ArenaError: closed, or memory of this kind cannot leave its addresses (`Kind.can_remap`). Nothing changed.
        """
        self.mapping.unmap()
        self.fds.close()

    def map_again(self, info: ArenaInfo, fds: Descriptors) -> None:
        """Map the same arena, or another one of the same layout, at the addresses where `unmap` left nothing.

        Args:
            info: the arena's; block sizes and kind are those of before.
            fds: one a block; owned by this arena from now on, and closed on failure.

        Raises:
            ArenaError: something is mapped, another layout, or what `fds` are cannot be mapped. Nothing is changed.
        """
        self._change(info, fds, lambda: self.mapping.map(Blocks(info.block_sizes, fds)))

    def replace(self, info: ArenaInfo, fds: Descriptors) -> None:
        """Map another arena of the same layout in place of this one. Views of it see the other's bytes from now on.

        Nothing may use the memory meanwhile; on a GPU this waits until the device is idle. The descriptors of what was
        mapped are closed: whoever wants to go back has duplicates.

        Args:
            info: the other arena's; block sizes and kind are this one's.
            fds: one a block; owned by this arena from now on, and closed on failure.

        Raises:
            ArenaError: nothing is mapped, another layout, or what `fds` are cannot be mapped. Nothing is changed,
                unless the error says that what was mapped before could not be mapped again.
        """
        self._change(info, fds, lambda: self.mapping.replace(fds))

    def _change(self, info: ArenaInfo, fds: Descriptors, change: Callable[[], None]) -> None:
        try:
            if (info.kind, info.block_sizes) != (self.info.kind, self.info.block_sizes):
                raise ArenaError(
                    f"Only an arena of the same layout can be mapped at these addresses: {_layout(self.info)}; "
                    f"this one has {_layout(info)}."
                )
            self._check(info, fds)
            change()
        except BaseException:
            fds.close()
            raise
        self.fds.close()
        self.info, self.fds = info, fds

    @contextlib.contextmanager
    def written_through(self, writer: ArenaWriter) -> Iterator[None]:
        """While open, an arena that is being filled is mapped here, writable, in place of this one.

        Whatever views this arena reads and writes what `writer` fills. Nothing may use the memory at both ends.

        Args:
            writer: of the same kind, with blocks of the same sizes; borrowed.

        Raises:
            ArenaError: nothing is mapped, or memory of this kind cannot be replaced. Nothing has changed then; at the
                end it means that nothing is mapped any more.
        """
        self.mapping.replace(writer.fds, writable=True)
        try:
            yield
        finally:
            self.mapping.replace(self.fds, writable=False)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While open, this process may write to a trained arena that it owns; before and after, a write faults.

        Whoever maps the arena sees each write at once.

        Raises:
            ArenaError: it is no trained arena, or another process's.
        """
        if not self._is_owner:
            raise ArenaError("Nobody writes to an arena but the owner of one that is trained.")
        self.mapping.allow_writes(True)
        try:
            yield
        finally:
            self.mapping.allow_writes(False)

    @property
    def shared_sizes(self) -> list[int]:
        """The sizes of the blocks that are not this process's own."""
        return [size for number, size in enumerate(self.info.block_sizes) if number not in self.mapping.private_blocks]

    @property
    def is_private(self) -> bool:
        """Whether the memory is this process's own, and may be written to."""
        return self.mapping.is_private

    def privatize(self) -> None:
        """Make the memory this process's own, writable and with the same bytes, at the same addresses.

        Descriptors are closed block by block. Raises `ArenaError` as `Mapping.privatize`; it may be tried again.
        """
        self.mapping.privatize(self.fds.close_one)
        self.fds.close()

    def map_private(self) -> None:
        """Map new memory of this process's own where nothing is mapped. Its bytes are anything. Raises `ArenaError`."""
        self.mapping.map_private(self.info.block_sizes)

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        self.mapping.close()
        self.fds.close()


def _layout(info: ArenaInfo) -> str:
    return f"{len(info.block_sizes)} blocks of {info.kind}, {info.size_bytes} bytes in all"


class ArenaWriter(Protocol):
    """An arena that is being filled. `address` is where it will stay mapped."""

    @property
    def address(self) -> int:
        """Where offset 0 is, or will be, mapped."""

    @property
    def fds(self) -> Sequence[int]:
        """A descriptor of each block so far, borrowed, by which another mapping of this process can write, too."""

    def add_block(self, size_bytes: int) -> None:
        """Allocate the next `size_bytes` and map them behind the blocks so far.

        Raises:
            ArenaError: no memory, or more than what was reserved.
        """

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        """Copy from this process's memory (of the arena's device) into a block. May be asynchronous."""

    def flush(self) -> None:
        """Wait until every write has landed."""

    def seal(self, *, trained: bool = False) -> Arena:
        """Finish: nobody can write any more, this process included. The writer is spent, and keeps the arena in use.

        Args:
            trained: this process owns the arena and goes on writing, while `Arena.writing` is open; nobody else can.

        Raises:
            ArenaError: memory of this kind cannot be trained, or the system cannot keep others from writing to it.
        """

    def abort(self) -> None:
        """Free everything. Idempotent; harmless after `seal`."""
