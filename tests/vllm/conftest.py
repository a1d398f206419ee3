"""Real engines on CPU: each in its own process group, ended with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoints
from tests.process.conftest import Place, place
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryStatus
from vllm_companion_plugin.settings import to_environment

__all__ = ["place"]

CHILD = Path(__file__).with_name("engine_child.py")
START_TIMEOUT_S = 240
MANY_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine core and its worker in processes of their own, as vLLM has it by default on CPU."""
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--skip-tokenizer-init")
"""Of every engine here that is started by a command line; the others have them from engine_child.py."""


class Engine:
    """A running engine. `result()` waits for it to be up and returns what it reported."""

    def __init__(self, options: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._result: dict[str, Any] | None = None
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def tokens_now(self) -> list[list[int]]:
        """What it answers to its prompts at this moment."""
        self.result()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._result = None
        tokens: list[list[int]] = self.result()["tokens"]
        return tokens

    def result(self) -> dict[str, Any]:
        if self._result is None:
            timer = threading.Timer(START_TIMEOUT_S, self.kill)
            timer.start()
            assert self.process.stdout is not None
            with self.log.open("a") as file:
                for line in self.process.stdout:
                    file.write(line)
                    if line.startswith("RESULT "):
                        self._result = json.loads(line.removeprefix("RESULT "))
                        break
            timer.cancel()
        assert self._result is not None, f"the engine did not start:\n{self.output()[-5000:]}"
        return self._result

    def output(self) -> str:
        return self.log.read_text()

    def wait_failure(self) -> int:
        """Exit code of an engine that is expected to fail."""
        assert self.process.stdout is not None
        rest = self.process.communicate(timeout=START_TIMEOUT_S)[0]
        with self.log.open("a") as file:
            file.write(rest)
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL the engine and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it as a user would; kill what is left."""
        if self.process.poll() is None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


StartEngine = Callable[..., Engine]


def entries(place: Place) -> tuple[EntryStatus, ...]:
    """What the companion of `place` holds."""
    with connect("cpu", place.settings, spawn=False) as connection:
        return connection.status().entries


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """Engines in one process, which start in half the time; tests about processes say `MANY_PROCESSES`."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def start_engine(tmp_path: Path, place: Place, engine_environment: dict[str, str]) -> Iterator[Callable[..., Engine]]:
    """Start an engine: `start_engine(model=..., load_format=..., ...)`."""
    engines: list[Engine] = []

    def start(*, environment: dict[str, str] | None = None, **options: Any) -> Engine:
        options["model"] = str(options["model"])
        full = engine_environment | to_environment(place.settings) | (environment or {})
        engines.append(Engine(options, full, tmp_path / f"engine-{len(engines)}.log"))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with untied embeddings, made in a child so that this process stays small."""
    return _make(
        tmp_path_factory,
        "llama",
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "config = C(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,"
        " num_key_value_heads=2, vocab_size=512, max_position_embeddings=256)\n",
    )


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter for `tiny_llama`, strong enough to change every answer."""
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    config = json.loads((tiny_llama / "config.json").read_text())
    checkpoints.save_adapter(path, config)
    return path


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose output layer is its embedding."""
    return _make(
        tmp_path_factory,
        "tied",
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "config = C(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,"
        " num_key_value_heads=4, vocab_size=512, max_position_embeddings=256, tie_word_embeddings=True)\n",
    )


def _make(factory: pytest.TempPathFactory, name: str, code: str) -> Path:
    path = factory.mktemp("models") / name
    script = f"import torch\ntorch.manual_seed(1)\n{code}M(config).to(torch.float32).save_pretrained({str(path)!r})\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from the package that carries it."""
    return checkpoints.minilm()
