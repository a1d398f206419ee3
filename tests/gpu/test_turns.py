"""Models that take turns on a GPU, with CUDA graphs: in one process, and where only one fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.starting import starter
from tests.support.checkpoints import models
from tests.support.place import Place

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


def test_models_in_one_process_and_where_only_one_fits(
    place: Place, tmp_path: Path, pair: list[str], total_gib: float
) -> None:
    """Their tokens are those of normal loads; each goes with its model, and makes room when it is in the way."""
    start = starter(place, tmp_path)
    options = {"models": [pair[0], pair[1], pair[0]]}
    options["flags"] = GRAPHS | {"gpu_memory_utilization": WANTED_GIB / total_gib}  # type: ignore[assignment]
    normal = start(**options, load_format="auto")
    expected = normal.result()
    normal.end()
    ours = start(**options)
    found = ours.result()
    ours.end()
    log = ours.log.read_text()
    assert [result["tokens"] for result in found] == [result["tokens"] for result in expected]
    assert [(result["mapped"], result["left"]) for result in found] == [(1, 0)] * 3
    dropped = [line for line in log.splitlines() if "Dropped" in line and "nobody used" in line]
    names = [Path(path).name for path in pair]
    assert [f"Dropped {name} " in line for name, line in zip(names, dropped, strict=True)] == [True, True], log[-3000:]
    assert "Published weights" in log
