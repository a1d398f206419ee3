"""What rounds of chaos (tests/process/test_chaos.py) once found, each made to happen on purpose."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.process.chaos import World
from tests.process.standin import companions
from tests.process.test_handing_back import Engines
from tests.support.place import KEY, Place, alive, until
from vllm_companion_plugin.client import mirror
from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.host import notes

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("step", ["elected", "packed", "deposited"])
def test_a_loader_whose_companion_is_killed_publishes_to_the_next_one_and_nobody_loads_again(step: str) -> None:
    """A second engine asks the next companion, and is elected there before the first goes on."""
    world = World(seed=1)
    try:
        world._start("engine", 0, {"at": step, "act": "kill and freeze", "delay_s": 60.0})
        (loader,) = world.standins
        until(lambda: world._hear() or "granted" in loader.steps, 20, "the first is elected")
        world._start("engine", 0, {})
        until(lambda: world._hear() or "granted" in world.standins[1].steps, 30, "the second is elected, too")
        world._thaw[loader.pid] = time.monotonic()
        world.settle()
        steps = [step for x in world.standins for step in x.steps]
        assert steps.count("packed") == 1
        # Elected only, it may notice at once that its companion is gone: then the second loads, for both.
        assert steps.count("the next one gets it") == 1 or (step, "asking again" in loader.steps) == ("elected", True)
        assert [x.alone for x in world.standins] == ["", ""]
    finally:
        world.close()


@pytest.mark.parametrize("after_s", [0.3, 0.6])
def test_engines_that_start_while_the_companion_is_stopped_get_another_one(after_s: float) -> None:
    world = World(seed=1)
    try:
        for number in range(6):
            world._start("engine", number % 2, {})
        world._kill_at = [(time.monotonic() + after_s, signal.SIGTERM)]
        world.settle()
        # Who maps what the first one had keeps it for itself: it was stopped on purpose.
        assert [x.alone for x in world.standins if x.alone not in ("", "let go")] == []
    finally:
        world.close()


@pytest.mark.parametrize("kills", [1, 2])
def test_a_companion_that_is_killed_while_it_starts_is_started_again(kills: int) -> None:
    world = World(seed=1)
    try:
        world._start("engine", 0, {})
        world._start("engine", 0, {})
        for _ in range(kills):
            until(lambda: companions(world.place.settings.runtime_dir), 20, "a companion starts", every_s=0.0)
            for pid in companions(world.place.settings.runtime_dir):
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: not alive(pid), 5, "it is dead")
        world.settle()
        assert [x.alone for x in world.standins] == ["", ""]
        assert all("asking again" not in x.steps for x in world.standins)
    finally:
        world.close()


def test_who_is_about_to_hand_back_when_the_companion_is_stopped_does_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before it connected only, and held afterwards what no companion to come would expect."""
    engines = Engines(place)
    try:
        engines.start()

        def connect_late(*args: Any, **kwargs: Any) -> CompanionConnection:
            notes.dismiss(place.paths, KEY, 1)  # as a companion does that is stopped meanwhile
            return connect(*args, **kwargs)

        monkeypatch.setattr(mirror, "connect", connect_late)
        engines.kill_companion()
        until(lambda: engines.holders[0]._closed.is_set(), 10, "it has let go")
        until(lambda: (status := engines.status()) is not None and status.entries == (), 5, "nothing is held")
    finally:
        engines.close()
