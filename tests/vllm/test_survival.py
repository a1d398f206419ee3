"""The companion is killed while real servers answer real requests."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Load, Server
from tests.support.place import Place, alive, until
from tests.vllm.conftest import MANY_PROCESSES, START_TIMEOUT_S, StartEngine
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState, EntryStatus
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import to_environment

# Alone, because it measures seconds.
pytestmark = [pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(600)]

FLAGS = ("--load-format", "companion", "--runner", "pooling", "--dtype", "float32", "--enforce-eager")
QUESTION = ("/v1/embeddings", {"input": "Who holds the weights?"})
# Pauses, because a worker of vLLM polls for a second after each request: two would keep both cores of a
# small machine, and it would be the scheduler whose time is measured.
PAUSES_S = (0.05, 0.05, 0.05, 1.5)


@pytest.fixture
def start_server(
    tmp_path: Path, place: Place, engine_environment: dict[str, str]
) -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(model: Path) -> Server:
        environment = engine_environment | MANY_PROCESSES | to_environment(place.settings)
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Server(model, list(FLAGS), QUESTION, environment, log))
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
    start_server: Callable[[Path], Server], start_engine: StartEngine, place: Place, minilm: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    usual = Place(str(tmp_path))
    try:
        usual.companion()
        start_s = time.monotonic() - began  # as the next companion needs, beside two servers
    finally:
        usual.clean()
    servers = [start_server(minilm) for _ in range(2)]
    until(lambda: all(server.is_up() for server in servers), START_TIMEOUT_S, "both servers are up")
    before = entry_now(place)
    assert before is not None
    times_s = []
    with Load(servers, PAUSES_S) as load:
        for _ in range(4):
            until(lambda: min(load.done) > 3, 60, "requests are answered")
            pid = place.companion_pid()
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            until(lambda pid=pid: not alive(pid), 5, "the companion is dead")
            until(lambda: leases_now(place) == 2, 20, "both are attached again", every_s=0.05)
            times_s.append(time.monotonic() - killed)
            load.done[:] = [0, 0]
        until(lambda: min(load.done) > 3, 60, "requests are answered")
    assert load.failures == []
    assert sorted(times_s)[1] < 1.5 + 2 * start_s, (times_s, start_s)
    after = entry_now(place)
    assert after is not None
    assert (after.generation, after.load_s, len(after.leases)) == (before.generation, before.load_s, 2)
    third = start_engine(model=minilm, load_format="companion", runner="pooling", texts=["Nobody who can crash."])
    third.result()
    assert "Attached to" in third.output()
    assert "Published" not in third.output()
