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
from tests.vllm.nursery import ROOT, Forked, Nursery
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHILD = "tests.vllm.turns_child"
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]


class Process:
    """One that runs models one after the other. `result()` waits for all of them; it stays until `end`.

    It is a fork of `nursery`, or without one a process that was started by a command line.
    """

    def __init__(self, nursery: Nursery | None, environment: dict[str, str], log: Path, **options: Any) -> None:
        self.log = log
        argument = json.dumps({"prompts": PROMPTS} | options)
        self.process: Forked | subprocess.Popen[str]
        with log.open("w") as file:
            if nursery is not None:
                self.process = nursery.start(CHILD, argument, environment=environment, stderr=file)
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", CHILD, argument],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True},
                **{"env": environment, "cwd": ROOT},
            )

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
        self.process.stdin = None
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]


@pytest.fixture
def start(
    nursery: Nursery, place: Place, fork_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Process]]:
    """Start such a process: `start(models=...)`."""
    started: list[Process] = []

    def one(**options: Any) -> Process:
        environment = fork_environment | to_environment(place.settings)
        started.append(Process(nursery, environment, tmp_path / f"log-{len(started)}", **options))
        return started[-1]

    yield one
    for process in started:
        assert isinstance(process.process, Forked)
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
    assert [str(path) in line for path, line in zip((tiny_llama, tied_llama), dropped, strict=True)] == [True, True]
    assert "needs" not in process.log.read_text()
    process.end()
