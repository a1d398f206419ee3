"""Models that take turns: in one process, and on a device where only one fits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import Place, until
from tests.vllm.conftest import START_TIMEOUT_S, entries
from tests.vllm.nursery import Nursery
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RESIDENT_KB = 16_000
"""What two runs of the same engines differ by."""
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]
CHILD = "tests.vllm.turns_child"


class Process:
    """One that runs models one after the other. `result()` waits for all of them; it stays until `end`."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process = process
        self.log = log

    def result(self) -> list[dict[str, Any]]:
        timer = threading.Timer(START_TIMEOUT_S, self.process.kill)
        timer.start()
        assert self.process.stdout is not None
        with self.log.open("a") as file:
            for line in self.process.stdout:
                file.write(line)
                if line.startswith("RESULT "):
                    timer.cancel()
                    found: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
                    return found
        raise AssertionError(self.log.read_text()[-5000:])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]


@pytest.fixture
def start(
    nursery: Nursery, place: Place, fork_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Process]]:
    """Start such a process: `start(models=...)`."""
    started: list[Process] = []

    def one(child: str = CHILD, **options: Any) -> Process:
        environment = fork_environment | to_environment(place.settings)
        log = tmp_path / f"log-{len(started)}"
        with log.open("w") as file:
            arguments = json.dumps({"prompts": PROMPTS} | options)
            started.append(Process(nursery.start(child, arguments, environment=environment, stderr=file), log))
        return started[-1]

    yield one
    for process in started:
        process.process.close()


def test_models_one_after_the_other_in_a_process_are_given_back(
    place: Place, start: Callable[..., Process], tiny_llama: Path, tied_llama: Path
) -> None:
    """Published or attached: with the model its mapping goes, and nobody uses its entry any more."""
    tokens = []
    for what in ("Published", "Attached"):
        process = start(models=[str(tiny_llama), str(tied_llama), str(tiny_llama)])
        results = process.result()
        assert [(result["mapped"], result["left"]) for result in results] == [(1, 0)] * 3
        assert results[0]["tokens"] == results[2]["tokens"]
        tokens.append([result["tokens"] for result in results])
        until(lambda: all(not entry.leases for entry in entries(place)), 10, "all are given back")
        assert len(entries(place)) == 2
        assert f"{what} weights" in process.log.read_text().replace("Attached to single-rank", "Attached")
        process.end()
    assert tokens[0] == tokens[1]


def test_models_take_turns_on_a_device_where_only_one_fits(
    place: Place, start: Callable[..., Process], tiny_llama: Path, tied_llama: Path
) -> None:
    """Long before its linger time is over, what nobody uses makes room for who is elected to load."""
    first, second = (sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (tiny_llama, tied_llama))
    process = start(
        models=[str(tiny_llama), str(tied_llama), str(tiny_llama)],
        room=max(first, second) + min(first, second) // 2,
    )
    results = process.result()
    assert results[0]["tokens"] == results[2]["tokens"] != results[1]["tokens"]
    assert [entry.key.model for entry in entries(place)] == [str(tiny_llama)]
    dropped = [line for line in process.log.read_text().splitlines() if "Dropped" in line and "nobody used" in line]
    assert [f"Dropped {path.name} " in line for path, line in zip((tiny_llama, tied_llama), dropped, strict=True)] == [
        True,
        True,
    ]
    assert "needs" not in process.log.read_text()
    process.end()


@pytest.mark.slow
def test_freezing_keeps_nothing_alive(
    place: Place, engine_environment: dict[str, str], tmp_path: Path, tiny_llama: Path
) -> None:
    """After an engine whose start failed, and after two that ran, as much is left as without freezing."""
    results: list[list[dict[str, Any]]] = []
    for freeze in ("true", "false"):
        environment = engine_environment | to_environment(place.settings) | {"COMPANION_GC_FREEZE": freeze}
        log = tmp_path / f"freeze-{freeze}"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "tests.vllm.freeze_child", str(tiny_llama), "companion"],
                **{"stdout": subprocess.PIPE, "stderr": file, "text": True, "env": environment},
                timeout=START_TIMEOUT_S,
                check=False,
            )
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        assert line is not None, log.read_text()[-3000:]
        results.append(json.loads(line.removeprefix("RESULT ")))
    for frozen, normal in zip(*results, strict=True):
        assert (frozen["mapped"], frozen["workers"]) == (normal["mapped"], normal["workers"]) == (0, 0)
        assert frozen.get("blocks") == normal.get("blocks")
        assert frozen["resident_kb"] <= normal["resident_kb"] + RESIDENT_KB
    assert [result.get("error") for result in results[0]] == ["no memory is left for the KV cache", None, None]
