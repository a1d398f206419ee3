"""`vllm-companion verify` on real engines: models of many kinds are equal, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from benchmarks import models
from tests.vllm.conftest import FLAGS

pytestmark = [pytest.mark.vllm, pytest.mark.core, pytest.mark.timeout(600)]

# vLLM's words, with or without us: 0.27 (mixtures of experts) and all before 0.32 (convolutions) have no
# float32 kernels on CPUs that know bfloat16, whose rounding would blur the answers.
NO_FLOAT32 = ("AMX grouped-gemm kernel cannot be used", "not implemented for 'Float'")
OLDER = Version(version("vllm")) < Version("0.32")
# 0.31 with the transformers that it asks for, when it loads normally.
NO_PROCESSOR = "Failed to load the processor."
# Before 0.32, of the picture that the tiny Idefics3 is asked about.
NO_PICTURE = "text only: RuntimeError: cannot reshape tensor of 0 elements"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temp directory of our own, with a short name: sockets go there."""
    path = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path, ignore_errors=True)


def verify(model: Path, environment: dict[str, str], temporary: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_companion_plugin.cli.main", "verify", str(model), "--json", *FLAGS, *flags],
        env=environment | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    if "the engine that loads normally ended" in done.stderr and any(words in done.stderr for words in NO_FLOAT32):
        pytest.skip("this vLLM cannot run the model in float32 on this CPU")
    if OLDER and "the engine that loads normally ended" in done.stderr and NO_PROCESSOR in done.stderr:
        pytest.skip("this vLLM cannot load the processor of the model")
    assert done.stdout, done.stderr[-3000:]
    assert not list(temporary.glob("vcv-*"))
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("case", "flags", "ranks"),
    [
        ("gemma3", (), ["single"]),
        ("hybrid", (), ["single"]),
        ("idefics3", ("--no-skip-tokenizer-init",), ["single"]),
        ("qwen3-moe", ("--tensor-parallel-size", "2"), ["tp0/2", "tp1/2"]),
    ],
)
def test_a_model_is_equal_through_the_companion(
    case: str,
    flags: tuple[str, ...],
    ranks: list[str],
    tmp_path: Path,
    temporary: Path,
    engine_environment: dict[str, str],
) -> None:
    models.make(case, tmp_path / case, tiny=True)
    code, verdict, said = verify(tmp_path / case, engine_environment, temporary, *flags)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]
    assert [rank["rank"] for rank in verdict["ranks"]] == ranks
    for rank in verdict["ranks"]:
        assert (rank["loaded"], rank["attached"]) == ("published", "attached")
        assert rank["tensors"] > 10
    assert "equal" in verdict["answers"]
    if OLDER and NO_PICTURE in verdict["answers"]:
        pytest.skip("this vLLM cannot read so small a picture; tensors and answers to text are equal")
    assert ("with image" in verdict["answers"]) == (models.CASES[case].kind == "multimodal")


@pytest.mark.slow
def test_a_compiled_model_is_equal_through_the_companion(
    tiny_llama: Path, temporary: Path, engine_environment: dict[str, str]
) -> None:
    """As vLLM starts by default; test_equal.py has one whose graph is traced and not compiled to machine code."""
    code, verdict, said = verify(tiny_llama, engine_environment, temporary, "--no-enforce-eager")
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]


@pytest.mark.slow  # test_equal asks this of real engines, too
def test_limits_of_the_publisher_are_its_own(
    tmp_path: Path, temporary: Path, engine_environment: dict[str, str]
) -> None:
    """Engines with other limits attach to what it published; a prompt is read in pieces."""
    models.make("qwen3-moe", tmp_path / "moe", tiny=True)
    limits = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    flags = ("--publisher", "--max-num-batched-tokens 128 --max-num-seqs 16", *limits)
    code, verdict, said = verify(tmp_path / "moe", engine_environment, temporary, *flags)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]
    assert verdict["ranks"][0]["attached"] == "attached"


def test_a_real_embedding_model_is_equal_through_the_companion(
    minilm: Path, temporary: Path, engine_environment: dict[str, str]
) -> None:
    flags = ("--runner", "pooling", "--no-skip-tokenizer-init")
    code, verdict, said = verify(minilm, engine_environment, temporary, *flags)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]
    (rank,) = verdict["ranks"]
    assert (rank["loaded"], rank["attached"]) == ("published", "attached")
    assert rank["tensors"] > 70
    assert verdict["answers"].startswith(("equal", "values within"))
