"""New generations of an entry: one client stages, others advance when they like, and what nobody needs goes.

A client that maps the entry may become its one writer. It stages a generation, fills memory of its own that is laid out
like the current one, and commits: what clients that attach get is the new generation from then on, and nobody is moved.
Clients that map it are told. Each client that maps another one says when it has advanced, or gone back. Besides the
current generation there stay those that were current last, as many as the setting `keep_previous` says, and every one
that a client maps. The one that is being written takes the place of one that is kept: by default, a device without
laggards has two at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import BadRequestError, EntryInUseError, EntryNotFoundError, LayoutError, StaleError
from vllm_companion_plugin.holder.registry.entries import CurrentEvent, Entry, Generation, Lease
from vllm_companion_plugin.holder.registry.generations import Generations
from vllm_companion_plugin.holder.registry.moves import CurrentChanged
from vllm_companion_plugin.holder.registry.steps import Steps
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState, LeaseEvent


class Updates:
    """What may become of an entry's generations. Its methods raise and change nothing, or do all that they say.

    Args:
        keep: how many generations that were current before stay, so that clients can go back.
    """

    def __init__(
        self, steps: Steps, numbers: Generations, wall: Callable[[], float], on_change: Callable[[], None], keep: int
    ) -> None:
        self._steps = steps
        self._numbers = numbers
        self._wall = wall
        self._on_change = on_change
        self._keep = keep

    def stage(self, lease: Lease, base: int = 0) -> int:
        """The client is the entry's writer from now on; the number that its generation will have.

        Raises:
            StaleError: as `check_base`.
            BadRequestError: it does not map the entry, or only holds it.
            EntryInUseError: another client is the writer.
        """
        entry = lease.entry
        self._steps.check(lease, LeaseEvent.STAGE)
        if lease.passive:
            raise BadRequestError("A client that only holds the entry writes nothing.")
        if entry.current.state is not GenerationState.READY:
            raise BadRequestError(f"{entry} is {entry.current.shown.value}; nothing can take its place.")
        if entry.writer is not None:
            raise EntryInUseError(f"{entry.writer.who} writes the next generation of {entry.key.title} already.")
        self.check_base(entry, base)
        self._steps.move_lease(lease, LeaseEvent.STAGE)
        self.prune(entry)
        self._on_change()
        return self._numbers.latest(entry.key.id) + 1

    def abort(self, lease: Lease) -> None:
        """The client writes no more, and nothing of it stays. Raises `BadRequestError` unless it is the writer."""
        self._steps.move_lease(lease, LeaseEvent.ABORT)
        self._steps.release(lease)
        self._on_change()

    def check_base(self, entry: Entry, base: int) -> None:
        """Raise `StaleError` unless this generation is the current one; 0: whichever."""
        current = entry.current
        if base not in (0, current.number):
            shown = f" ({current.published.version})" if current.published.version else ""
            raise StaleError(
                f"Generation {base} of {entry.key.title} ({entry.key.rank}) is not current: "
                f"generation {current.number}{shown} is.",
                remedy="Begin anew from that, or name no base.",
            )

    def commit(self, lease: Lease, arena: ArenaInfo, version: str, base: int = 0, *, tensor_count: int = 0) -> int:
        """What the writer has deposited is the current generation; its number.

        Args:
            arena: with the checksums of its bytes; laid out like the current one, if the entry's kind has a layout.
            version: the user's name for it.
            tensor_count: 0: as many as before.

        Raises:
            BadRequestError: not the writer, or not one descriptor for each block.
            LayoutError: it is laid out differently.
            StaleError: as `check_base`.
        """
        entry = lease.entry
        self._steps.check(lease, LeaseEvent.COMMIT_STAGED)
        self.check_base(entry, base)
        if not version:
            raise BadRequestError("Weights that a client has written need a version, by which they are known.")
        before = entry.current
        assert before.arena is not None  # a client that writes keeps it on the device
        is_other = arena.block_sizes != before.arena.block_sizes and entry.key.rules.has_layout
        if arena.kind != before.arena.kind or is_other:
            raise LayoutError(f"{entry} has {len(before.arena.block_sizes)} blocks of other sizes, or of another kind.")
        if len(lease.deposited) != len(arena.block_sizes):
            raise BadRequestError(f"{len(lease.deposited)} of {len(arena.block_sizes)} descriptors were deposited.")
        number = self._numbers.latest(entry.key.id) + 1
        self._numbers.note(entry.key.id, number)
        count = tensor_count or before.published.tensor_count
        published = replace(
            before.published, tensor_count=count, ready_unix_s=self._wall(), load_s=0.0, version=version
        )
        new = Generation(
            number=number, follows=before.number, arena=arena, manifest=before.manifest, published=published
        )
        new.fds, lease.deposited, lease.announced = lease.deposited, (), 0
        self._steps.move_lease(lease, LeaseEvent.COMMIT_STAGED)
        entry.others.append(before)
        entry.current = new
        self._steps.move_generation(entry, new, GenerationEvent.COMMIT)
        self._tell_current(entry, before)
        self.prune(entry)
        self._on_change()
        return number

    def find(self, entry: Entry, number: int) -> Generation:
        """The generation with this number that clients can map; 0: the current one. Raises `EntryNotFoundError`."""
        for generation in (entry.current, *entry.others):
            if generation.state is GenerationState.READY and number in (0, generation.number):
                return generation
        there = [each.number for each in (entry.current, *entry.others) if each.state is GenerationState.READY]
        what = f"Generation {number}" if number else "The current generation"
        raise EntryNotFoundError(
            f"{what} of {entry.key.title} is not held; there are: {', '.join(map(str, there)) or 'none'}."
        )

    def advance(self, lease: Lease, number: int) -> None:
        """The client maps this generation from now on.

        Raises:
            EntryNotFoundError: it is not held.
            BadRequestError: the client maps nothing.
        """
        if lease.state not in (LeaseState.ATTACHED, LeaseState.WRITING):
            raise BadRequestError("Only a client that maps the entry can advance.")
        lease.maps = self.find(lease.entry, number).number
        self.prune(lease.entry)
        self._on_change()

    def told(self, lease: Lease) -> None:
        """The client is told of the current generation just now, which another may have become meanwhile."""
        current, to_be_told = lease.entry.current.number, lease.to_be_told
        lease.to_be_told = False
        if to_be_told and lease.maps != current:
            lease.maps = current
            self.prune(lease.entry)
            self._on_change()

    def make_current(self, entry: Entry, number: int) -> None:
        """What clients get from now on is this generation, older or newer. Raises `EntryNotFoundError`."""
        wanted = self.find(entry, number)
        if wanted is not entry.current:
            before = entry.current
            entry.others.remove(wanted)
            entry.others.append(before)
            entry.current = wanted
            self._tell_current(entry, before)
            self.prune(entry)

    def prune(self, entry: Entry) -> None:
        """Let go of every generation that nobody maps and that is not kept."""
        mapped = {lease.maps for lease in entry.leases}
        keep = self._keep if entry.writer is None else self._keep - 1
        kept = entry.others[-keep:] if keep > 0 else []
        for generation in [each for each in entry.others if each not in kept and each.number not in mapped]:
            self._forget(entry, generation)

    def lose(self, entry: Entry, is_lost: Callable[[ArenaInfo, Sequence[int]], bool]) -> bool:
        """Let go of the generations besides the current one whose memory nobody can map any more; whether any were."""
        lost = [each for each in entry.others if each.arena is not None and is_lost(each.arena, each.fds)]
        for generation in lost:
            self._steps.move_generation(entry, generation, GenerationEvent.LOSE)
            self._forget(entry, generation)
        return bool(lost)

    def _forget(self, entry: Entry, generation: Generation) -> None:
        entry.others.remove(generation)
        self._steps.move_generation(entry, generation, GenerationEvent.FORGET)
        self._steps.release_generation(generation)

    def _tell_current(self, entry: Entry, before: Generation) -> None:
        """Tell observers, and those who map the entry. Only what is current has a copy in host memory."""
        self._steps.release_host(before)
        current = entry.current
        is_latest = current.number == self._numbers.latest(entry.key.id)
        self._steps.emit(CurrentChanged(entry, current, before.number, is_latest))
        for lease in entry.leases:
            if lease.state is not None and lease.state.is_attached:
                self._steps.tell(lease, CurrentEvent(current.number, current.published.version))
