"""A runtime directory with the processes that a test starts in it, and what tests give to a companion."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.settings import Settings, resolve, to_environment
from vllm_companion_plugin.wire import messages, schema
from vllm_companion_plugin.wire.forking import grpc

KEY = EntryKey("ab" * 32, "test/model", fields={"dtype": "bfloat16"})
SEALS = 0x1 | 0x2 | 0x4 | 0x8


_LISTENING = 0x10000
"""A flag in /proc/net/unix."""
PATIENCE_S = 60.0
"""Tests wait as long for what comes soon: a machine that is slow and has other things to do is no fault of ours."""


def until(condition: Callable[[], object], within_s: float, what: str, every_s: float = 0.005) -> float:
    """Seconds until `condition` held. Fails the test after `within_s`, and not before `PATIENCE_S`: a test of how long
    something takes looks at the seconds."""
    limit_s = max(within_s, PATIENCE_S)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def listens(path: str) -> bool:
    """Whether somebody listens on a Unix socket: its file is there a little before that."""
    flags = (line.split()[3] for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(f" {path}"))
    return any(int(each, 16) & _LISTENING for each in flags)


def memfd(content: bytes, *, seals: int = SEALS) -> int:
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def arena_of(*contents: bytes) -> tuple[ArenaInfo, Descriptors]:
    """An arena of a memfd for each of `contents`, which the caller owns."""
    return ArenaInfo("memfd", tuple(map(len, contents))), Descriptors(memfd(content) for content in contents)


class Place:
    """A runtime directory, and every process started in it."""

    def __init__(self, root: str) -> None:
        self.settings: Settings = resolve({"runtime_dir": f"{root}/r", "linger_s": 600, "spawn_timeout_s": 20})
        self.environment: dict[str, str] = {**os.environ, **to_environment(self.settings), "PYTHONFAULTHANDLER": "1"}
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def paths(self) -> DevicePaths:
        return device_paths("cpu", self.settings)

    def companion_pid(self) -> int:
        # Not through `paths`, which refuses the directories that some tests make.
        with contextlib.suppress(OSError, ValueError):
            return int(Path(self.settings.runtime_dir, "cpu", "companion.lock").read_text())
        return 0

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """A Python process with this place's settings, its output in pipes."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.processes.append(process)
        return process

    def companion(self, *options: str) -> subprocess.Popen[str]:
        """A companion as a child of the test, answering."""
        process = self.run("-m", "vllm_companion_plugin.holder", "--device", "cpu", *options)
        until(lambda: process.poll() is not None or listens(self.paths.fd_socket), 20, "the companion listens")
        assert process.poll() is None, process.communicate()[1]
        return process

    def client(self, name: str, *options: str) -> subprocess.Popen[str]:
        """A child that runs tests/process/client_child.py."""
        return self.run("-m", "tests.process.client_child", name, *options)

    def ended(self, process: subprocess.Popen[str], timeout_s: float) -> int:
        """The exit code of one that `run` started. If it goes on: what each of its threads does, and what all said."""
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            said = []
            # The companion too, which has the pipes of whoever started it.
            for number in (
                self.companion_pid() or process.pid,
                *(one.pid for one in self.processes if one.poll() is None),
            ):
                with contextlib.suppress(OSError):
                    os.kill(number, signal.SIGABRT)
            for one in self.processes:
                said.append(f"{one.args}: {one.wait(30)}\n{''.join(one.communicate(timeout=100))}")
            with contextlib.suppress(OSError):
                said.append(Path(self.settings.runtime_dir, "cpu", "companion.log").read_text())
            raise AssertionError(f"It has not ended within {timeout_s} s.\n" + "\n".join(said)) from None

    def clean(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        pid = self.companion_pid()
        left = pid and alive(pid) and b"vllm_companion_plugin" in Path(f"/proc/{pid}/cmdline").read_bytes()
        if left:
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:  # whose children may have their pipes, if a test failed
            if process.stdin is not None and process.stdin.closed:
                process.stdin = None  # which from Python 3.12 on would be flushed
            process.communicate(timeout=100)
        until(lambda: not left or not alive(pid), 5, "the companion is gone")


@contextlib.contextmanager
def answering(place: Place, version: int) -> Iterator[None]:
    """While open, something listens on the companion's socket and speaks another version of the protocol."""

    class Other:
        def __getattr__(self, name: str) -> Any:
            return lambda request, context: messages.CompanionStatus(pid=5, version="9.9", protocol_version=version)

        def Attach(self, request: messages.AttachRequest, context: Any) -> Iterator[messages.AttachEvent]:
            told = f"The client speaks protocol {request.protocol_version}, the companion speaks protocol {version}."
            yield messages.AttachEvent(failed=messages.Failed(code="protocol_mismatch", message=told))

    with speaking(place, Other()):
        yield


@contextlib.contextmanager
def speaking(place: Place, servicer: Any) -> Iterator[None]:
    """While open, `servicer` answers on the companion's socket."""
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((schema.handlers(servicer),))
    server.add_insecure_port(f"unix:{place.paths.grpc_socket}")
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait(30)
