"""Command blocks that start engines, run with the settings that the guide gives for a CPU: `make test-docs`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.docs.blocks import ROOT, Block, of_kind
from tests.support.place import Place, until
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import CompanionUnavailableError

START_TIMEOUT_S = 400
SERVES = re.compile(r"\b(vllm|vllm-companion) serve\b")
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Terminals:
    """A user's terminals: what stays in the foreground gets one of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place
        (block,) = of_kind("cpu settings")
        self._settings = block.text
        # What a developer has set for engines is not what a reader has.
        kept = {name: value for name, value in place.environment.items() if not name.startswith("VLLM_")}
        self._environment = kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}
        self._started: list[tuple[subprocess.Popen[str], IO[str]]] = []

    def run(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-euc", self._settings + command],
            **{"env": self._environment, "capture_output": True, "text": True, "cwd": ROOT},
            timeout=3 * START_TIMEOUT_S,  # `verify` starts three engines
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    def start(self, command: str) -> None:
        """Start what serves, on a free port in the place of the one that is named, and wait until it does."""
        port = free_port()
        if "vllm-companion" not in command:
            command = re.sub(r" --port \d+", "", command) + f" --port {port}"
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            ["bash", "-euc", self._settings + command],
            **{"env": self._environment, "stdout": log, "stderr": log, "text": True, "cwd": ROOT},
            start_new_session=True,
        )
        self._started.append((process, log))

        def serves() -> bool:
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"{command} ended with status {process.returncode}:\n{log.read()[-3000:]}")
            if "vllm-companion" in command:
                return self.held() > 0
            with contextlib.suppress(OSError), _http.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
            return False

        until(serves, START_TIMEOUT_S, f"{command} serves", every_s=0.3)

    def held(self) -> int:
        """How many models the companion has ready."""
        with (
            contextlib.suppress(CompanionUnavailableError),
            connect("cpu", self._place.settings, spawn=False) as connection,
        ):
            return sum(entry.state is EntryState.READY for entry in connection.status().entries)
        return 0

    def users(self) -> int:
        """How many clients are attached."""
        with connect("cpu", self._place.settings, spawn=False) as connection:
            return sum(len(entry.leases) for entry in connection.status().entries)

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process, _ in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)


@pytest.fixture
def terminals(place: Place) -> Iterator[Terminals]:
    made = Terminals(place)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", of_kind("engines"), ids=lambda block: block.id)
def test_block(block: Block, terminals: Terminals) -> None:
    """Every command succeeds or serves, and engines that ask for a companion share one copy."""
    for line in block.lines:
        (terminals.start if SERVES.search(line) else terminals.run)(line)
    sharing = [line for line in block.lines if "--load-format companion" in line]
    if sharing:
        assert (terminals.held(), terminals.users()) == (1, len(sharing))
    elif "vllm serve" in block.text:
        assert terminals.held() == 0
