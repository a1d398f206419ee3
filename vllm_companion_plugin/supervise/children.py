"""Child processes of `serve`: companions that start and end together, and the signals that end them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from vllm_companion_plugin.core.polling import readable
from vllm_companion_plugin.errors import CompanionUnavailableError, from_code
from vllm_companion_plugin.host.spawn import child_environment
from vllm_companion_plugin.settings import Settings

TERMINATE_S = 1.5
"""Seconds between SIGTERM and SIGKILL for a child; `serve` promises to be gone within 2 s."""


class Stopped(Exception):
    """This process received SIGTERM, SIGINT or SIGHUP."""


class Signals:
    """Lets the main thread wait for SIGTERM, SIGINT, SIGHUP and SIGCHLD. Use it in the main thread only."""

    def __init__(self) -> None:
        self._stopped = False
        self._receive, self._send = socket.socketpair()
        self._receive.setblocking(False)
        self._send.setblocking(False)

    def __enter__(self) -> Signals:
        self._wakeup = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has it ignored: the terminal may go
            numbers.append(signal.SIGHUP)
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
        """Make `wait` return. Any thread may call this."""
        with contextlib.suppress(OSError):  # the pipe is full, or no thread waits any more
            self._send.send(b"\0")

    def wait(self, *fds: int, timeout_s: float | None = None) -> None:
        """Return when a child changed, one of `fds` is readable, `wake` was called, or the time is over.

        Raises:
            Stopped: a signal asked this process to end, now or before.
        """
        if not self._stopped:
            readable([self._receive.fileno(), *fds], timeout_s)
            with contextlib.suppress(BlockingIOError):
                self._receive.recv(4096)
        if self._stopped:
            raise Stopped


class Child:
    """A companion that runs as a child of this process and shares its output."""

    def __init__(self, device: str, settings: Settings) -> None:
        self.device = device
        self._ready_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "vllm_companion_plugin.holder", "--device", device]
        command += [f"--linger-s={settings.linger_s}", "--ready-fd", str(write_fd)]
        try:
            # The child has its own session, so that Ctrl-C reaches it through us only, after we undid the other work.
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
        """Return once the companion answers. Raises the error that kept it from starting."""
        deadline = time.monotonic() + timeout_s
        text = b""
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CompanionUnavailableError(f"The companion of {self.device} did not start in {timeout_s:g} s.")
                signals.wait(self._ready_fd, timeout_s=left)
                if not readable([self._ready_fd], 0):
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
    """Run a process that starts others; when it ends, end all of them. Returns its exit status.

    Raises:
        Stopped: a signal asked this process to end; all processes of the group have ended.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
    )
    try:
        # Only `end` collects the process: until then the kernel gives its number, and its group's, to no other.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            signals.wait()
    finally:
        end([process], whole_group=True)
    return process.returncode


def end(processes: list[subprocess.Popen[bytes]], *, whole_group: bool = False) -> None:
    """End these processes and collect them. Kills those that have not ended after `TERMINATE_S`.

    Args:
        whole_group: each process leads a process group; end all processes of the group, also if the leader is gone.
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
