"""`vllm-companion verify` on real engines: models of many kinds are equal, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.support.checkpoints import models
from tests.vllm.conftest import FLAGS
from tests.vllm.nursery import Nursery

pytestmark = [pytest.mark.vllm, pytest.mark.core, pytest.mark.timeout(600)]

# vLLM's words, with or without us: 0.27 (mixtures of experts) and all before 0.32 (convolutions) have no
# float32 kernels on CPUs that know bfloat16, whose rounding would blur the answers.
NO_FLOAT32 = ("AMX grouped-gemm kernel cannot be used", "not implemented for 'Float'")
OLDER = Version(version("vllm")) < Version("0.32")
# 0.31 with the transformers that it asks for, when it loads normally.
NO_PROCESSOR = "Failed to load the processor."
# Before 0.32, of the picture that the tiny Idefics3 is asked about.
NO_PICTURE = "text only: RuntimeError: cannot reshape tensor of 0 elements"


Verify = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def verify(
    nursery: Nursery, engine_environment: dict[str, str], fork_environment: dict[str, str], tmp_path: Path
) -> Iterator[Verify]:
    """Run the command; its status, its verdict, and what it said.

    Its engines are forks of a process that has imported vLLM, unless `by_command`.
    """
    temporary = Path(tempfile.mkdtemp(prefix="vc", dir="/tmp"))  # with a short name: sockets go there

    def run(model: Path, *flags: str, by_command: bool = False) -> tuple[int, dict[str, Any], str]:
        line = ["verify", str(model), "--json", *FLAGS, *flags]
        environment = (engine_environment if by_command else fork_environment) | {"TMPDIR": str(temporary)}
        if by_command:
            command = [sys.executable, "-m", "vllm_companion_plugin.cli.main", *line]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
            code, out, said = done.returncode, done.stdout, done.stderr
        else:
            log = tmp_path / "said"
            with log.open("w") as file:
                fork = nursery.start("tests.vllm.verify_child", *line, environment=environment, stderr=file)
            out, _ = fork.communicate(580)
            fork.close()
            code, said = fork.wait(0), log.read_text()
        return judged(code, out, said, temporary)

    yield run
    shutil.rmtree(temporary, ignore_errors=True)


def judged(code: int, out: str, said: str, temporary: Path) -> tuple[int, dict[str, Any], str]:
    if "the engine that loads normally ended" in said and any(words in said for words in NO_FLOAT32):
        pytest.skip("this vLLM cannot run the model in float32 on this CPU")
    if OLDER and "the engine that loads normally ended" in said and NO_PROCESSOR in said:
        pytest.skip("this vLLM cannot load the processor of the model")
    assert out, said[-3000:]
    assert not list(temporary.glob("vcv-*"))
    return code, json.loads(out), said


@pytest.mark.parametrize(
    ("case", "flags", "ranks"),
    [
        pytest.param("gemma3", (), ["single"], marks=pytest.mark.slow),
        ("hybrid", (), ["single"]),
        ("idefics3", ("--no-skip-tokenizer-init",), ["single"]),
        pytest.param("qwen3-moe", ("--tensor-parallel-size", "2"), ["tp0/2", "tp1/2"], marks=pytest.mark.slow),
    ],
)
def test_a_model_is_equal_through_the_companion(
    case: str,
    flags: tuple[str, ...],
    ranks: list[str],
    tmp_path: Path,
    verify: Verify,
) -> None:
    """The first by the command that users type."""
    models.make(case, tmp_path / case, tiny=True)
    code, verdict, said = verify(tmp_path / case, *flags, by_command=case == "gemma3")
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
def test_a_compiled_model_is_equal_through_the_companion(tiny_llama: Path, verify: Verify) -> None:
    """As vLLM starts by default; test_equal.py has one whose graph is traced and not compiled to machine code."""
    code, verdict, said = verify(tiny_llama, "--no-enforce-eager", by_command=True)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]


@pytest.mark.slow  # test_equal asks this of real engines, too
def test_limits_of_the_publisher_are_its_own(tmp_path: Path, verify: Verify) -> None:
    """Engines with other limits attach to what it published; a prompt is read in pieces."""
    models.make("qwen3-moe", tmp_path / "moe", tiny=True)
    limits = ("--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    flags = ("--publisher", "--max-num-batched-tokens 128 --max-num-seqs 16", *limits)
    code, verdict, said = verify(tmp_path / "moe", *flags)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]
    assert verdict["ranks"][0]["attached"] == "attached"


def test_a_real_embedding_model_is_equal_through_the_companion(minilm: Path, verify: Verify) -> None:
    flags = ("--runner", "pooling", "--no-skip-tokenizer-init")
    code, verdict, said = verify(minilm, *flags)
    assert (code, verdict["verdict"]) == (0, "equal"), said[-3000:]
    (rank,) = verdict["ranks"]
    assert (rank["loaded"], rank["attached"]) == ("published", "attached")
    assert rank["tensors"] > 70
    assert verdict["answers"].startswith(("equal", "values within"))
