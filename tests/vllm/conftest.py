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

from tests.support.checkpoints import formats
from tests.support.place import Place
from tests.vllm.nursery import ROOT, Forked, Nursery
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryStatus
from vllm_companion_plugin.settings import to_environment

CHILD = "tests.vllm.engine_child"
START_TIMEOUT_S = 240
MANY_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine core and its worker in processes of their own, as vLLM has it by default on CPU."""
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--skip-tokenizer-init")
"""Of every engine here that is started by a command line; the others have them from engine_child.py."""


class Engine:
    """A running engine. `result()` waits for it to be up and returns what it reported.

    It is a fork of `nursery`, or without one a process that was started by a command line.
    """

    def __init__(
        self, options: dict[str, Any], environment: dict[str, str], log: Path, nursery: Nursery | None
    ) -> None:
        self.log = log
        self._result: dict[str, Any] | None = None
        self.process: Forked | subprocess.Popen[str]
        with log.open("w") as file:
            if nursery is not None:
                self.process = nursery.start(CHILD, json.dumps(options), environment=environment, stderr=file)
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", CHILD, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def tokens_now(self) -> list[list[int]]:
        """What it answers to its prompts at this moment."""
        tokens: list[list[int]] = self._ask("")["tokens"]
        return tokens

    def update(self, generations: dict[str, int] | None = None) -> dict[str, Any]:
        """Have it advance to the current generations, or to these; what it says, and answers from then on."""
        return self._ask(json.dumps(generations or {}))

    def advance(self, generations: dict[str, int] | None = None) -> dict[str, Any]:
        """The same, as a fleet of one engine in the process of who asks."""
        return self._ask(json.dumps({"fleet": generations or {}}))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the engine. Raises `RuntimeError` with what it raises."""
        answer = self._ask(json.dumps({"call": name, "args": args, "kwargs": kwargs}))
        if "raised" in answer:
            raise RuntimeError(answer["raised"])
        return answer["returned"]

    def _ask(self, line: str) -> dict[str, Any]:
        self.result()
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._result = None
        return self.result()

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

    def tell_to_end(self) -> None:
        """End it as a user would."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def stop(self) -> None:
        """End it as a user would, wait for that, and kill what is left."""
        self.tell_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.kill()
        self.process.wait(60)
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


@pytest.fixture(scope="session")
def fork_environment(engine_environment: dict[str, str]) -> dict[str, str]:
    """Engines that are forked compile nothing: vLLM's sampler does otherwise, 3 s each; engines that start do."""
    return engine_environment | {"TORCH_COMPILE_DISABLE": "1"}


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory, fork_environment: dict[str, str]) -> Iterator[Nursery]:
    """Of this worker, for all its tests."""
    made = Nursery(fork_environment, tmp_path_factory.mktemp("nursery") / "log")
    yield made
    made.close()


@pytest.fixture
def start_engine(
    tmp_path: Path,
    place: Place,
    engine_environment: dict[str, str],
    fork_environment: dict[str, str],
    nursery: Nursery,
) -> Iterator[Callable[..., Engine]]:
    """Start an engine: `start_engine(model=..., load_format=..., ...)`.

    An engine with an `environment` of its own is started by a command line, others are forks of the nursery. So are
    those with `many_processes`; their engine core is a process that is started.
    """
    engines: list[Engine] = []

    def start(*, environment: dict[str, str] | None = None, many_processes: bool = False, **options: Any) -> Engine:
        options["model"] = str(options["model"])
        full = engine_environment if environment is not None else fork_environment
        full = full | to_environment(place.settings) | (environment or {}) | (MANY_PROCESSES if many_processes else {})
        log = tmp_path / f"engine-{len(engines)}.log"
        engines.append(Engine(options, full, log, None if environment is not None else nursery))
        return engines[-1]

    yield start
    for engine in engines:
        engine.tell_to_end()
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A random Llama with untied embeddings."""
    return make_llama(
        nursery, tmp_path_factory.mktemp("models") / "llama", intermediate_size=256, num_key_value_heads=2
    )


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter for `tiny_llama`, strong enough to change every answer."""
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    config = json.loads((tiny_llama / "config.json").read_text())
    formats.save_adapter(path, config)
    return path


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A random Llama whose output layer is its embedding."""
    options = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    return make_llama(nursery, tmp_path_factory.mktemp("models") / "tied", **options)


def make_llama(nursery: Nursery, path: Path, **options: Any) -> Path:
    """Save a random Llama: in a fork, so that this process stays small."""
    log = path.with_suffix(".log")
    with log.open("w") as file:
        fork = nursery.start(
            "tests.vllm.llama_child", str(path), json.dumps(options), environment=os.environ, stderr=file
        )
    said, _ = fork.communicate(START_TIMEOUT_S)
    fork.close()
    assert fork.returncode == 0, said + log.read_text()
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from the package that carries it."""
    return formats.minilm()
