"""The companion's state: which entries exist, who loads them, who is attached.

Rules
-----
* No I/O, no gRPC, no event loop, no clock but the two it is given. The registry owns file
  descriptors as numbers: it says when they are to be closed (`close_fds`), others close them.
* A transition either happens completely or raises and changes nothing.
* Nothing here assumes one entry, one generation or one reader.

Theory of operation
-------------------
An *entry* is one published or coming model of one rank:

    LOADING --commit--> READY --unload--> RETIRED --last lease ends--> gone
       |  decline, or no candidate is left
       +--> gone

A *lease* is one client's open Attach stream. It belongs to one entry from its first moment:

    WAITING --elected--> LOADING --commit--> ATTACHED
       |  the entry becomes READY                ^
       +-----------------------------------------+

An entry may also begin as *expected*: somebody maps it, and its companion has died. Then only a client
that holds it is elected, to hand it back, until the time for that is over.

Of a READY entry that nobody uses the *idle time* runs. One that has been idle for the linger time *expires*, whatever
becomes of the others; before that it may be dropped for somebody who needs its memory. A companion that stays until
it is stopped (a `serve`'s does) has a negative linger time: nothing in it expires, nothing is dropped for others.

At most one lease of an entry is LOADING: the first WAITING one, in order of arrival, that may
load; but who holds the entry already goes before those who would load it. If it ends before its
commit the next one is elected, and if none may load the others fail. Of one key at most one entry
is LOADING or READY; any number may be RETIRED.

What a client has to be told is appended to its lease's `events` (a later Waiting replaces an
unread one, so a slow reader costs nothing), then `on_event(lease)` is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import subject
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
from vllm_companion_plugin.holder.registry.counters import Counters
from vllm_companion_plugin.holder.registry.entries import (
    STARTING,
    Entry,
    Event,
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.selection import Query, describe, no_match_text
from vllm_companion_plugin.holder.service.incoming import StoredManifest

MAX_ENTRIES = 128
MAX_LEASES = 1024
MAX_REMEMBERED = 10_000
"""Keys whose generation is known though nothing is held."""


class Registry:
    """All entries and leases of one companion.

    Args:
        close_fds: closes descriptors that the registry no longer needs.
        on_event: a lease has something new in `events`.
        on_change: the status has changed.
        max_fds: most descriptors of all entries and deposits.
        wall, monotonic: clocks, in seconds.
    """

    def __init__(
        self,
        *,
        close_fds: Callable[[Sequence[int]], None],
        on_event: Callable[[Lease], None] = lambda lease: None,
        on_change: Callable[[], None] = lambda: None,
        max_fds: int = 1 << 20,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._close_fds = close_fds
        self._on_event = on_event
        self._on_change = on_change
        self._max_fds = max_fds
        self._wall = wall
        self._monotonic = monotonic
        self._lease_ids = count(1)
        self._generations: dict[str, int] = {}
        self._unloaded: dict[str, int] = {}
        self.counters = Counters()
        self.entries: list[Entry] = []
        self.idle_since: float | None = monotonic()
        """Monotonic time since which nobody uses anything (a load is a use too); None while somebody does."""

    def status(self, linger_s: float = -1.0) -> tuple[EntryStatus, ...]:
        """All entries, with when they expire by this linger time; negative: never."""
        return tuple(entry.status(linger_s) for entry in self.entries)

    @property
    def leases(self) -> list[Lease]:
        return [lease for entry in self.entries for lease in entry.leases]

    # ---- leases

    def expect(self, key: EntryKey, generation: int) -> None:
        """Processes map `generation` of this entry, of a companion that has died: wait for one to hand it back."""
        _remember(self._generations, key.id, generation)
        if self._by_key(key) is None and len(self.entries) < MAX_ENTRIES:
            self._add(Entry(key, generation=generation, expected=True, load_since_unix_s=self._wall()))
            self._on_change()

    def give_up_expected(self) -> list[Entry]:
        """What nobody has handed back by now is loaded anew; the entries."""
        given_up = [entry for entry in self.entries if entry.expected]
        for entry in given_up:
            entry.expected, entry.generation = False, 0
            self.counters.count("readoptions", *subject(entry.key), "given_up")
            self._elect_or_discard(entry, f"Nobody handed back {describe([entry])}, and nobody else may load it.")
        if given_up:
            self._changed()
        return given_up

    def end_overdue(self, limit_s: float) -> tuple[list[Lease], float | None]:
        """Who was let to hand back, and has not done so for `limit_s`, may not any more: it hangs. The next one may.

        Returns:
            Their leases, and seconds until the next one will be late; None: nobody is handing back.
        """
        busy = [lease for entry in self.entries if (lease := entry.loading_lease) is not None and lease.holds]
        left_s = {lease.id: lease.entry.load_since + limit_s - self._monotonic() for lease in busy}
        late = [lease for lease in busy if left_s[lease.id] <= 0]
        for lease in late:
            what = f"{lease.client} (pid {lease.pid}) did not hand back {describe([lease.entry])} in time."
            self._tell(lease, FailedEvent(WaitTimeoutError(what)))
            self.end_lease(lease)
        if late:
            return late, 0.0  # others were elected
        return late, min(left_s.values(), default=None)

    def attach(
        self,
        select: EntryKey | Query,
        *,
        may_load: bool,
        pid: int,
        client: str,
        holds: int = 0,
        passive: bool = False,
    ) -> Lease:
        """A new lease on the entry that `select` names.

        Args:
            holds: the generation that the client maps and can publish again; heeded if it is the latest. 0: none.
            passive: as of `Lease`.

        Raises:
            EntryNotFoundError: nothing matches and this client may not load it.
            BadRequestError: a query that matches several entries, or one that would have to load.
            LimitError: there are as many leases or entries as are allowed.
        """
        if len(self.leases) >= MAX_LEASES:
            raise LimitError(f"The companion has {MAX_LEASES} clients already.")
        entry = self._by_key(select) if isinstance(select, EntryKey) else self._by_query(select)
        if isinstance(select, EntryKey) and not self._wants(select, holds):
            holds = 0
        if entry is None:
            if not may_load and not holds:
                raise EntryNotFoundError(no_match_text(select, [e for e in self.entries if _current(e)]))
            if not isinstance(select, EntryKey):
                raise BadRequestError("Only a client that knows the full key may load; attach with a key.")
            if len(self.entries) >= MAX_ENTRIES:
                raise LimitError(f"The companion has {MAX_ENTRIES} entries already; unload some: vllm-companion unload")
            entry = self._add(Entry(select))
        lease = Lease(next(self._lease_ids), pid, client, may_load, self._wall(), entry, holds, passive)
        entry.leases.append(lease)
        if not passive:
            self.idle_since = entry.idle_since = None
        if entry.state is EntryState.READY:
            self._attach_ready(lease)
        else:
            self._elect(entry)
            self._tell_waiting(entry, [lease])
            if lease.state is LeaseState.WAITING:
                lease.waiting_since = self._monotonic()
        self._on_change()
        return lease

    def _add(self, entry: Entry) -> Entry:
        self.entries.append(entry)
        self.counters.start(*subject(entry.key))
        return entry

    def _wants(self, key: EntryKey, generation: int) -> bool:
        """Whether this generation may be handed back: the latest, and not unloaded."""
        return generation >= self._generations.get(key.id, 0) and generation > self._unloaded.get(key.id, 0)

    def _by_key(self, key: EntryKey) -> Entry | None:
        return next((e for e in self.entries if _current(e) and e.key.id == key.id), None)

    def _by_query(self, query: Query) -> Entry | None:
        for state in (EntryState.READY, EntryState.LOADING):
            found = [e for e in self.entries if e.state is state and query.matches(e.key)]
            if len(found) > 1:
                raise BadRequestError(f"{query} matches {len(found)} entries; name one of: {describe(found)}.")
            if found:
                return found[0]
        return None

    def end_lease(self, lease: Lease) -> None:
        """The client is gone or done. Harmless when the lease has ended already."""
        if lease.ended:
            return
        self._remove(lease)
        entry = lease.entry
        if entry.state is EntryState.LOADING:
            stopped = f"{lease.client} (pid {lease.pid}) stopped loading"
            self._elect_or_discard(entry, f"{stopped} {describe([entry])}; nobody else may load it.")
        elif entry.state is EntryState.RETIRED and not entry.users:
            self._discard(entry, None)
        elif not lease.passive:
            self._note_idle(entry)
        self._changed()

    # ---- loading

    def announce(self, lease: Lease, count: int) -> None:
        """So many descriptors are about to be deposited.

        Raises:
            BadRequestError: not the loader.
            LimitError: with what it has, they would be more than the companion keeps.
        """
        self._require_loading(lease)
        held = sum(len(entry.fds) for entry in self.entries) + sum(other.announced for other in self.leases)
        if held + count > self._max_fds:
            raise LimitError(
                f"The companion has {held} descriptors and keeps at most {self._max_fds}. Unload what is not needed, "
                "or raise its limit of open files (ulimit -Hn) and start it anew."
            )
        lease.announced = count

    def deposit(self, lease: Lease, fds: Sequence[int]) -> None:
        """The loader's descriptors arrived; the registry owns them now, whatever comes.

        Raises:
            BadRequestError: not the loader, or a second deposit. The caller still owns `fds`.
        """
        self._require_loading(lease)
        if lease.deposited:
            raise BadRequestError("The descriptors of this arena were deposited already.")
        lease.deposited = tuple(fds)

    def progress(self, lease: Lease, progress: Progress) -> None:
        """Raises `BadRequestError` unless `lease` is loading."""
        entry = self._require_loading(lease)
        if progress != entry.progress:
            entry.progress, entry.progress_unix_s = progress, self._wall()
            self._tell_waiting(entry, entry.leases)
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
        entry = self._require_loading(lease)
        if generation and generation != lease.holds:
            raise BadRequestError("Only a client that holds this generation of the entry may hand it back.")
        if len(lease.deposited) != len(arena.block_sizes):
            raise BadRequestError(
                f"The arena has {len(arena.block_sizes)} blocks; {len(lease.deposited)} descriptors were deposited."
            )
        entry.fds, lease.deposited, lease.announced = lease.deposited, (), 0
        entry.arena, entry.manifest = arena, manifest
        entry.state, entry.expected = EntryState.READY, False
        latest = self._generations.get(entry.key.id, 0)
        if generation:
            self.counters.count("readoptions", *subject(entry.key), "handed_back")
        else:
            loaded_s = self._monotonic() - entry.load_since
            published = replace(published, ready_unix_s=self._wall(), load_s=loaded_s)
            self.counters.count("loads", *subject(entry.key), "published")
            self.counters.observe("load_seconds", loaded_s, *subject(entry.key))
        entry.generation, entry.published = generation or latest + 1, published
        _remember(self._generations, entry.key.id, entry.generation)
        lease.state = LeaseState.ATTACHED
        for other in entry.leases:
            if other is not lease:
                self._attach_ready(other)
        self._note_idle(entry)  # a `serve` or an `upgrade` has handed it back
        self._on_change()
        return entry.generation

    def decline(self, lease: Lease, reason: str) -> None:
        """The loader keeps its model to itself: all waiters are told why, the entry vanishes."""
        entry = self._require_loading(lease)
        self._remove(lease, "declined")
        self._on_event(lease)  # nothing to read, but it has ended
        self._discard(entry, NotShareableError(reason))
        self._changed()

    # ---- unloading

    def unload(self, query: Query, *, force: bool = False) -> tuple[EntryStatus, ...]:
        """Drop all current entries that match; their status before. Attached clients keep mapping.

        Raises:
            EntryNotFoundError: nothing matches.
            EntryInUseError: without `force`, one of them has leases. Nothing was unloaded.
        """
        found = [e for e in self.entries if _current(e) and query.matches(e.key)]
        if not found:
            raise EntryNotFoundError(no_match_text(query, [e for e in self.entries if _current(e)]))
        used = [e for e in found if e.users]
        if used and not force:
            users = ", ".join(f"{x.client} (pid {x.pid}, {x.state.value})" for e in used for x in e.users)
            raise EntryInUseError(f"{describe(used)} is in use by {users}. Stop them, or force the unload.")
        return self._unload(found)

    def expire(self, linger_s: float) -> tuple[tuple[EntryStatus, ...], float | None]:
        """Drop what nobody has used for `linger_s`; negative: nothing.

        Returns:
            What it was, and seconds until the next one will be due; None: nothing is.
        """
        now = self._monotonic()
        idle = [(since + linger_s - now, entry) for since, entry in self._idle(linger_s)]
        dropped = self._unload([entry for left_s, entry in idle if left_s <= 0])
        return dropped, min((left_s for left_s, _ in idle if left_s > 0), default=None)

    def make_room(self, size_bytes: int, linger_s: float) -> tuple[EntryStatus, ...]:
        """Drop what will expire by `linger_s`, the longest idle first, until so many bytes are dropped.

        Returns:
            What it was. Nothing if all together would not do: it would be lost in vain.
        """
        chosen: list[Entry] = []
        for _, entry in sorted(self._idle(linger_s), key=lambda idle: idle[0]):
            if sum(e.size_bytes for e in chosen) >= size_bytes:
                break
            chosen.append(entry)
        return self._unload(chosen) if sum(e.size_bytes for e in chosen) >= size_bytes else ()

    def _idle(self, linger_s: float) -> list[tuple[float, Entry]]:
        """What may be dropped, each with the time since which it is idle."""
        if linger_s < 0:
            return []
        # Whoever holds an entry without using it wants it for the next companion.
        return [(e.idle_since, e) for e in self.entries if e.idle_since is not None and not e.leases]

    def _unload(self, entries: Sequence[Entry]) -> tuple[EntryStatus, ...]:
        """Nobody finds them any more, and nobody hands them back; their status before."""
        before = tuple(entry.status() for entry in entries)
        for entry in entries:
            _remember(self._unloaded, entry.key.id, max(entry.generation, self._generations.get(entry.key.id, 0)))
        for entry in entries:
            if entry.state is EntryState.LOADING:
                self._discard(entry, LeaseLostError(f"{describe([entry])} was unloaded while it was loading."))
                continue
            self._retire(entry)
        if entries:
            self._changed()
        return before

    def retire(self, is_lost: Callable[[ArenaInfo, Sequence[int]], bool]) -> list[Entry]:
        """Drop the entries whose memory nobody can map any more. Attached clients keep mapping it."""
        found = [e for e in self.entries if e.state is EntryState.READY and e.arena and is_lost(e.arena, e.fds)]
        for entry in found:
            self._retire(entry)
        if found:
            self._changed()
        return found

    def check_replaceable(self) -> None:
        """Raise `EntryInUseError` if another companion could not take over all entries from those who hold them."""
        for entry in self.entries:
            if entry.state is EntryState.LOADING:
                lease = entry.loading_lease
                by = f" by {lease.client} (pid {lease.pid})" if lease else ""
                raise EntryInUseError(f"{describe([entry])} is being loaded{by}; try again afterwards.")
            if entry.state is EntryState.READY and not entry.leases:
                raise EntryInUseError(f"{describe([entry])} was published meanwhile; try again.")

    def restart_idle_time(self) -> None:
        """Nobody uses anything, but that shall count from now on."""
        if self.idle_since is not None:
            self.idle_since = self._monotonic()
        for entry in self.entries:
            if entry.idle_since is not None:
                self._note_idle(entry)

    def close(self, error: CompanionError) -> None:
        """End everything: every lease fails with `error`, every descriptor is closed."""
        for entry in list(self.entries):
            self._discard(entry, error)
        self._changed()

    # ---- inside

    def _retire(self, entry: Entry) -> None:
        entry.state, entry.idle_since = EntryState.RETIRED, None
        self._close_fds(entry.fds)
        entry.fds = ()
        for lease in entry.leases:
            self._tell(lease, RetiredEvent())
        if not entry.users:
            self._discard(entry, None)

    def _require_loading(self, lease: Lease) -> Entry:
        if lease.ended or lease.state is not LeaseState.LOADING:
            state = "ended" if lease.ended else lease.state.value
            raise BadRequestError(f"The lease of {lease.client} (pid {lease.pid}) is {state}, not loading.")
        return lease.entry

    def _elect(self, entry: Entry) -> None:
        loader = entry.loading_lease
        holders = [lease for lease in entry.leases if lease.holds]
        if loader is not None:
            if loader.holds or loader.deposited or not holders:
                return
            loader.state = LeaseState.WAITING
        others = [lease for lease in entry.leases if lease.may_load and not entry.expected]
        heir = next(iter(holders + others), None)
        if heir is None:
            return
        heir.state = LeaseState.LOADING
        self._end_wait(heir)
        entry.progress = STARTING
        entry.load_since_unix_s, entry.load_since = self._wall(), self._monotonic()
        entry.progress_unix_s = entry.load_since_unix_s
        self._tell(heir, GrantedEvent(heir.holds or self._generations.get(entry.key.id, 0) + 1))
        self._tell_waiting(entry, entry.leases)

    def _elect_or_discard(self, entry: Entry, why: str) -> None:
        self._elect(entry)
        if entry.loading_lease is None and not entry.expected:
            self._discard(entry, EntryNotFoundError(why))

    def _attach_ready(self, lease: Lease) -> None:
        lease.state = LeaseState.ATTACHED
        self._end_wait(lease)
        if lease.holds:
            self.counters.count("readoptions", *subject(lease.entry.key), "renewed")
        elif not lease.passive:
            self.counters.count("attaches", *subject(lease.entry.key))
        self._tell(lease, ReadyEvent())

    def _end_wait(self, lease: Lease) -> None:
        if lease.waiting_since is not None:
            waited_s = self._monotonic() - lease.waiting_since
            self.counters.observe("wait_seconds", waited_s, *subject(lease.entry.key))
            lease.waiting_since = None

    def _tell_waiting(self, entry: Entry, leases: Sequence[Lease]) -> None:
        loader = entry.loader_info()
        for lease in leases:
            if loader is not None and lease.state is LeaseState.WAITING:
                self._tell(lease, WaitingEvent(loader))

    def _tell(self, lease: Lease, event: Event) -> None:
        if lease.events and isinstance(lease.events[-1], WaitingEvent):
            lease.events.pop()
        lease.events.append(event)
        self._on_event(lease)

    def _remove(self, lease: Lease, result: str = "abandoned") -> None:
        """The lease is over; `result` of its load, if it had one."""
        lease.ended = True
        self._end_wait(lease)
        if lease.state is LeaseState.LOADING and not lease.holds:
            self.counters.count("loads", *subject(lease.entry.key), result)
        lease.entry.leases.remove(lease)
        self._close_fds(lease.deposited)
        lease.deposited = ()

    def _discard(self, entry: Entry, error: CompanionError | None) -> None:
        """The entry is gone; leases that it still has fail with `error`."""
        for lease in list(entry.leases):
            self._remove(lease)
            if error is not None:
                self.counters.count("failures", "companion", error.code)
                self._tell(lease, FailedEvent(error))
        self._close_fds(entry.fds)
        entry.fds = ()
        self.entries.remove(entry)

    def _note_idle(self, entry: Entry) -> None:
        """Unless somebody uses the entry, its idle time runs from now on."""
        if entry.state is EntryState.READY and not entry.users:
            entry.idle_since, entry.idle_since_unix_s = self._monotonic(), self._wall()

    def _changed(self) -> None:
        if self.idle_since is None and not any(entry.users for entry in self.entries):
            self.idle_since = self._monotonic()
        self._on_change()


def _remember(generations: dict[str, int], key_id: str, generation: int) -> None:
    generations[key_id] = max(generation, generations.pop(key_id, 0))
    while len(generations) > MAX_REMEMBERED:
        del generations[next(iter(generations))]


def _current(entry: Entry) -> bool:
    return entry.state is not EntryState.RETIRED
