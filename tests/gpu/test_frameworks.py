"""What TRL and verl do to an engine that they train, by vLLM's own interfaces: with a companion as with `auto`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)
CHANGING = ("trl", "trl again", "verl", "private, level 1")
"""Steps after which an engine has other weights on purpose."""


@pytest.mark.parametrize(
    ("place", "steps"),
    [
        pytest.param(["--tiny"], 13, marks=pytest.mark.slow, id="CPU"),
        pytest.param([], 14, marks=pytest.mark.gpu, id="GPU"),
    ],
)
def test_a_training_frameworks_sequence_leaves_what_it_leaves_with_auto(
    place: list[str], steps: int, tmp_path: Path
) -> None:
    """Sleep at each level, by tags and in flight; reloading; TRL's step twice, verl's once; the checkpoint again."""
    command = [sys.executable, "-m", "benchmarks.sleeping", "--only", "llama", "--out", str(tmp_path), *place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = tmp_path.glob("sleeping-*.json")
    (row,) = json.loads(report.read_text())["rows"]
    ours, theirs = row["companion"]["steps"], row["auto"]["tokens"]
    assert len(ours) == steps, done.stdout
    trains = {"trl", "verl"} <= theirs.keys()
    assert trains or "--tiny" in place, "on a CPU vLLM packs weights of its own, and cannot load into them again"
    for name, step in ours.items():
        if name in CHANGING:
            assert step["tokens"] == "other", (name, step)
        else:
            assert (step["tokens"], step["tensors"]) == ("equal", "equal"), (name, step)
        if name in theirs and (name not in CHANGING or trains):
            assert row["companion"]["tokens"][name] == theirs[name], name
