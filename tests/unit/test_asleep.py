"""Clients that sleep, as the registry sees them: where the bytes stay, who brings them back, and what ends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.test_state import ARENA, MANIFEST, SHOWN, World, kinds
from tests.unit.test_state import key as make_key
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import EntryState, LeaseState
from vllm_companion_plugin.errors import (
    BadRequestError,
    EntryInUseError,
    EntryNotFoundError,
    LeaseLostError,
    LimitError,
)
from vllm_companion_plugin.holder.registry.entries import (
    Entry,
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.limits import HAND_BACK_S
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState

KEY = make_key()
DEVICE_FDS, HOST_FD = (7, 8), 50
HOST = ArenaInfo("memfd", (12288,))
AUTO, STAY, PARK, DROP = WhenAsleep
DEVICE, HOST_MEMORY, NOWHERE, DEVICE_FOR_LACK = "device", "host", "nowhere", "device, for lack of a copy"
OWNED = 4711


def fall_asleep(world: World, lease: Lease, level: int = 1, wish: WhenAsleep = AUTO) -> bool:
    """Whether a copy was asked for; the client left one then."""
    if world.registry.sleeping.sleep(lease, level, wish):
        return False
    assert lease.state is LeaseState.PARKING
    world.registry.announce(lease, 1)
    world.registry.deposit(lease, (HOST_FD,))
    assert world.registry.sleeping.sleep(lease, level, wish, HOST, lease.entry.current.number)
    return True


def where(world: World, entry: Entry) -> str:
    """Where the bytes are, by the state, and by what was closed and what not."""
    is_open = [fd not in world.closed for fd in DEVICE_FDS]
    copied = HOST_FD in entry.current.host_fds
    assert len(world.closed) == len(set(world.closed))
    found = {
        EntryState.READY: (DEVICE, [True, True], copied),
        EntryState.PARKED: (HOST_MEMORY, [False, False], True),
        EntryState.DROPPED: (NOWHERE, [False, False], False),
    }[entry.current.shown]
    assert found[1:] == (is_open, copied)
    assert not (copied and HOST_FD in world.closed)
    return found[0]


def wake(world: World, *, pid: int = 9, may_load: bool = True) -> Lease:
    return world.registry.attach(KEY, may_load=may_load, pid=pid, client=f"woken{pid}")


def bring_back(world: World, lease: Lease) -> None:
    world.registry.deposit(lease, (17, 18))
    world.registry.commit(lease, ARENA, MANIFEST, SHOWN, 1)


@pytest.fixture
def world() -> World:
    return World(linger_s=10)


@pytest.fixture
def sleeper(world: World) -> Lease:
    """The only client, which sleeps at level 1: the entry is parked."""
    lease = world.publish(KEY)
    assert fall_asleep(world, lease)
    return lease


class TestResidence:
    """The last client that falls asleep decides where the bytes stay."""

    @pytest.mark.parametrize("awake", ["nobody", "a holder", "another one", "one that leaves a copy"])
    @pytest.mark.parametrize(
        ("wish", "is_owned", "expected"),
        [
            (AUTO, False, (DEVICE, HOST_MEMORY, NOWHERE)),
            (AUTO, True, (DEVICE, HOST_MEMORY, HOST_MEMORY)),
            (STAY, False, (DEVICE, DEVICE, DEVICE)),
            (STAY, True, (DEVICE, DEVICE, DEVICE)),
            (PARK, False, (HOST_MEMORY, HOST_MEMORY, HOST_MEMORY)),
            (PARK, True, (HOST_MEMORY, HOST_MEMORY, HOST_MEMORY)),
            (DROP, False, (NOWHERE, NOWHERE, NOWHERE)),
            (DROP, True, (HOST_MEMORY, HOST_MEMORY, HOST_MEMORY)),
        ],
        ids=lambda x: (
            x.value
            if isinstance(x, WhenAsleep)
            else {True: "owned", False: "free"}.get(x, "")
            if isinstance(x, bool)
            else ""
        ),
    )
    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_follows_the_wish_the_level_and_the_owner(
        self, world: World, wish: WhenAsleep, level: int, is_owned: bool, expected: tuple[str, ...], awake: str
    ) -> None:
        """While another client is awake nothing moves, and nobody is asked for a copy. Who only holds is nobody."""
        lease = world.publish(KEY)
        if is_owned:
            world.registry.own(OWNED, -1)
        if awake == "another one":
            world.attach(KEY, pid=2)
        elif awake == "a holder":
            holder = world.registry.attach(KEY, may_load=False, pid=2, client="serve", passive=True)
        elif awake == "one that leaves a copy":
            assert not world.registry.sleeping.sleep(lease, 1, PARK)
            lease = world.attach(KEY, pid=2)
        alone = awake in ("nobody", "a holder")
        stays = expected[level] if alone else DEVICE
        assert fall_asleep(world, lease, level, wish) is (stays == HOST_MEMORY)
        assert where(world, lease.entry) == stays
        assert (lease.state, lease.ended) == (LeaseState.ASLEEP, False)
        if awake == "a holder":
            assert holder.ended is (stays != DEVICE)
            assert kinds(holder) == [ReadyEvent, *([RetiredEvent] if holder.ended else [])]

    @pytest.mark.parametrize(
        ("first", "last", "expected"),
        [
            pytest.param((0, AUTO), (1, AUTO), DEVICE, id="level-0-keeps-all-where-it-is"),
            pytest.param((2, AUTO), (0, AUTO), DEVICE, id="level-0-last"),
            pytest.param((1, AUTO), (2, AUTO), HOST_MEMORY, id="one-at-level-1-wants-them-back"),
            pytest.param((2, AUTO), (1, AUTO), HOST_MEMORY, id="level-1-last"),
            pytest.param((2, AUTO), (2, AUTO), NOWHERE, id="all-at-level-2"),
            pytest.param((1, STAY), (2, DROP), NOWHERE, id="the-last-wish-counts"),
            pytest.param((2, DROP), (2, STAY), DEVICE, id="and-not-the-first"),
            pytest.param((0, DROP), (2, PARK), HOST_MEMORY, id="whatever-the-levels"),
            pytest.param((1, PARK), (2, AUTO), HOST_MEMORY, id="levels-of-all"),
        ],
    )
    def test_follows_the_levels_of_all_and_the_last_wish(
        self, world: World, first: tuple[int, WhenAsleep], last: tuple[int, WhenAsleep], expected: str
    ) -> None:
        """Two clients, one after the other."""
        one = world.publish(KEY)
        other = world.attach(KEY, pid=2)
        assert not fall_asleep(world, one, *first)
        assert fall_asleep(world, other, *last) is (expected == HOST_MEMORY)
        assert where(world, one.entry) == expected

    @pytest.mark.parametrize(
        ("level", "wish", "is_owned", "expected"),
        [
            (0, AUTO, False, DEVICE),
            (1, AUTO, False, DEVICE_FOR_LACK),
            (2, AUTO, False, NOWHERE),
            (2, AUTO, True, DEVICE_FOR_LACK),
            (1, DROP, False, NOWHERE),
            (2, STAY, False, DEVICE),
            (2, PARK, False, DEVICE_FOR_LACK),
        ],
    )
    def test_of_those_whose_last_awake_client_dies(
        self, world: World, level: int, wish: WhenAsleep, is_owned: bool, expected: str
    ) -> None:
        """A client that dies leaves no copy: what should be parked stays on the device."""
        dies = world.publish(KEY)
        lease = world.attach(KEY, pid=2)
        if is_owned:
            world.registry.own(OWNED, -1)
        assert not fall_asleep(world, lease, level, wish)
        world.registry.end_lease(dies)
        assert where(world, lease.entry) == expected.partition(",")[0]
        assert not lease.ended

    def test_is_host_memory_where_the_client_that_dies_has_left_a_copy_before(self, world: World) -> None:
        """A copy is made once, and stays while somebody is awake."""
        first = world.publish(KEY)
        assert not world.registry.sleeping.sleep(first, 1, AUTO)
        second = world.attach(KEY, pid=2)  # wakes while the first one copies
        world.registry.deposit(first, (HOST_FD,))
        assert world.registry.sleeping.sleep(first, 1, AUTO, HOST, 1)
        assert where(world, first.entry) == DEVICE
        world.registry.end_lease(second)
        assert where(world, first.entry) == HOST_MEMORY

    def test_is_looked_at_again_when_a_sleeper_or_the_owner_goes(self, world: World) -> None:
        """What stayed on the device for lack of a copy is dropped when nobody is left who wants it."""
        dies, first, second = world.publish(KEY), world.attach(KEY, pid=2), world.attach(KEY, pid=3)
        world.registry.own(OWNED, -1)
        fall_asleep(world, first, 1)
        fall_asleep(world, second, 2)
        world.registry.end_lease(dies)
        world.registry.end_lease(first)
        assert where(world, second.entry) == DEVICE
        world.registry.disown()
        assert where(world, second.entry) == NOWHERE


class TestCopy:
    """The last client is asked to leave a copy in host memory before it sleeps."""

    @pytest.fixture
    def copying(self, world: World) -> Lease:
        lease = world.publish(KEY)
        assert not world.registry.sleeping.sleep(lease, 1, AUTO)
        return lease

    @pytest.mark.parametrize(
        ("fds", "host"),
        [
            ((), HOST),
            ((HOST_FD,), ArenaInfo("memfd", (4096,))),
            ((HOST_FD,), ArenaInfo("memfd", (4096, 8192))),
        ],
        ids=["none", "size", "blocks"],
    )
    def test_is_refused_if_it_is_none_of_this_entry(
        self, world: World, copying: Lease, fds: tuple[int, ...], host: ArenaInfo
    ) -> None:
        """The client goes on, or gives up; nothing has moved."""
        if fds:
            world.registry.deposit(copying, fds)
        before = world.snapshot()
        with pytest.raises(BadRequestError):
            world.registry.sleeping.sleep(copying, 1, AUTO, host, 1)
        assert world.snapshot() == before
        world.registry.sleeping.stay_awake(copying)
        assert (world.closed, copying.state) == ([*fds], LeaseState.ATTACHED)

    def test_is_asked_for_again_until_it_is_there(self, world: World, copying: Lease) -> None:
        """Saying that one sleeps is not enough."""
        before = world.snapshot()
        assert not world.registry.sleeping.sleep(copying, 1, AUTO)
        assert world.snapshot() == before

    def test_is_not_needed_if_another_client_wakes_meanwhile(self, world: World, copying: Lease) -> None:
        """What was deposited is closed, unless the client says that it is the copy."""
        wake(world)
        world.registry.deposit(copying, (HOST_FD,))
        assert world.registry.sleeping.sleep(copying, 1, AUTO)
        assert (world.closed, where(world, copying.entry)) == ([HOST_FD], DEVICE)

    def test_goes_with_a_client_that_dies_over_it(self, world: World, copying: Lease) -> None:
        """The bytes stay on the device for those who sleep."""
        sleeper = world.registry.attach(KEY, may_load=True, pid=2, client="sleeper", asleep=1)
        world.registry.deposit(copying, (HOST_FD,))
        world.registry.end_lease(copying)
        assert (world.closed, where(world, sleeper.entry)) == ([HOST_FD], DEVICE)

    def test_counts_as_descriptors_that_are_kept(self) -> None:
        """Also when it is parked, and the device's are closed."""
        world = World(max_fds=3)
        fall_asleep(world, world.publish(KEY))
        loader = world.attach(make_key("other"), pid=2)
        with pytest.raises(LimitError, match="has 1 descriptors and keeps at most 3"):
            world.registry.announce(loader, 3)
        world.registry.announce(loader, 2)

    def test_is_refused_if_there_is_no_place_for_its_descriptors(self) -> None:
        """The client stays awake then."""
        world = World(max_fds=2)
        lease = world.publish(KEY)
        assert not world.registry.sleeping.sleep(lease, 1, AUTO)
        with pytest.raises(LimitError):
            world.registry.announce(lease, 1)
        world.registry.sleeping.stay_awake(lease)
        assert where(world, lease.entry) == DEVICE


class TestIllegal:
    """Only a client that uses the entry and maps it falls asleep, at a level that there is."""

    @pytest.mark.parametrize(
        "step",
        [
            pytest.param(lambda r, awake, holder, asleep, waiter: r.sleeping.sleep(awake, 3, AUTO), id="level"),
            pytest.param(lambda r, awake, holder, asleep, waiter: r.sleeping.sleep(holder, 1, AUTO), id="holder"),
            pytest.param(lambda r, awake, holder, asleep, waiter: r.sleeping.sleep(asleep, 1, AUTO), id="twice"),
            pytest.param(lambda r, awake, holder, asleep, waiter: r.sleeping.sleep(waiter, 1, AUTO), id="waiting"),
            pytest.param(
                lambda r, awake, holder, asleep, waiter: r.sleeping.sleep(awake, 1, AUTO, HOST, 1), id="copy-unasked"
            ),
            pytest.param(lambda r, awake, holder, asleep, waiter: r.deposit(awake, (1,)), id="deposit-unasked"),
            pytest.param(
                lambda r, awake, holder, asleep, waiter: r.sleeping.stay_awake(awake), id="stays-awake-unasked"
            ),
            pytest.param(
                lambda r, awake, holder, asleep, waiter: r.sleeping.stay_awake(asleep), id="stays-awake-asleep"
            ),
            pytest.param(
                lambda r, *_: r.attach(KEY, may_load=True, pid=9, client="x", asleep=3), id="attach-at-no-level"
            ),
            pytest.param(
                lambda r, *_: r.attach(KEY, may_load=True, pid=9, client="x", asleep=1, passive=True),
                id="attach-as-holder",
            ),
        ],
    )
    def test_steps_change_nothing(self, world: World, step: Callable[..., object]) -> None:
        """Each is a bad request."""
        asleep, awake = world.publish(KEY), world.attach(KEY, pid=2)
        holder = world.registry.attach(KEY, may_load=False, pid=3, client="serve", passive=True)
        fall_asleep(world, asleep)
        world.attach(make_key("other"), pid=4)
        waiter = world.attach(make_key("other"), pid=5)
        before = world.snapshot()
        with pytest.raises(BadRequestError):
            step(world.registry, awake, holder, asleep, waiter)
        assert world.snapshot() == before


class TestWaking:
    """A client wakes by a new lease, and ends the one that slept."""

    def test_from_the_device_is_an_attach(self, world: World) -> None:
        """Nothing had moved."""
        lease = world.publish(KEY)
        fall_asleep(world, lease, 2, STAY)
        woken = wake(world)
        world.registry.end_lease(lease)
        assert (kinds(woken), woken.entry) == ([ReadyEvent], lease.entry)
        assert where(world, woken.entry) == DEVICE

    def test_from_host_memory_is_a_load_of_the_first_for_all(self, world: World, sleeper: Lease) -> None:
        """The entry is the same generation as before; its copy stays, so that nobody is asked for another one."""
        first, second = wake(world, may_load=False), wake(world, pid=10)
        assert list(first.events) == [GrantedEvent(1, brings_back=True)]
        assert kinds(second) == [WaitingEvent]
        bring_back(world, first)
        assert kinds(second)[-1] is ReadyEvent
        entry = first.entry
        assert (entry.current.shown, entry.current.number, entry.current.fds) == (EntryState.READY, 1, (17, 18))
        assert world.closed == [*DEVICE_FDS]
        for lease in (sleeper, second):
            world.registry.end_lease(lease)
        assert world.registry.sleeping.sleep(first, 1, AUTO)
        assert (entry.current.shown, world.closed) == (EntryState.PARKED, [*DEVICE_FDS, 17, 18])

    @pytest.mark.parametrize(
        ("number", "arena"), [(0, ARENA), (2, ARENA), (1, ArenaInfo("memfd", (8192, 4096)))], ids=str
    )
    def test_from_host_memory_brings_back_what_it_was(
        self, world: World, sleeper: Lease, number: int, arena: ArenaInfo
    ) -> None:
        """Another generation or arena is refused, and the client may try again."""
        woken = wake(world)
        world.registry.deposit(woken, (17, 18))
        before = world.snapshot()
        with pytest.raises(BadRequestError, match="what it was"):
            world.registry.commit(woken, arena, MANIFEST, SHOWN, number)
        assert world.snapshot() == before
        world.registry.commit(woken, ARENA, MANIFEST, SHOWN, 1)

    def test_from_host_memory_cannot_be_declined(self, world: World, sleeper: Lease) -> None:
        """The copy belongs to others, too."""
        woken = wake(world)
        before = world.snapshot()
        with pytest.raises(BadRequestError, match="not decline"):
            world.registry.decline(woken, "because")
        assert world.snapshot() == before

    def test_that_dies_midway_leaves_the_copy_to_the_next(self, world: World, sleeper: Lease) -> None:
        """The next one that waits is elected; after the last one the entry is parked as before."""
        first, second = wake(world), wake(world, pid=10, may_load=False)
        holder = world.registry.attach(KEY, may_load=False, pid=11, client="serve", passive=True)
        world.registry.deposit(first, (17, 18))
        world.registry.end_lease(first)
        assert world.closed == [*DEVICE_FDS, 17, 18]
        assert second.events[-1] == GrantedEvent(1, brings_back=True)
        world.registry.end_lease(second)
        assert where(world, sleeper.entry) == HOST_MEMORY
        assert (kinds(holder)[-1], sleeper.ended) == (FailedEvent, False)
        assert not {"abandoned", "declined"} & {
            series.labels["result"]
            for series in world.counting.counters.all()
            if series.name == "loads" and series.value
        }

    def test_from_nowhere_is_a_load(self, world: World) -> None:
        """Under the next number. A loader that dies leaves it dropped, for those who sleep."""
        lease = world.publish(KEY)
        fall_asleep(world, lease, 2)
        first, reader = wake(world), wake(world, pid=10, may_load=False)
        assert list(first.events) == [GrantedEvent(2)]
        world.registry.end_lease(first)
        assert (kinds(reader), where(world, lease.entry), lease.ended) == ([FailedEvent], NOWHERE, False)
        second = wake(world)
        world.registry.deposit(second, (17, 18))
        assert world.registry.commit(second, ARENA, MANIFEST, SHOWN) == 2
        assert lease.state is LeaseState.ASLEEP

    def test_from_nowhere_needs_a_client_that_may_load(self, world: World) -> None:
        """Neither a key nor a query finds what is dropped."""
        fall_asleep(world, world.publish(KEY), 2)
        before = world.snapshot()
        for select in (KEY, Query(model="m")):
            with pytest.raises(EntryNotFoundError, match="Here: nothing"):
                world.attach(select, may_load=False, pid=9)
        assert world.snapshot() == before

    def test_by_a_query_finds_what_is_parked(self, world: World, sleeper: Lease) -> None:
        """It has nothing to load, only to bring back."""
        lease = world.attach(Query(model="m"), may_load=False, pid=9)
        assert list(lease.events) == [GrantedEvent(1, brings_back=True)]

    def test_is_not_for_holders(self, world: World, sleeper: Lease) -> None:
        """A client that only holds would keep what sleepers have let go of."""
        before = world.snapshot()
        with pytest.raises(EntryNotFoundError):
            world.registry.attach(KEY, may_load=False, pid=2, client="serve", passive=True)
        assert world.snapshot() == before

    def test_is_left_to_others_by_those_who_sleep(self, world: World) -> None:
        """A sleeper that might load is passed over."""
        dies, sleeper = world.publish(KEY), world.attach(KEY, pid=2)
        fall_asleep(world, sleeper, 2)
        world.registry.end_lease(dies)
        loader = wake(world)
        world.registry.end_lease(loader)
        assert (sleeper.state, sleeper.entry.current.state) == (LeaseState.ASLEEP, GenerationState.DROPPED)


class TestEnds:
    """Whatever ends an entry ends it in each state of sleep, and each descriptor is closed once."""

    def states(self, world: World, name: str) -> tuple[Lease, tuple[int, ...]]:
        """A client that sleeps, or is about to, and the descriptors that are open."""
        lease = world.publish(KEY)
        if name == "copying":
            assert not world.registry.sleeping.sleep(lease, 1, AUTO)
            world.registry.deposit(lease, (HOST_FD,))
            return lease, (*DEVICE_FDS, HOST_FD)
        fall_asleep(world, lease, *{"stays": (1, STAY), "dropped": (2, AUTO)}.get(name, (1, AUTO)))
        if name == "coming back":
            world.registry.deposit(wake(world), (17, 18))
        return lease, {
            "stays": DEVICE_FDS,
            "parked": (HOST_FD,),
            "dropped": (),
            "coming back": (HOST_FD, 17, 18),
        }[name]

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("copying", RetiredEvent),
            ("stays", RetiredEvent),
            ("parked", RetiredEvent),
            ("dropped", FailedEvent),
            ("coming back", FailedEvent),
        ],
    )
    def test_by_an_unload(self, world: World, name: str, told: type) -> None:
        """Those who sleep use the entry: it has to be forced. They are told, and whoever wakes loads anew."""
        lease, there = self.states(world, name)
        before = world.snapshot()
        with pytest.raises(EntryInUseError, match=r"pid 1, (asleep|parking)"):
            world.registry.unload(Query())
        assert world.snapshot() == before
        gone = len(world.closed)
        world.registry.unload(Query(), force=True)
        assert sorted(world.closed[gone:]) == sorted(there)
        assert kinds(lease)[-1] is told
        if isinstance(lease.events[-1], FailedEvent):
            assert str(lease.events[-1].error).endswith("was unloaded.")
        assert list(wake(world, pid=20).events) == [GrantedEvent(2)]
        world.registry.end_lease(lease)
        assert [entry.current.state for entry in world.registry.entries] == [GenerationState.LOADING]

    @pytest.mark.parametrize("replaced", [False, True])
    @pytest.mark.parametrize("name", ["copying", "stays", "parked", "dropped", "coming back"])
    def test_with_the_companion(self, world: World, name: str, replaced: bool) -> None:
        """Every lease fails."""
        lease, there = self.states(world, name)
        gone = len(world.closed)
        world.registry.end(replaced=replaced)
        world.registry.close()
        assert sorted(world.closed[gone:]) == sorted(there)
        assert (kinds(lease)[-1], world.registry.entries) == (FailedEvent, [])

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("copying", None),
            ("stays", "everybody sleeps on it"),
            ("parked", "is in host memory"),
            ("dropped", None),
            ("coming back", "is being loaded by woken9"),
        ],
    )
    def test_by_a_replacement_only_if_nothing_is_lost(self, world: World, name: str, why: str | None) -> None:
        """Who sleeps maps nothing, and can hand nothing to the next companion."""
        self.states(world, name)
        if why is None:
            world.registry.check_replaceable()
        else:
            with pytest.raises(EntryInUseError, match=why):
                world.registry.check_replaceable()

    def test_by_a_replacement_if_somebody_else_holds_it(self, world: World) -> None:
        """An upgrade holds what stays on the device."""
        self.states(world, "stays")
        world.registry.attach(KEY, may_load=False, pid=2, client="upgrade", passive=True)
        world.registry.check_replaceable()

    @pytest.mark.parametrize("name", ["copying", "stays", "parked", "dropped", "coming back"])
    def test_neither_by_time_nor_for_room_while_a_client_sleeps(self, world: World, name: str) -> None:
        """A sleeper uses the entry and the companion."""
        self.states(world, name)
        before = len(world.closed)
        assert not world.wait(1000).over
        assert world.registry.make_room(1) == ()
        assert len(world.closed) == before
        assert world.registry.lifetime.idle_since is None

    def test_by_time_when_nobody_sleeps_on_what_is_parked(self, world: World, sleeper: Lease) -> None:
        """Its idle time runs as on the device, but it makes no room there."""
        world.registry.end_lease(sleeper)
        assert (world.wait(9).next_s, world.registry.make_room(1)) == (1, ())
        assert world.registry.status()[0].expires_at_unix_s == 1010
        world.wait(1)
        assert (world.happened(GenerationEvent.EXPIRE), world.closed) == (["k1"], [*DEVICE_FDS, HOST_FD])
        assert world.registry.entries == []

    def test_by_time_when_nobody_brings_it_back(self, world: World, sleeper: Lease) -> None:
        """The idle time of what is parked begins when the client that woke last has gone."""
        woken = wake(world)
        world.registry.end_lease(sleeper)
        world.now += 5
        world.registry.end_lease(woken)
        assert where(world, woken.entry) == HOST_MEMORY
        world.wait(9)
        assert world.happened(GenerationEvent.EXPIRE) == []
        world.wait(1)
        assert world.happened(GenerationEvent.EXPIRE) == ["k1"]

    def test_with_its_last_sleeper_where_nothing_is_left(self, world: World) -> None:
        """A name that nobody needs."""
        lease, _ = self.states(world, "dropped")
        world.registry.end_lease(lease)
        assert (world.registry.entries, world.happened(GenerationEvent.LEAVE)) == ([], ["k1"])

    @pytest.mark.parametrize(
        ("name", "lost"), [("copying", True), ("stays", True), ("parked", False), ("dropped", False)]
    )
    def test_with_the_memory_that_it_depends_on(self, world: World, name: str, lost: bool) -> None:
        """Only what is on the device is lost with the device's memory."""
        lease, there = self.states(world, name)
        gone = len(world.closed)
        world.registry.lose(lambda arena, fds: True)
        assert sorted(world.closed[gone:]) == (sorted(there) if lost else [])
        assert (kinds(lease)[-1:] == [RetiredEvent]) is lost


class TestNextCompanion:
    """A client that sleeps tells the next companion so."""

    def attach(self, world: World, level: int = 1) -> Lease:
        return world.registry.attach(KEY, may_load=True, pid=5, client="sleeper", asleep=level)

    def hold(self, world: World, *, passive: bool) -> Lease:
        return world.registry.attach(KEY, may_load=False, pid=6, client="holder", holds=4, passive=passive)

    def test_remembers_a_name_and_no_bytes(self, world: World) -> None:
        """What all sleep on is lost with a companion that dies; who wakes loads it."""
        sleeper = self.attach(world)
        assert (sleeper.state, sleeper.entry.current.state) == (LeaseState.ASLEEP, GenerationState.DROPPED)
        assert world.happened(GenerationEvent.REMEMBER) == ["k1"]
        assert kinds(wake(world)) == [GrantedEvent]

    @pytest.mark.parametrize("level", [0, 1, 2])
    @pytest.mark.parametrize("passive", [False, True])
    @pytest.mark.parametrize("expected", [False, True])
    def test_gets_from_a_holder_what_another_sleeps_on(
        self, world: World, level: int, passive: bool, expected: bool
    ) -> None:
        """Whoever comes first. It stays on the device, though nobody is awake: what the sleeper wishes is not known."""
        if expected:
            world.registry.expect(KEY, 4)
        world.registry.open()
        sleeper = self.attach(world, level)
        holder = self.hold(world, passive=passive)
        assert list(holder.events) == [GrantedEvent(4)]
        world.registry.deposit(holder, DEVICE_FDS)
        assert world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4) == 4
        world.registry.end_lease(holder)
        assert where(world, sleeper.entry) == DEVICE
        assert kinds(wake(world)) == [ReadyEvent]

    def test_waits_for_what_is_expected_no_longer_than_for_others(self, world: World) -> None:
        """Then it is dropped, and stays for its sleepers."""
        world.registry.expect(KEY, 4)
        world.registry.open()
        sleeper = self.attach(world)
        assert sleeper.entry.current.state is GenerationState.EXPECTED
        world.wait(HAND_BACK_S)
        assert (sleeper.ended, sleeper.entry.current.state) == (False, GenerationState.DROPPED)
        assert list(wake(world).events) == [GrantedEvent(5)]

    def test_drops_again_what_is_handed_back_though_all_wished_it_dropped(self, world: World) -> None:
        """The holder is told, and lets go."""
        lease = world.publish(KEY)
        fall_asleep(world, lease, 2)
        holder = world.registry.attach(KEY, may_load=False, pid=6, client="serve", holds=1, passive=True)
        world.registry.deposit(holder, (17, 18))
        world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 1)
        assert where(world, lease.entry) == NOWHERE
        assert (kinds(holder)[-1], holder.ended, world.closed) == (RetiredEvent, True, [*DEVICE_FDS, 17, 18])

    def test_fails_sleepers_that_come_when_it_ends(self, world: World) -> None:
        """As everybody."""
        world.registry.end(replaced=False)
        with pytest.raises(LeaseLostError):
            self.attach(world)
