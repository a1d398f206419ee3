"""Child processes of `serve`: companions, started and ended together, and the signals that end them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from vllm_companion_plugin.errors import CompanionUnavailableError, from_code
from vllm_companion_plugin.host.spawn import child_environment
from vllm_companion_plugin.settings import Settings

TERMINATE_S = 1.5
"""Until a child that was asked to end is killed; `serve` promises to be gone within 2 s."""


class Stopped(Exception):
    """SIGTERM, SIGINT or SIGHUP came."""


class Signals:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGCHLD into something to wait for. Use in the main thread."""

    def __init__(self) -> None:
        self._stopped = False
        self._receive, self._send = socket.socketpair()
        self._receive.setblocking(False)
        self._send.setblocking(False)

    def __enter__(self) -> Signals:
        self._wakeup = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._receive.close()
        self._send.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._stopped = True

    def wake(self) -> None:
        """Let `wait` return, from any thread."""
        with contextlib.suppress(OSError):  # it has enough to read, or nobody waits any more
            self._send.send(b"\0")

    def wait(self, *fds: int, timeout_s: float | None = None) -> None:
        """Return when a child changed, one of `fds` is readable, somebody woke us, or the time is over.

        Raises:
            Stopped: a signal asked us to end, now or before.
        """
        if not self._stopped:
            select.select([self._receive.fileno(), *fds], [], [], timeout_s)
            with contextlib.suppress(BlockingIOError):
                self._receive.recv(4096)
        if self._stopped:
            raise Stopped


class Child:
    """A companion that runs as our child, with our output."""

    def __init__(self, device: str, settings: Settings) -> None:
        self.device = device
        self._ready_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "vllm_companion_plugin.holder", "--device", device]
        command += [f"--linger-s={settings.linger_s}", "--ready-fd", str(write_fd)]
        try:
            # A session of its own: Ctrl-C must reach it through us, with the rest of the work undone first.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=child_environment(settings),
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._ready_fd)
            raise
        finally:
            os.close(write_fd)

    def wait_ready(self, signals: Signals, timeout_s: float) -> None:
        """Return once it answers. Raises what it could not start for."""
        deadline = time.monotonic() + timeout_s
        text = b""
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CompanionUnavailableError(f"The companion of {self.device} did not start in {timeout_s:g} s.")
                signals.wait(self._ready_fd, timeout_s=left)
                if not select.select([self._ready_fd], [], [], 0)[0]:
                    continue
                chunk = os.read(self._ready_fd, 4096)
                text += chunk
                if not chunk:
                    break
        finally:
            os.close(self._ready_fd)
        if text != b"ok":
            code, _, message = text.decode(errors="replace").partition(" ")
            if not code:
                raise CompanionUnavailableError(f"The companion of {self.device} ended at once; see the lines above.")
            raise from_code(code, message)


def run_to_end(
    command: list[str],
    environment: dict[str, str],
    signals: Signals,
    stdout: int | None = None,
    stderr: int | None = None,
) -> int:
    """Run a process that starts others, and end all of them with it. Its status.

    Raises:
        Stopped: a signal asked us to end; nothing of it is left.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
    )
    try:
        # Left to be collected by `end`: until then its number, and its group's, mean nobody else.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            signals.wait()
    finally:
        end([process], whole_group=True)
    return process.returncode


def end(processes: list[subprocess.Popen[bytes]], *, whole_group: bool = False) -> None:
    """End these processes and collect them, within `TERMINATE_S` or by force.

    Args:
        whole_group: each leads a process group; all in it are ended, also if the leader is gone.
    """

    def tell(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if whole_group:
                os.killpg(process.pid, number)
            elif process.poll() is None:
                process.send_signal(number)

    for process in processes:
        tell(process, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_S
    for process in processes:
        while process.returncode is None and time.monotonic() < deadline:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.01)
    for process in processes:
        tell(process, signal.SIGKILL)
        process.wait()
