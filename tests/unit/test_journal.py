"""What the companion writes down of the registry's moves: notes for the next companion, and its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.unit.test_state import ARENA, MANIFEST, SHOWN, World, hold, key
from tests.unit.test_updates import write
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.errors import RuntimeDirError
from vllm_companion_plugin.holder.registry.limits import HAND_BACK_S
from vllm_companion_plugin.holder.service.journal import Journal


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Lines of the companion's logger, which hands nothing on where vLLM has been imported."""
    logger = logging.getLogger("vllm.companion.service")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        propagate, logger.propagate = logger.propagate, False
        yield caplog
        logger.propagate = propagate
    logger.removeHandler(caplog.handler)


class Notes:
    """A journal of a world's moves, and the notes that it has left."""

    def __init__(self) -> None:
        self.left: list[tuple[str, int]] = []
        self.rolled_back: list[tuple[str, int]] = []
        self.cleared: list[tuple[str, int]] = []
        self.world = World(linger_s=10)
        self.error: Exception | None = None

    def dismiss(self, noted: EntryKey, generation: int) -> None:
        if self.error is not None:
            raise self.error
        self.left.append((noted.id, generation))

    def roll_back(self, noted: EntryKey, generation: int) -> None:
        if self.error is not None:
            raise self.error
        self.rolled_back.append((noted.id, generation))

    def write(self) -> list[tuple[str, int]]:
        """Have all moves written down; the notes."""
        journal = Journal(self.dismiss, self.roll_back, lambda noted, number: self.cleared.append((noted.id, number)))
        for move in self.world.moves:
            journal.observe(move)
        return self.left


@pytest.fixture
def notes() -> Notes:
    return Notes()


class TestNotes:
    """What was dropped on purpose is noted, so that nobody hands it back."""

    def test_are_left_by_an_unload(self, notes: Notes) -> None:
        """Also of an entry that clients still map."""
        notes.world.publish(key())
        notes.world.registry.unload(Query(), force=True)
        assert notes.write() == [("k1", 1)]

    def test_are_left_by_the_linger_time_and_by_room(self, notes: Notes) -> None:
        """Each of the generation that was dropped."""
        for name, fds in (("a", (7, 8)), ("b", (17, 18))):
            notes.world.registry.end_lease(notes.world.publish(key(name), fds=fds))
            notes.world.now += 1
        notes.world.registry.make_room(1)
        notes.world.wait(10)
        assert notes.write() == [("a", 1), ("b", 1)]

    @pytest.mark.parametrize("replaced", [True, False])
    def test_are_left_at_the_end_unless_another_companion_follows(self, notes: Notes, replaced: bool) -> None:
        """The companion that follows gets what clients map."""
        notes.world.publish(key())
        notes.world.registry.end(replaced=replaced)
        notes.world.registry.close()
        assert notes.write() == ([] if replaced else [("k1", 1)])

    def test_are_not_left_of_what_is_lost_or_declined(self, notes: Notes) -> None:
        """Nobody decided that nobody shall have it."""
        notes.world.publish(key("a"))
        notes.world.registry.lose(lambda arena, fds: True)
        notes.world.registry.decline(notes.world.attach(key("b")), "because")
        assert notes.write() == []

    @pytest.mark.parametrize("comes", [True, False])
    def test_are_left_of_what_has_not_come_back(self, notes: Notes, comes: bool) -> None:
        """A client that hangs may map another generation, from the companion before."""
        for number in (1, 2):
            notes.world.registry.expect(key(), number)
        if comes:
            lease = notes.world.registry.attach(key(), may_load=False, pid=1, client="engine", holds=2)
            notes.world.registry.deposit(lease, (7, 8))
            notes.world.registry.commit(lease, ARENA, MANIFEST, SHOWN, 2)
        notes.world.registry.close()
        assert sorted(notes.write()) == [("k1", 1), ("k1", 2)]

    @pytest.mark.parametrize("error", [OSError, RuntimeDirError])
    def test_that_cannot_be_left_are_logged(
        self, notes: Notes, log: pytest.LogCaptureFixture, error: type[Exception]
    ) -> None:
        """The entry is dropped all the same."""
        notes.error = error("Read-only file system")
        notes.world.publish(key())
        notes.world.registry.unload(Query(), force=True)
        notes.write()
        assert "Those who map m may hand it back: Read-only file system" in log.messages
        assert "Unloaded m, generation 1." in log.messages


class TestRollback:
    """What is current is noted if it is not the latest, so that the next companion goes on with it."""

    def rolled_back(self, notes: Notes) -> World:
        world = notes.world
        write(world, world.publish(key()), "step-7")
        world.registry.make_current(Query(), 1)
        return world

    def test_is_noted_until_something_newer_is_current(self, notes: Notes) -> None:
        """By a commit, or by the reverse."""
        world = self.rolled_back(notes)
        world.registry.make_current(Query(), 2)
        world.registry.make_current(Query(), 1)
        write(world, world.registry.leases[0])
        notes.write()
        assert [number for _, number in notes.rolled_back] == [0, 0, 1, 0, 1, 0]

    @pytest.mark.parametrize("replaced", [True, False])
    def test_is_noted_for_a_companion_that_follows(self, notes: Notes, replaced: bool) -> None:
        """Not after an end that drops everything."""
        world = self.rolled_back(notes)
        world.registry.end(replaced=replaced)
        world.registry.close()
        notes.write()
        assert notes.rolled_back[-1] == ("k1", 1 if replaced else 0)

    def test_is_logged(self, notes: Notes, log: pytest.LogCaptureFixture) -> None:
        """What is current, and in place of what; and if it cannot be noted."""
        self.rolled_back(notes)
        notes.error = OSError("Read-only file system")
        notes.write()
        assert "Generation 2 (step-7) of m (single) is current, in place of 1." in log.messages
        assert "Generation 1 of m (single) is current, in place of 2." in log.messages
        assert "The next companion may take another generation of m: Read-only file system" in log.messages


def test_the_log_names_who_did_what(notes: Notes, log: pytest.LogCaptureFixture) -> None:
    """A hand-back, a client that hangs, a publication, a decline, and the end."""
    world = notes.world
    world.registry.expect(key(), 4)
    world.registry.open()
    hold(world, pid=1)
    holder = hold(world, pid=2)
    world.wait(HAND_BACK_S)
    world.registry.deposit(holder, (7, 8))
    world.registry.commit(holder, ARENA, MANIFEST, SHOWN, 4)
    world.publish(key("k2", model="n"), pid=3, fds=(17, 18))
    world.registry.decline(world.attach(key("k3", model="o"), pid=4), "because")
    notes.write()
    assert log.messages == [
        "Expecting m (single) from those who map it.",
        "Nobody handed back m within 5 s.",
        "holder1 (pid 1) was elected to hand back m and did not within 5 s: the next one may.",
        "holder2 (pid 2) handed back m (target, single), generation 4: 0.00 GiB of memfd, loaded in 0.0 s.",
        "client3 (pid 3) published n (target, single), generation 1: 0.00 GiB of memfd, loaded in 0.0 s.",
        "client4 (pid 4) keeps o: because",
    ]


@pytest.mark.parametrize(("linger_s", "idle"), [(-1.0, ""), (20.0, ", or until nobody was attached for 20 s")])
def test_the_log_says_that_an_owner_has_come(
    linger_s: float, idle: str, notes: Notes, log: pytest.LogCaptureFixture
) -> None:
    """The line before says when the companion would end without one."""
    notes.world.registry.own(5, linger_s)
    notes.write()
    assert log.messages[-1] == f"The owner is pid 5: this companion stays until that process ends{idle}."
