"""The companion's registry as a specification: every rule of its docstring, without a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from vllm_companion_plugin.core.adapters import key_of
from vllm_companion_plugin.core.adapters import key_of as adapter_key
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import EntryState, LeaseState, Progress, Published
from vllm_companion_plugin.errors import (
    AlreadyRunningError,
    BadRequestError,
    CompanionError,
    CompanionReplacedError,
    EntryInUseError,
    EntryNotFoundError,
    LeaseLostError,
    LimitError,
    NotShareableError,
    OvertakenError,
    WaitTimeoutError,
)
from vllm_companion_plugin.holder.registry import limits
from vllm_companion_plugin.holder.registry.counting import Counting
from vllm_companion_plugin.holder.registry.entries import (
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    StoredManifest,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.lifetime import FOR_EVER
from vllm_companion_plugin.holder.registry.limits import HAND_BACK_S
from vllm_companion_plugin.holder.registry.moves import GenerationMoved, Lingering, LingerOver, Move, OwnerGone
from vllm_companion_plugin.holder.registry.state import Due, Registry
from vllm_companion_plugin.holder.registry.table import DISMISSING, GenerationEvent

ARENA = ArenaInfo("memfd", (4096, 8192))
MANIFEST = StoredManifest((b"manifest",), 8, b"\0" * 32)
SHOWN = Published(3)


class World:
    """A registry with a clock of its own and a record of what it asked for."""

    def __init__(
        self, linger_s: float = FOR_EVER, grace_s: float = 0.0, max_fds: int = 1000, keep_previous: int = 1
    ) -> None:
        self.now = 1000.0
        self.closed: list[int] = []
        self.changes = 0
        self.moves: list[Move] = []
        self.counting = Counting()
        self.registry = Registry(
            close_fds=self.closed.extend,
            wall=lambda: self.now,
            monotonic=lambda: self.now,
            device="cpu",
            pid=77,
            linger_s=linger_s,
            grace_s=grace_s,
            max_fds=max_fds,
            keep_previous=keep_previous,
            on_change=self._changed,
            observers=(self.counting.observe, self.moves.append),
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

    def wait(self, seconds: float) -> Due:
        """Let time pass, and have done what is due."""
        self.now += seconds
        return self.registry.advance()

    def happened(self, event: GenerationEvent) -> list[str]:
        """The ids of the keys that this has happened to."""
        return [m.entry.key.id for m in self.moves if isinstance(m, GenerationMoved) and m.event is event]

    def snapshot(self) -> object:
        return (
            self.registry.status(),
            list(self.closed),
            [(list(x.events), x.state, x.deposited, x.announced) for x in self.registry.leases],
            self.changes,
            list(self.moves),
        )


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
    assert (old.entry.current.number, new.entry.current.number) == (1, 2)
    assert [e.state for e in world.registry.status()] == [EntryState.RETIRED, EntryState.READY]
    assert world.publish(key("other"), pid=3, fds=(27, 28)).entry.current.number == 1


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


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_name_of_a_model_means_its_weights(world: World, is_loaded: bool) -> None:
    """Also while they are loaded, and an adapter of that name is ready."""
    world.publish(adapter_key("m"))
    weights = world.publish(key()) if is_loaded else world.attach(key())
    reader = world.attach(Query(model="m"), may_load=False, pid=3)
    assert reader.entry is weights.entry
    other = world.attach(Query(key_id=adapter_key("m").id), may_load=False, pid=4)
    assert other.entry is not weights.entry


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
    assert world.registry.lifetime.idle_since == 1000
    lease = world.publish(key())
    assert world.registry.lifetime.idle_since is None
    other = world.attach(key(), pid=2)
    world.registry.end_lease(lease)
    assert world.registry.lifetime.idle_since is None
    world.now = 1234
    world.registry.end_lease(other)
    assert world.registry.lifetime.idle_since == 1234
    world.now = 1300
    world.registry.unload(Query())
    assert world.registry.lifetime.idle_since == 1234


class TestLinger:
    """An entry that nobody uses goes after its own linger time."""

    @pytest.fixture
    def world(self) -> World:
        return World(linger_s=10)

    def test_ends_for_each_entry_by_itself(self, world: World) -> None:
        """What a rolling restart leaves behind goes, though the companion is in use all the time."""
        old, new = world.publish(key("old")), world.publish(key("new"), pid=2, fds=(17, 18))
        world.registry.end_lease(old)
        assert world.wait(4) == Due(False, 6)
        (idle, used) = world.registry.status()
        assert (idle.expires_at_unix_s, used.expires_at_unix_s) == (1010, 0)
        assert world.wait(6) == Due(False, None)
        assert (world.happened(GenerationEvent.EXPIRE), world.closed) == (["old"], [7, 8])
        assert [e.key.id for e in world.registry.status()] == ["new"]
        assert world.registry.lifetime.idle_since is None
        world.registry.end_lease(new)

    def test_begins_anew_with_every_user(self, world: World) -> None:
        """A user that comes and goes restarts it."""
        world.registry.end_lease(world.publish(key()))
        world.now += 9
        user = world.attach(key(), pid=2)
        assert world.wait(9) == Due(False, None)
        world.registry.end_lease(user)
        assert world.wait(9) == Due(False, 1)

    def test_leaves_alone_what_is_loading_and_what_is_held(self, world: World) -> None:
        """An entry that an upgrade holds must be there to be handed back."""
        world.registry.end_lease(world.publish(key("held")))
        holder = world.registry.attach(key("held"), may_load=False, pid=9, client="upgrade", passive=True)
        world.attach(key("loading"), pid=2)
        assert world.wait(99) == Due(False, None)
        world.registry.end_lease(holder)
        world.wait(0)
        assert world.happened(GenerationEvent.EXPIRE) == ["held"]

    @pytest.mark.parametrize("linger_s", [-1, float("inf"), float("nan")])
    def test_that_is_endless_drops_nothing(self, linger_s: float) -> None:
        """What a companion that is stopped by hand holds stays until then."""
        world = World(linger_s)
        world.registry.end_lease(world.publish(key()))
        assert world.wait(1e6) == Due(False, None)
        assert world.registry.make_room(1) == ()
        assert world.registry.status()[0].expires_at_unix_s == world.registry.exits_at_unix_s == 0

    def test_counts_from_the_hand_back_of_a_holder_that_uses_nothing(self, world: World) -> None:
        """An entry that a `serve` or an upgrade handed back is idle from then on."""
        world.registry.expect(key(), 4)
        world.now += 5
        lease = world.registry.attach(key(), may_load=False, pid=1, client="serve", holds=4, passive=True)
        world.registry.deposit(lease, (7, 8))
        world.registry.commit(lease, ARENA, MANIFEST, SHOWN, 4)
        world.registry.end_lease(lease)
        world.wait(9)
        assert world.happened(GenerationEvent.EXPIRE) == []
        world.wait(1)
        assert world.happened(GenerationEvent.EXPIRE) == ["k1"]

    def test_that_is_over_lets_nobody_hand_the_entry_back(self, world: World) -> None:
        """A client that held it for a companion that died comes too late."""
        world.registry.end_lease(world.publish(key()))
        world.wait(10)
        with pytest.raises(EntryNotFoundError):
            world.registry.attach(key(), may_load=False, pid=3, client="late", holds=1)


class TestLifetime:
    """The companion ends when nobody has used anything for its linger time."""

    def test_is_over_after_the_linger_time(self) -> None:
        """Observers hear of the end when it comes in sight, and when it is there."""
        world = World(linger_s=10)
        assert world.wait(0) == world.wait(0) == Due(False, 10)
        world.now += 1
        world.registry.end_lease(world.publish(key()))
        world.wait(4)
        assert world.registry.exits_at_unix_s == 1011
        assert world.wait(6) == Due(True, 0)
        told = [move for move in world.moves if isinstance(move, (Lingering, LingerOver))]
        assert told == [Lingering(10, 0), Lingering(6, 12288), LingerOver(10)]

    def test_goes_on_while_somebody_uses_something(self) -> None:
        """Also while somebody loads."""
        world = World(linger_s=10)
        world.attach(key())
        assert world.wait(99) == Due(False, None)
        assert world.registry.exits_at_unix_s == 0

    def test_has_a_grace_until_the_first_user(self) -> None:
        """A client can attach to the companion that it has started, however short the linger time."""
        world = World(linger_s=0, grace_s=10)
        assert world.wait(9) == Due(False, 1)
        world.registry.end_lease(world.publish(key()))
        assert world.wait(0).over

    def test_is_over_though_somebody_holds_what_nobody_uses(self) -> None:
        """A passive lease keeps an entry, not the companion."""
        world = World(linger_s=10)
        user = world.publish(key())
        world.registry.attach(key(), may_load=False, pid=2, client="serve", passive=True)
        world.registry.end_lease(user)
        assert world.wait(10).over

    def test_lets_nobody_in_that_comes_at_the_end(self, world: World) -> None:
        """The error says whether another companion follows."""
        world.registry.end(replaced=True)
        before = world.snapshot()
        with pytest.raises(CompanionReplacedError, match=r"The companion of cpu \(pid 77\) makes room for another one"):
            world.attach(key())
        assert world.snapshot() == before
        world.registry.end(replaced=False)
        with pytest.raises(LeaseLostError):
            world.attach(key())

    @pytest.mark.parametrize(
        ("replaced", "event", "error"),
        [(True, GenerationEvent.REPLACE, CompanionReplacedError), (False, GenerationEvent.CLOSE, LeaseLostError)],
    )
    def test_ends_every_entry(
        self, world: World, replaced: bool, event: GenerationEvent, error: type[CompanionError]
    ) -> None:
        """Only if no companion follows are clients kept from handing back (`table.DISMISSING`)."""
        lease = world.publish(key())
        world.registry.end(replaced=replaced)
        world.registry.close()
        assert world.happened(event) == ["k1"]
        assert (event in DISMISSING) is not replaced
        assert isinstance(lease.events[-1], FailedEvent)
        assert type(lease.events[-1].error) is error


class TestOwner:
    """A `serve` owns its companion: what it holds stays, or goes as a whole."""

    def test_keeps_every_entry_and_the_companion(self) -> None:
        """The owner's linger time counts."""
        world = World(linger_s=10)
        world.registry.end_lease(world.publish(key()))
        world.registry.own(5, -1)
        assert world.wait(1e6) == Due(False, None)
        assert world.registry.make_room(1) == ()
        assert world.registry.status()[0].expires_at_unix_s == world.registry.exits_at_unix_s == 0

    def test_may_have_the_companion_linger(self) -> None:
        """An owner with a linger time keeps entries, but not for longer than the companion."""
        world = World(linger_s=10, grace_s=50)
        world.registry.own(5, 20)
        world.registry.expect(key(), 1)
        holder = world.registry.attach(key(), may_load=False, pid=5, client="serve", holds=1, passive=True)
        world.registry.deposit(holder, (7, 8))
        world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 1)
        world.registry.end_lease(holder)
        assert world.wait(19) == Due(False, 1)
        assert world.happened(GenerationEvent.EXPIRE) == []
        assert world.wait(1).over

    def test_may_wait_for_the_first_client(self) -> None:
        """Who loads a model for it comes when vLLM has been imported, which may take longer than the linger time."""
        world = World(linger_s=10, grace_s=50)
        world.registry.own(5, 20, from_first_client=True)
        assert world.wait(1000) == Due(False, None)
        assert world.registry.exits_at_unix_s == 0
        world.registry.end_lease(world.publish(key()))
        assert world.wait(19) == Due(False, 1)
        assert world.wait(1).over
        used = World(linger_s=10)
        lease = used.publish(key())
        used.registry.own(5, 20, from_first_client=True)
        used.registry.end_lease(lease)
        assert used.wait(20).over, "there was a client"
        world.registry.end(replaced=False)
        with pytest.raises(LeaseLostError, match=r"Nobody used the companion of cpu \(pid 77\) for 20 s"):
            world.attach(key())

    def test_leaves_and_idle_time_begins_anew(self) -> None:
        """The time while the entry belonged to a `serve` does not count."""
        world = World(linger_s=10)
        world.registry.end_lease(world.publish(key()))
        world.registry.own(5, -1)
        world.now += 99
        world.registry.disown()
        assert world.moves[-1] == OwnerGone(5)
        assert world.wait(9) == Due(False, 1)
        assert world.wait(1).over
        assert world.happened(GenerationEvent.EXPIRE) == ["k1"]

    def test_is_one(self, world: World) -> None:
        """The error names the owner, and how to end its companion."""
        world.registry.own(5, -1)
        before = world.snapshot(), vars(world.registry.lifetime).copy()
        with pytest.raises(AlreadyRunningError, match=r"cpu runs already \(pid 77\).*\(pid 5\).*stop --device cpu"):
            world.registry.own(6, 3)
        assert (world.snapshot(), vars(world.registry.lifetime)) == before

    @pytest.mark.parametrize(("pid", "linger_s"), [(0, -1), (-1, -1), (5, float("inf")), (5, float("nan"))])
    def test_has_a_pid_and_a_finite_linger_time(self, world: World, pid: int, linger_s: float) -> None:
        """Anything else comes from no correct client."""
        with pytest.raises(BadRequestError):
            world.registry.own(pid, linger_s)
        assert world.registry.lifetime.owner_pid == 0


class TestRoom:
    """Entries that nobody uses make room for a client that is about to load."""

    @pytest.fixture
    def idle(self) -> World:
        """Entries a, b and c of 12288 bytes each: b is idle for longest, a is in use."""
        world = World(linger_s=600)
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
        assert "".join(e.key.id for e in idle.registry.make_room(size_bytes)) == dropped
        assert {e.key.id for e in idle.registry.status()} == set("abc") - set(dropped)

    def test_is_never_made_of_adapters(self) -> None:
        """They expire like models, and no checkpoint brings them back before."""
        world = World(linger_s=600)
        world.registry.end_lease(world.publish(key_of("mine")))
        world.now += 1
        assert world.registry.make_room(1) == ()
        world.now += 600
        world.registry.advance()
        assert world.registry.status() == ()

    def test_is_never_made_of_what_somebody_uses_or_holds(self, idle: World) -> None:
        """An attached engine, a waiting one and a holder keep an entry."""
        idle.registry.attach(key("b"), may_load=False, pid=8, client="engine")
        idle.registry.attach(key("c"), may_load=False, pid=9, client="serve", passive=True)
        assert idle.registry.make_room(1) == ()


class TestLimits:
    """A companion takes on a bounded number of everything."""

    def test_places_are_taken_and_given_back(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watches and publications have separate places."""
        monkeypatch.setattr(limits, "MAX_WATCHES", 1)
        registry = World().registry
        with registry.watch(), pytest.raises(LimitError, match="1 clients watch"), registry.receive(), registry.watch():
            pass
        with registry.watch():
            pass

    def test_manifests_are_counted_together(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Published ones, and what is on its way."""
        monkeypatch.setattr(limits, "MAX_MANIFESTS_BYTES", 20)
        world.publish(key())
        world.registry.check_manifests(12)
        with pytest.raises(LimitError, match="larger than 20"):
            world.registry.check_manifests(13)

    def test_descriptors_are_counted_with_those_announced(self) -> None:
        """A client that is refused keeps its lease and may announce fewer."""
        world = World(max_fds=5)
        world.publish(key("a"))
        first, second = world.attach(key("b"), pid=2), world.attach(key("c"), pid=3)
        world.registry.announce(first, 2)
        before = world.snapshot()
        with pytest.raises(LimitError, match="has 4 descriptors and keeps at most 5"):
            world.registry.announce(second, 2)
        assert world.snapshot() == before
        world.registry.announce(second, 1)


def test_closing_fails_all_leases_and_closes_each_descriptor_once(world: World) -> None:
    attached = world.publish(key("a"))
    loader = world.attach(key("b"), pid=2)
    world.registry.deposit(loader, (17, 18))
    world.registry.close()
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
    world.registry.open()
    world.now += 1
    world.registry.progress(holder, Progress("copying"))
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


def test_what_is_being_handed_back_when_the_time_is_over_may_yet_come(world: World) -> None:
    world.registry.expect(key(), 4)
    world.registry.open()
    world.now += 1
    holder = hold(world, pid=1)
    assert world.wait(HAND_BACK_S - 1) == Due(False, 1)
    assert world.happened(GenerationEvent.GIVE_UP) == ["k1"]
    world.registry.deposit(holder, (7, 8))
    assert world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4) == 4


def test_what_nobody_hands_back_in_time_is_loaded_as_the_next_generation(world: World) -> None:
    world.registry.expect(key(), 4)
    world.registry.expect(key("k2"), 1)
    assert world.wait(99) == Due(False, None)  # nobody could reach us yet
    world.registry.open()
    newcomer = world.attach(key(), pid=1)
    reader = world.attach(key("k2"), may_load=False, pid=2)
    assert world.wait(HAND_BACK_S - 1) == Due(False, 1)
    world.wait(1)
    assert world.happened(GenerationEvent.GIVE_UP) == ["k1", "k2"]
    assert kinds(newcomer)[-1] is GrantedEvent
    assert kinds(reader)[-1] is FailedEvent
    world.registry.deposit(newcomer, (7, 8))
    assert world.registry.commit(newcomer, ARENA, MANIFEST, SHOWN) == 5
    late = hold(world, pid=3)
    assert kinds(late) == [ReadyEvent]  # of another generation, as it will see
    assert [entry.key.id for entry in world.registry.status()] == ["k1"]


def test_a_holder_that_hangs_loses_its_turn_to_the_next_and_then_to_a_loader(world: World) -> None:
    world.registry.expect(key(), 4)
    world.registry.open()
    first, newcomer, second = hold(world, pid=1), world.attach(key(), pid=2), hold(world, pid=3)
    world.registry.deposit(first, (7, 8))
    assert world.wait(0) == Due(False, HAND_BACK_S)
    assert world.wait(2) == Due(False, HAND_BACK_S - 2)
    assert world.wait(HAND_BACK_S - 2) == Due(False, HAND_BACK_S)
    assert world.closed == [7, 8]
    with pytest.raises(BadRequestError, match="is ended, not loading"):
        world.registry.commit(first, ARENA, MANIFEST, SHOWN, 4)
    assert isinstance(first.events[-1], FailedEvent)
    assert isinstance(first.events[-1].error, WaitTimeoutError)
    assert kinds(second)[-1] is GrantedEvent
    assert world.wait(HAND_BACK_S) == Due(False, None)
    assert kinds(second)[-1] is FailedEvent
    assert kinds(newcomer)[-1] is GrantedEvent
    assert world.wait(500) == Due(False, None)  # a load takes its time
    assert kinds(newcomer)[-1] is GrantedEvent


def test_who_only_holds_an_entry_keeps_nobody_from_unloading_it_and_no_companion_from_ending(world: World) -> None:
    user = world.publish(key())
    passive = world.registry.attach(key(), may_load=False, pid=2, client="serve", passive=True)
    world.registry.end_lease(user)
    assert world.registry.lifetime.idle_since == 1000
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
    with pytest.raises(OvertakenError, match=r"client1 \(pid 1\) was to load m, and another client .* hands it back"):
        world.registry.deposit(newcomer, (17, 18))
    world.registry.deposit(holder, (7, 8))
    assert world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4) == 4
    assert kinds(newcomer)[-1] is ReadyEvent
    with pytest.raises(OvertakenError):
        world.registry.decline(newcomer, "why")


def test_who_was_overtaken_loads_after_all_if_the_holder_dies(world: World) -> None:
    newcomer = world.attach(key(), pid=1)
    world.registry.end_lease(hold(world, pid=2))
    assert kinds(newcomer)[-1] is GrantedEvent
    with pytest.raises(BadRequestError):
        world.registry.commit(newcomer, ARENA, MANIFEST, SHOWN)
    world.registry.deposit(newcomer, (7, 8))
    assert world.registry.commit(newcomer, ARENA, MANIFEST, SHOWN) == 1
    with pytest.raises(BadRequestError, match="is attached, not"):
        world.registry.deposit(newcomer, (17, 18))


def test_who_was_overtaken_and_sleeps_has_no_part_in_that_any_more(world: World) -> None:
    newcomer, holder = world.attach(key(), pid=1), hold(world, pid=2)
    world.registry.deposit(holder, (7, 8))
    world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4)
    world.registry.sleeping.sleep(newcomer, 1, WhenAsleep.STAY)
    with pytest.raises(BadRequestError, match="is asleep, not"):
        world.registry.decline(newcomer, "why")


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
    assert world.registry.lifetime.idle_since is not None
    world.registry.end_lease(world.attach(key(), pid=1))
    assert [entry.state for entry in world.registry.status()] == [EntryState.LOADING]
    world.registry.open()
    world.wait(HAND_BACK_S)
    assert world.registry.status() == ()


def test_who_is_attached_to_what_is_unloaded_is_told(world: World) -> None:
    lease = world.publish(key())
    lease.events.clear()
    world.registry.unload(Query(model="m"), force=True)
    assert kinds(lease) == [RetiredEvent]
