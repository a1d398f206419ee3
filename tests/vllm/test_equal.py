"""The promise, for every architecture that tests have: what attaches equals what loads, and nobody writes to it.

Each case is a row of benchmarks/matrix.py: a normal engine, one that publishes, one that attaches, and one that
attaches and packs its weights as a normal one does. All are asked (pictures, long prompts, adapters, several requests
at once) with the shared weights mapped read-only, and then everything that their models lead to is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import models
from tests.vllm.nursery import Nursery

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

QUICK = ("qwen3-vl", "qwen3-moe-limits", "dense", "reranker", "plugin-plain", "plugin-tree", "plugin-values")
"""These are tried by `make test`; each is a kind of its own."""

ALL = [name for name, case in models.CASES.items() if case.on_cpu or case.only_tiny]
NEED_TORCHVISION = ("qwen3-vl", "qwen3-vl-limits")


class Matrix:
    """A process that makes rows; a fork of the nursery, which forks for each engine."""

    def __init__(self, nursery: Nursery, environment: dict[str, str], directory: Path) -> None:
        options = ["--tiny", "--stdin", "--out", str(directory), "--models", str(directory / "models")]
        with (directory / "log").open("w") as log:
            self._process = nursery.start("benchmarks.matrix", *options, environment=environment, stderr=log)

    def row(self, case: str) -> dict[str, Any]:
        """What became of a case; a fork that hangs is ended by the process itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        row: dict[str, Any] = next(json.loads(line) for line in self._process.stdout if line.startswith("{"))
        return row

    def close(self) -> None:
        self._process.close()


@pytest.fixture(scope="module")
def matrix(
    nursery: Nursery, fork_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    made = Matrix(nursery, fork_environment, tmp_path_factory.mktemp("matrix"))
    yield made
    made.close()


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALL])
def test_equal(case: str, matrix: Matrix) -> None:
    """An attached engine leads to the same values and tensors, says the same, and writes to nothing shared."""
    if case in NEED_TORCHVISION and find_spec("torchvision") is None:
        pytest.skip("its processor needs torchvision")
    row = matrix.row(case)
    if row["verdict"] == "vLLM refuses" and case not in QUICK:
        pytest.skip(row["reason"])
    assert row["verdict"] == "equal", (row["reason"], row.get("answers", ""), row["differences"])
    assert models.CASES[case].kind != "multimodal" or "with image" in row["answers"]
