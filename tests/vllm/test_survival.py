"""The companion is killed while real servers answer real requests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.conftest import Place, alive, until
from tests.vllm.conftest import MANY_PROCESSES, START_TIMEOUT_S, StartEngine
from vllm_companion_plugin.client import connect
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import to_environment
from vllm_companion_plugin.types import EntryState, EntryStatus

# Alone, because it measures seconds.
pytestmark = [pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(600)]

http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """`vllm serve`, in a process group of its own."""

    def __init__(self, model: Path, environment: dict[str, str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--load-format", "companion"]
        command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--served-model-name", "minilm"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def is_up(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(OSError), http.open(f"{self.url}/health", timeout=5):
            return True
        return False

    def ask(self) -> list[float]:
        body = json.dumps({"model": "minilm", "input": "Who holds the weights?"}).encode()
        request = urllib.request.Request(f"{self.url}/v1/embeddings", body, {"Content-Type": "application/json"})
        with http.open(request, timeout=30) as response:
            vector: list[float] = json.load(response)["data"][0]["embedding"]
        return vector

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def start_server(
    tmp_path: Path, place: Place, engine_environment: dict[str, str]
) -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(model: Path) -> Server:
        environment = engine_environment | MANY_PROCESSES | to_environment(place.settings)
        servers.append(Server(model, environment, tmp_path / f"server-{len(servers)}.log"))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def entry_now(place: Place) -> EntryStatus | None:
    """The only entry, if a companion answers and has it ready."""
    with contextlib.suppress(CompanionError), connect("cpu", place.settings, spawn=False) as connection:
        (entry,) = connection.status().entries or (None,)
        return entry if entry is not None and entry.state is EntryState.READY else None
    return None


def leases_now(place: Place) -> int:
    entry = entry_now(place)
    return len(entry.leases) if entry is not None else 0


def test_no_request_fails_and_nothing_is_loaded_again_when_the_companion_is_killed(
    start_server: Callable[[Path], Server], start_engine: StartEngine, place: Place, minilm: Path
) -> None:
    servers = [start_server(minilm) for _ in range(2)]
    until(lambda: all(server.is_up() for server in servers), START_TIMEOUT_S, "both servers are up")
    expected = [server.ask() for server in servers]
    before = entry_now(place)
    assert before is not None
    done, failures, ending, times_s = [0, 0], [], threading.Event(), []

    def load(number: int) -> None:
        # Pauses, because a worker of vLLM polls for a second after each request: two would keep both cores of a
        # small machine, and it would be the scheduler whose time is measured below.
        for pause_s in itertools.cycle((0.05, 0.05, 0.05, 1.5 + number)):
            if ending.wait(pause_s):
                return
            try:
                assert servers[number].ask() == expected[number]
                done[number] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            until(lambda: min(done) > 3, 60, "requests are answered")
            pid = place.companion_pid()
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            until(lambda pid=pid: not alive(pid), 5, "the companion is dead")
            until(lambda: leases_now(place) == 2, 20, "both are attached again", every_s=0.05)
            times_s.append(time.monotonic() - killed)
            done[:] = [0, 0]
        until(lambda: min(done) > 3, 60, "requests are answered")
    finally:
        ending.set()
        for thread in threads:
            thread.join(40)
    assert failures == []
    assert sorted(times_s)[1] < 2, times_s
    after = entry_now(place)
    assert after is not None
    assert (after.generation, after.load_s, len(after.leases)) == (before.generation, before.load_s, 2)
    third = start_engine(model=minilm, load_format="companion", runner="pooling", texts=["Nobody who can crash."])
    third.result()
    assert "Attached to" in third.output()
    assert "Published" not in third.output()
