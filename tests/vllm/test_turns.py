"""Models that take turns: in one process, and on a device where only one fits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.process.conftest import Place, until
from tests.vllm.conftest import START_TIMEOUT_S, entries
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHILD = str(Path(__file__).with_name("turns_child.py"))
FREEZE_CHILD = str(Path(__file__).with_name("freeze_child.py"))
RESIDENT_KB = 16_000
"""What two runs of the same engines differ by."""
PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]


class Process:
    """One that runs models one after the other. `result()` waits for all of them; it stays until `end`."""

    def __init__(self, place: Place, environment: dict[str, str], log: Path, **options: Any) -> None:
        self.log = log
        options = {"prompts": PROMPTS} | options
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, CHILD, json.dumps(options)],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True},
                env=environment | to_environment(place.settings),
            )
        place.processes.append(self.process)

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


def test_models_one_after_the_other_in_a_process_are_given_back(
    place: Place, engine_environment: dict[str, str], tmp_path: Path, tiny_llama: Path, tied_llama: Path
) -> None:
    """Published or attached: with the model its mapping goes, and nobody uses its entry any more."""
    tokens = []
    for what in ("Published", "Attached"):
        process = Process(
            *(place, engine_environment, tmp_path / what), models=[str(tiny_llama), str(tied_llama), str(tiny_llama)]
        )
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
    place: Place, engine_environment: dict[str, str], tmp_path: Path, tiny_llama: Path, tied_llama: Path
) -> None:
    """Long before its linger time is over, what nobody uses makes room for who is elected to load."""
    first, second = (sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (tiny_llama, tied_llama))
    process = Process(
        *(place, engine_environment, tmp_path / "log"),
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
                [sys.executable, FREEZE_CHILD, str(tiny_llama), "companion"],
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
