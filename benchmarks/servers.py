"""`vllm serve` as a child process, and requests to it."""

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
import urllib.request
from pathlib import Path
from typing import IO, Any

SMALL_CPU_ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Environment of engines that share a few cores."""

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A server of `model` on a loopback port, in a process group of its own.

    Args:
        flags: of `vllm serve`, besides model, name and port.
        question: path and body of the request that `ask` sends.
    """

    def __init__(
        self,
        model: Path,
        flags: list[str],
        question: tuple[str, dict[str, Any]],
        environment: dict[str, str],
        log: Path,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._path, self._body = question[0], question[1] | {"model": "model"}
        arguments = [str(model), "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *flags]
        with log.open("w") as file:
            self.process = self._start(arguments, environment, file)

    def _start(self, arguments: list[str], environment: dict[str, str], log: IO[str]) -> Any:
        """`vllm serve` with these arguments, as the leader of a session."""
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def is_up(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log.read_text()[-4000:]}")
        with contextlib.suppress(OSError), _http.open(f"{self.url}/health", timeout=5):
            return True
        return False

    def ask(self) -> Any:
        """The answer's content: an embedding, or text."""
        request = urllib.request.Request(
            self.url + self._path, json.dumps(self._body).encode(), {"Content-Type": "application/json"}
        )
        with _http.open(request, timeout=30) as response:
            answer = json.load(response)
        return answer["data"][0]["embedding"] if "data" in answer else answer["choices"][0]["text"]

    def stop(self) -> None:
        """SIGKILL it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Load:
    """Requests to each server, one after the other with these pauses, while the context is open.

    Attributes:
        done: requests answered as expected, a server; may be set to zero.
        failures: exceptions, and answers other than the first.
    """

    def __init__(self, servers: list[Server], pauses_s: tuple[float, ...]) -> None:
        self._expected = [server.ask() for server in servers]
        self.done = [0] * len(servers)
        self.failures: list[Exception | str] = []
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, server, pauses_s)) for number, server in enumerate(servers)
        ]

    def _run(self, number: int, server: Server, pauses_s: tuple[float, ...]) -> None:
        for pause_s in itertools.cycle(pauses_s):
            if self._ending.wait(pause_s * (1 + number / 3)):
                return
            try:
                if server.ask() == self._expected[number]:
                    self.done[number] += 1
                else:
                    self.failures.append(f"server {number} answered otherwise")
            except Exception as error:
                self.failures.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(40)
