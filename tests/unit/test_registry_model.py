"""The registry under any order of events: Hypothesis looks for one that breaks a rule.

`Clients` is a state machine whose rules are what clients, time and people do to a companion. It keeps its own simple
account: of each descriptor, of what each client was told, of who sleeps and what was wished, of since when each entry
is idle, of each generation and who maps it. After each step the account and the registry must agree; what the registry
refuses must leave it as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import count
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import LeaseState, Progress, Published
from vllm_companion_plugin.errors import CompanionError, CompanionReplacedError, LeaseLostError, NotShareableError
from vllm_companion_plugin.holder.registry.counting import Counting
from vllm_companion_plugin.holder.registry.entries import (
    CurrentEvent,
    Entry,
    Event,
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    StoredManifest,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.limits import HAND_BACK_S
from vllm_companion_plugin.holder.registry.moves import GenerationMoved, LeaseMoved, LingerOver, Move
from vllm_companion_plugin.holder.registry.state import Registry
from vllm_companion_plugin.holder.registry.table import (
    DISMISSING,
    GENERATION,
    LEASE,
    GenerationEvent,
    GenerationState,
    LeaseEvent,
)

KEYS = [EntryKey("a", "m", rank="tp0/2"), EntryKey("b", "m", rank="tp1/2")]
ARENA = ArenaInfo("memfd", (4096, 8192))
OTHER_ARENA = ArenaInfo("memfd", (8192, 4096))
HOST = ArenaInfo("memfd", (12288,))
NO_COPY = ArenaInfo("memfd", (4096,))
OTHER_KIND = ArenaInfo("cuda_vmm", (4096, 8192))
MANIFEST = StoredManifest((b"manifest",), 8, b"\0" * 32)
LINGER_S, GRACE_S = 8.0, 16.0
ENDS_SLEEPERS = (LeaseLostError, NotShareableError, CompanionReplacedError)
GOES_TO = {GenerationEvent.PARK: "host", GenerationEvent.DROP: "nowhere"}
BY_LINGER = (GenerationEvent.EXPIRE, GenerationEvent.MAKE_ROOM)

levels = st.sampled_from([0, 1, 1, 1, 2, 2])
wishes = st.sampled_from([WhenAsleep.AUTO] * 3 + list(WhenAsleep))
copies = st.sampled_from(["right"] * 3 + ["wrong", "none", "half", "stays awake", "later", "dies", "is unloaded"])
writings = st.sampled_from(["right"] * 7 + ["other blocks", "other kind", "too few", "no version", "abort", "dies"])
numbers = st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 9])
keys = st.sampled_from([KEYS[0]] * 3 + KEYS)
queries = st.sampled_from([Query(), Query(model="m"), Query(rank="tp0/2"), Query(key_id="b"), Query(model="nobody's")])


def one_of(find: Callable[[Any], list[Lease]]) -> st.SearchStrategy[Lease]:
    """One of the leases that `find` finds in the state machine."""
    return st.runner().flatmap(lambda self: st.sampled_from(find(self)))


def should_stay(wish: WhenAsleep, levels: Sequence[int], *, is_owned: bool) -> str:
    """Where the bytes belong while clients sleep at these levels and nobody is awake, in the account's own words."""
    if wish is WhenAsleep.STAY or (wish is WhenAsleep.AUTO and 0 in levels):
        return "device"
    if wish is WhenAsleep.PARK or is_owned or (wish is WhenAsleep.AUTO and 1 in levels):
        return "host"
    return "nowhere"


leases = one_of(lambda self: self.all_leases + self.registry.leases)
loaders = one_of(lambda self: self.elected_leases() or self.all_leases)
attached = precondition(lambda self: self.all_leases)
held = precondition(lambda self: self.registry.entries)
expected = precondition(lambda self: self.expected_entries())
one_of_expected = st.runner().flatmap(lambda self: st.sampled_from(self.expected_entries()))
loading = precondition(lambda self: self.elected_leases())
awake = one_of(lambda self: self.awake_leases() or self.all_leases)
asleep = one_of(lambda self: self.asleep_leases())
writers = one_of(lambda self: self.writing_leases() or self.all_leases)
some_sleep = precondition(lambda self: self.asleep_leases())


class Clients(RuleBasedStateMachine):
    """What may happen to a companion, and what must be true whatever has happened."""

    taken: ClassVar[set[tuple[Enum | None, Enum]]] = set()
    """Steps of the tables that any order has taken."""

    # ---- the world around the registry

    @initialize(
        linger_s=st.sampled_from([LINGER_S, LINGER_S, -1.0]),
        expected=st.sampled_from(
            [
                [],
                [(KEYS[0], 3)],
                [(KEYS[0], 1), (KEYS[1], 2)],
                [(KEYS[0], 1), (KEYS[0], 4)],
                [(KEYS[0], 4), (KEYS[0], 1)],
            ]
        ),
        rolled_back=st.sampled_from([0, 1]),
        given_up=st.booleans(),
        replaced=st.booleans(),
        keep=st.sampled_from([1, 1, 0, 2]),
    )
    def start(
        self,
        linger_s: float,
        expected: list[tuple[EntryKey, int]],
        rolled_back: int,
        given_up: bool,
        replaced: bool,
        keep: int,
    ) -> None:
        """`rolled_back`: the generation that was current in the companion before; 0: the latest one."""
        self.replaced, self.keep = replaced, keep
        self.wanted = {key.id: number for key, number in expected if number == rolled_back}
        self.now = 1000.0
        self.linger_s, self.grace_s = linger_s, GRACE_S
        self.numbers, self.pids = count(100), count(1)
        self.deposited: set[int] = set()
        self.closed: Counter[int] = Counter()
        self.moves: list[Move] = []
        self.all_leases: list[Lease] = []
        self.told: dict[int, list[Event]] = {}
        self.commits: Counter[str] = Counter()
        self.committed: set[int] = set()  # leases
        self.own_loads = self.yielded_loads = 0
        self.holds: dict[int, int] = {}
        self.levels: dict[int, int] = {}  # of leases that sleep
        self.woken: set[int] = set()  # leases that have slept, and gone on
        self.wakes = 0
        self.falling = 0  # the level at which a client is about to sleep
        self.copying: set[int] = set()  # leases that were asked for a copy
        self.wishes: dict[int, WhenAsleep] = {}
        self.copies: dict[tuple[int, int], int] = {}  # entries and generations to the descriptors of their copies
        self.writing: set[int] = set()  # leases
        self.staged = self.rollbacks = 0
        self.written: set[tuple[str, int]] = set()  # generations that a client wrote
        self.loaded: dict[str, set[int]] = {key.id: set() for key in KEYS}  # generations that a client loaded
        self.current: dict[int, int] = {}  # entries to their current generations
        self.others: dict[int, list[int]] = {}  # to those that were current before, the latest one last
        self.mapped: dict[int, int] = {}  # leases to the generations that they map
        self.asked: dict[int, int] = {}  # pids to the generations that they mapped before they came
        self.strays: set[int] = set()  # leases that map what this companion does not hold
        self.declines = 0
        self.owner = 0
        self.idle: dict[int, float] = {}
        self.idle_since: float | None = self.now
        self.elected: dict[int, float] = {}
        self.published: dict[str, int] = {}
        self.dismissed: dict[str, int] = {}
        self.opened_at = self.now
        self.counting = Counting()
        self.registry = Registry(
            close_fds=self.closed.update,
            wall=lambda: self.now + 1e9,
            monotonic=lambda: self.now,
            linger_s=linger_s,
            grace_s=GRACE_S,
            max_fds=12,
            keep_previous=keep,
            observers=(self.counting.observe, self.observe),
        )
        for key, generation in expected:
            self.registry.expect(key, generation, rolled_back=generation == rolled_back)
            self.published[key.id] = max(generation, self.published.get(key.id, 0))
        for entry in self.registry.entries:
            self.current[id(entry)] = self.wanted.get(entry.key.id, self.published[entry.key.id])
        self.registry.open()
        self.settle()
        if given_up:
            self.now += HAND_BACK_S
            self.check_time()

    def observe(self, move: Move) -> None:
        """Each move is judged when it is made, by what was known before."""
        self.moves.append(move)
        if isinstance(move, GenerationMoved | LeaseMoved):
            self.taken.add((move.before, move.event))
        if isinstance(move, LeaseMoved):
            self.observe_lease(move)
        if not isinstance(move, GenerationMoved):
            return
        key_id, generation, entry = move.entry.key.id, move.generation.number, id(move.entry)
        is_other = move.generation in move.entry.others or move.event is GenerationEvent.FORGET
        assert (move.generation is move.entry.current) is not is_other
        if is_other:
            self.observe_other(move)
            return
        if move.before is GenerationState.READY and move.event in GOES_TO:
            assert not any(self.maps(lease) and not lease.passive for lease in move.entry.leases), "somebody is awake"
            assert self.belongs(move.entry) == GOES_TO[move.event]
            assert move.event is GenerationEvent.PARK or (key_id, generation) not in self.written
        if move.event in (GenerationEvent.PUBLISH, GenerationEvent.COMMIT):
            assert generation > self.published.get(key_id, 0), "a number was given twice"
        if move.event is GenerationEvent.HAND_BACK:
            assert generation > self.dismissed.get(key_id, 0), "what was dropped on purpose came back"
        if move.event in BY_LINGER:
            assert not self.owner, "an owner's entry was dropped"
            assert self.linger_s >= 0
            assert not move.entry.leases
        if move.event is GenerationEvent.EXPIRE:
            assert self.now - self.idle[id(move.entry)] >= self.linger_s, "an entry expired too early"
        if move.event is GenerationEvent.PUBLISH:
            self.loaded[key_id].add(generation)
        if move.event is GenerationEvent.COMMIT:
            self.others[entry].append(self.current[entry])
        self.current[entry] = generation
        if move.event in (GenerationEvent.DROP, GenerationEvent.GIVE_UP):
            self.current[entry] = 0
        if move.generation.state is not GenerationState.READY:
            self.others[entry] = []
        if move.event in (GenerationEvent.PUBLISH, GenerationEvent.HAND_BACK):
            self.wanted.pop(key_id, None)
        if move.event in (GenerationEvent.PUBLISH, GenerationEvent.HAND_BACK, GenerationEvent.COMMIT):
            self.published[key_id] = max(generation, self.published.get(key_id, 0))
        elif move.event in DISMISSING:
            self.dismissed[key_id] = max(generation, self.published.get(key_id, 0))

    def observe_other(self, move: GenerationMoved) -> None:
        """A generation that is not current is let go, because nobody maps it, or its memory is lost."""
        number, entry = move.generation.number, move.entry
        assert move.event in (GenerationEvent.LOSE, GenerationEvent.FORGET)
        if move.event is GenerationEvent.LOSE:
            self.others[id(entry)].remove(number)
            self.strays |= {lease.id for lease in entry.leases if self.mapped.get(lease.id) == number}

    def observe_lease(self, move: LeaseMoved) -> None:
        lease = move.lease
        if move.event is LeaseEvent.ELECT:
            assert lease.id not in self.levels, "a client that sleeps was elected"
            self.elected[lease.id] = self.now
        elif move.event is LeaseEvent.SLEEP:
            self.levels[lease.id] = self.falling
        elif move.event is LeaseEvent.WAKE:
            del self.levels[lease.id]
            self.woken.add(lease.id)
            self.wakes += 1
            self.strays.discard(lease.id)
            self.mapped[lease.id] = self.current[id(lease.entry)]
        elif move.event is LeaseEvent.YIELD:
            self.yielded_loads += not self.grant(lease).brings_back
        elif lease.ended and move.before is LeaseState.ASLEEP:
            assert move.event is LeaseEvent.END or isinstance(move.error, ENDS_SLEEPERS)
        if move.event in (LeaseEvent.MAP, LeaseEvent.COMMIT):
            asked = self.asked[lease.pid] if move.event is LeaseEvent.MAP else 0
            self.mapped[lease.id] = asked or self.current[id(lease.entry)]
            if self.mapped[lease.id] not in self.held_generations(lease.entry):
                self.strays.add(lease.id)
        if lease.ended or move.event in (LeaseEvent.RETIRE, LeaseEvent.SLEEP):
            self.mapped.pop(lease.id, None)
        if lease.ended or move.event is LeaseEvent.RETIRE:
            self.copying.discard(lease.id)
        if move.event is LeaseEvent.STAGE:
            self.writing.add(lease.id)
        elif lease.ended or move.event in (LeaseEvent.RETIRE, LeaseEvent.ABORT, LeaseEvent.COMMIT_STAGED):
            self.writing.discard(lease.id)

    def attempt(self, call: Callable[[], Any], *, legal: bool | None = None) -> Any:
        """The answer of `call`, or None if it is refused: then nothing may have changed. `legal`: what is expected."""
        self.now += 0.25
        before = self.snapshot()
        answer, refusal = None, None
        try:
            answer = call()
        except CompanionError as error:
            refusal = error
        if refusal is not None:
            assert not legal, f"refused: {refusal}"
            assert self.snapshot() == before, f"something changed, though it was refused: {refusal}"
            return None
        assert legal is not False, "what is illegal was done"
        self.settle()
        return answer

    def settle(self) -> None:
        """Bring the account up to date after a step."""
        kept = (GenerationState.READY, GenerationState.PARKED)
        now_idle = {id(e): e for e in self.registry.entries if e.current.state in kept and not e.users}
        self.idle = {entry: self.idle.get(entry, self.now) for entry in now_idle}
        for entry in self.registry.entries:
            used = {self.mapped.get(lease.id) for lease in entry.leases}
            others, is_written = self.others[id(entry)], any(lease.id in self.writing for lease in entry.leases)
            keep = self.keep - is_written
            kept = others[-keep:] if keep > 0 else []
            self.others[id(entry)] = [number for number in others if number in used or number in kept]
        if any(entry.users for entry in self.registry.entries):
            self.idle_since, self.grace_s = None, 0.0
        elif self.idle_since is None:
            self.idle_since = self.now

    def snapshot(self) -> object:
        """All that the registry knows, and all that others have seen of it."""
        fields = [
            (
                {**vars(e), "leases": [x.id for x in e.leases], "others": list(e.others)},
                [dict(vars(generation)) for generation in (e.current, *e.others)],
                [{**vars(x), "events": list(x.events)} for x in e.leases],
            )
            for e in self.registry.entries
        ]
        counts = [(series.name, series.value, list(series.counts)) for series in self.counting.counters.all()]
        remembered = [dict(numbers) for numbers in vars(self.registry._generations).values()]
        return (
            *(fields, counts, remembered, dict(vars(self.registry.lifetime))),
            *(self.closed.copy(), len(self.moves), [list(x.events) for x in self.all_leases]),
        )

    def events(self, lease: Lease) -> list[Event]:
        """All that the client was told, read or not."""
        return [*self.told[lease.id], *lease.events]

    def may_publish(self, lease: Lease) -> bool:
        """Whether the client knows itself to be elected; the account, not the registry, says so."""
        heard = self.events(lease)
        return not lease.ended and bool(heard) and isinstance(heard[-1], GrantedEvent) and lease.id in self.elected

    def grant(self, lease: Lease) -> GrantedEvent:
        """The client's latest."""
        return [event for event in self.events(lease) if isinstance(event, GrantedEvent)][-1]

    def maps(self, lease: Lease) -> bool:
        """Whether the client maps the entry, as far as it knows."""
        if lease.ended or lease.id in self.levels:
            return False
        told = any(isinstance(event, ReadyEvent) for event in self.events(lease))
        return lease.id in self.committed or lease.id in self.woken or told

    def is_retired(self, lease: Lease) -> bool:
        """Whether the client knows that the entry was dropped."""
        return any(isinstance(event, RetiredEvent) for event in self.events(lease))

    def awake_leases(self) -> list[Lease]:
        return [lease for lease in self.registry.leases if self.maps(lease) and not lease.passive]

    def asleep_leases(self) -> list[Lease]:
        return [lease for lease in self.registry.leases if lease.id in self.levels]

    def writing_leases(self) -> list[Lease]:
        return [lease for lease in self.registry.leases if lease.id in self.writing]

    def copy_of(self, entry: Entry) -> int | None:
        """The descriptor of the copy of its current generation."""
        fd = self.copies.get((id(entry), self.current.get(id(entry), 0)))
        return None if fd is None or self.closed[fd] else fd

    def has_copy(self, entry: Entry) -> bool:
        return self.copy_of(entry) is not None

    def lasts(self, entry: Entry) -> bool:
        """Whether no checkpoint brings it back, or a companion's owner wants it kept."""
        return self.owner > 0 or (entry.key.id, self.current[id(entry)]) in self.written

    def held_generations(self, entry: Entry) -> list[int]:
        return [self.current[id(entry)], *self.others[id(entry)]]

    def belongs(self, entry: Entry) -> str:
        """Where the entry's bytes should be, if nobody is awake."""
        levels = [self.levels[lease.id] for lease in entry.leases if lease.id in self.levels]
        return should_stay(self.wishes.get(id(entry), WhenAsleep.STAY), levels, is_owned=self.lasts(entry))

    def expected_entries(self) -> list[Entry]:
        return [entry for entry in self.registry.entries if entry.current.state is GenerationState.EXPECTED]

    def elected_leases(self) -> list[Lease]:
        return [lease for lease in self.registry.leases if lease.state is LeaseState.LOADING]

    # ---- clients

    @rule(
        select=st.one_of(keys, keys, queries),
        may_load=st.sampled_from([True, True, False]),
        holds=st.sampled_from([0, 0, 0, 0, 1, 1, 4, None, None]),
        passive=st.sampled_from([False, False, True]),
    )
    def attach(
        self, select: EntryKey | Query, may_load: bool, holds: int | None, passive: bool, level: int | None = None
    ) -> None:
        """`holds` None: the latest generation; `level`: at which the client sleeps, None: it is awake."""
        pid, self.falling = next(self.pids), level or 0
        if holds is None:
            holds = self.published.get(select.id, 0) if isinstance(select, EntryKey) else 0
        self.asked[pid] = holds

        def call() -> Lease:
            return self.registry.attach(
                select, may_load=may_load, pid=pid, client=f"client{pid}", holds=holds, passive=passive, asleep=level
            )

        before = len(self.registry.leases)
        lease = self.attempt(call, legal=False if level is not None and (passive or level not in range(3)) else None)
        if lease is not None:
            assert len(self.registry.leases) == before + 1
            self.all_leases.append(lease)
            self.told[lease.id], self.holds[lease.id] = [], lease.holds
            if level is not None:
                self.wishes[id(lease.entry)] = WhenAsleep.STAY

    @rule(key=keys)
    def engine(self, key: EntryKey) -> None:
        self.attach(key, True, 0, False)

    @rule(key=keys, passive=st.booleans(), how=st.sampled_from(["not yet", "as it was", "anew"]))
    def holder(self, key: EntryKey, passive: bool, how: str) -> None:
        """A client that maps the latest generation already."""
        self.attach(key, False, None, passive)
        if how != "not yet" and self.last_is_elected():
            self.publish(self.all_leases[-1], how)

    @expected
    @rule(
        entry=one_of_expected,
        number=st.sampled_from([None, 1]),
        how=st.sampled_from(["as it was", "as it was", "anew", "not at all"]),
    )
    def come_back(self, entry: Entry, number: int | None, how: str) -> None:
        """A client that maps what the companion before held, as soon as it can."""
        self.attach(entry.key, False, number, False)
        if self.last_is_elected():
            self.publish(self.all_leases[-1], how)

    @held
    @rule(key=keys)
    def hold(self, key: EntryKey) -> None:
        """A `serve` or an `upgrade` that wants to hold what is there."""
        self.attach(key, False, 0, True)

    @rule(key=keys, then=st.sampled_from(["stays", "all leave", "a holder stays"]))
    def publisher(self, key: EntryKey, then: str) -> None:
        """A client that publishes at once if it is elected."""
        self.attach(key, True, 0, False)
        if self.last_is_elected():
            self.publish(self.all_leases[-1], "anew")
        if then != "stays":
            self.all_leave(key)
        if then == "a holder stays":
            self.attach(key, False, None, True)

    @rule(key=keys, level=st.sampled_from([0, 1, 2, 2, 3]), passive=st.sampled_from([False] * 5 + [True]))
    def sleeper(self, key: EntryKey, level: int, passive: bool) -> None:
        """A client that fell asleep on an entry of a companion that has died."""
        self.attach(key, True, 0, passive, level)

    @attached
    @rule(lease=awake, level=levels, wish=wishes, copy=copies)
    def fall_asleep(self, lease: Lease, level: int, wish: WhenAsleep, copy: str) -> None:
        """If a copy is asked for, the client leaves one, or a wrong one, or none; or something else happens first."""
        if self.sleep(lease, level, wish, None) is not False:
            return
        if copy == "dies":
            self.leave(lease)
        elif copy == "is unloaded":
            self.unload(Query(key_id=lease.entry.key.id), True)
        elif copy in ("right", "wrong", "half"):
            self.announce(lease, 1)
            if not lease.deposited:
                self.deposit(lease, 1)
        if copy in ("half", "stays awake"):
            self.stay_awake(lease)
        elif copy in ("right", "wrong", "none"):
            self.sleep(lease, level, wish, NO_COPY if copy == "wrong" else HOST)

    @held
    @rule(key=keys, level=levels, wish=wishes)
    def all_fall_asleep(self, key: EntryKey, level: int, wish: WhenAsleep) -> None:
        """Each of them leaves a copy if it is asked for one."""
        for lease in self.awake_leases():
            if lease.entry.key is key:
                self.fall_asleep(lease, level, wish, "right")

    @attached
    @rule(
        lease=st.one_of(awake, leases),
        level=st.sampled_from([0, 1, 2, 3]),
        wish=wishes,
        host=st.sampled_from([None, None, HOST, NO_COPY]),
        stale=st.booleans(),
    )
    def asks_to_sleep(self, lease: Lease, level: int, wish: WhenAsleep, host: ArenaInfo | None, stale: bool) -> None:
        """Anybody, at any time."""
        self.sleep(lease, level, wish, host, stale)

    def sleep(
        self, lease: Lease, level: int, wish: WhenAsleep, host: ArenaInfo | None, stale: bool = False
    ) -> bool | None:
        """Whether the client has fallen asleep; None: it was refused. `stale`: its copy is of another generation."""
        entry = lease.entry
        stale = stale and host is not None
        copied = self.current[id(entry)] + stale
        leaves_copy = lease.id in self.copying and len(lease.deposited) == 1 and host is HOST and not stale
        can_sleep = self.maps(lease) and not lease.passive and lease.id not in self.writing
        legal = can_sleep and level in range(3) and (host is None or leaves_copy or stale)
        alone = all(other is lease or other.id in self.levels for other in entry.users)
        lacks = entry.current.state is GenerationState.READY and not (self.has_copy(entry) or leaves_copy)
        slept = [self.levels[other.id] for other in entry.leases if other.id in self.levels]
        where = should_stay(wish, [level, *slept], is_owned=self.lasts(entry))
        deposited, wished, self.falling = lease.deposited, self.wishes.get(id(entry), WhenAsleep.STAY), level
        self.wishes[id(entry)] = wish
        answer = self.attempt(lambda: self.registry.sleeping.sleep(lease, level, wish, host, copied), legal=legal)
        if not answer:
            self.wishes[id(entry)] = wished
        if answer is None:
            return None
        assert answer is not (alone and lacks and where == "host"), "a copy was asked for in vain, or should have been"
        if not answer:
            self.copying.add(lease.id)
            return False
        if host is not None and not stale:
            (self.copies[id(entry), copied],) = deposited
        self.copying.discard(lease.id)
        return True

    @rule(
        key=keys,
        level=st.sampled_from([1, 1, 2]),
        copy=copies,
        then=st.sampled_from(["stay", "all leave", "one dies awake"]),
    )
    def sleepers(self, key: EntryKey, level: int, copy: str, then: str) -> None:
        """All sleep on what one of them has published."""
        self.publisher(key, "stays")
        dies = self.awake_leases()[:1] if then == "one dies awake" else []
        if dies:
            self.engine(key)
        for lease in self.awake_leases():
            if lease not in dies and lease.entry.key is key:
                self.fall_asleep(lease, level, WhenAsleep.AUTO, copy)
        for lease in dies:
            self.leave(lease)
        if then == "all leave":
            self.all_leave(key)

    @attached
    @rule(lease=leases)
    def stay_awake(self, lease: Lease) -> None:
        self.attempt(lambda: self.registry.sleeping.stay_awake(lease), legal=lease.id in self.copying)
        self.copying.discard(lease.id)

    @some_sleep
    @rule(
        lease=asleep,
        how=st.sampled_from(["as it was", "as it was", "later", "another arena", "anew", "dies"]),
        ends=st.booleans(),
    )
    def wake(self, lease: Lease, how: str, ends: bool) -> None:
        """A client attaches anew, and does what it is asked for; then its lease that slept ends."""
        self.attach(lease.entry.key, True, 0, False)
        woken = self.all_leases[-1]
        if how == "dies":
            self.leave(woken)
        elif how != "later" and self.last_is_elected():
            self.fill(woken, how)
        if ends and not woken.ended:
            self.leave(lease)

    @some_sleep
    @rule(
        lease=st.one_of(asleep, asleep, leases),
        known=st.sampled_from([True, True, True, False]),
        cannot=st.sampled_from([False, False, True]),
    )
    def wake_by_lease(self, lease: Lease, known: bool, cannot: bool) -> None:
        """A client goes on with its lease, if what it knows is on the device; else nothing has changed.

        `cannot`: it cannot map the entry, and sleeps on: all is as before.
        """
        level = self.levels.get(lease.id, 0)
        sleeps, ready = lease.id in self.levels, lease.entry.current.state is GenerationState.READY
        before = self.snapshot()
        manifest = MANIFEST.sha256 if known else b"another"
        answer = self.attempt(lambda: self.registry.sleeping.wake(lease, manifest), legal=sleeps and not lease.ended)
        if answer is None:
            return
        assert answer is (ready and known)
        assert answer or self.snapshot() == before
        assert not answer or self.events(lease)[-1] == self.current_event(lease.entry)
        if answer and cannot:
            self.sleep_on(lease, level)

    @attached
    @rule(lease=st.one_of(awake, leases), level=st.sampled_from([0, 1, 2, 3]))
    def sleep_on(self, lease: Lease, level: int) -> None:
        """As who has woken in vain; the wish stays what it was, and nobody need have wished anything."""
        self.falling = level
        can = self.maps(lease) and not lease.passive and lease.id not in self.writing | self.copying
        if lease.id in self.levels and not lease.ended:  # it may not know whether it was woken
            before = self.snapshot()
            self.attempt(lambda: self.registry.sleeping.sleep_on(lease, level), legal=level in range(3))
            assert self.snapshot() == before
            return
        if can and level in range(3):
            self.wishes.setdefault(id(lease.entry), WhenAsleep.AUTO)
        self.attempt(lambda: self.registry.sleeping.sleep_on(lease, level), legal=can and level in range(3))

    def fill(self, lease: Lease, how: str) -> None:
        """The client loads, or brings back."""
        if not lease.deposited:
            self.deposit(lease, 2)
        grant = self.grant(lease)
        number = grant.generation if grant.brings_back and how != "anew" else 0
        self.commit(lease, number, OTHER_ARENA if how == "another arena" else ARENA)

    def last_is_elected(self) -> bool:
        return bool(self.all_leases) and self.all_leases[-1].state is LeaseState.LOADING

    @loading
    @rule(lease=loaders, how=st.sampled_from(["as it was", "anew", "half", "not at all"]))
    def publish(self, lease: Lease, how: str) -> None:
        """What a loader does: all of it, half of it until a client comes that maps the entry already, or a decline."""
        if how == "not at all":
            self.decline(lease, 0)
            return
        if not lease.deposited:
            self.deposit(lease, 2)
        if how == "half":
            self.attach(lease.entry.key, False, None, False)
        else:
            grant = self.grant(lease)
            number = grant.generation if grant.brings_back else lease.holds
            self.commit(lease, number if how == "as it was" else 0)

    @attached
    @rule(
        lease=st.one_of(leases, loaders),
        call=st.sampled_from(["announce", "deposit", "progress", "commit", "decline"]),
        number=st.sampled_from([0, 1, 2, 2, 3, 7]),
    )
    def call(self, lease: Lease, call: str, number: int) -> None:
        """Anything that a client may say, in any state."""
        getattr(self, call)(lease, number)

    def may_deposit(self, lease: Lease) -> bool:
        return self.may_publish(lease) or lease.id in self.copying or lease.id in self.writing

    def announce(self, lease: Lease, number: int) -> None:
        legal = None if self.may_deposit(lease) else False  # the limit may refuse it
        self.attempt(lambda: self.registry.announce(lease, number), legal=legal)

    def deposit(self, lease: Lease, number: int) -> None:
        fds = [next(self.numbers) for _ in range(number)]
        legal = self.may_deposit(lease) and not lease.deposited

        def call() -> None:
            self.registry.deposit(lease, fds)
            self.deposited.update(fds)

        self.attempt(call, legal=legal)

    def progress(self, lease: Lease, number: int) -> None:
        progress = Progress("reading", number, 7)
        self.attempt(lambda: self.registry.progress(lease, progress), legal=self.may_publish(lease))

    def commit(self, lease: Lease, number: int, arena: ArenaInfo = ARENA) -> None:
        legal = self.may_publish(lease) and len(lease.deposited) == 2
        brings_back = legal and self.grant(lease).brings_back
        handed = (lease.entry.key.id, number)
        if brings_back:
            legal = (number, arena) == (self.grant(lease).generation, lease.entry.current.arena)
        elif legal:
            legal = number in (0, lease.holds)
        if legal and not brings_back and number not in self.loaded[lease.entry.key.id] and number % 2:
            self.written.add(handed)  # by a client of the companion before
        version = "step" if handed in self.written else ""

        def call() -> int:
            return self.registry.commit(lease, arena, MANIFEST, Published(3, version=version), number)

        committed = self.attempt(call, legal=legal)
        if committed is not None:
            self.commits["brought_back" if brings_back else "handed_back" if number else "published"] += 1
            self.own_loads += not (brings_back or lease.holds)
            assert lease.entry.current.number in (committed, 0)  # 0: nobody is awake, and it was dropped at once
            self.committed.add(lease.id)
            del self.elected[lease.id]

    def decline(self, lease: Lease, number: int) -> None:
        legal, holds = self.may_publish(lease) and not self.grant(lease).brings_back, lease.holds
        self.attempt(lambda: self.registry.decline(lease, "because"), legal=legal)
        self.declines += legal and not holds

    @attached
    @rule(lease=leases)
    def leave(self, lease: Lease) -> None:
        """Nothing is lost by it that a client which sleeps waits for."""
        entry, was_copied = lease.entry, self.has_copy(lease.entry)
        was_there = entry.current.state is GenerationState.READY
        waits = [other for other in entry.leases if other.id in self.levels and other is not lease]
        self.attempt(lambda: self.registry.end_lease(lease), legal=True)
        assert lease.ended
        if not waits:
            return
        assert not any(other.ended for other in waits)
        if entry.current.state is GenerationState.DROPPED and (was_there or was_copied):
            assert was_there, "what was in host memory is lost"
            assert self.belongs(entry) == "nowhere"
        elif was_copied or was_there:
            assert entry.current.state is GenerationState.READY or self.has_copy(entry)

    @held
    @rule(key=keys)
    def all_leave(self, key: EntryKey) -> None:
        for lease in [lease for lease in self.registry.leases if lease.entry.key is key]:
            self.leave(lease)

    # ---- updates

    @attached
    @rule(lease=st.one_of(awake, leases), base=st.sampled_from([0, 0, 0, 0, 1, 2]))
    def stage(self, lease: Lease, base: int = 0) -> None:
        entry = lease.entry
        free = lease.id not in self.copying and not any(other.id in self.writing for other in entry.leases)
        legal = self.maps(lease) and not self.is_retired(lease) and not lease.passive and free
        legal = legal and base in (0, self.current[id(entry)])
        number = self.attempt(lambda: self.registry.updates.stage(lease, base), legal=legal)
        if legal:
            assert number == self.published[entry.key.id] + 1
            assert lease.id in self.writing
            self.staged += 1

    @attached
    @rule(lease=st.one_of(writers, leases))
    def abort(self, lease: Lease) -> None:
        self.attempt(lambda: self.registry.updates.abort(lease), legal=lease.id in self.writing)
        assert lease.id not in self.writing
        assert lease.deposited == () or lease.id in self.copying or self.may_publish(lease)

    @attached
    @rule(lease=writers, how=writings)
    def write(self, lease: Lease, how: str) -> None:
        """What a writer does at the end: it commits something right or wrong, stops, or dies."""
        if how == "abort":
            self.abort(lease)
        elif how == "dies":
            self.leave(lease)
        else:
            count = 1 if how == "too few" else 2
            if not lease.deposited:
                self.announce(lease, count)
                self.deposit(lease, count)
            self.commit_staged(lease, how)

    @attached
    @rule(lease=st.one_of(writers, leases), how=writings, base=st.sampled_from([0, 0, 0, 1, 2]))
    def commit_staged(self, lease: Lease, how: str, base: int = 0) -> None:
        """Nobody is moved, and all who map the entry are told."""
        entry, right = lease.entry, lease.entry.current.arena or ARENA
        other = OTHER_ARENA if right == ARENA else ARENA
        arena = {"other blocks": other, "other kind": OTHER_KIND}.get(how, right)
        version = "" if how == "no version" else "step"
        legal = lease.id in self.writing and len(lease.deposited) == 2 and arena is right and version != ""
        legal = legal and base in (0, self.current[id(entry)])
        before = [self.seen(x) for x in self.registry.leases if x is not lease]
        if legal:
            self.written.add((entry.key.id, self.published[entry.key.id] + 1))
        number = self.attempt(lambda: self.registry.updates.commit(lease, arena, version, base), legal=legal)
        assert [self.seen(x) for x in self.registry.leases if x is not lease] == before
        if legal:
            assert number == self.current[id(entry)]
            self.all_are_told(entry)
            assert lease.id not in self.writing

    @rule(
        key=keys,
        steps=st.lists(writings, min_size=1, max_size=3),
        then=st.sampled_from(["stays", "leaves", "leaves", "advances"]),
    )
    def trainer(self, key: EntryKey, steps: list[str], then: str) -> None:
        """A client that writes the next generations of what is there, or is brought there first."""
        self.publisher(key, "stays")
        self.attach(key, False, 0, False)
        lease = self.all_leases[-1] if self.all_leases else None
        if lease is None or not self.maps(lease) or lease.entry.key is not key:
            return
        for how in steps:
            self.stage(lease)
            if lease.id in self.writing:
                self.write(lease, how)
        if then == "leaves" and not lease.ended:
            self.leave(lease)
        elif then == "advances" and not lease.ended:
            self.advance(lease, 0)

    @attached
    @rule(lease=st.one_of(awake, awake, leases), number=numbers)
    def advance(self, lease: Lease, number: int) -> None:
        """To a generation that is held, or to one that is not."""
        entry = lease.entry
        there = self.held_generations(entry)
        can = self.maps(lease) and not self.is_retired(lease) and lease.id not in self.copying
        legal = can and number in (0, *there)
        if legal:
            self.mapped[lease.id] = number or there[0]
            self.strays.discard(lease.id)
        self.attempt(lambda: self.registry.updates.advance(lease, number), legal=legal)

    @held
    @rule(
        query=st.one_of(st.just(Query(key_id="a")), queries), number=numbers, base=st.sampled_from([0, 0, 0, 1, 2, 3])
    )
    def make_current(self, query: Query, number: int, base: int = 0) -> None:
        found = [e for e in self.registry.entries if e.can_be_asked_for and query.matches(e.key)]
        ready = all(e.current.state is GenerationState.READY for e in found)
        legal = bool(found) and ready and all(number in (0, *self.held_generations(e)) for e in found)
        legal = legal and all(base in (0, self.current[id(e)]) for e in found)
        changed: list[Entry] = []
        for entry in found if legal and number else ():
            before = self.current[id(entry)]
            self.others[id(entry)] = [x for x in self.others[id(entry)] if x != number]
            self.others[id(entry)] += [before] if before != number else []
            self.current[id(entry)] = number
            changed += [entry] if before != number else []
            self.rollbacks += number < before
        seen = [self.seen(x) for x in self.registry.leases]
        self.attempt(lambda: self.registry.make_current(query, number, base), legal=legal)
        assert [self.seen(x) for x in self.registry.leases] == seen
        for entry in changed:
            self.all_are_told(entry)

    def all_are_told(self, entry: Entry) -> None:
        """That another generation is current, unless they sleep."""
        for lease in entry.leases:
            assert lease.id in self.levels or self.events(lease)[-1] == self.current_event(entry)

    def seen(self, lease: Lease) -> object:
        """What a client notices, but for the news that all who map the entry get."""
        return lease.id, lease.maps, lease.state, lease.id in self.levels and len(lease.events)

    def current_event(self, entry: Entry) -> CurrentEvent:
        number = self.current[id(entry)]
        return CurrentEvent(number, "step" if (entry.key.id, number) in self.written else "")

    # ---- people and memory

    @held
    @rule(query=queries, force=st.booleans())
    def unload(self, query: Query, force: bool) -> None:
        found = [e for e in self.registry.entries if e.can_be_asked_for and query.matches(e.key)]
        legal = bool(found) and (force or not any(e.users for e in found))
        self.attempt(lambda: self.registry.unload(query, force=force), legal=legal)
        assert not legal or not any(e.can_be_asked_for for e in found)

    @held
    @rule(size_bytes=st.sampled_from([0, 1, 1, ARENA.size_bytes, ARENA.size_bytes + 1, 3 * ARENA.size_bytes]))
    def make_room(self, size_bytes: int) -> None:
        dropped = self.attempt(lambda: self.registry.make_room(size_bytes), legal=True)
        sizes = [entry.size_bytes for entry in dropped]
        assert not sizes or sum(sizes[:-1]) < size_bytes <= sum(sizes)

    @held
    @rule(key=keys, which=st.sampled_from(["the current one", "the others", "the last one"]))
    def lose(self, key: EntryKey, which: str) -> None:
        """The process that the memory of some generations depends on ends."""
        entries = [e for e in self.registry.entries if e.key is key]
        of = {
            "the current one": [e.current for e in entries],
            "the others": [each for e in entries for each in e.others],
            "the last one": [each for e in entries for each in e.others[-1:]],
        }
        lost = {fd for each in of[which] for fd in each.fds}
        self.attempt(lambda: self.registry.lose(lambda arena, fds: not lost.isdisjoint(fds)), legal=True)

    @rule(pid=st.sampled_from([0, 0, 1, 2]), linger_s=st.sampled_from([-1.0, 4.0, float("inf")]))
    def own(self, pid: int, linger_s: float) -> None:
        legal = not self.owner and pid > 0 and linger_s != float("inf")
        before = self.linger_s
        self.attempt(lambda: self.registry.own(pid, linger_s), legal=legal)
        if legal:
            self.owner, self.linger_s, self.without_owner_s, self.grace_s = pid, linger_s, before, 0.0

    @precondition(lambda self: self.owner)
    @rule()
    def disown(self) -> None:
        self.owner, self.linger_s = 0, self.without_owner_s
        self.registry.disown()
        self.idle = dict.fromkeys(self.idle, self.now)
        self.idle_since = self.idle_since if self.idle_since is None else self.now
        self.settle()

    # ---- time

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, HAND_BACK_S, LINGER_S]), read=st.booleans())
    def wait(self, seconds: float, read: bool) -> None:
        for lease in self.all_leases if read else ():
            self.told[lease.id] += lease.events
            lease.events.clear()
        self.now += seconds
        self.check_time()

    @rule()
    def wait_until_due(self) -> None:
        """Nothing happens before the registry says so, and something does then."""
        due = self.registry.advance()
        if due.over or due.next_s is None:
            return
        assert due.next_s > 0
        self.settle()
        before = len(self.moves)
        self.now += due.next_s / 2
        again = self.registry.advance()
        assert (again.over, again.next_s, len(self.moves)) == (False, due.next_s / 2, before)
        self.now += due.next_s / 2
        self.check_time()
        assert len(self.moves) > before

    def check_time(self) -> None:
        """Whatever is due is done."""
        before = len(self.moves)
        due = self.registry.advance()
        self.settle()
        for entry in self.registry.entries:
            assert entry.current.state is not GenerationState.EXPECTED or self.now < self.opened_at + HAND_BACK_S
            idle_s = self.now - self.idle.get(id(entry), self.now)
            assert self.owner or self.linger_s < 0 or entry.leases or idle_s < self.linger_s or not idle_s
        for lease in self.registry.leases:
            if lease.state is LeaseState.LOADING and lease.holds:
                assert self.now < self.elected[lease.id] + HAND_BACK_S, "a client that hangs kept its turn"
        ends = None
        if self.linger_s >= 0 and self.idle_since is not None:
            ends = self.idle_since + max(self.linger_s, self.grace_s)
        assert due.over == (ends is not None and ends <= self.now)
        assert due.over == any(isinstance(move, LingerOver) for move in self.moves[before:])

    # ---- what is always true

    @invariant()
    def a_key_has_one_current_entry(self) -> None:
        ids = [entry.key.id for entry in self.registry.entries if entry.can_be_asked_for]
        assert len(ids) == len(set(ids))

    @invariant()
    def every_descriptor_has_one_owner_or_is_closed_once(self) -> None:
        generations = [each for e in self.registry.entries for each in (e.current, *e.others)]
        kept = [fd for each in generations for fd in (*each.fds, *each.host_fds)]
        kept += [fd for lease in self.all_leases for fd in lease.deposited]
        assert Counter(kept) + self.closed == Counter(dict.fromkeys(self.deposited, 1))

    @invariant()
    def leases_agree_with_their_entries(self) -> None:
        for entry in self.registry.entries:
            states = Counter(lease.state for lease in entry.leases)
            assert all(lease.entry is entry for lease in entry.leases)
            if entry.current.state in (GenerationState.EXPECTED, GenerationState.LOADING):
                assert states.keys() <= {LeaseState.WAITING, LeaseState.LOADING, LeaseState.ASLEEP}
                assert states[LeaseState.LOADING] in (
                    (1,) if entry.current.state is GenerationState.LOADING else (0, 1)
                )
                assert not entry.current.fds
            else:
                using = {
                    GenerationState.READY: {LeaseState.ATTACHED, LeaseState.PARKING, LeaseState.WRITING},
                    GenerationState.RETIRED: {LeaseState.ATTACHED},
                }
                assert states.keys() <= using.get(entry.current.state, set()) | {LeaseState.ASLEEP}
                assert len(entry.current.fds) == (2 if entry.current.state is GenerationState.READY else 0)
            assert states[LeaseState.PARKING] <= 1
            assert states[LeaseState.WRITING] <= 1
            assert entry.current.state is not GenerationState.DROPPED or states[LeaseState.ASLEEP]
            assert entry.current.state is not GenerationState.RETIRED or entry.users
            assert (entry.idle_since is not None) == (id(entry) in self.idle)
            assert entry.idle_since in (None, self.idle.get(id(entry)))
        there = {lease.id for lease in self.registry.leases}
        for lease in self.all_leases:
            assert lease.ended != (lease.id in there)
            may_deposit = lease.state in (LeaseState.LOADING, LeaseState.PARKING, LeaseState.WRITING)
            assert may_deposit or not (lease.deposited or lease.announced)
            assert (lease.state is LeaseState.ASLEEP) == (lease.id in self.levels and not lease.ended)
            assert (lease.state is LeaseState.PARKING) == (lease.id in self.copying)
            assert (lease.state is LeaseState.WRITING) == (lease.id in self.writing)

    @invariant()
    def the_right_generations_are_held(self) -> None:
        """The current one, those that clients map, and some of those that were current before, or what is written."""
        for entry in self.registry.entries:
            there = [entry.current.number, *(each.number for each in entry.others)]
            assert there == self.held_generations(entry)
            assert len(there) == len(set(there))
            assert not entry.others or entry.current.state is GenerationState.READY
            assert all(each.state is GenerationState.READY and len(each.fds) == 2 for each in entry.others)
            for generation in (entry.current, *entry.others):
                assert generation.written == ((entry.key.id, generation.number) in self.written)
            mapped = [self.mapped[lease.id] for lease in entry.leases if lease.id in self.mapped]
            assert len(there) <= 1 + self.keep + len(set(mapped) - {there[0]})
            if entry.current.state is GenerationState.READY:
                assert {
                    lease.id: lease.maps for lease in entry.leases if lease.state not in (None, LeaseState.ASLEEP)
                } == {lease.id: self.mapped[lease.id] for lease in entry.leases if lease.id in self.mapped}
                shown = entry.status(self.linger_s).generations
                assert sorted(there) == [each.number for each in shown]
                assert [each.number for each in shown if each.is_current] == there[:1]
                for each in shown:
                    users = [lease.pid for lease in entry.users if self.mapped.get(lease.id) == each.number]
                    assert list(each.pids) == users
        for lease in self.registry.leases:
            if lease.id in self.mapped and lease.id not in self.strays:
                assert self.mapped[lease.id] in self.held_generations(lease.entry)

    @invariant()
    def bytes_are_where_they_belong(self) -> None:
        """On the device while anybody is awake; else where the rule says, unless the copy that it takes is lacking."""
        for entry in self.registry.entries:
            current, awake = entry.current, [x for x in entry.leases if self.maps(x) and not self.is_retired(x)]
            assert not awake or current.state is GenerationState.READY
            assert (current.host is not None) == self.has_copy(entry)
            assert current.host_fds == ((self.copy_of(entry),) if self.has_copy(entry) else ())
            if current.state is GenerationState.PARKED:
                assert current.host_fds
            elif current.state in (GenerationState.DROPPED, GenerationState.RETIRED, GenerationState.EXPECTED):
                assert not current.host_fds
            elif current.state is GenerationState.READY and entry.users and not any(not x.passive for x in awake):
                where = self.belongs(entry)
                assert where == "device" or (where == "host" and not current.host_fds)
            elif current.state is GenerationState.LOADING:
                assert entry.loading_lease is not None
                assert self.grant(entry.loading_lease).brings_back == self.has_copy(entry)

    @invariant()
    def the_first_in_order_of_arrival_loads(self) -> None:
        """But a client that holds the entry goes first, until a loader has deposited."""
        for entry in self.registry.entries:
            loader = entry.loading_lease
            holders = [lease for lease in entry.leases if lease.holds]
            wanted = self.wanted.get(entry.key.id)
            first = [lease for lease in holders if wanted in (None, lease.holds)]
            able = [x for x in entry.leases if x.id not in self.levels]
            able = [x for x in able if x.may_load or (self.has_copy(entry) and not x.passive)]
            if entry.current.state is GenerationState.EXPECTED:
                assert loader is (first[0] if first else None)
            elif entry.current.state is GenerationState.LOADING:
                assert loader is not None
                assert loader is (holders or able)[0] or (loader is able[0] and loader.deposited)

    @invariant()
    def idle_time_runs_while_nobody_uses_anything(self) -> None:
        assert self.registry.lifetime.idle_since == self.idle_since

    @invariant()
    def clients_are_told_in_order(self) -> None:
        for lease in self.all_leases:
            heard = [type(event) for event in self.events(lease)]
            waits = [index for index, kind in enumerate(heard) if kind is WaitingEvent]
            for kind in (ReadyEvent, RetiredEvent, FailedEvent):
                assert heard.count(kind) <= 1
                if kind in heard:
                    assert all(index < heard.index(kind) for index in waits)
            if FailedEvent in heard:
                assert heard[-1] is FailedEvent
                assert lease.ended
            unread = [type(event) for event in lease.events]
            assert unread.count(WaitingEvent) <= unread.count(GrantedEvent) + 1
            assert unread.count(CurrentEvent) <= 1

    @invariant()
    def counters_equal_a_recount(self) -> None:
        """From what clients were told and did, not from the moves that are counted."""
        heard = [(lease, event) for lease in self.all_leases for event in self.events(lease)]
        moved = [move for move in self.moves if isinstance(move, LeaseMoved)]
        ready = [lease for lease, event in heard if isinstance(event, ReadyEvent)]
        loads = [x for x, event in heard if isinstance(event, GrantedEvent) and not event.brings_back]
        loading = [x for x in self.elected_leases() if not self.grant(x).brings_back]
        grants = sum(not self.holds[lease.id] for lease in loads) - self.yielded_loads
        under_way = sum(not self.holds[lease.id] for lease in loading)
        expected = {
            "loads published": self.commits["published"],
            "loads declined": self.declines,
            "loads abandoned": grants - under_way - self.own_loads - self.declines,
            "load_seconds": self.commits["published"],
            "attaches": sum(not self.holds[lease.id] and not lease.passive for lease in ready) + self.wakes,
            "readoptions handed_back": self.commits["handed_back"],
            "readoptions renewed": sum(self.holds[lease.id] > 0 for lease in ready),
            "readoptions given_up": self.happened(GenerationEvent.GIVE_UP),
            "updates committed": self.happened(GenerationEvent.COMMIT),
            "updates aborted": self.staged - self.happened(GenerationEvent.COMMIT) - len(self.writing),
            "rollbacks": self.rollbacks,
            "failures": sum(isinstance(event, FailedEvent) for _, event in heard),
            "wait_seconds": sum(move.waited_s is not None for move in moved),
        }
        assert self.counts(expected) == expected

    def happened(self, event: GenerationEvent) -> int:
        return sum(isinstance(move, GenerationMoved) and move.event is event for move in self.moves)

    def counts(self, names: Sequence[str] | dict[str, int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for series in self.counting.counters.all():
            name = f"{series.name} {series.labels['result']}" if "result" in series.labels else series.name
            found[name] += sum(series.counts) if series.counts else int(series.value)
        return {name: found[name] for name in names}

    def teardown(self) -> None:
        """At the end nobody is let in, and nothing is left."""
        if not hasattr(self, "registry"):
            return
        self.registry.end(replaced=self.replaced)
        before = self.snapshot()
        with pytest.raises(CompanionReplacedError if self.replaced else LeaseLostError):
            self.registry.attach(KEYS[0], may_load=True, pid=1, client="late")
        assert self.snapshot() == before
        self.registry.close()
        assert self.closed == Counter(dict.fromkeys(self.deposited, 1))
        assert self.registry.entries == []
        assert all(lease.ended for lease in self.all_leases)


def explore(examples: int, steps: int, *, derandomize: bool, missed: int) -> None:
    """Try so many orders of so many events. They must have taken all steps of both tables but for `missed`."""
    Clients.taken.clear()
    run_state_machine_as_test(
        Clients,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    tables = [*GENERATION.rows.items(), *LEASE.rows.items()]
    not_taken = {(state, event) for state, row in tables for event in row} - Clients.taken
    assert len(not_taken) <= missed, f"these steps were not tried: {not_taken}"


class TestRegistryModel:
    """No order of events breaks a rule of the registry."""

    @pytest.mark.timeout(600)  # a failure is shortened before it is shown
    def test_short(self) -> None:
        """The same orders every time: Hypothesis takes constants of the modules that a process has loaded."""
        code = f"from {__name__} import explore; explore(240, 50, derandomize=True, missed=5)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=590, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_long(self) -> None:
        """Other orders every time, and longer ones."""
        explore(3000, 80, derandomize=False, missed=0)
