"""The companion's registry: which entries exist, who loads them, who maps them, and what is due when.

Rules
-----
* No I/O, no gRPC, no event loop. Time comes from the two functions that the registry is given.
* A transition either happens completely or raises and changes nothing. `table.py` says which ones there are.
* Here is what is decided; `steps.py` carries it out. It alone changes states and closes descriptors.

Theory of operation
-------------------
Clients attach to an entry by its key, or by a query. Of one key at most one entry is EXPECTED, LOADING or READY; any
number may be RETIRED. At most one lease of an entry is LOADING: the first WAITING one, in order of arrival, that may
load; but a client that holds the entry already goes before those who would load it, until a loader has deposited
descriptors. If the LOADING lease ends before its commit the next client is elected; if none may load the others fail.

An entry that the companion before held begins as EXPECTED. Only a client that holds it is elected, to hand it back,
until `limits.HAND_BACK_S` after `open`; then whoever may load is. What it hands back is the latest generation, or an
older one that was current there. A client that has been elected to hand back and hangs for as long loses its turn.

While nobody uses a READY entry its idle time runs. An entry that has been idle for the linger time expires, whatever
becomes of the others; before that it may be dropped for a client that needs its memory (`room.py`). How long entries
and the companion stay is in `lifetime.py`. `advance` does what is due, and says when something will be.

A client that falls asleep says so by `sleep`. When nobody is awake any more, `core/residency.py` says where the bytes
stay: on the device, in host memory (PARKED), for which the last client leaves a copy first, or nowhere (DROPPED). What
takes a copy and has none stays on the device. Who asks for a PARKED entry is elected to bring it back; of a DROPPED
one, to load it, as if it were new. What is PARKED stays so until somebody asks for it.

What clients are told is in `entries.py`, what observers are told in `moves.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.status import EntryState, EntryStatus, LeaseState, Progress, Published
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    EntryInUseError,
    EntryNotFoundError,
    LeaseLostError,
    LimitError,
    NotShareableError,
    WaitTimeoutError,
)
from vllm_companion_plugin.holder.registry import limits, room
from vllm_companion_plugin.holder.registry.entries import (
    STARTING,
    Entry,
    Generation,
    GrantedEvent,
    Lease,
    RetiredEvent,
    StoredManifest,
)
from vllm_companion_plugin.holder.registry.generations import Generations
from vllm_companion_plugin.holder.registry.lifetime import FOR_EVER, Lifetime
from vllm_companion_plugin.holder.registry.moves import (
    CurrentChanged,
    Lingering,
    LingerOver,
    Observer,
    Owned,
    OwnerGone,
)
from vllm_companion_plugin.holder.registry.selection import LOAD_IT, describe, no_match_text
from vllm_companion_plugin.holder.registry.sleeping import Sleeping, check_sleeper
from vllm_companion_plugin.holder.registry.steps import Steps
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState, LeaseEvent
from vllm_companion_plugin.holder.registry.updates import Updates


@dataclass(frozen=True)
class Due:
    """What time will bring.

    Attributes:
        over: the companion should end: nobody has used anything for its linger time.
        next_s: seconds until something is due; None: nothing will be before the next change.
    """

    over: bool
    next_s: float | None


class Registry:
    """All entries and leases of one companion.

    Args:
        close_fds: closes descriptors that the registry no longer needs.
        wall, monotonic: clocks, in seconds. Durations are measured by the monotonic one; the other is only shown.
        device, pid: of the companion, for the texts of errors.
        linger_s, grace_s: as of `Lifetime`.
        max_fds: most descriptors of all entries and deposits.
        keep_previous: how many generations of an entry that were current before stay, besides those that clients map.
        on_event: a lease has something new in `events`.
        on_change: the status has changed.
        observers: are told every move, as `moves.py` says.
    """

    def __init__(
        self,
        *,
        close_fds: Callable[[Sequence[int]], None],
        wall: Callable[[], float],
        monotonic: Callable[[], float],
        device: str = "",
        pid: int = 0,
        linger_s: float = FOR_EVER,
        grace_s: float = 0.0,
        max_fds: int = 1 << 20,
        keep_previous: int = 1,
        on_event: Callable[[Lease], None] = lambda lease: None,
        on_change: Callable[[], None] = lambda: None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._max_fds = max_fds
        self._on_event, self._on_change = on_event, on_change
        self._steps = Steps(close_fds, monotonic, on_event, tuple(observers))
        self._lease_ids = count(1)
        self._generations = Generations()
        self._expected_until: float | None = None
        self._told_end: float | None = None
        self._watches = limits.Places(limits.MAX_WATCHES, f"{limits.MAX_WATCHES} clients watch the companion already.")
        self._publications = limits.Places(
            limits.MAX_PUBLICATIONS, f"The companion receives {limits.MAX_PUBLICATIONS} publications already."
        )
        self.lifetime = Lifetime(device, pid, linger_s, grace_s, monotonic())
        self.updates = Updates(self._steps, self._generations, wall, on_change, keep_previous)
        self.sleeping = Sleeping(self._steps, self.updates, self.lifetime, self._changed)

    # ---- what there is

    def status(self, key_id: str = "") -> tuple[EntryStatus, ...]:
        """All entries as they are shown, or those with this key."""
        linger_s = self.lifetime.entry_linger_s
        return tuple(entry.status(linger_s) for entry in self.entries if key_id in ("", entry.key.id))

    @property
    def entries(self) -> list[Entry]:
        """All entries, in order of arrival. To be read, not changed."""
        return self._steps.entries

    @property
    def leases(self) -> list[Lease]:
        return [lease for entry in self.entries for lease in entry.leases]

    @property
    def exits_at_unix_s(self) -> float:
        """Time at which the companion ends if nobody comes, to be shown; 0: that is not in sight."""
        ends_at = self.lifetime.ends_at
        return 0.0 if ends_at is None else self._wall() + ends_at - self._monotonic()

    def key_of(self, key_id: str) -> EntryKey | None:
        """The key with this id, if there is an entry with it."""
        return next((entry.key for entry in self.entries if entry.key.id == key_id), None)

    # ---- time

    def open(self) -> None:
        """Clients can reach the companion from now on: the time within which they hand back runs."""
        self._expected_until = self._monotonic() + limits.HAND_BACK_S

    def advance(self) -> Due:
        """Do all that is due, and say when something else will be. Call it after every change, and then."""
        now_s = self._monotonic()
        if self._expected_until is not None and self._expected_until <= now_s:
            self._give_up_expected()
        for lease in self._handing_back():
            if lease.entry.current.load_since + limits.HAND_BACK_S <= now_s:
                what = f"{lease.who} did not hand back {describe([lease.entry])} in time."
                self._end(lease, LeaseEvent.OVERDUE, WaitTimeoutError(what))
        expired, idle_s = room.expired(self.entries, self.lifetime.entry_linger_s, now_s)
        self._drop(expired, GenerationEvent.EXPIRE)
        over = self._check_linger(now_s)
        next_s = [lease.entry.current.load_since + limits.HAND_BACK_S - now_s for lease in self._handing_back()]
        if self._expected_until is not None and any(e.current.state is GenerationState.EXPECTED for e in self.entries):
            next_s.append(self._expected_until - now_s)
        if idle_s is not None:
            next_s.append(idle_s)
        if self.lifetime.ends_at is not None:
            next_s.append(self.lifetime.ends_at - now_s)
        return Due(over, min(next_s, default=None))

    def _handing_back(self) -> list[Lease]:
        return [lease for lease in self.leases if lease.state is LeaseState.LOADING and lease.holds]

    def _give_up_expected(self) -> None:
        """What nobody has handed back by now is loaded anew. What is being handed back may yet come."""
        given_up = [entry for entry in self.entries if entry.current.state is GenerationState.EXPECTED]
        for entry in given_up:
            why = f"Nobody handed back {describe([entry])}, and nobody else may load it."
            self._steps.move_entry(entry, GenerationEvent.GIVE_UP)
            entry.current.number = 0
            self._elect_or_abandon(entry, why)
        if given_up:
            self._changed()

    def _check_linger(self, now_s: float) -> bool:
        """Whether the companion should end by now. Observers are told when it should, and when that comes in sight."""
        ends_at = self.lifetime.ends_at
        told_before, self._told_end = self._told_end, ends_at
        if ends_at is None:
            return False
        if ends_at <= now_s:
            self.lifetime.is_over = True
            self._steps.emit(LingerOver(self.lifetime.linger_s))
            return True
        if ends_at != told_before:
            self._steps.emit(Lingering(ends_at - now_s, sum(entry.size_bytes for entry in self.entries)))
        return False

    # ---- the companion's owner and end

    def own(self, pid: int, linger_s: float, *, from_first_client: bool = False) -> None:
        """The companion belongs to process `pid`, and stays for `linger_s`. Raises as `Lifetime.own`."""
        self.lifetime.own(pid, linger_s, from_first_client=from_first_client)
        self._steps.emit(Owned(pid, linger_s))
        self._on_change()

    def disown(self) -> None:
        """The owner has gone: what was idle while it was there is idle from now on."""
        pid = self.lifetime.owner_pid
        self.lifetime.disown(self._monotonic())
        for entry in self.entries:
            if entry.idle_since is not None:
                self._note_idle(entry)
            self.sleeping.settle(entry)
        if not self.lifetime.ending:
            self._steps.emit(OwnerGone(pid))
        self._on_change()

    def check_replaceable(self) -> None:
        """Raise `EntryInUseError` if another companion could not take over all entries from those who hold them."""
        for entry in self.entries:
            if entry.current.shown is EntryState.LOADING:
                lease = entry.loading_lease
                by = f" by {lease.who}" if lease else ""
                raise EntryInUseError(f"{describe([entry])} is being loaded{by}; try again afterwards.")
            if entry.current.state is GenerationState.READY and len(entry.sleepers) == len(entry.leases):
                raise EntryInUseError(
                    f"{describe([entry])} was published meanwhile, or everybody sleeps on it; try again."
                )
            if entry.current.state is GenerationState.PARKED:
                raise EntryInUseError(
                    f"{describe([entry])} is in host memory, from where no other companion could take it over. "
                    "Wake one of those who sleep on it, or unload it."
                )

    def end(self, *, replaced: bool) -> None:
        """Let nobody in any more. Leases go on until `close`.

        Args:
            replaced: another companion follows, to which clients shall hand back what they map.
        """
        self.lifetime.end(replaced=replaced)

    def close(self) -> None:
        """End everything: every lease fails, every descriptor is closed."""
        self.lifetime.end(replaced=self.lifetime.replaced)
        event = GenerationEvent.REPLACE if self.lifetime.replaced else GenerationEvent.CLOSE
        for entry in list(self.entries):
            self._steps.end_entry(entry, event, self.lifetime.end_error())
        self._changed()

    # ---- limits

    def watch(self) -> AbstractContextManager[None]:
        """A place among those who watch, while open. Raises `LimitError` if there is none."""
        return self._watches.one()

    def receive(self) -> AbstractContextManager[None]:
        """A place among the publications that are being received, while open. Raises `LimitError` if there is none."""
        return self._publications.one()

    def _no_room_for(self, key: EntryKey) -> str:
        """What there is too much of for another entry with this key; empty if there is room."""
        if len(self.entries) >= limits.MAX_ENTRIES:
            return f"{limits.MAX_ENTRIES} entries"
        if sum(entry.key.characters for entry in self.entries) + key.characters > limits.MAX_KEYS_CHARACTERS:
            return f"keys of {limits.MAX_KEYS_CHARACTERS} characters"
        return ""

    def check_manifests(self, incoming_bytes: int) -> None:
        """Raise `LimitError` if with so many bytes on their way all manifests together are too large."""
        stored = sum(entry.current.manifest.size_bytes for entry in self.entries if entry.current.manifest)
        if stored + incoming_bytes > limits.MAX_MANIFESTS_BYTES:
            raise LimitError(
                f"All manifests together would be larger than {limits.MAX_MANIFESTS_BYTES} bytes.", remedy=limits.UNLOAD
            )

    # ---- leases

    def expect(self, key: EntryKey, generation: int, *, rolled_back: bool = False) -> None:
        """Processes map `generation` of this entry, of a companion that has died: wait for one to hand it back.

        Args:
            rolled_back: it was current there, though others that are newer may be mapped, too. It comes before them.
        """
        self._generations.note(key.id, generation)
        if rolled_back:
            self._generations.roll_back(key.id, generation)
        entry = self._by_key(key)
        if entry is None:
            if self._no_room_for(key):
                return
            current = Generation(load_since_unix_s=self._wall())
            entry = self._steps.add(Entry(key, current=current), GenerationEvent.EXPECT)
        entry.noted.add(generation)
        entry.current.number = self._generations.rolled_back_to(key.id) or self._generations.latest(key.id)
        self._on_change()

    def attach(
        self,
        select: EntryKey | Query,
        *,
        may_load: bool,
        pid: int,
        client: str,
        holds: int = 0,
        passive: bool = False,
        asleep: int | None = None,
    ) -> Lease:
        """A new lease on the entry that `select` names.

        Args:
            asleep: the client sleeps, at this level, on an entry that a companion which has died knew by its key.
                It does not say what it wishes: what is on the device stays there until a client falls asleep.
            holds: the generation that the client maps, and can publish again if it is the latest. 0: none.
            passive: as of `Lease`.

        Raises:
            CompanionError: the companion is ending; the class says how.
            EntryNotFoundError: nothing matches and this client may not load it.
            BadRequestError: a query that matches several entries, or one that would have to load; a sleeper of no
                level, or one that is passive.
            LimitError: there are as many leases or entries as are allowed.
        """
        self.lifetime.check_open()
        if asleep is not None:
            check_sleeper(asleep, passive)
        if len(self.leases) >= limits.MAX_LEASES:
            raise LimitError(
                f"The companion has {limits.MAX_LEASES} clients already.",
                remedy="Use another runtime directory for some, or end those that `vllm-companion status` shows.",
            )
        entry = self._by_key(select) if isinstance(select, EntryKey) else self._by_query(select)
        maps = holds
        key_id = select.id if isinstance(select, EntryKey) else entry.key.id if entry else ""
        if not self._generations.may_return(key_id, holds):
            holds = 0
        held = self._held(passive)
        if entry not in held and asleep is None and not may_load and not holds:
            raise EntryNotFoundError(no_match_text(select, held), remedy=LOAD_IT)
        if entry is None:
            if not isinstance(select, EntryKey):
                raise BadRequestError("Only a client that knows the full key may load; attach with a key.")
            if problem := self._no_room_for(select):
                raise LimitError(f"The companion has {problem} already.", remedy=limits.UNLOAD)
            first = GenerationEvent.ASK if asleep is None else GenerationEvent.REMEMBER
            entry = self._steps.add(Entry(select), first)
        lease = Lease(next(self._lease_ids), pid, client, may_load, self._wall(), entry, holds, passive, maps=maps)
        entry.leases.append(lease)
        self._steps.move_lease(lease, LeaseEvent.ATTACH)
        if not passive:
            entry.idle_since = None
            self.lifetime.use()
        if asleep is not None:
            self.sleeping.fall_asleep(lease, asleep)
        elif entry.current.state is GenerationState.READY:
            self._steps.map_entry(lease)
        else:
            if entry.current.state in (GenerationState.PARKED, GenerationState.DROPPED):
                self._steps.move_entry(entry, GenerationEvent.ASK)
                entry.idle_since = None
            self._elect(entry)
            self._steps.tell_waiting(entry, [lease])
            if lease.state is LeaseState.WAITING:
                lease.waiting_since = self._monotonic()
        self._on_change()
        return lease

    def _current(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.can_be_asked_for]

    def _held(self, passive: bool) -> list[Entry]:
        """The entries that a client gets though it cannot load. A passive one does not bring them back either."""
        lacking = {GenerationState.DROPPED, *([GenerationState.PARKED] if passive else [])}
        return [entry for entry in self._current() if entry.current.state not in lacking]

    def _by_key(self, key: EntryKey) -> Entry | None:
        return next((entry for entry in self._current() if entry.key.id == key.id), None)

    def _by_query(self, query: Query) -> Entry | None:
        states = (EntryState.READY, EntryState.PARKED, EntryState.LOADING)
        meant = query.among(entry for entry in self.entries if entry.current.shown in states)
        for state in states:
            found = [entry for entry in meant if entry.current.shown is state]
            if len(found) > 1:
                raise BadRequestError(
                    f"{len(found)} entries match {query}: {describe(found)}.",
                    remedy="Choose by rank or key id.",
                )
            if found:
                return found[0]
        return None

    def end_lease(self, lease: Lease) -> None:
        """The client is gone or done. Harmless when the lease has ended already."""
        if not lease.ended:
            self._end(lease, LeaseEvent.END)

    # ---- loading

    def announce(self, lease: Lease, count: int) -> None:
        """So many descriptors are about to be deposited.

        Raises:
            BadRequestError: not the loader.
            OvertakenError: it was, and another client hands the entry back. So of all that a loader does.
            LimitError: with what it has, they would be more than the companion keeps.
        """
        self._steps.check(lease, LeaseEvent.ANNOUNCE)
        generations = [each for entry in self.entries for each in (entry.current, *entry.others)]
        kept = [fds for each in generations for fds in (each.fds, each.host_fds)]
        held = sum(map(len, kept)) + sum(other.announced for other in self.leases)
        if held + count > self._max_fds:
            raise LimitError(
                f"The companion has {held} descriptors and keeps at most {self._max_fds}. Unload what is not needed, "
                "or raise its limit of open files (ulimit -Hn) and start it anew."
            )
        lease.announced = count
        self._steps.move_lease(lease, LeaseEvent.ANNOUNCE)

    def deposit(self, lease: Lease, fds: Sequence[int]) -> None:
        """Descriptors of a loader, or of a copy in host memory, arrived; the registry owns them now, whatever comes.

        Raises:
            BadRequestError: not one who may deposit, or a second deposit. The caller still owns `fds`.
        """
        self._steps.check(lease, LeaseEvent.DEPOSIT)
        if lease.deposited:
            raise BadRequestError("The descriptors of this arena were deposited already.")
        lease.deposited = tuple(fds)
        self._steps.move_lease(lease, LeaseEvent.DEPOSIT)

    def progress(self, lease: Lease, progress: Progress) -> None:
        """Raises `BadRequestError` unless `lease` is loading."""
        self._steps.move_lease(lease, LeaseEvent.PROGRESS)
        entry = lease.entry
        if progress != entry.current.progress:
            entry.current.progress, entry.current.progress_unix_s = progress, self._wall()
            self._steps.tell_waiting(entry, entry.leases)
            self._on_change()

    def commit(
        self, lease: Lease, arena: ArenaInfo, manifest: StoredManifest, published: Published, generation: int = 0
    ) -> int:
        """The entry becomes READY with the deposited descriptors; returns its generation.

        Args:
            generation: of an entry that is handed back, as are the times in `published`; 0: the next one.

        Raises:
            BadRequestError: not the loader, or not one descriptor for each block.
        """
        self._steps.check(lease, LeaseEvent.COMMIT)
        entry = lease.entry
        brings_back = entry.current.host is not None
        if brings_back and (generation != entry.current.number or arena != entry.current.arena):
            raise BadRequestError("An entry that comes back from host memory can only be what it was.")
        if generation and not brings_back and generation != lease.holds:
            raise BadRequestError("Only a client that holds this generation of the entry may hand it back.")
        if len(lease.deposited) != len(arena.block_sizes):
            raise BadRequestError(
                f"The arena has {len(arena.block_sizes)} blocks; {len(lease.deposited)} descriptors were deposited."
            )
        loaded_s = None if generation else self._monotonic() - entry.current.load_since
        if loaded_s is not None:
            published = replace(published, ready_unix_s=self._wall(), load_s=loaded_s)
        entry.current.fds, lease.deposited, lease.announced = lease.deposited, (), 0
        if not brings_back:
            entry.current.arena, entry.current.manifest, entry.current.published = arena, manifest, published
        entry.current.number = generation or self._generations.latest(entry.key.id) + 1
        self._generations.note(entry.key.id, entry.current.number)
        event = GenerationEvent.HAND_BACK if generation else GenerationEvent.PUBLISH
        self._steps.move_entry(entry, GenerationEvent.BRING_BACK if brings_back else event, loaded_s=loaded_s)
        if not brings_back:
            self._generations.roll_back(entry.key.id, 0)
            is_latest = entry.current.number == self._generations.latest(entry.key.id)
            self._steps.emit(CurrentChanged(entry, entry.current, 0, is_latest))
        self._steps.move_lease(lease, LeaseEvent.COMMIT)
        lease.maps = entry.current.number
        for other in entry.leases:
            if other.state is LeaseState.WAITING:
                self._steps.map_entry(other)
        self.sleeping.settle(entry)  # a `serve` or an `upgrade` may have handed it back, for nobody or for sleepers
        self._note_idle(entry)
        self._on_change()
        return entry.current.number

    def decline(self, lease: Lease, reason: str) -> None:
        """The loader keeps its model to itself: all waiters are told why, the entry vanishes.

        Raises:
            BadRequestError: not the loader, or one who brings back what belongs to others, too.
        """
        self._steps.check(lease, LeaseEvent.DECLINE)
        if lease.entry.current.host is not None:
            raise BadRequestError(
                "A client that brings an entry back from host memory may stop, but not decline it for all."
            )
        self._steps.end_lease(lease, LeaseEvent.DECLINE, reason=reason)
        self._on_event(lease)  # nothing to read, but it has ended
        self._steps.end_entry(lease.entry, GenerationEvent.DECLINE, NotShareableError(reason))
        self._changed()

    # ---- updates

    def make_current(self, query: Query, number: int, base: int = 0) -> tuple[EntryStatus, ...]:
        """Make this generation of every entry that matches the current one; their status after.

        Raises:
            EntryNotFoundError: nothing matches, or one of them does not have it. Nothing has changed.
            StaleError: as `Updates.check_base`, of one of them. Nothing has changed.
        """
        found = query.among(self._current())
        if not found:
            raise EntryNotFoundError(no_match_text(query, self._current()))
        for entry in found:
            self.updates.find(entry, number)
            self.updates.check_base(entry, base)
        for entry in found:
            self.updates.make_current(entry, number)
        self._on_change()
        return tuple(entry.status(FOR_EVER) for entry in found)

    # ---- dropping

    def unload(self, query: Query, *, force: bool = False) -> tuple[EntryStatus, ...]:
        """Drop all current entries that match; their status before. Attached clients keep mapping.

        Raises:
            EntryNotFoundError: nothing matches.
            EntryInUseError: without `force`, one of them has leases. Nothing was unloaded.
        """
        found = query.among(self._current())
        if not found:
            raise EntryNotFoundError(no_match_text(query, self._current()))
        used = [entry for entry in found if entry.users]
        if used and not force:
            users = ", ".join(f"{x.client} (pid {x.pid}, {x.state.value})" for e in used for x in e.users if x.state)
            raise EntryInUseError(f"{describe(used)} is in use by {users}. End them, or unload with --force.")
        return self._drop(found, GenerationEvent.UNLOAD)

    def make_room(self, size_bytes: int) -> tuple[EntryStatus, ...]:
        """Drop idle entries of so many bytes, as `room.make` chooses; their status before."""
        chosen = room.make(self.entries, size_bytes, self.lifetime.entry_linger_s)
        return self._drop(chosen, GenerationEvent.MAKE_ROOM)

    def lose(self, is_lost: Callable[[ArenaInfo, Sequence[int]], bool]) -> None:
        """Drop the entries and generations whose memory nobody can map any more. Attached clients keep mapping it."""
        ready = [entry for entry in self.entries if entry.current.state is GenerationState.READY]
        lost = [entry for entry in ready if entry.current.arena and is_lost(entry.current.arena, entry.current.fds)]
        for entry in lost:
            self._retire(entry, GenerationEvent.LOSE)
        lost += [entry for entry in ready if self.updates.lose(entry, is_lost)]
        if lost:
            self._changed()

    def _drop(self, entries: Sequence[Entry], event: GenerationEvent) -> tuple[EntryStatus, ...]:
        """Nobody finds the entries any more, and nobody hands them back; their status before."""
        before = tuple(entry.status(FOR_EVER) for entry in entries)
        for entry in entries:
            self._generations.drop(entry.key.id, entry.current.number)
            if entry.current.state in (GenerationState.READY, GenerationState.PARKED):
                self._retire(entry, event)
            else:
                error = LeaseLostError(f"{describe([entry])} was unloaded.")
                self._steps.end_entry(entry, event, error)
        if entries:
            self._changed()
        return before

    def _retire(self, entry: Entry, event: GenerationEvent) -> None:
        self._steps.move_entry(entry, event)
        entry.idle_since = None
        self._steps.release(entry)
        for lease in entry.leases:
            self._steps.release(lease)
            self._steps.move_lease(lease, LeaseEvent.RETIRE)
            self._steps.tell(lease, RetiredEvent())
        if not entry.users:
            self._steps.end_entry(entry, GenerationEvent.LEAVE)

    # ---- election

    def _elect(self, entry: Entry) -> None:
        """Let the first client that may load do so, unless one does that already and goes before it."""
        loader = entry.loading_lease
        expected = entry.current.state is GenerationState.EXPECTED
        holders = [lease for lease in entry.leases if lease.holds]
        if expected and (wanted := self._generations.rolled_back_to(entry.key.id)):
            holders = [lease for lease in holders if lease.holds == wanted]
        if loader is not None:
            if loader.holds or loader.deposited or not holders:
                return
            self._steps.move_lease(loader, LeaseEvent.YIELD)
            loader.announced = 0
        brings_back = entry.current.host is not None
        waiting = [lease for lease in entry.leases if lease.state is LeaseState.WAITING and not expected]
        others = [lease for lease in waiting if lease.may_load or (brings_back and not lease.passive)]
        heir = next(iter(holders + others), None)
        if heir is None:
            return
        self._steps.move_lease(heir, LeaseEvent.ELECT)
        entry.current.progress = STARTING
        entry.current.load_since_unix_s, entry.current.load_since = self._wall(), self._monotonic()
        entry.current.progress_unix_s = entry.current.load_since_unix_s
        number = entry.current.number if brings_back else heir.holds or self._generations.latest(entry.key.id) + 1
        self._steps.tell(heir, GrantedEvent(number, brings_back))
        self._steps.tell_waiting(entry, entry.leases)

    def _elect_or_abandon(self, entry: Entry, why: str) -> None:
        self._elect(entry)
        if entry.loading_lease is not None or entry.current.state is GenerationState.EXPECTED:
            return
        if entry.current.host is None and not entry.sleepers:
            self._steps.end_entry(entry, GenerationEvent.ABANDON, EntryNotFoundError(why))
            return
        self._steps.move_entry(entry, GenerationEvent.PARK if entry.current.host else GenerationEvent.DROP)
        for lease in [lease for lease in entry.leases if lease.state is LeaseState.WAITING]:
            self._steps.end_lease(lease, LeaseEvent.FAIL, EntryNotFoundError(why))
        self._note_idle(entry)

    # ---- consequences

    def _end(self, lease: Lease, event: LeaseEvent, error: CompanionError | None = None) -> None:
        """The lease is over; its entry goes on without it, or goes, too."""
        entry = lease.entry
        stopped = f"{lease.who} stopped loading {describe([entry])}; nobody else may load it."
        self._steps.end_lease(lease, event, error)
        self.updates.prune(entry)
        if entry.current.shown is EntryState.LOADING:
            self._elect_or_abandon(entry, stopped)
        elif entry.current.state in (GenerationState.RETIRED, GenerationState.DROPPED) and not entry.users:
            self._steps.end_entry(entry, GenerationEvent.LEAVE)
        elif not lease.passive:
            self.sleeping.settle(entry)
            self._note_idle(entry)
        self._changed()

    def _note_idle(self, entry: Entry) -> None:
        """Unless somebody uses the entry, its idle time runs from now on."""
        if entry.current.state in (GenerationState.READY, GenerationState.PARKED) and not entry.users:
            entry.idle_since, entry.idle_since_unix_s = self._monotonic(), self._wall()

    def _changed(self) -> None:
        if not any(entry.users for entry in self.entries):
            self.lifetime.idle(self._monotonic())
        self._on_change()
