"""Models that take turns on a GPU, with CUDA graphs: in one process, and where only one fits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import models
from tests.support.place import Place
from tests.vllm.test_turns import Process
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

FREE_GIB, WANTED_GIB = 8.0, 6.0
"""What is left of the GPU, and what an engine wants of it: not there while a model of 2 GiB is held that is not its."""
BALLAST = f"""
import sys, torch
free, total = torch.cuda.mem_get_info()
kept = torch.empty(free - int({FREE_GIB} * 2**30), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print(total, flush=True)
sys.stdin.read()
"""
GRAPHS = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]},
    "kv_cache_memory_bytes": 256 << 20,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of about 2 GiB."""
    paths = [tmp_path_factory.mktemp("models") / name for name in ("llama", "qwen3")]
    for path in paths:
        models.make(path.name, path)
    return [str(path) for path in paths]


@pytest.fixture
def total_gib() -> Iterator[float]:
    """Size of the GPU, of which only FREE_GIB are free meanwhile."""
    command = [sys.executable, "-c", BALLAST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ballast:
        assert ballast.stdout is not None
        yield int(ballast.stdout.readline()) / 2**30
        ballast.communicate(timeout=60)


def run(place: Place, log: Path, **options: Any) -> list[dict[str, Any]]:
    environment = os.environ | to_environment(place.settings) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = Process(None, environment, log, device=CompanionClient().device, **options)
    assert isinstance(process.process, subprocess.Popen)
    place.processes.append(process.process)
    results = process.result()
    process.end()
    return results


def test_models_in_one_process_and_where_only_one_fits(
    place: Place, tmp_path: Path, pair: list[str], total_gib: float
) -> None:
    """Their tokens are those of normal loads; each goes with its model, and makes room when it is in the way."""
    turns = [pair[0], pair[1], pair[0]]
    flags = GRAPHS | {"gpu_memory_utilization": WANTED_GIB / total_gib}
    normal = run(place, tmp_path / "auto", models=turns, flags=flags, load_format="auto")
    ours = run(place, tmp_path / "companion", models=turns, flags=flags)
    log = (tmp_path / "companion").read_text()
    assert [result["tokens"] for result in ours] == [result["tokens"] for result in normal]
    assert [(result["mapped"], result["left"]) for result in ours] == [(1, 0)] * 3
    dropped = [line for line in log.splitlines() if "Dropped" in line and "nobody used" in line]
    assert [path in line for path, line in zip(pair, dropped, strict=True)] == [True, True], log[-3000:]
    assert "Published weights" in log
