"""Generations of an entry, as the registry sees them: who writes the next one, who maps which, and what is let go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest

from tests.unit.test_asleep import AUTO, HOST, HOST_FD, STAY, fall_asleep, wake
from tests.unit.test_state import ARENA, MANIFEST, SHOWN, World, kinds
from tests.unit.test_state import key as make_key
from vllm_companion_plugin.core.adapters import key_of
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import (
    BadRequestError,
    EntryInUseError,
    EntryNotFoundError,
    LayoutError,
    LimitError,
    StaleError,
)
from vllm_companion_plugin.holder.registry import limits
from vllm_companion_plugin.holder.registry.entries import (
    CurrentEvent,
    Entry,
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
)
from vllm_companion_plugin.holder.registry.generations import Generations
from vllm_companion_plugin.holder.registry.moves import CurrentChanged
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState

KEY = make_key()
FIRST_FDS = (7, 8)


def fds_of(number: int) -> tuple[int, int]:
    """Descriptors of generation `number`, as `write` deposits them."""
    return (10 * number + 7, 10 * number + 8) if number > 1 else FIRST_FDS


def write(world: World, lease: Lease, version: str = "") -> int:
    """The next generation, written by `lease`."""
    number = world.registry.updates.stage(lease)
    world.registry.announce(lease, 2)
    world.registry.deposit(lease, fds_of(number))
    return world.registry.updates.commit(lease, ARENA, version or f"step-{number}")


def held(entry: Entry) -> list[int]:
    """Generations on the device, oldest first."""
    return [each.number for each in entry.status(-1).generations]


def check_open(world: World, numbers: Sequence[int], latest: int) -> None:
    """The descriptors of these generations are open, and those of all others were closed once."""
    gone = [fd for number in range(1, latest + 1) if number not in numbers for fd in fds_of(number)]
    assert sorted(fd for fd in world.closed if fd != HOST_FD) == gone


@pytest.fixture
def world() -> World:
    return World(linger_s=10)


@pytest.fixture
def engine(world: World) -> Lease:
    """It loaded generation 1, and maps it."""
    return world.publish(KEY)


@pytest.fixture
def trainer(world: World, engine: Lease) -> Lease:
    return world.attach(KEY, may_load=False, pid=2)


def test_who_is_told_late_maps_what_is_current_then(world: World, engine: Lease) -> None:
    """And what it would have mapped before goes, if nobody maps it."""
    late = world.attach(KEY, may_load=False, pid=3)
    assert kinds(late) == [ReadyEvent]
    write(world, engine)
    write(world, engine)
    world.registry.updates.advance(engine, 3)
    assert held(late.entry) == [1, 2, 3]
    world.registry.updates.told(late)
    assert (late.maps, held(late.entry)) == (3, [2, 3])


def test_only_what_is_current_has_a_copy_in_host_memory(world: World, engine: Lease) -> None:
    """Copies of what was current before would be shown by nobody."""
    fall_asleep(world, engine)
    woken = wake(world)
    world.registry.deposit(woken, (17, 18))
    world.registry.commit(woken, ARENA, MANIFEST, SHOWN, 1)
    assert woken.entry.current.host == HOST
    write(world, woken)
    assert [each.host for each in (woken.entry.current, *woken.entry.others)] == [None, None]
    assert HOST_FD in world.closed


def test_what_was_rolled_back_to_is_forgotten() -> None:
    """Each key that was ever committed would stay known."""
    numbers = Generations()
    for number in range(50):
        numbers.roll_back(f"k{number}", 3)
        numbers.roll_back(f"k{number}", 0)
    assert not numbers._rolled_back


class TestMakingRoom:
    """What entries that nobody uses make for others."""

    def test_is_never_made_of_what_a_client_has_written(self, world: World, engine: Lease) -> None:
        """No checkpoint brings it back."""
        write(world, engine)
        world.registry.end_lease(engine)
        assert world.registry.make_room(1) == ()
        assert held(engine.entry) == [1, 2]

    def test_counts_all_generations(self, world: World, engine: Lease) -> None:
        """An entry goes as a whole."""
        write(world, engine)
        world.registry.updates.make_current(engine.entry, 1)
        world.registry.end_lease(engine)
        assert held(engine.entry) == [1, 2]
        assert [gone.key for gone in world.registry.make_room(2 * ARENA.size_bytes)] == [KEY]


class TestWriter:
    """An entry has at most one writer, which maps it."""

    def test_gets_the_number_that_its_generation_will_have(self, world: World, trainer: Lease) -> None:
        """Nothing but its own lease changes by that."""
        assert world.registry.updates.stage(trainer) == 2
        assert (trainer.state, trainer.entry.writer) == (LeaseState.WRITING, trainer)
        assert (held(trainer.entry), trainer.entry.current.number) == ([1], 1)

    def test_is_named_to_another_one(self, world: World, engine: Lease, trainer: Lease) -> None:
        """A second writer is refused."""
        world.registry.updates.stage(trainer)
        before = world.snapshot()
        with pytest.raises(EntryInUseError, match=r"client2 \(pid 2\) writes the next generation of m "):
            world.registry.updates.stage(engine)
        assert world.snapshot() == before

    @pytest.mark.parametrize("who", ["waits", "loads", "only holds", "sleeps", "was unloaded", "writes"])
    def test_must_map_the_entry(self, world: World, who: str) -> None:
        """Nothing changes when somebody else asks."""
        lease = world.attach(KEY)
        if who == "waits":
            lease = world.attach(KEY, pid=3)
        elif who != "loads":
            world.registry.deposit(lease, FIRST_FDS)
            world.registry.commit(lease, ARENA, MANIFEST, SHOWN)
        if who == "only holds":
            lease = world.registry.attach(KEY, may_load=False, pid=3, client="serve", passive=True)
        elif who == "sleeps":
            fall_asleep(world, lease, 1, STAY)
        elif who == "was unloaded":
            world.registry.unload(Query(), force=True)
        elif who == "writes":
            world.registry.updates.stage(lease)
        before = world.snapshot()
        with pytest.raises((BadRequestError, EntryInUseError)):
            world.registry.updates.stage(lease)
        assert world.snapshot() == before

    @pytest.mark.parametrize("how", ["stops", "dies"])
    def test_leaves_nothing(self, world: World, trainer: Lease, how: str) -> None:
        """What it has deposited is closed, and another one may write. Its number was never given."""
        world.registry.updates.stage(trainer)
        world.registry.deposit(trainer, (97, 98))
        if how == "dies":
            world.registry.end_lease(trainer)
        else:
            world.registry.updates.abort(trainer)
            assert trainer.state is LeaseState.ATTACHED
        assert (world.closed, held(trainer.entry)) == ([97, 98], [1])
        assert write(world, world.attach(KEY, may_load=False, pid=3)) == 2

    def test_cannot_stop_twice(self, world: World, trainer: Lease) -> None:
        """Nor without having begun."""
        before = world.snapshot()
        with pytest.raises(BadRequestError):
            world.registry.updates.abort(trainer)
        assert world.snapshot() == before

    def test_keeps_the_entry_on_the_device(self, world: World, engine: Lease, trainer: Lease) -> None:
        """It is awake, whatever the others do."""
        world.registry.updates.stage(trainer)
        assert world.registry.sleeping.sleep(engine, 2, AUTO)
        assert held(trainer.entry) == [1]

    def test_cannot_fall_asleep(self, world: World, trainer: Lease) -> None:
        """It commits or stops before."""
        world.registry.updates.stage(trainer)
        before = world.snapshot()
        with pytest.raises(BadRequestError):
            world.registry.sleeping.sleep(trainer, 1, AUTO)
        assert world.snapshot() == before


class TestCommit:
    """What the writer has deposited becomes current, or nothing happens."""

    def test_moves_nobody(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Who attaches from now on gets the new one; the others go on."""
        world.now += 5
        assert write(world, trainer, "step-7") == 2
        assert (engine.maps, engine.state) == (1, LeaseState.ATTACHED)
        assert (trainer.maps, trainer.state) == (1, LeaseState.ATTACHED)
        (entry,) = world.registry.status()
        assert (entry.generation, entry.version, entry.ready_unix_s, entry.tensor_count) == (2, "step-7", 1005, 3)
        assert [(x.number, x.version, x.is_current, x.pids, x.follows) for x in entry.generations] == [
            (1, "", False, (1, 2), 0),
            (2, "step-7", True, (), 1),
        ]
        newcomer = world.attach(KEY, pid=3)
        assert (kinds(newcomer), newcomer.maps) == ([ReadyEvent], 2)
        check_open(world, [1, 2], 2)

    @pytest.mark.parametrize(
        ("arena", "count", "version", "error"),
        [
            pytest.param(ArenaInfo("memfd", (8192, 4096)), 2, "v", LayoutError, id="other-blocks"),
            pytest.param(ArenaInfo("memfd", (4096, 8192, 1)), 3, "v", LayoutError, id="more-blocks"),
            pytest.param(ArenaInfo("cuda_vmm", (4096, 8192)), 2, "v", LayoutError, id="other-kind"),
            pytest.param(ARENA, 1, "v", BadRequestError, id="too-few"),
            pytest.param(ARENA, 0, "v", BadRequestError, id="none"),
            pytest.param(ARENA, 2, "", BadRequestError, id="no-version"),
        ],
    )
    def test_of_something_else_is_refused(
        self, world: World, trainer: Lease, arena: ArenaInfo, count: int, version: str, error: type[Exception]
    ) -> None:
        """The writer is the writer still, and may stop."""
        world.registry.updates.stage(trainer)
        if count:
            world.registry.deposit(trainer, range(90, 90 + count))
        before = world.snapshot()
        with pytest.raises(error):
            world.registry.updates.commit(trainer, arena, version)
        assert world.snapshot() == before
        world.registry.updates.abort(trainer)
        assert world.closed == list(range(90, 90 + count))

    def test_of_another_size_is_taken_for_an_adapter(self, world: World) -> None:
        """Though not of another kind of memory."""
        trainer = world.publish(key_of("mine"))
        for arena, error in ((ArenaInfo("cuda_vmm", (4096,)), LayoutError), (ArenaInfo("memfd", (1 << 20,)), None)):
            world.registry.updates.stage(trainer)
            world.registry.deposit(trainer, (90,))
            with pytest.raises(error) if error else nullcontext():
                world.registry.updates.commit(trainer, arena, "v")
            if error:
                world.registry.updates.abort(trainer)
        assert [each.size_bytes for each in trainer.entry.status(-1).generations] == [ARENA.size_bytes, 1 << 20]

    def test_by_one_who_is_no_writer_is_refused(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Though another one is."""
        world.registry.updates.stage(trainer)
        before = world.snapshot()
        with pytest.raises(BadRequestError):
            world.registry.updates.commit(engine, ARENA, "v")
        assert world.snapshot() == before

    def test_counts_every_generation_as_descriptors_that_are_kept(self) -> None:
        """At the limit the writer is told before it deposits."""
        world = World(max_fds=6)
        engine = world.publish(KEY)
        write(world, engine)
        world.attach(KEY, may_load=False, pid=2)
        write(world, engine)
        assert held(engine.entry) == [1, 2, 3]
        world.registry.updates.stage(engine)
        before = world.snapshot()
        with pytest.raises(LimitError, match="has 6 descriptors and keeps at most 6"):
            world.registry.announce(engine, 2)
        assert world.snapshot() == before
        world.registry.updates.abort(engine)
        world.registry.updates.advance(engine, 3)
        assert write(world, engine) == 4


class TestNews:
    """Who maps the entry is told which generation is current."""

    def news(self, lease: Lease) -> list[CurrentEvent]:
        return [event for event in lease.events if isinstance(event, CurrentEvent)]

    def test_of_a_commit_and_a_rollback(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Also the writer, and one who only holds it. Nobody else is told."""
        holder = world.registry.attach(KEY, may_load=False, pid=3, client="serve", passive=True)
        sleeper = world.attach(KEY, pid=4)
        fall_asleep(world, sleeper, 1, STAY)
        write(world, trainer, "step-7")
        for lease in (engine, trainer, holder):
            assert self.news(lease) == [CurrentEvent(2, "step-7")]
            lease.events.clear()
        world.registry.make_current(Query(), 1)
        for lease in (engine, trainer, holder):
            assert list(lease.events) == [CurrentEvent(1, "")]
        assert self.news(sleeper) == []

    def test_is_not_told_of_the_same(self, world: World, engine: Lease) -> None:
        """What is current already is made current again."""
        world.registry.make_current(Query(), 1)
        assert self.news(engine) == []

    def test_costs_nothing_unread(self, world: World, engine: Lease, trainer: Lease) -> None:
        """A client that hangs finds the latest news alone."""
        before = len(engine.events)
        for _ in range(5):
            write(world, trainer)
        assert len(engine.events) == before + 1
        assert self.news(engine) == [CurrentEvent(6, "step-6")]

    def test_names_what_was_before(self, world: World, engine: Lease) -> None:
        """To observers: which one was current, and whether another one is newer."""
        write(world, engine)
        world.registry.make_current(Query(), 1)
        write(world, engine)
        changes = [(move.before, move.is_latest) for move in world.moves if isinstance(move, CurrentChanged)]
        assert changes == [(0, True), (1, True), (2, False), (1, True)]


class TestBase:
    """A client that goes by a generation is refused if another one is current by now."""

    def test_of_one_who_begins_to_write(self, world: World, engine: Lease) -> None:
        """It may begin anew."""
        write(world, engine, "step-7")
        before = world.snapshot()
        with pytest.raises(StaleError, match=r"Generation 1 of m \(single\) is not current: generation 2 \(step-7\)"):
            world.registry.updates.stage(engine, 1)
        assert world.snapshot() == before
        assert world.registry.updates.stage(engine, 2) == 3

    def test_of_one_who_commits(self, world: World, engine: Lease) -> None:
        """Another one was made current while it wrote. It is the writer still."""
        write(world, engine)
        world.registry.updates.stage(engine, 2)
        world.registry.deposit(engine, fds_of(3))
        world.registry.make_current(Query(), 1)
        before = world.snapshot()
        with pytest.raises(StaleError):
            world.registry.updates.commit(engine, ARENA, "v", 2)
        assert world.snapshot() == before
        assert world.registry.updates.commit(engine, ARENA, "v", 1) == 3

    def test_of_a_rollback(self, world: World, engine: Lease) -> None:
        """Somebody has committed meanwhile."""
        write(world, engine)
        before = world.snapshot()
        with pytest.raises(StaleError):
            world.registry.make_current(Query(), 1, 1)
        assert world.snapshot() == before
        world.registry.make_current(Query(), 1, 2)
        assert engine.entry.current.number == 1


class TestAdvance:
    """A client says which generation it maps, and by that which one must stay."""

    def test_lets_the_one_of_before_go(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Once nobody maps it and another one was current after it."""
        for number in (2, 3):
            assert write(world, trainer) == number
            world.registry.updates.advance(trainer, number)
        check_open(world, [1, 2, 3], 3)
        world.registry.updates.advance(engine, 0)
        assert (engine.maps, held(engine.entry)) == (3, [2, 3])
        check_open(world, [2, 3], 3)
        assert world.happened(GenerationEvent.FORGET) == ["k1"]

    @pytest.mark.parametrize("number", [1, 4, 99])
    def test_goes_to_nothing_that_is_not_held(self, world: World, engine: Lease, number: int) -> None:
        """The error lists what there is."""
        for _ in range(2):
            world.registry.updates.advance(engine, write(world, engine))
        before = world.snapshot()
        with pytest.raises(EntryNotFoundError, match=f"Generation {number} of m .* there are: 3, 2"):
            world.registry.updates.advance(engine, number)
        assert world.snapshot() == before

    def test_goes_back_and_forth(self, world: World, engine: Lease) -> None:
        """To an older one while that is there, and to the newer one again."""
        write(world, engine)
        for number in (2, 1, 2, 2, 1):
            world.registry.updates.advance(engine, number)
            assert (engine.maps, held(engine.entry)) == (number, [1, 2])

    def test_needs_a_mapping(self, world: World, engine: Lease) -> None:
        """Neither a sleeper nor a waiter advances."""
        fall_asleep(world, engine, 1, STAY)
        before = world.snapshot()
        with pytest.raises(BadRequestError, match="Only a client that maps"):
            world.registry.updates.advance(engine, 1)
        assert world.snapshot() == before

    def test_is_possible_while_it_writes(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Another writer had been faster."""
        write(world, engine)
        world.registry.updates.stage(trainer)
        world.registry.updates.advance(trainer, 2)
        assert (trainer.state, trainer.maps) == (LeaseState.WRITING, 2)


class TestRoom:
    """A device without laggards has two generations at most."""

    def test_is_made_for_the_one_that_is_written(self, world: World, engine: Lease) -> None:
        """It takes the place of the one before. One that somebody maps stays."""
        world.registry.updates.advance(engine, write(world, engine))
        assert held(engine.entry) == [1, 2]
        world.registry.updates.stage(engine)
        assert held(engine.entry) == [2]
        check_open(world, [2], 2)
        world.registry.updates.abort(engine)
        write(world, engine)
        trainer = world.attach(KEY, may_load=False, pid=2)
        world.registry.updates.stage(trainer)
        assert held(engine.entry) == [2, 3]

    @pytest.mark.parametrize(
        ("keep", "idle", "writing"),
        [(0, [6], [6]), (1, [5, 6], [6]), (2, [4, 5, 6], [5, 6]), (9, [1, 2, 3, 4, 5, 6], None)],
    )
    def test_is_kept_for_as_many_as_the_setting_says(
        self, keep: int, idle: list[int], writing: list[int] | None
    ) -> None:
        """Of those that were current before; one of them makes room for what is written."""
        world = World(keep_previous=keep)
        engine = world.publish(KEY)
        for _ in range(5):
            world.registry.updates.advance(engine, write(world, engine))
        assert held(engine.entry) == idle
        world.registry.updates.stage(engine)
        assert held(engine.entry) == (idle if writing is None else writing)
        check_open(world, held(engine.entry), 6)


class TestRollback:
    """Another generation is made the current one."""

    def make(self, world: World, number: int) -> None:
        world.registry.make_current(Query(model="m"), number)

    def test_and_forward(self, world: World, engine: Lease) -> None:
        """Nobody is moved, and nothing is lost by going back."""
        write(world, engine)
        self.make(world, 1)
        assert (engine.entry.current.number, engine.entry.current.published.version) == (1, "")
        assert world.attach(KEY, pid=3).maps == 1
        self.make(world, 2)
        assert (engine.entry.current.number, held(engine.entry), engine.maps) == (2, [1, 2], 1)
        assert world.closed == []

    def test_is_the_way_back_of_what_comes_next(self, world: World, engine: Lease) -> None:
        """What was rolled back is not what the next one goes back to."""
        write(world, engine)
        self.make(world, 1)
        assert write(world, engine) == 3
        world.registry.updates.advance(engine, 3)
        assert held(engine.entry) == [1, 3]
        check_open(world, [1, 3], 3)

    def test_to_what_is_not_held_is_refused(self, world: World, engine: Lease) -> None:
        """Of several entries all are rolled back, or none."""
        other = world.publish(make_key("k2", rank="tp1/2"), pid=5, fds=(57, 58))
        write(world, engine)
        before = world.snapshot()
        with pytest.raises(EntryNotFoundError, match="Generation 2 of m"):
            self.make(world, 2)
        with pytest.raises(EntryNotFoundError):
            world.registry.make_current(Query(model="nobody's"), 1)
        assert world.snapshot() == before
        self.make(world, 1)
        assert [entry.generation for entry in world.registry.status()] == [1, 1]
        write(world, engine)
        for _ in range(2):
            world.registry.updates.advance(other, write(world, other))
        assert (held(engine.entry), held(other.entry)) == ([1, 3], [2, 3])
        before = world.snapshot()
        with pytest.raises(EntryNotFoundError, match="Generation 1 of m"):
            self.make(world, 1)
        assert world.snapshot() == before

    def test_keeps_what_was_current_last(self, world: World, engine: Lease) -> None:
        """Not the oldest one, nor the one with the highest number."""
        reader = world.attach(KEY, pid=3)
        write(world, engine)
        world.registry.updates.advance(reader, 2)
        write(world, engine)
        assert held(engine.entry) == [1, 2, 3]
        self.make(world, 1)
        world.registry.updates.advance(reader, 0)
        assert held(engine.entry) == [1, 3]

    def test_never_gives_a_number_twice(self, world: World, engine: Lease) -> None:
        """Though the latest one is not the current one, or has gone."""
        write(world, engine)
        self.make(world, 1)
        assert world.registry.updates.stage(engine) == 3
        world.registry.updates.abort(engine)
        world.registry.unload(Query(), force=True)
        assert list(world.attach(KEY, pid=9).events) == [GrantedEvent(3)]


class TestPruning:
    """Nothing is held that nobody maps and no rule keeps."""

    def test_goes_by_when_they_were_current(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Each mapped one stays in between."""
        for _ in range(4):
            world.registry.updates.advance(trainer, write(world, trainer))
        assert held(engine.entry) == [1, 4, 5]
        reader = world.attach(KEY, pid=3)
        for _ in range(2):
            world.registry.updates.advance(trainer, write(world, trainer))
        assert held(engine.entry) == [1, 5, 6, 7]
        world.registry.end_lease(engine)
        assert held(engine.entry) == [5, 6, 7]
        world.registry.end_lease(reader)
        assert held(engine.entry) == [6, 7]
        check_open(world, [6, 7], 7)

    def test_comes_with_the_end_of_one_who_only_held(self, world: World, engine: Lease) -> None:
        """A `serve` holds what it has descriptors of."""
        holder = world.registry.attach(KEY, may_load=False, pid=3, client="serve", passive=True)
        for _ in range(2):
            world.registry.updates.advance(engine, write(world, engine))
        assert held(engine.entry) == [1, 2, 3]
        world.registry.end_lease(holder)
        assert held(engine.entry) == [2, 3]

    def test_comes_with_sleep(self, world: World, engine: Lease, trainer: Lease) -> None:
        """A sleeper maps nothing."""
        for _ in range(2):
            world.registry.updates.advance(trainer, write(world, trainer))
        fall_asleep(world, engine, 1, AUTO)
        assert held(trainer.entry) == [2, 3]


class TestSleep:
    """What a client wrote, no checkpoint brings back."""

    @pytest.mark.parametrize("wish", list(WhenAsleep))
    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_never_loses_what_was_written(self, world: World, engine: Lease, wish: WhenAsleep, level: int) -> None:
        """The last client sleeps while it maps an older generation: the current one is what stays, and alone."""
        write(world, engine, "step-7")
        if not world.registry.sleeping.sleep(engine, level, wish):
            world.registry.announce(engine, 1)
            world.registry.deposit(engine, (HOST_FD,))
            assert world.registry.sleeping.sleep(engine, level, wish, HOST, 2)
        entry = engine.entry
        stays = wish is STAY or (wish is AUTO and level == 0)
        assert entry.current.state is (GenerationState.READY if stays else GenerationState.PARKED)
        assert (entry.current.number, entry.current.published.version, engine.maps) == (2, "step-7", 0)
        check_open(world, [1, 2] if stays else [], 2)
        woken = wake(world)
        assert list(woken.events) == [ReadyEvent() if stays else GrantedEvent(2, brings_back=True)]

    def test_never_loses_what_was_handed_back(self, world: World) -> None:
        """A companion that follows knows it by its version."""
        world.registry.expect(KEY, 4)
        lease = world.registry.attach(KEY, may_load=False, pid=1, client="engine", holds=4)
        world.registry.deposit(lease, FIRST_FDS)
        published = type(SHOWN)(3, version="step-7")
        assert world.registry.commit(lease, ARENA, MANIFEST, published, 4) == 4
        assert not world.registry.sleeping.sleep(lease, 2, AUTO)
        assert lease.state is LeaseState.PARKING

    def test_drops_what_a_checkpoint_has(self, world: World, engine: Lease) -> None:
        """After a rollback to it."""
        write(world, engine)
        world.registry.make_current(Query(), 1)
        assert world.registry.sleeping.sleep(engine, 2, AUTO)
        assert engine.entry.current.state is GenerationState.DROPPED
        check_open(world, [], 2)

    def test_asks_for_the_copy_again_if_another_one_became_current_meanwhile(self, world: World, engine: Lease) -> None:
        """The copy of the one before is closed, and the current one is what is parked."""
        assert not world.registry.sleeping.sleep(engine, 1, AUTO)
        trainer = world.attach(KEY, may_load=False, pid=2)
        write(world, trainer)
        world.registry.end_lease(trainer)
        world.registry.announce(engine, 1)
        world.registry.deposit(engine, (51,))
        assert not world.registry.sleeping.sleep(engine, 1, AUTO, HOST, 1)
        assert (engine.state, world.closed, engine.entry.current.host) == (LeaseState.PARKING, [51], None)
        world.registry.announce(engine, 1)
        world.registry.deposit(engine, (52,))
        assert world.registry.sleeping.sleep(engine, 1, AUTO, HOST, 2)
        assert (engine.entry.current.number, engine.entry.current.host_fds) == (2, (52,))
        assert sorted(world.closed) == [7, 8, 27, 28, 51]

    def test_needs_no_copy_if_somebody_else_is_awake_by_then(self, world: World, engine: Lease) -> None:
        """The stale copy goes, and its client sleeps."""
        assert not world.registry.sleeping.sleep(engine, 1, AUTO)
        trainer = world.attach(KEY, may_load=False, pid=2)
        write(world, trainer)
        world.registry.deposit(engine, (51,))
        assert world.registry.sleeping.sleep(engine, 1, AUTO, HOST, 1)
        assert (world.closed, engine.state) == ([51], LeaseState.ASLEEP)


class TestEnds:
    """Whatever ends the entry ends all its generations, and its writer."""

    @pytest.mark.parametrize("how", ["unload", "lose", "close", "replace"])
    def test_close_each_descriptor_once(self, world: World, engine: Lease, trainer: Lease, how: str) -> None:
        """Three generations, one that is being written, and a copy."""
        for _ in range(2):
            world.registry.updates.advance(trainer, write(world, trainer))
        world.registry.updates.stage(trainer)
        world.registry.deposit(trainer, (97, 98))
        if how == "unload":
            with pytest.raises(EntryInUseError, match=r"client2 \(pid 2, writing\)"):
                world.registry.unload(Query())
            world.registry.unload(Query(), force=True)
        elif how == "lose":
            world.registry.lose(lambda arena, fds: set(fds) == set(fds_of(3)))
        else:
            world.registry.end(replaced=how == "replace")
            world.registry.close()
        assert sorted(world.closed) == sorted([*FIRST_FDS, *fds_of(2), *fds_of(3), 97, 98])
        told = RetiredEvent if how in ("unload", "lose") else FailedEvent
        assert (kinds(engine)[-1], kinds(trainer)[-1]) == (told, told)
        if told is RetiredEvent:
            assert trainer.state is engine.state is LeaseState.ATTACHED
            before = world.snapshot()
            for refused in (
                lambda: world.registry.updates.stage(trainer),
                lambda: world.registry.updates.commit(trainer, ARENA, "v"),
                lambda: world.registry.updates.advance(engine, 2),
            ):
                with pytest.raises((BadRequestError, EntryNotFoundError)):
                    refused()
            assert world.snapshot() == before

    def test_come_by_time_to_all_of_them(self, world: World, engine: Lease) -> None:
        """The idle time is the entry's."""
        write(world, engine)
        world.registry.end_lease(engine)
        assert held(engine.entry) == [1, 2]
        world.wait(10)
        assert sorted(world.closed) == sorted([*FIRST_FDS, *fds_of(2)])


class TestLost:
    """The process that the memory of a generation depends on has ended."""

    def test_lets_one_go_that_is_not_current(self, world: World, engine: Lease, trainer: Lease) -> None:
        """Who maps it goes on, and can advance; nobody can go back to it."""
        write(world, trainer)
        world.registry.lose(lambda arena, fds: tuple(fds) == FIRST_FDS)
        assert (held(engine.entry), engine.maps, engine.state) == ([2], 1, LeaseState.ATTACHED)
        check_open(world, [2], 2)
        assert RetiredEvent not in kinds(engine)
        with pytest.raises(EntryNotFoundError):
            world.registry.make_current(Query(), 1)
        world.registry.updates.advance(engine, 0)
        assert (engine.maps, world.happened(GenerationEvent.LOSE)) == (2, ["k1"])


class TestNextCompanion:
    """A client that maps an older generation than the one that was handed back."""

    def expect(self, world: World, *, order: Sequence[int] = (1, 2)) -> None:
        """Generation 1 was current there, after a rollback from 2."""
        for number in order:
            world.registry.expect(KEY, number, rolled_back=number == 1)
        world.registry.open()

    def hand_back(self, world: World, lease: Lease, number: int) -> None:
        world.registry.deposit(lease, fds_of(number))
        world.registry.commit(lease, ARENA, MANIFEST, type(SHOWN)(3, version=f"step-{number}"), number)

    @pytest.mark.parametrize("order", [(1, 2), (2, 1)])
    @pytest.mark.parametrize("first", [1, 2])
    def test_gets_what_was_current_after_a_rollback(self, world: World, first: int, order: tuple[int, int]) -> None:
        """Whoever comes first; and no number is given twice."""
        self.expect(world, order=order)
        assert world.registry.status()[0].generation == 1
        leases = {number: self.attach(world, number) for number in ((1, 2) if first == 1 else (2, 1))}
        assert kinds(leases[1]) == [GrantedEvent]
        assert list(leases[1].events) == [GrantedEvent(1)]
        self.hand_back(world, leases[1], 1)
        assert (kinds(leases[2])[-1], leases[2].maps) == (ReadyEvent, 2)
        assert world.registry.status()[0].generation == 1
        world.registry.updates.advance(leases[2], 0)
        assert write(world, leases[2]) == 3

    @pytest.mark.parametrize("how", ["never comes", "dies", "hangs"])
    def test_gets_the_newest_if_nobody_hands_that_back(self, world: World, how: str) -> None:
        """It is waited for as long as for any."""
        self.expect(world)
        newer = self.attach(world, 2)
        older = self.attach(world, 1) if how != "never comes" else None
        if how == "dies":
            assert older is not None
            world.registry.end_lease(older)
        world.wait(limits.HAND_BACK_S / 2)
        assert GrantedEvent not in kinds(newer)
        world.wait(limits.HAND_BACK_S / 2)
        assert list(newer.events)[-1] == GrantedEvent(2)
        self.hand_back(world, newer, 2)
        assert world.registry.status()[0].generation == 2

    def test_takes_nothing_back_that_was_dropped(self, world: World) -> None:
        """Neither what was current nor what was the newest."""
        self.expect(world)
        world.registry.unload(Query(), force=True)
        for number in (1, 2):
            with pytest.raises(EntryNotFoundError):
                self.attach(world, number)

    def test_forgets_the_rollback(self, world: World) -> None:
        """Once something is current again: what was rolled back to is an older generation like any other."""
        self.expect(world)
        newer = self.attach(world, 2)
        world.wait(limits.HAND_BACK_S)
        self.hand_back(world, newer, 2)
        world.registry.lose(lambda arena, fds: True)
        with pytest.raises(EntryNotFoundError):
            self.attach(world, 1)

    def attach(self, world: World, number: int) -> Lease:
        return world.registry.attach(KEY, may_load=False, pid=number, client="engine", holds=number)

    def test_is_attached_and_can_advance(self, world: World) -> None:
        """It is shown as a user of the entry, and not as one of the generation that it does not map."""
        for number in (1, 2):
            world.registry.expect(KEY, number)
        world.registry.open()
        older, newer = self.attach(world, 1), self.attach(world, 2)
        assert kinds(newer) == [GrantedEvent]
        world.registry.deposit(newer, fds_of(2))
        world.registry.commit(newer, ARENA, MANIFEST, type(SHOWN)(3, version="step-2"), 2)
        assert (kinds(older)[-1], older.maps) == (ReadyEvent, 1)
        (entry,) = world.registry.status()
        assert [(each.number, each.pids) for each in entry.generations] == [(2, (2,))]
        assert [lease.pid for lease in entry.leases] == [1, 2]
        world.registry.updates.advance(older, 0)
        assert world.registry.status()[0].generations[0].pids == (1, 2)
