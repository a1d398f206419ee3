"""A nursery: one process that imports vLLM once, and forks for each engine that a test starts.

Importing vLLM takes most of the time in which a small engine starts. A fork has the standard streams, the environment
and the process group of a process that was started by a command line, and ends like one, but for the teardown of
modules. The nursery gives it these things: the seed of Python's hashes, the addresses of libraries, and whatever
libraries read from the environment while they are imported. Tests about a start, and engines with an environment of
their own, start processes instead.

The nursery starts no thread, so that its forks can start theirs. It ends with the test process, and its forks with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 100
MAX_REQUEST_BYTES = 1 << 18
PR_SET_PDEATHSIG = 1


class Forked:
    """A fork, with the part of `subprocess.Popen` that tests use.

    It owns the pipes of the fork's standard input and output. `returncode` is None as long as nobody has asked for the
    end of the process, by `poll`, `wait` or `communicate`.
    """

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str], status: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float) -> int:
        """The exit status, negative for a signal. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            told = self._status.read()
            self._status.close()
            self.returncode = int(told) if told else -signal.SIGKILL  # its nursery died, and took it along
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def communicate(self, timeout: float) -> tuple[str, None]:
        """The rest of the fork's output, once it has ended. Raises `subprocess.TimeoutExpired` after killing it."""
        assert self.stdin is not None
        assert self.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.kill()))
        timer.start()
        try:
            rest = self.stdout.read()
        finally:
            timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
        self.wait(timeout)
        return rest, None

    def kill(self) -> None:
        """SIGKILL the fork and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left, and close the pipes."""
        self.kill()
        self.wait(60)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


class Nursery:
    """A nursery as a child of this process. Its first fork waits until vLLM is imported."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel, self._log = ours, log
        ours.settimeout(READY_TIMEOUT_S)
        with theirs, log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.vllm.nursery", str(theirs.fileno())],
                # A pipe, as standard output of a fork will be: Python does other things with files.
                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": file},
                env=dict(environment),
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )

    def start(self, module: str, *arguments: str, environment: Mapping[str, str], stderr: IO[Any]) -> Forked:
        """Run `main()` of `module` in a fork, with these arguments in `sys.argv`.

        Its environment is `environment` alone.
        """
        request = json.dumps({"module": module, "arguments": arguments, "environment": dict(environment)}).encode()
        assert len(request) <= MAX_REQUEST_BYTES
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        ours_status, theirs_status = os.pipe()
        given = [theirs_in, theirs_out, stderr.fileno(), theirs_status]
        try:
            socket.send_fds(self._channel, [request], given)
            answer = self._channel.recv(100)
        except OSError as error:
            raise AssertionError(f"the nursery: {error}\n{self._log.read_text()[-5000:]}") from error
        finally:
            for fd in (theirs_in, theirs_out, theirs_status):
                os.close(fd)
        assert answer, f"the nursery ended:\n{self._log.read_text()[-5000:]}"
        self._channel.settimeout(ANSWER_TIMEOUT_S)
        return Forked(int(answer), os.fdopen(ours_in, "w"), os.fdopen(ours_out), os.fdopen(ours_status, "rb"))

    def close(self) -> None:
        """End the nursery with all its forks."""
        self._channel.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.communicate()


# ---- in the nursery


def main() -> None:
    """Fork for each request, and end with the channel. In a fork, run what was asked for."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    importlib.import_module("vllm.v1.worker.cpu_worker")
    importlib.import_module("vllm_companion_plugin.engine.run.verify")
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # vLLM collects several times in each engine
    request = serve(channel)
    if request is not None:
        sys.argv = [request["module"], *request["arguments"]]
        run_and_end(lambda: importlib.import_module(request["module"]).main())


def run_and_end(work: Callable[[], int | None]) -> NoReturn:
    """End this process with the status of `work`, as Python does it.

    Only the teardown of modules is left out, which takes longer than any other part of an engine's end.
    """
    status: object = 1
    try:
        status = work() or 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """The request, in a fork for it; None in the nursery, once its channel has closed."""
    running: dict[int, tuple[int, int]] = {}  # by pidfd: pid, where its end is told
    while True:
        readable = select.select([channel, *running], [], [])[0]
        for pidfd in set(readable) & set(running):
            pid, told = running.pop(pidfd)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                os.write(told, str(status).encode())
            os.close(told)
            os.close(pidfd)
        if channel not in readable:
            continue
        packet, fds, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, 4)
        if not packet:
            for pid, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        request: dict[str, Any] = json.loads(packet)
        nursery = os.getpid()
        pid = os.fork()
        if not pid:
            for pidfd, (_, told) in running.items():
                os.close(pidfd)
                os.close(told)
            become(request["environment"], fds, nursery)
            channel.send(str(os.getpid()).encode())  # who hears of it can kill its group
            channel.close()
            return request
        running[os.pidfd_open(pid)] = pid, fds.pop()
        for fd in fds:
            os.close(fd)


def lead_a_session(parent: int) -> None:
    """Let this fork be killed with everything it starts, and die with its parent."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had died before
        os._exit(1)


def become(environment: dict[str, str], fds: list[int], nursery: int) -> None:
    """Let this fork have what a new process has."""
    lead_a_session(nursery)
    for number, fd in enumerate(fds):
        if number < 3:
            os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR is read once
    # The same of TORCH_COMPILE_DISABLE.
    sys.modules["torch._dynamo"].config.disable = environment.get("TORCH_COMPILE_DISABLE") == "1"  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
