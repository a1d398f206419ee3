"""What a kind of memory has to know and to do, so that arenas can be made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.arena import Arena, ArenaWriter
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.host_copy import HostCopy
from vllm_companion_plugin.memory.mapping import Blocks, Mapping, Reservation

Keeper = Callable[[int], Descriptors]
"""Gives the descriptor of a new allocation of so many bytes (`keeper/client.py`)."""


class Kind(ABC):
    """A kind of memory. What `check` and `is_lost` need imports no CUDA: the companion asks them.

    Attributes:
        name: on the wire, and in settings.
        device_type: of the devices whose memory it is, as PyTorch names it: "cpu" or "cuda".
        is_read_only: whether a mapping refuses writes; else only good manners do.
        can_remap: whether memory can leave a mapping whose addresses stay, and other memory take its place.
        is_made_at_once: whether the memory of a whole arena is taken before the first block is filled.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    is_read_only: ClassVar[bool] = True
    can_remap: ClassVar[bool] = True
    is_made_at_once: ClassVar[bool] = False

    def unsupported_reason(self, device_index: int) -> str | None:
        """Why this device cannot share memory so, or None if it can.

        Raises:
            ArenaError: the device does not answer.
        """
        return None

    @abstractmethod
    def granularity(self, device_index: int | None) -> int:
        """Bytes that block sizes must be a multiple of. Raises `ArenaError`."""

    @abstractmethod
    def create(self, size_bytes: int, device_index: int | None, keeper: Keeper | None) -> ArenaWriter:
        """As `memory.create`."""

    def open(self, info: ArenaInfo, fds: Descriptors, device_index: int | None) -> Arena:
        """As `memory.open_arena`."""
        try:
            self.check(info, fds)
            return Arena(info, fds, self._map(info, fds, device_index), self.check)
        except BaseException:
            fds.close()
            raise

    @abstractmethod
    def reserve(self, size_bytes: int, device_index: int | None) -> Reservation:
        """Addresses into which memory of this kind can be mapped; the caller closes them.

        Raises:
            ArenaError: there are not so many, or the kind cannot choose addresses (`can_remap`).
        """

    def _map(self, info: ArenaInfo, fds: Sequence[int], device_index: int | None) -> Mapping:
        """A new mapping of these blocks, read-only if the kind can. Raises `ArenaError`; then nothing is left of it."""
        mapping = self.reserve(info.size_bytes, device_index)
        try:
            mapping.map(Blocks(info.block_sizes, fds))
        except BaseException:
            mapping.close()
            raise
        return mapping

    def to_host(self, arena: Arena, device_index: int | None) -> tuple[ArenaInfo, Descriptors]:
        """A copy of a mapped arena in host memory: what it is, and its descriptors, which the caller owns.

        Raises:
            ArenaError: there is not so much host memory, or the kind cannot leave its addresses (`can_remap`).
        """
        raise ArenaError(f"Memory of kind {self.name} stays where it is.")

    def keep(self, host: ArenaInfo, fds: Sequence[int], device_index: int | None) -> HostCopy | None:
        """What a process that made a copy, and will read it, keeps of it; None if there is nothing to be gained.

        Raises:
            ArenaError: the descriptors, which are borrowed, are of no such copy.
        """
        return None

    def from_host(
        self, info: ArenaInfo, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> Arena:
        """A new arena like `info`, filled from its copy in host memory.

        Args:
            host, fds: what `to_host` gave; the descriptors are owned from now on.
            kept: of a copy of the same bytes.

        Raises:
            ArenaError: there is not so much memory on the device, or the copy is none of such an arena.
        """
        fds.close()
        raise ArenaError(f"Memory of kind {self.name} stays where it is.")

    def fill(
        self, arena: Arena, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> None:
        """Copy what `to_host` gave into an arena whose memory is this process's own; it owns the descriptors.

        Raises:
            ArenaError: as `from_host`.
        """
        fds.close()
        raise ArenaError(f"Memory of kind {self.name} stays where it is.")

    def check(self, info: ArenaInfo, fds: Sequence[int]) -> None:
        """Check what can be known of descriptors without mapping them; never waits for a file system or a peer.

        Raises:
            ArenaError: not one for each block, not of this kind, or not sealed.
        """
        if len(fds) != len(info.block_sizes):
            raise ArenaError(f"The arena has {len(info.block_sizes)} blocks, and {len(fds)} descriptors.")

    def is_lost(self, fds: Sequence[int]) -> bool:
        """Whether nobody can map this memory any more, though descriptors of it are open."""
        return False


def required_index(kind: str, device_index: int | None) -> int:
    """The index of the device. Raises `ArenaError` where a kind needs one and there is none."""
    if device_index is None:
        raise ArenaError(f"A {kind} arena needs a device index.")
    return device_index
