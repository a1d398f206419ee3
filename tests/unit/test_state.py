"""The companion's registry as a specification: every rule of its docstring, without a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import EntryState, LeaseState, Progress, Published
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    EntryInUseError,
    EntryNotFoundError,
    LeaseLostError,
    NotShareableError,
)
from vllm_companion_plugin.holder.registry.entries import (
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.selection import Query
from vllm_companion_plugin.holder.registry.state import Registry
from vllm_companion_plugin.holder.service.incoming import StoredManifest

ARENA = ArenaInfo("memfd", (4096, 8192))
MANIFEST = StoredManifest((b"manifest",), 8, b"\0" * 32)
SHOWN = Published(3)


class World:
    """A registry with a clock of its own and a record of what it asked for."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.closed: list[int] = []
        self.changes = 0
        self.registry = Registry(
            close_fds=self.closed.extend, on_change=self._changed, wall=lambda: self.now, monotonic=lambda: self.now
        )

    def _changed(self) -> None:
        self.changes += 1

    def attach(self, key: EntryKey | Query, *, may_load: bool = True, pid: int = 1) -> Lease:
        return self.registry.attach(key, may_load=may_load, pid=pid, client=f"client{pid}")

    def publish(self, key: EntryKey, *, pid: int = 1, fds: Sequence[int] = (7, 8)) -> Lease:
        lease = self.attach(key, pid=pid)
        self.registry.deposit(lease, fds)
        self.registry.commit(lease, ARENA, MANIFEST, SHOWN)
        return lease

    def snapshot(self) -> object:
        return self.registry.status(), list(self.closed), [list(x.events) for x in self.registry.leases], self.changes


@pytest.fixture
def world() -> World:
    return World()


def key(identity: str = "k1", model: str = "m", rank: str = "single", **fields: str) -> EntryKey:
    return EntryKey(identity, model, rank=rank, fields=fields)


def kinds(lease: Lease) -> list[type]:
    return [type(event) for event in lease.events]


def test_the_first_client_that_may_load_is_granted_and_the_second_waits_for_it(world: World) -> None:
    first, second = world.attach(key(), pid=1), world.attach(key(), pid=2)
    assert kinds(first) == [GrantedEvent]
    assert kinds(second) == [WaitingEvent]
    assert second.events[0].loader.pid == 1  # type: ignore[union-attr]
    assert [x.state for x in (first, second)] == [LeaseState.LOADING, LeaseState.WAITING]


def test_a_commit_makes_the_entry_ready_and_attaches_everybody(world: World) -> None:
    first, second, third = world.attach(key()), world.attach(key(), pid=2), world.attach(key(), may_load=False, pid=3)
    world.registry.deposit(first, (7, 8))
    world.now += 5
    assert world.registry.commit(first, ARENA, MANIFEST, SHOWN) == 1
    assert kinds(second) == kinds(third) == [ReadyEvent]
    (entry,) = world.registry.status()
    assert (entry.state, entry.generation, entry.load_s) == (EntryState.READY, 1, 5)
    assert (entry.size_bytes, entry.tensor_count, entry.arena_kind) == (12288, 3, "memfd")
    assert {x.state for x in entry.leases} == {LeaseState.ATTACHED}
    assert world.closed == []


def test_a_client_that_comes_after_the_commit_is_ready_at_once(world: World) -> None:
    world.publish(key())
    assert kinds(world.attach(key(), may_load=False, pid=2)) == [ReadyEvent]


def test_when_the_loader_dies_the_next_that_may_load_is_granted_in_order_of_arrival(world: World) -> None:
    loader = world.attach(key(), pid=1)
    reader, heir, last = (
        world.attach(key(), may_load=False, pid=2),
        world.attach(key(), pid=3),
        world.attach(key(), pid=4),
    )
    world.registry.deposit(loader, (7, 8))
    world.registry.end_lease(loader)
    assert world.closed == [7, 8]
    assert kinds(heir) == [GrantedEvent]
    assert kinds(reader) == kinds(last) == [WaitingEvent]
    assert reader.events[-1].loader.pid == 3  # type: ignore[union-attr]


def test_when_the_loader_dies_and_nobody_else_may_load_the_waiters_fail(world: World) -> None:
    loader, reader = world.attach(key()), world.attach(key(), may_load=False, pid=2)
    world.registry.end_lease(loader)
    assert isinstance(reader.events[-1], FailedEvent)
    assert isinstance(reader.events[-1].error, EntryNotFoundError)
    assert reader.ended
    assert world.registry.status() == ()


def test_a_waiter_that_leaves_changes_nothing_for_the_others(world: World) -> None:
    loader, waiter = world.attach(key()), world.attach(key(), pid=2)
    world.registry.end_lease(waiter)
    world.registry.end_lease(waiter)
    assert loader.state is LeaseState.LOADING
    assert [x.pid for x in world.registry.leases] == [1]


def test_progress_reaches_all_waiters_and_a_slow_reader_keeps_only_the_latest(world: World) -> None:
    loader, waiter = world.attach(key()), world.attach(key(), pid=2)
    for done in range(100):
        world.registry.progress(loader, Progress("reading", done, 100))
    assert kinds(waiter) == [WaitingEvent]
    assert waiter.events[0].loader.progress.done_bytes == 99  # type: ignore[union-attr]


def test_a_decline_tells_all_waiters_why_and_the_entry_vanishes(world: World) -> None:
    loader, waiter = world.attach(key()), world.attach(key(), pid=2)
    world.registry.decline(loader, "GGUF layer")
    assert isinstance(waiter.events[-1], FailedEvent)
    assert isinstance(waiter.events[-1].error, NotShareableError)
    assert "GGUF layer" in str(waiter.events[-1].error)
    assert loader.ended
    assert world.registry.status() == ()
    assert kinds(world.attach(key(), pid=3)) == [GrantedEvent]


def test_an_unload_with_clients_is_refused_and_names_their_pids(world: World) -> None:
    world.publish(key(), pid=11)
    world.attach(key(), pid=12)
    with pytest.raises(EntryInUseError, match=r"pid 11.*pid 12"):
        world.registry.unload(Query())
    assert world.registry.status()[0].state is EntryState.READY


def test_a_forced_unload_drops_descriptors_at_once_and_the_entry_with_its_last_client(world: World) -> None:
    lease = world.publish(key())
    (before,) = world.registry.unload(Query(model="m"), force=True)
    assert before.state is EntryState.READY
    assert world.closed == [7, 8]
    assert world.registry.status()[0].state is EntryState.RETIRED
    with pytest.raises(EntryNotFoundError):
        world.attach(key(), may_load=False, pid=2)
    world.registry.end_lease(lease)
    assert world.registry.status() == ()
    assert world.closed == [7, 8]


def test_generations_count_up_and_survive_an_unload(world: World) -> None:
    old = world.publish(key())
    world.registry.unload(Query(), force=True)
    new = world.publish(key(), pid=2, fds=(17, 18))
    assert (old.entry.generation, new.entry.generation) == (1, 2)
    assert [e.state for e in world.registry.status()] == [EntryState.RETIRED, EntryState.READY]
    assert world.publish(key("other"), pid=3, fds=(27, 28)).entry.generation == 1


def test_unloading_what_is_loading_needs_force_and_fails_its_clients(world: World) -> None:
    loader = world.attach(key())
    with pytest.raises(EntryInUseError):
        world.registry.unload(Query())
    world.registry.unload(Query(), force=True)
    assert isinstance(loader.events[-1], FailedEvent)
    with pytest.raises(BadRequestError):
        world.registry.commit(loader, ARENA, MANIFEST, SHOWN)


def test_several_entries_of_one_query_are_unloaded_together_or_not_at_all(world: World) -> None:
    world.registry.end_lease(world.publish(key("a")))
    world.publish(key("b", rank="tp1/2"), pid=2, fds=(17, 18))
    with pytest.raises(EntryInUseError):
        world.registry.unload(Query(model="m"))
    assert len(world.registry.status()) == 2
    assert len(world.registry.unload(Query(model="m"), force=True)) == 2


def test_a_query_finds_the_only_entry_or_waits_for_the_one_that_loads(world: World) -> None:
    loader = world.attach(key())
    waiter = world.attach(Query(model="m"), may_load=False, pid=2)
    assert kinds(waiter) == [WaitingEvent]
    world.registry.deposit(loader, (7, 8))
    world.registry.commit(loader, ARENA, MANIFEST, SHOWN)
    assert kinds(waiter) == [ReadyEvent]
    assert kinds(world.attach(Query(rank="single"), may_load=False, pid=3)) == [ReadyEvent]


@pytest.mark.parametrize(
    ("select", "may_load", "error", "text"),
    [
        pytest.param(Query(model="x"), False, EntryNotFoundError, r"'x'.*Here: m \(target, tp0/2", id="lists-all"),
        pytest.param(Query(model="m"), False, BadRequestError, "tp0/2.*tp1/2", id="ambiguous"),
        pytest.param(Query(model="x"), True, BadRequestError, "full key", id="query-cannot-load"),
        pytest.param(key("z", model="x"), False, EntryNotFoundError, "not published", id="unknown-model"),
        pytest.param(
            key("z", rank="tp0/2", dtype="half"), False, EntryNotFoundError, "dtype is 'bf16' there and 'half' here",
            id="differing-field",
        ),
    ],
)  # fmt: skip
def test_an_attach_that_cannot_be_served_says_why(
    world: World, select: EntryKey | Query, may_load: bool, error: type[CompanionError], text: str
) -> None:
    world.publish(key("a", rank="tp0/2", dtype="bf16"))
    world.publish(key("b", rank="tp1/2", dtype="bf16"), pid=2, fds=(17, 18))
    before = world.snapshot()
    with pytest.raises(error, match=text):
        world.attach(select, may_load=may_load, pid=9)
    assert world.snapshot() == before


def test_another_key_of_a_published_model_may_be_loaded_beside_it(world: World) -> None:
    world.publish(key("a"))
    assert kinds(world.attach(key("b"), pid=2)) == [GrantedEvent]


ILLEGAL: list[tuple[str, Callable[[Registry, Lease, Lease], object]]] = [
    ("a waiter commits", lambda r, loader, waiter: r.commit(waiter, ARENA, MANIFEST, SHOWN)),
    ("a waiter reports", lambda r, loader, waiter: r.progress(waiter, Progress("x"))),
    ("a waiter declines", lambda r, loader, waiter: r.decline(waiter, "x")),
    ("a waiter deposits", lambda r, loader, waiter: r.deposit(waiter, (1,))),
    ("a second deposit", lambda r, loader, waiter: r.deposit(loader, (1, 2))),
    ("too few descriptors", lambda r, loader, waiter: r.commit(loader, ArenaInfo("memfd", (1, 2, 3)), MANIFEST, SHOWN)),
]


@pytest.mark.parametrize(("name", "step"), ILLEGAL, ids=[name for name, _ in ILLEGAL])
def test_illegal_transitions_raise_and_nothing_happens(
    world: World, name: str, step: Callable[[Registry, Lease, Lease], object]
) -> None:
    loader, waiter = world.attach(key()), world.attach(key(), pid=2)
    world.registry.deposit(loader, (7, 8))
    before = world.snapshot()
    with pytest.raises(BadRequestError):
        step(world.registry, loader, waiter)
    assert world.snapshot() == before


def test_a_second_commit_is_illegal(world: World) -> None:
    lease = world.publish(key())
    before = world.snapshot()
    with pytest.raises(BadRequestError):
        world.registry.commit(lease, ARENA, MANIFEST, SHOWN)
    assert world.snapshot() == before


def test_idle_time_runs_while_no_lease_exists(world: World) -> None:
    assert world.registry.idle_since == 1000
    lease = world.publish(key())
    assert world.registry.idle_since is None
    other = world.attach(key(), pid=2)
    world.registry.end_lease(lease)
    assert world.registry.idle_since is None
    world.now = 1234
    world.registry.end_lease(other)
    assert world.registry.idle_since == 1234
    world.now = 1300
    world.registry.unload(Query())
    assert world.registry.idle_since == 1234


class TestLinger:
    """An entry that nobody uses goes after its own linger time."""

    def test_ends_for_each_entry_by_itself(self, world: World) -> None:
        """What a rolling restart leaves behind goes, though the companion is in use all the time."""
        old, new = world.publish(key("old")), world.publish(key("new"), pid=2, fds=(17, 18))
        world.registry.end_lease(old)
        world.now += 4
        assert world.registry.expire(10) == ((), 6)
        (idle, used) = world.registry.status(10)
        assert (idle.expires_at_unix_s, used.expires_at_unix_s) == (1010, 0)
        world.now += 6
        (dropped,), next_s = world.registry.expire(10)
        assert (dropped.key.id, next_s, world.closed) == ("old", None, [7, 8])
        assert [e.key.id for e in world.registry.status()] == ["new"]
        assert world.registry.idle_since is None
        world.registry.end_lease(new)

    def test_begins_anew_with_every_user(self, world: World) -> None:
        """A user that comes and goes restarts it."""
        world.registry.end_lease(world.publish(key()))
        world.now += 9
        user = world.attach(key(), pid=2)
        world.now += 9
        assert world.registry.expire(10) == ((), None)
        world.registry.end_lease(user)
        world.now += 9
        assert world.registry.expire(10) == ((), 1)

    def test_leaves_alone_what_is_loading_and_what_is_held(self, world: World) -> None:
        """An entry that an upgrade holds must be there to be handed back."""
        world.registry.end_lease(world.publish(key("held")))
        holder = world.registry.attach(key("held"), may_load=False, pid=9, client="upgrade", passive=True)
        world.attach(key("loading"), pid=2)
        world.now += 99
        assert world.registry.expire(10) == ((), None)
        world.registry.end_lease(holder)
        assert [e.key.id for e in world.registry.expire(10)[0]] == ["held"]

    def test_that_is_endless_drops_nothing(self, world: World) -> None:
        """What a `serve` holds stays until it is stopped."""
        world.registry.end_lease(world.publish(key()))
        world.now += 1e6
        assert world.registry.expire(-1) == ((), None)
        assert world.registry.make_room(1, -1) == ()
        assert world.registry.status(-1)[0].expires_at_unix_s == 0

    def test_restarts_when_an_owner_goes(self, world: World) -> None:
        """The time while the entry belonged to a `serve` does not count."""
        world.registry.end_lease(world.publish(key()))
        world.now += 99
        world.registry.restart_idle_time()
        assert world.registry.expire(10) == ((), 10)

    def test_counts_from_the_hand_back_of_a_holder_that_uses_nothing(self, world: World) -> None:
        """An entry that a `serve` or an upgrade handed back is idle from then on."""
        world.registry.expect(key(), 4)
        lease = world.registry.attach(key(), may_load=False, pid=1, client="serve", holds=4, passive=True)
        world.registry.deposit(lease, (7, 8))
        world.registry.commit(lease, ARENA, MANIFEST, SHOWN, 4)
        world.registry.end_lease(lease)
        assert world.registry.expire(10) == ((), 10)

    def test_that_is_over_lets_nobody_hand_the_entry_back(self, world: World) -> None:
        """Who held it for a companion that died comes too late."""
        world.registry.end_lease(world.publish(key()))
        world.now += 10
        world.registry.expire(10)
        with pytest.raises(EntryNotFoundError):
            world.registry.attach(key(), may_load=False, pid=3, client="late", holds=1)


class TestRoom:
    """Who is about to load has idle entries dropped."""

    @pytest.fixture
    def idle(self, world: World) -> World:
        """Entries a, b and c of 12288 bytes each: b is idle for longest, a is in use."""
        leases = {name: world.publish(key(name), fds=(n, n + 1)) for n, name in enumerate("abc", start=10)}
        for name in "bc":
            world.registry.end_lease(leases[name])
            world.now += 1
        return world

    @pytest.mark.parametrize(
        ("size_bytes", "dropped"), [(0, ""), (1, "b"), (12288, "b"), (12289, "bc"), (24576, "bc"), (24577, "")]
    )
    def test_is_made_by_the_longest_idle_and_by_no_more_than_it_takes(
        self, idle: World, size_bytes: int, dropped: str
    ) -> None:
        """What would not be enough is not dropped at all."""
        assert "".join(e.key.id for e in idle.registry.make_room(size_bytes, 600)) == dropped
        assert {e.key.id for e in idle.registry.status()} == set("abc") - set(dropped)

    def test_is_never_made_of_what_somebody_uses_or_holds(self, idle: World) -> None:
        """An attached engine, a waiting one and a holder keep an entry."""
        idle.registry.attach(key("b"), may_load=False, pid=8, client="engine")
        idle.registry.attach(key("c"), may_load=False, pid=9, client="serve", passive=True)
        assert idle.registry.make_room(1, 600) == ()


def test_closing_fails_all_leases_and_closes_each_descriptor_once(world: World) -> None:
    attached = world.publish(key("a"))
    loader = world.attach(key("b"), pid=2)
    world.registry.deposit(loader, (17, 18))
    world.registry.close(LeaseLostError("bye"))
    assert sorted(world.closed) == [7, 8, 17, 18]
    assert all(isinstance(x.events[-1], FailedEvent) for x in (attached, loader))
    assert world.registry.status() == ()


# ---- what a dead companion held


def hold(world: World, *, pid: int) -> Lease:
    return world.registry.attach(key(), may_load=True, pid=pid, client=f"holder{pid}", holds=4)


def test_of_what_is_expected_only_a_holder_is_elected_and_it_comes_back_as_it_was(world: World) -> None:
    world.registry.expect(key(), 4)
    newcomer, reader = world.attach(key(), pid=1), world.attach(Query(model="m"), may_load=False, pid=2)
    assert kinds(newcomer) == kinds(reader) == [WaitingEvent]
    holder, second = hold(world, pid=3), hold(world, pid=4)
    assert kinds(holder) == [GrantedEvent]
    assert world.registry.give_up_expected() != []  # it is being handed back, which ends well
    world.registry.deposit(holder, (7, 8))
    assert world.registry.commit(holder, ARENA, MANIFEST, Published(3, {"hide": 2}, 900.0, 8.0), 4) == 4
    assert [kinds(x)[-1] for x in (newcomer, reader, second)] == [ReadyEvent] * 3
    (entry,) = world.registry.status()
    assert (entry.generation, entry.ready_unix_s, entry.load_s, entry.ways) == (4, 900.0, 8.0, {"hide": 2})


def test_a_holder_that_dies_while_it_hands_back_is_followed_by_the_next(world: World) -> None:
    world.registry.expect(key(), 1)
    newcomer, first = world.attach(key(), pid=1), hold(world, pid=2)
    world.registry.deposit(first, (7, 8))
    world.registry.end_lease(first)
    assert world.closed == [7, 8]
    assert kinds(newcomer) == [WaitingEvent]
    assert kinds(hold(world, pid=3)) == [GrantedEvent]


def test_what_nobody_hands_back_in_time_is_loaded_as_the_next_generation(world: World) -> None:
    world.registry.expect(key(), 4)
    world.registry.expect(key("k2"), 1)
    newcomer = world.attach(key(), pid=1)
    reader = world.attach(key("k2"), may_load=False, pid=2)
    assert len(world.registry.give_up_expected()) == 2
    assert kinds(newcomer)[-1] is GrantedEvent
    assert kinds(reader)[-1] is FailedEvent
    world.registry.deposit(newcomer, (7, 8))
    assert world.registry.commit(newcomer, ARENA, MANIFEST, SHOWN) == 5
    late = hold(world, pid=3)
    assert kinds(late) == [ReadyEvent]  # of another generation, as it will see
    assert [entry.key.id for entry in world.registry.status()] == ["k1"]


def test_a_holder_that_hangs_loses_its_turn_to_the_next_and_then_to_a_loader(world: World) -> None:
    world.registry.expect(key(), 4)
    first, newcomer, second = hold(world, pid=1), world.attach(key(), pid=2), hold(world, pid=3)
    world.registry.deposit(first, (7, 8))
    assert world.registry.end_overdue(5) == ([], 5)
    world.now += 2
    assert world.registry.end_overdue(5) == ([], 3)
    world.now += 3
    world.registry.give_up_expected()
    assert world.registry.end_overdue(5) == ([first], 0)
    assert world.closed == [7, 8]
    with pytest.raises(BadRequestError):
        world.registry.commit(first, ARENA, MANIFEST, SHOWN, 4)
    assert kinds(first)[-1] is FailedEvent
    assert kinds(second)[-1] is GrantedEvent
    assert world.registry.end_overdue(5) == ([], 5)
    world.now += 5
    assert world.registry.end_overdue(5) == ([second], 0)
    assert kinds(newcomer)[-1] is GrantedEvent
    world.now += 500  # a load takes its time
    assert world.registry.end_overdue(5) == ([], None)


def test_who_only_holds_an_entry_keeps_nobody_from_unloading_it_and_no_companion_from_ending(world: World) -> None:
    user = world.publish(key())
    passive = world.registry.attach(key(), may_load=False, pid=2, client="serve", passive=True)
    world.registry.end_lease(user)
    assert world.registry.idle_since == 1000
    assert [entry.leases for entry in world.registry.status()] == [()]
    world.registry.unload(Query())
    assert (kinds(passive), passive.ended) == ([ReadyEvent, RetiredEvent], True)
    assert (world.registry.status(), world.closed) == ((), [7, 8])


def test_a_companion_can_be_replaced_while_somebody_holds_each_entry_and_nothing_is_loaded(world: World) -> None:
    user = world.publish(key())
    world.registry.check_replaceable()
    loader = world.attach(key("k2"), pid=2)
    with pytest.raises(EntryInUseError, match=r"being loaded by client2 \(pid 2\)"):
        world.registry.check_replaceable()
    world.registry.end_lease(loader)
    world.registry.end_lease(user)
    with pytest.raises(EntryInUseError, match="published meanwhile"):
        world.registry.check_replaceable()


def test_who_holds_an_entry_goes_before_whoever_was_elected_to_load_it(world: World) -> None:
    newcomer = world.attach(key(), pid=1)
    holder = hold(world, pid=2)
    assert kinds(holder) == [GrantedEvent]
    assert [x.state for x in (newcomer, holder)] == [LeaseState.WAITING, LeaseState.LOADING]
    with pytest.raises(BadRequestError, match="is waiting, not loading"):
        world.registry.deposit(newcomer, (17, 18))
    world.registry.deposit(holder, (7, 8))
    assert world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4) == 4
    assert kinds(newcomer)[-1] is ReadyEvent


def test_who_is_about_to_publish_is_let_finish_before_a_holder(world: World) -> None:
    newcomer = world.attach(key(), pid=1)
    world.registry.deposit(newcomer, (17, 18))
    holder = hold(world, pid=2)
    assert kinds(holder) == [WaitingEvent]
    assert world.registry.commit(newcomer, ARENA, MANIFEST, SHOWN) == 1
    assert kinds(holder)[-1] is ReadyEvent


def test_who_is_elected_is_told_the_generation_that_its_publication_will_have(world: World) -> None:
    world.publish(key())
    world.registry.unload(Query(model="m"), force=True)
    (event,) = world.attach(key(), pid=2).events
    assert event == GrantedEvent(2)


def test_an_expected_entry_keeps_nobody_from_ending(world: World) -> None:
    world.registry.expect(key(), 1)
    assert world.registry.idle_since is not None
    world.registry.end_lease(world.attach(key(), pid=1))
    assert [entry.state for entry in world.registry.status()] == [EntryState.LOADING]
    world.registry.give_up_expected()
    assert world.registry.status() == ()


def test_who_is_attached_to_what_is_unloaded_is_told(world: World) -> None:
    lease = world.publish(key())
    lease.events.clear()
    world.registry.unload(Query(model="m"), force=True)
    assert kinds(lease) == [RetiredEvent]
