"""What rounds of chaos (tests/process/test_chaos.py) once found, each made to happen on purpose."""

from __future__ import annotations

import pytest

from tests.process.chaos import World

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("step", ["granted", "packing", "packed", "deposited"])
def test_a_loader_whose_companion_is_killed_publishes_to_the_next_one_and_nobody_loads_again(step: str) -> None:
    """A second engine waits for it, asks the next companion, and is elected there before the first has finished."""
    world = World(seed=1)
    try:
        world._start("engine", 0, {"at": step, "act": "kill", "delay_s": 0.0})
        world._start("engine", 0, {})
        world.settle()
        loader, other = world.standins
        assert "published" in loader.steps + other.steps
        assert [step for x in world.standins for step in x.steps].count("packed") == 1
        assert loader.alone == other.alone == ""
    finally:
        world.close()
