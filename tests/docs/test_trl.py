"""The examples for TRL, with TRL itself: in an environment of its own, on top of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import SMALL_CPU_ENGINE, Server
from benchmarks.trl_grpo import steps_of
from tests.support.place import Place, until
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.status import EntryStatus
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TRL = "trl==1.16.0"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--load-format", "companion"]
LOGPROBS = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
MAKE_MODEL = (
    "import pathlib, sys; from benchmarks.trl_grpo import make; make(pathlib.Path(sys.argv[1]), 64, 3, 'float32')"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has TRL, and all that this one has."""
    made = tmp_path_factory.mktemp("trl") / "venv"
    subprocess.run([sys.executable, "-m", "venv", made], check=True, timeout=120)
    interpreter = str(made / "bin" / "python")
    (packages,) = made.glob("lib/python*/site-packages")
    # Like what is installed there, which for this project means code that runs at the start.
    (packages / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [interpreter, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", TRL]
    subprocess.run(pip, check=True, timeout=600)
    return interpreter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    subprocess.run([sys.executable, "-c", MAKE_MODEL, path], cwd=ROOT, check=True, timeout=120)
    return path


@pytest.fixture
def environment(place: Place) -> dict[str, str]:
    return {**os.environ, **SMALL_CPU_ENGINE, **to_environment(place.settings), "VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture
def serve(environment: dict[str, str], model: str, tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def start(*flags: str) -> str:
        servers.append(Server(Path(model), [*FLAGS, *LOGPROBS, *flags], ("", {}), environment, tmp_path / "log"))
        until(servers[0].is_up, 240, "the server is up", every_s=0.2)
        return servers[0].url

    yield start
    for server in servers:
        server.stop()


def run(python: str, example: str, environment: dict[str, str], where: Path, *arguments: str) -> list[dict[str, float]]:
    """What TRL logged of each step."""
    command = [python, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    print(done.stdout)
    lines = steps_of(done.stdout)
    assert [line["step"] for line in lines] == list(range(1, 11))
    return lines


def check(lines: list[dict[str, float]]) -> None:
    """The engine sampled from the weights that the trainer had: with others, the first step alone would be equal."""
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4


def entries(place: Place, kind: str) -> list[EntryStatus]:
    with connect("cpu", place.settings, spawn=False) as connection:
        return [entry for entry in connection.status().entries if entry.key.kind == kind]


def test_all_weights(
    python: str, serve: Any, environment: dict[str, str], model: str, tmp_path: Path, place: Place
) -> None:
    check(run(python, "trl_grpo.py", environment, tmp_path, model, serve()))
    [entry] = entries(place, WEIGHTS)
    assert entry.version == "step-10"


def test_adapter_and_server(
    python: str, serve: Any, environment: dict[str, str], model: str, tmp_path: Path, place: Place
) -> None:
    check(run(python, "trl_lora_grpo.py", environment, tmp_path, model, serve("--enable-lora")))
    [entry] = entries(place, WEIGHTS)
    assert (entry.generation, len(entry.leases)) == (1, 1)


def test_adapter_in_one_process(
    python: str, environment: dict[str, str], model: str, tmp_path: Path, place: Place
) -> None:
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    environment["ENGINE_ARGS"] = json.dumps(engine)
    check(run(python, "trl_lora_grpo.py", environment, tmp_path, model))
    [entry] = entries(place, WEIGHTS)
    assert entry.generation == 1
