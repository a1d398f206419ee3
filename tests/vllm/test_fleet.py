"""Two real servers take new weights together, over HTTP, while they answer requests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.place import Place, until
from tests.vllm.conftest import START_TIMEOUT_S, StartEngine, make_llama
from tests.vllm.nursery import ROOT, Forked, Nursery
from tests.vllm.test_update import trained
from vllm_companion_plugin import CompanionClient, FleetError
from vllm_companion_plugin.fleet.engines import HttpEngine
from vllm_companion_plugin.fleet.http import Http
from vllm_companion_plugin.settings import to_environment
from vllm_companion_plugin.trainers.trl import CompanionWeightTransfer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BLOCK = 32
"""The smallest block of a prefix cache that vLLM has on CPU."""
PROMPT = [1 + number % 97 for number in range(2 * BLOCK + 5)]
LENGTH = 1024
RUNNING = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
STARTED = 900
"""Tokens of a request that is in flight while engines switch."""


class Server:
    """A `vllm serve` in a process group of its own, which is killed at the end."""

    def __init__(self, process: Forked, model: str, port: int, log: Path) -> None:
        self.process, self.model, self.port, self.log = process, model, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.http = Http(self.url)

    def wait_healthy(self) -> None:
        def healthy() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                return self.http.ask("GET", "/health", 5)[0] == 200
            except OSError:
                return False

        until(healthy, START_TIMEOUT_S, f"{self.url} is healthy", every_s=0.2)

    def _request(self, prompt: list[int], count: int) -> dict[str, Any]:
        asked = {"model": self.model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        return asked | {"return_token_ids": True, "detokenize": False}

    def tokens(self, prompt: list[int] = PROMPT, count: int = 24) -> list[int]:
        status, answer = self.http.ask("POST", "/v1/completions", 120, self._request(prompt, count))
        assert status == 200, answer
        found: list[int] = answer["choices"][0]["token_ids"]  # type: ignore[call-overload]
        return found

    def stream(self, prompt: list[int], count: int) -> Iterator[list[int]]:
        """Its tokens, as they come."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            body = json.dumps(self._request(prompt, count) | {"stream": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"]

    def running(self) -> int:
        """How many requests are in flight."""
        text = str(self.http.ask("GET", "/metrics", 20)[1])
        return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(RUNNING))

    def version(self) -> str:
        found: str = self.http.ask("GET", "/weight_info", 20)[1]["weight_version"]  # type: ignore[call-overload]
        return found

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def serve(
    place: Place, nursery: Nursery, fork_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[[str], Server]]:
    """Start `vllm serve MODEL --load-format companion` with the routes that trainers use."""
    made: list[Server] = []
    environment = fork_environment | to_environment(place.settings)
    environment |= {"VLLM_SERVER_DEV_MODE": "1"}

    def start(model: str) -> Server:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [*("--max-model-len", str(LENGTH), "--block-size", str(BLOCK), "--load-format", "companion")]
        flags += ["--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"]
        log = tmp_path / f"server-{port}.log"
        with log.open("w") as file:
            process = nursery.start(
                *("tests.vllm.serve_child", model, *flags, "--host", "127.0.0.1", "--port", str(port)),
                environment=environment,
                stderr=file,
            )
        made.append(Server(process, model, port, log))
        return made[-1]

    yield start
    for server in made:
        server.process.close()


class Killed(HttpEngine):
    """A server that dies when it has prepared and is about to be paused."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.url)
        self._kill = server.kill

    def pause(self, timeout_s: float, *, clear_caches: bool) -> None:
        self._kill()
        super().pause(timeout_s, clear_caches=clear_caches)


@pytest.fixture
def long_llama(nursery: Nursery, tmp_path: Path) -> Path:
    """Of all positions that a request in flight takes. Beyond the last one vLLM reads whatever is there."""
    return make_llama(nursery, tmp_path / "llama", max_position_embeddings=LENGTH)


def test_servers_switch_together_with_requests_in_flight_and_back(
    place: Place, serve: Callable[[str], Server], start_engine: StartEngine, long_llama: Path, tmp_path: Path
) -> None:
    """Their answers are those of an engine that loads these weights by itself, also to a prompt that they know.

    If one is killed between the two phases, the other one has the new weights, and the report says so.
    """
    model, checkpoint = str(long_llama), trained(long_llama, tmp_path, 1)
    first, second = serve(model), serve(model)
    fresh = start_engine(model=checkpoint, load_format="auto", prompts=[PROMPT], skip_tokenizer_init=True)
    (one,) = fresh.result()["tokens"]
    for server in (first, second):
        server.wait_healthy()
    loaded = first.tokens()
    assert second.tokens() == loaded == first.tokens()
    assert loaded != one

    client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
    with client.update(model, version="step-1") as new:
        new.load(load_file(checkpoint / "model.safetensors"))
    assert second.tokens() == loaded
    started = first.stream(PROMPT[:4], STARTED)
    answer = next(started)
    report = client.advance(model, [first.url, second.url])
    assert first.running() == 1
    assert [(each.state, each.version) for each in report.engines] == [("new", "step-1")] * 2
    assert first.tokens() == second.tokens() == one
    assert first.version() == second.version() == "step-1"
    for more in started:
        answer += more
    assert len(answer) == STARTED
    assert second.tokens(PROMPT[:4] + answer[:-24]) == answer[-24:]

    back = place.run(
        *("-m", "vllm_companion_plugin.cli.main", "advance", long_llama.name, "--to", "1"),
        *("--engine", first.url, "--engine", second.url),
    )
    said, error = back.communicate(timeout=START_TIMEOUT_S)
    assert back.returncode == 0, error
    assert said.count("has the checkpoint (generation 1), after a pause of ") == 2
    assert first.tokens() == second.tokens() == loaded
    assert first.version() == second.version() == "default"

    with pytest.raises(FleetError) as caught:
        client.advance(model, [first.url, Killed(second)])
    report = caught.value.report
    assert [(each.state, each.version) for each in report.engines] == [("new", "step-1"), ("gone", None)]
    assert f"Restart {second.url}" in str(caught.value)
    assert first.tokens() == one
    assert first.version() == "step-1"

    example = place.run(str(ROOT / "docs" / "examples" / "advance.py"), model, model, "step-2", first.url)
    said, error = example.communicate(timeout=START_TIMEOUT_S)
    assert example.returncode == 0, error
    assert f"{first.url} has step-2 (generation 3), after a pause of " in said
    assert first.tokens() == loaded
    assert first.version() == "step-2"

    transfer = CompanionWeightTransfer(
        model, [first.url], version="policy-{}".format, device="cpu", runtime_dir=place.settings.runtime_dir
    )
    transfer.init_weight_transfer()
    transfer.pause()
    assert first.tokens() == loaded, "it serves until the weights are written"
    weights = load_file(checkpoint / "model.safetensors")
    transfer.send_weights((name, tensor.double()) for name, tensor in weights.items())
    transfer.resume()
    transfer.destroy()
    assert first.tokens() == one
    assert first.version() == "policy-1"
