"""Real engines of one entry sleep, wake, reload and get other weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.checkpoints import models
from tests.support.place import Place, alive, until
from tests.vllm.conftest import entries
from tests.vllm.test_replace import pair
from tests.vllm.test_turns import Process, start
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.core.status import EntryState, LeaseState
from vllm_companion_plugin.errors import CompanionError

__all__ = ["start"]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHILD = "tests.vllm.sleep_child"
ASLEEP = {(1, 1): EntryState.PARKED, (1, 2): EntryState.PARKED, (2, 1): EntryState.PARKED, (2, 2): EntryState.DROPPED}
"""What two levels of sleep leave of the entry."""
Start = Callable[..., Process]


class Engine:
    """One engine, and what it says."""

    def __init__(self, start: Start, model: str, **options: Any) -> None:
        self.process = start(CHILD, model=model, **options)

    def try_to(self, *what: Any) -> dict[str, Any]:
        stdin = self.process.process.stdin
        stdin.write(json.dumps(what) + "\n")
        stdin.flush()
        return self.process.result()  # type: ignore[return-value]

    def do(self, *what: Any) -> Any:
        answer = self.try_to(*what)
        assert "error" not in answer, (what, answer)
        return answer["value"]

    def log(self) -> str:
        return self.process.log.read_text()


def shown(place: Place) -> tuple[EntryState, list[LeaseState]]:
    (entry,) = entries(place)
    return entry.state, sorted((lease.state for lease in entry.leases), key=lambda state: state.value)


def test_sleep(place: Place, start: Start, tiny_llama: Path) -> None:
    """At each level, by tags, beside another that is awake or asleep, in either order: a normal load's tokens."""
    normal = Engine(start, str(tiny_llama), load_format="auto")
    expected = normal.do("tokens")
    normal.process.end()
    engines = [Engine(start, str(tiny_llama)) for _ in range(2)]
    for engine in engines:
        assert engine.do("tokens") == expected
    places = [engine.do("state")[3] for engine in engines]

    for engine, other in (engines, reversed(engines)):
        for level in (1, 2):
            engine.do("sleep", level)
            assert shown(place) == (EntryState.READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
            assert engine.do("state")[0]
            assert other.do("tokens") == expected
            if level == 1:
                engine.do("wake")
            else:
                engine.do("wake", ["kv_cache"])
                assert engine.do("state")[0]
                engine.do("wake", ["weights"])
            assert engine.do("tokens") == expected

    for levels, after in ASLEEP.items():
        for order in (engines, engines[::-1]):
            loads = [engine.log().count("loading them again") for engine in order]
            for engine, level in zip(order, levels, strict=True):
                engine.do("sleep", level)
            assert shown(place) == (after, [LeaseState.ASLEEP] * 2)
            for engine in order:
                engine.do("wake")
                assert engine.do("tokens") == expected
            loaded = after is EntryState.DROPPED
            assert [engine.log().count("loading them again") for engine in order] == [loads[0] + loaded, loads[1]]
    assert [engine.do("state")[3] for engine in engines] == places


def test_newcomer(place: Place, start: Start, tiny_llama: Path) -> None:
    """An engine that starts while the entry is parked brings it back, and loads nothing."""
    sleeper = Engine(start, str(tiny_llama))
    expected = sleeper.do("tokens")
    sleeper.do("sleep", 1)
    assert shown(place) == (EntryState.PARKED, [LeaseState.ASLEEP])
    newcomer = Engine(start, str(tiny_llama))
    assert newcomer.do("tokens") == expected
    assert shown(place) == (EntryState.READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
    sleeper.do("wake")
    assert sleeper.do("tokens") == expected
    assert sleeper.do("state")[2] == newcomer.do("state")[2] == 1


def test_a_draft_in_the_checkpoint(start: Start, tmp_path: Path) -> None:
    """Alone at level 2 the engine loads both models again, though vLLM keeps no configuration of such a draft."""
    case = models.CASES["mimo-mtp"]
    models.make("mimo-mtp", tmp_path, tiny=True)
    engine = Engine(start, str(tmp_path), flags={"speculative_config": case.flags["speculative_config"]})
    expected = engine.do("tokens")
    for _ in range(2):
        engine.do("sleep", 2)
        engine.do("wake")
        assert engine.do("tokens") == expected


def test_what_engines_process_for_themselves(place: Place, start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    """Where unprocessed weights are shared, it is theirs, stays what it is, and no other weights can take its place."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "gated"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GatedForCausalLM"]}))
    normal = Engine(start, str(model), load_format="auto")
    expected = normal.do("tokens")
    engines = [Engine(start, str(model)) for _ in range(2)]
    assert [each.do("tokens") for each in engines] == [expected] * 2
    assert any("Attached" in each.log() for each in engines)
    for what in (("sleep", 1), ("sleep", 2), ("reload",)):
        for each in engines:
            each.do(*what)
        for each in engines:
            if what[0] == "sleep":
                each.do("wake")
            assert each.do("tokens") == expected, what
    with (
        contextlib.closing(CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)) as client,
        client.update(str(model), "step", mode="direct") as update,
    ):
        update.load({"lm_head.weight": load_file(model / "model.safetensors")["lm_head.weight"] * 2})
    for each in engines:
        name, text = each.try_to("update")["error"]
        assert "tensors that it has processed for itself" in text, name
        assert each.do("tokens") == expected


def test_reload_of_what_was_not_published(start: Start, tiny_llama: Path) -> None:
    """Its weights are bound as shared ones are, so vLLM processes what it reloads for the same kernels."""
    normal = Engine(start, str(tiny_llama), load_format="auto")
    engine = Engine(start, str(tiny_llama), refused=True)
    expected = normal.do("tokens")
    assert engine.do("tokens") == expected
    for each in (normal, engine):
        each.do("reload")
        assert each.do("tokens") == expected


def test_other_weights(place: Place, start: Start, tmp_path: Path) -> None:
    """They become one engine's own, and give the tokens of an engine that loaded them; the other keeps what it has."""
    own, others = pair(tmp_path, tiny=True)
    normal = Engine(start, others)
    theirs = normal.do("tokens")
    normal.process.end()
    writer = Engine(start, own)
    expected = writer.do("tokens")
    reader = Engine(start, own, config={"on_write": "refuse"})
    address = writer.do("state")[3]
    assert reader.do("tokens") == expected != theirs

    for engine in (writer, reader):  # nothing else is to be written: they are renewed
        engine.do("reload")
        assert engine.do("state")[1] is False
        assert engine.do("tokens") == expected

    for what in ("load", "load_part", "reload_from"):
        name, text = reader.try_to(what, others)["error"]
        assert name == "SharedWeightsError"
        assert "which other processes use too" in text
        assert reader.do("state")[1] is False
        assert reader.do("tokens") == expected

    writer.do("load_part", others)
    assert writer.do("state")[1::2] == [True, address]
    assert writer.do("tokens") not in (expected, theirs)  # with the head of the other weights
    writer.do("load", others)
    assert writer.do("state")[1::2] == [True, address]
    assert "load_weights is about to write to" in writer.log()
    assert writer.do("tokens") == theirs
    assert reader.do("tokens") == expected
    writer.do("sleep", 1)
    writer.do("wake")
    assert writer.do("tokens") == theirs
    writer.do("reload")  # by vLLM, as it has been written to
    assert writer.do("tokens") == expected
    writer.do("sleep", 2)
    writer.do("wake", ["weights"])
    writer.do("reload")
    writer.do("wake", ["kv_cache"])
    assert writer.do("tokens") == expected
    writer.do("sleep", 2)
    writer.do("wake")
    writer.do("load", others)
    assert writer.do("tokens") == theirs
    for path, tokens in ((own, expected), (others, theirs)):
        writer.do("reload_from", path)
        assert writer.do("tokens") == tokens
    assert writer.do("state")[1::2] == [True, address]
    reader.do("sleep", 2)
    reader.do("wake")
    assert reader.do("tokens") == expected


def test_written_to_while_asleep(start: Start, tmp_path: Path) -> None:
    """There is no memory to write to: an error says so, whoever's it is, and the engine wakes as if nothing was."""
    own, others = pair(tmp_path, tiny=True)
    engine = Engine(start, own)
    expected = engine.do("tokens")
    for is_private in (False, True):
        engine.do("sleep", 1)
        for what in ("load", "reload_from"):
            name, text = engine.try_to(what, others)["error"]
            assert name == "ArenaError"
            assert "no memory at their addresses. Wake the engine first" in text
        engine.do("wake")
        assert engine.do("state")[:2] == [False, is_private]
        assert engine.do("tokens") == expected
        engine.do("load", own)


def test_two_engines_in_a_process(place: Place, start: Start, tmp_path: Path) -> None:
    """Each sleeps, is renewed, updated and written to for itself, whatever the other one does."""
    own, others = pair(tmp_path, tiny=True)
    engine = Engine(start, own, another=others)
    expected = []
    for number in (0, 1):
        engine.do("use", number)
        expected.append(engine.do("tokens"))
    for sleeper, other in ((0, 1), (1, 0)):
        for level in (1, 2):
            engine.do("use", sleeper)
            engine.do("sleep", level)
            assert engine.do("state")[0]
            engine.do("use", other)
            for what in ("reload", "update", "wake"):
                engine.do(what)
                assert engine.do("state")[:2] == [False, False]
                assert engine.do("tokens") == expected[other]
            engine.do("use", sleeper)
            assert engine.do("state")[0]
            engine.do("wake")
            assert engine.do("tokens") == expected[sleeper]
    engine.do("use", 0)
    engine.do("sleep", 1)
    engine.do("use", 1)
    engine.do("load", own)
    assert engine.do("tokens") == expected[0]
    engine.do("use", 0)
    engine.do("wake")
    assert engine.do("state")[:2] == [False, False]
    assert engine.do("tokens") == expected[0]


def test_companion_dies(place: Place, start: Start, tiny_llama: Path) -> None:
    """While one sleeps and one is awake, and while both sleep: tokens are right, and what is lost is loaded again."""
    engines = [Engine(start, str(tiny_llama)) for _ in range(2)]
    expected = engines[0].do("tokens")
    assert engines[1].do("tokens") == expected
    engines[0].do("sleep", 1)
    kill_companion(place)
    until(lambda: is_shown(place, EntryState.READY, LeaseState.ASLEEP, LeaseState.ATTACHED), 20, "all are told")
    engines[0].do("wake")
    assert [engine.do("tokens") for engine in engines] == [expected] * 2
    for engine in engines:
        engine.do("sleep", 1)
    kill_companion(place)
    assert sum(engine.log().count("loading them again") for engine in engines) == 0
    for engine in engines:
        engine.do("wake")
        assert engine.do("tokens") == expected
    assert [engine.log().count("loading them again") for engine in engines] == [1, 0]


def kill_companion(place: Place) -> None:
    pid = place.companion_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), 5, "it is dead")


def is_shown(place: Place, state: EntryState, *leases: LeaseState) -> bool:
    with contextlib.suppress(CompanionError, ValueError):
        return shown(place) == (state, [*leases])
    return False
