"""What the registry counts at which transition, and that it stays bounded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.unit.test_state import ARENA, MANIFEST, SHOWN, World
from tests.unit.test_updates import write
from vllm_companion_plugin.core import metrics
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import BOUNDS_S
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.holder.registry.counters import MAX_SUBJECTS, Counters
from vllm_companion_plugin.holder.registry.limits import HAND_BACK_S

KEY = EntryKey("ab" * 32, "org/model")


def counted(world: World) -> dict[str, tuple[float, int]]:
    """Value, and number of observations, by name and the labels that are not the model's; without zeros."""
    found = {}
    for series in world.counting.counters.all():
        rest = [value for name, value in series.labels.items() if name not in ("model", "rank", "role")]
        if series.value or any(series.counts):
            found[" ".join([series.name, *rest])] = (series.value, sum(series.counts))
    return found


def test_a_load_and_those_who_waited_for_it() -> None:
    world = World()
    loader = world.attach(KEY)
    world.now += 1
    world.attach(KEY, pid=2)
    world.now += 2
    world.registry.deposit(loader, (7, 8))
    world.registry.commit(loader, ARENA, MANIFEST, SHOWN)
    world.attach(KEY, pid=3)
    assert counted(world) == {
        "loads published": (1, 0),
        "load_seconds": (3, 1),
        "wait_seconds": (2, 1),
        "attaches": (2, 0),
    }


def test_a_loader_that_dies_and_the_heir_that_declines() -> None:
    world = World()
    first, second = world.attach(KEY), world.attach(KEY, pid=2)
    world.attach(KEY, may_load=False, pid=3)
    world.now += 4
    world.registry.end_lease(first)
    world.now += 1
    world.registry.decline(second, "because")
    assert counted(world) == {
        "loads abandoned": (1, 0),
        "loads declined": (1, 0),
        "wait_seconds": (9, 2),  # 4 until elected, 5 in vain
        "failures companion not_shareable": (1, 0),
    }


def test_an_unloaded_load_is_abandoned() -> None:
    world = World()
    world.attach(KEY)
    world.registry.unload(Query(), force=True)
    assert counted(world) == {"loads abandoned": (1, 0), "failures companion lease_lost": (1, 0)}


def test_what_is_handed_back_renewed_and_given_up() -> None:
    world = World()
    other = EntryKey("cd" * 32, "org/other")
    world.registry.expect(KEY, 3)
    world.registry.expect(other, 1)
    world.registry.open()
    heir = world.registry.attach(KEY, may_load=False, pid=1, client="heir", holds=3)
    world.registry.deposit(heir, (7, 8))
    world.registry.commit(heir, ARENA, MANIFEST, SHOWN, 3)
    world.registry.attach(KEY, may_load=False, pid=2, client="second", holds=3)
    world.wait(HAND_BACK_S)
    assert counted(world) == {
        "readoptions handed_back": (1, 0),
        "readoptions renewed": (1, 0),
        "readoptions given_up": (1, 0),
    }


def test_who_hands_back_too_late_has_failed() -> None:
    world = World()
    world.registry.attach(KEY, may_load=False, pid=1, client="slow", holds=3)
    world.wait(HAND_BACK_S)
    assert counted(world) == {"failures companion wait_timeout": (1, 0)}


def test_updates_that_were_committed_or_not_and_the_way_back() -> None:
    """Whoever stops to write without a commit has aborted; forward again is no rollback."""
    world = World()
    writer = world.publish(KEY)
    write(world, writer)
    for end in (
        lambda: world.registry.updates.abort(writer),
        lambda: world.registry.end_lease(writer),
    ):
        world.registry.updates.stage(writer)
        end()
    for number in (1, 2, 2, 1):
        world.registry.make_current(Query(), number)
    write(world, world.attach(KEY, may_load=False, pid=2))
    world.registry.updates.stage(world.registry.leases[0])
    world.registry.unload(Query(), force=True)
    counts = counted(world)
    assert {name: counts[name][0] for name in ("updates committed", "updates aborted", "rollbacks")} == {
        "updates committed": 2,
        "updates aborted": 3,
        "rollbacks": 2,
    }


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0, 0), (BOUNDS_S[0], 0), (BOUNDS_S[0] + 1e-6, 1), (BOUNDS_S[-1] + 1, len(BOUNDS_S))]
)
def test_a_bucket_holds_what_is_at_most_its_bound(seconds: float, bucket: int) -> None:
    histogram = Counters()
    histogram.observe("attach_seconds", seconds, "m", "single", "target")
    (series,) = [series for series in histogram.all() if series.name == "attach_seconds"]
    assert [index for index, count in enumerate(series.counts) if count] == [bucket]


def test_models_that_come_and_go_do_not_grow_it_for_ever() -> None:
    many = Counters()
    many.count("failures", "client", "parity")

    def names() -> Sequence[str]:
        return [series.labels["model"] for series in many.all() if series.name == "attaches"]

    for number in range(MAX_SUBJECTS + 3):
        many.count("attaches", f"m{number}", "single", "target")
        many.observe("attach_seconds", 1, f"m{number}", "single", "target")
        many.count("attaches", "m0", "single", "target")  # in use all the time
    assert len(names()) == MAX_SUBJECTS
    assert "m0" in names()
    assert "m1" not in names()
    assert [series.value for series in many.all() if series.name == "failures" and series.value] == [1]


def test_every_series_of_an_entry_begins_at_zero() -> None:
    world = World()
    world.attach(KEY)
    before = {(series.name, *series.labels.values()) for series in world.counting.counters.all()}
    assert {name for name, *_ in before} == {metric.name for metric in metrics.TABLE if metric.kind != "gauge"}
    assert counted(world) == {}
    world.registry.end_lease(world.registry.leases[0])
    world.publish(KEY)
    assert {(series.name, *series.labels.values()) for series in world.counting.counters.all()} == before


def test_a_name_is_a_label_of_bounded_length() -> None:
    assert metrics.subject(EntryKey("ab" * 32, "x" * 5000))[0] == "x" * metrics.MAX_LABEL
