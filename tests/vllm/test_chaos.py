"""Real engines and their companion, killed at random moments of a start and while they serve."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.process.standin import companions
from tests.support.place import Place, alive, until
from tests.vllm.conftest import START_TIMEOUT_S, Engine, StartEngine
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState, EntryStatus, LeaseState
from vllm_companion_plugin.errors import CompanionError

SEED = 20261121
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]
STEPS = ("a companion", "asked", "published", "attached", "serving")


class Rounds:
    """Two engines of one model, of which each round kills one, or their companion, or both."""

    def __init__(self, start: Callable[[], Engine], place: Place) -> None:
        self.start, self.place = start, place
        self.engines: list[Engine] = []

    def entry(self) -> EntryStatus | None:
        with contextlib.suppress(CompanionError), connect("cpu", self.place.settings, spawn=False) as connection:
            return next(iter(connection.status().entries), None)
        return None

    def has_come_to(self, step: str, engine: Engine) -> bool:
        """Whether `engine`, which starts, has taken this step or a later one."""
        assert engine.process.poll() is None, engine.output()[-5000:]
        if step == "serving":
            return bool(engine.result())
        if step == "a companion":
            return bool(companions(self.place.settings.runtime_dir))
        entry = self.entry()
        states = {lease.pid: lease.state for lease in entry.leases} if entry is not None else {}
        if entry is None or engine.process.pid not in states:
            return False
        reached = {
            "asked": True,
            "published": entry.state is EntryState.READY,
            "attached": states[engine.process.pid] is LeaseState.ATTACHED,
        }
        return reached[step]

    def play(self, rng: random.Random) -> str:
        """One round; what it did."""
        new = [self.start() for _ in range(2 - len(self.engines))]
        step, delay_s = rng.choice(STEPS), rng.uniform(0, 0.4)
        victims = rng.choice((["companion"], ["companion"], ["engine"], ["companion", "engine"]))
        watched = rng.choice(new or self.engines)
        victim = rng.choice([*self.engines, *new])
        until(lambda: self.has_come_to(step, watched), START_TIMEOUT_S, f"an engine comes to: {step}", every_s=0.01)
        time.sleep(delay_s)
        self.engines += new
        if "companion" in victims:
            for pid in companions(self.place.settings.runtime_dir):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if "engine" in victims:
            victim.kill()
            victim.process.wait(60)
            self.engines.remove(victim)
        return f"{' and '.join(victims)} killed {delay_s:.2f} s after {step!r}"

    def check(self, expected: list[list[int]]) -> None:
        """Every engine that lives answers right, from the one copy that the companion has."""
        for engine in self.engines:
            assert engine.tokens_now() == expected
        pids = sorted(engine.process.pid for engine in self.engines)

        def settled() -> bool:
            entry = self.entry()
            return entry is not None and sorted(lease.pid for lease in entry.leases) == pids

        until(settled, 30, f"{pids} are attached", every_s=0.05)
        (companion,) = companions(self.place.settings.runtime_dir)
        assert len({inode for pid in (companion, *pids) for inode in arenas_open(pid)}) == 1
        assert all(alive(pid) for pid in pids)


def arenas_open(pid: int) -> set[int]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            path = Path(f"/proc/{pid}/fd/{name}")
            if "memfd:vllm-companion" in os.readlink(path):
                found.add(path.stat().st_ino)
    return found


def run(rounds: range, start_engine: StartEngine, place: Place, model: Path) -> None:
    options = {"model": model, "prompts": PROMPTS, "skip_tokenizer_init": True}
    normal = start_engine(load_format="auto", **options)
    world = Rounds(lambda: start_engine(load_format="companion", **options), place)
    expected = None
    for number in rounds:
        began = time.monotonic()
        done = world.play(random.Random(f"{SEED}:{number}"))
        if expected is None:
            expected = normal.result()["tokens"]
            normal.stop()
        world.check(expected)
        print(f"round {number}: {done}; {len(world.engines)} serve; {time.monotonic() - began:.1f} s", flush=True)


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_engines_and_their_companion_may_be_killed_at_any_moment(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    run(range(10), start_engine, place, tiny_llama)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_engines_and_their_companion_may_be_killed_at_thirty_other_moments(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    run(range(10, 40), start_engine, place, tiny_llama)
