"""The steps that entries and leases take, one at a time, as `table.py` allows them. Nothing here decides anything.

The registry owns file descriptors as numbers. They enter it by a deposit, go from the lease to its entry by a commit,
and leave it in `Steps.release`, `release_host` and `release_device` alone, each one once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import CompanionError, OvertakenError
from vllm_companion_plugin.holder.registry import table
from vllm_companion_plugin.holder.registry.entries import (
    CurrentEvent,
    Entry,
    Event,
    FailedEvent,
    Generation,
    Lease,
    ReadyEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.moves import GenerationMoved, LeaseMoved, Move, Observer
from vllm_companion_plugin.holder.registry.table import GenerationEvent, IllegalTransitionError, LeaseEvent


class Steps:
    """All entries, and what can happen to them and their leases.

    Args:
        close_fds: closes descriptors that are not needed any more.
        monotonic: clock, in seconds.
        on_event: a lease has something new in `events`.
        observers: are told every move.
    """

    def __init__(
        self,
        close_fds: Callable[[Sequence[int]], None],
        monotonic: Callable[[], float],
        on_event: Callable[[Lease], None],
        observers: Sequence[Observer],
    ) -> None:
        self._close_fds = close_fds
        self._monotonic = monotonic
        self._on_event = on_event
        self._observers = observers
        self.entries: list[Entry] = []

    def add(self, entry: Entry, event: GenerationEvent) -> Entry:
        """A new entry is there, because of `event`."""
        self.move_entry(entry, event)
        self.entries.append(entry)
        return entry

    def check(self, lease: Lease, event: LeaseEvent) -> None:
        """Raise `IllegalTransitionError` unless the lease may do this now; `OvertakenError` if it was to load."""
        self._after(lease, event)

    @staticmethod
    def _after(lease: Lease, event: LeaseEvent) -> LeaseState | None:
        try:
            return table.LEASE.after(lease.state, event, lease)
        except IllegalTransitionError:
            if lease.overtaken and not lease.ended:
                what = f"{lease.who} was to load {lease.entry.key.title}, and another client that maps it hands it back"
                raise OvertakenError(f"{what} instead.") from None
            raise

    def move_lease(
        self, lease: Lease, event: LeaseEvent, error: CompanionError | None = None, reason: str = ""
    ) -> None:
        """Move a lease, and tell observers. Raises as `check`; nothing has changed then."""
        before, lease.state = lease.state, self._after(lease, event)
        lease.overtaken = event is LeaseEvent.YIELD or (lease.overtaken and event is LeaseEvent.MAP)
        waited_s = None
        if lease.waiting_since is not None and lease.state is not LeaseState.WAITING:
            waited_s, lease.waiting_since = self._monotonic() - lease.waiting_since, None
        self.emit(LeaseMoved(lease, event, before, waited_s, error, reason))

    def move_entry(self, entry: Entry, event: GenerationEvent, *, loaded_s: float | None = None) -> None:
        """Move an entry's generation, and tell observers. Raises `IllegalTransitionError`; nothing has changed then."""
        self.move_generation(entry, entry.current, event, loaded_s=loaded_s)

    def move_generation(
        self, entry: Entry, generation: Generation, event: GenerationEvent, *, loaded_s: float | None = None
    ) -> None:
        """As `move_entry`, of any of its generations."""
        before, generation.state = generation.state, table.GENERATION.after(generation.state, event, entry)
        self.emit(GenerationMoved(entry, generation, event, before, loaded_s))

    def map_entry(self, lease: Lease) -> None:
        """The client may map the entry, which another client has published."""
        self.move_lease(lease, LeaseEvent.MAP)
        if not lease.maps:
            lease.maps, lease.to_be_told = lease.entry.current.number, True
        self.tell(lease, ReadyEvent())

    def end_lease(self, lease: Lease, event: LeaseEvent, error: CompanionError | None = None, reason: str = "") -> None:
        """The lease is over, and told `error`; its descriptors are closed."""
        self.move_lease(lease, event, error, reason)
        lease.entry.leases.remove(lease)
        self.release(lease)
        if error is not None:
            self.tell(lease, FailedEvent(error))

    def end_entry(self, entry: Entry, event: GenerationEvent, error: CompanionError | None = None) -> None:
        """The entry is gone. Leases that it still has fail with `error`, or are released if there is none."""
        self.move_entry(entry, event)
        for lease in list(entry.leases):
            self.end_lease(lease, LeaseEvent.RELEASE if error is None else LeaseEvent.FAIL, error)
        self.release(entry)
        self.entries.remove(entry)

    def release(self, owner: Entry | Lease) -> None:
        """Have the descriptors of an entry or a lease closed: they leave the registry here, or below."""
        if isinstance(owner, Entry):
            for generation in (owner.current, *owner.others):
                self.release_generation(generation)
            owner.others.clear()
            return
        fds, owner.deposited, owner.announced = owner.deposited, (), 0
        if fds:
            self._close_fds(fds)

    def release_generation(self, generation: Generation) -> None:
        """Have all descriptors of one generation closed."""
        fds, generation.fds, generation.host_fds = (*generation.fds, *generation.host_fds), (), ()
        generation.host = None
        if fds:
            self._close_fds(fds)

    def release_host(self, generation: Generation) -> None:
        """Have the descriptors of its copy in host memory closed, if there is one; its memory on the device stays."""
        fds, generation.host_fds, generation.host = generation.host_fds, (), None
        if fds:
            self._close_fds(fds)

    def release_device(self, entry: Entry) -> None:
        """Have the descriptors of an entry's memory on the device closed; its copy in host memory stays."""
        for generation in entry.others:
            self.release_generation(generation)
        entry.others.clear()
        fds, entry.current.fds = entry.current.fds, ()
        if fds:
            self._close_fds(fds)

    def tell_waiting(self, entry: Entry, leases: Sequence[Lease]) -> None:
        """Tell those of `leases` that wait who loads the entry, and how far that is."""
        loader = entry.loader_info()
        for lease in leases:
            if loader is not None and lease.state is LeaseState.WAITING:
                self.tell(lease, WaitingEvent(loader))

    def tell(self, lease: Lease, event: Event) -> None:
        """The client has to be told `event`. What that makes old news is not told: so a slow reader costs nothing."""
        unread = lease.events[-1] if lease.events else None
        if isinstance(unread, WaitingEvent) or (isinstance(unread, CurrentEvent) and isinstance(event, CurrentEvent)):
            lease.events.pop()
        lease.events.append(event)
        self._on_event(lease)

    def emit(self, move: Move) -> None:
        """Tell the observers."""
        for observe in self._observers:
            observe(move)
