"""`vllm-companion verify` in a process that has imported vLLM: its engines are forks of it, not commands.

A fork runs what the command line says, with the environment and the standard output that the command would have.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from tests.vllm.nursery import lead_a_session, run_and_end
from vllm_companion_plugin.cli import main as cli
from vllm_companion_plugin.cli import verify


def run_to_end(command: list[str], environment: dict[str, str], signals: Any, *, stdout: int) -> int:
    """As `supervise.children.run_to_end`, of `python -m MODULE ...`."""
    sys.stdout.flush()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        run_and_end(lambda: engine(command, environment, stdout, parent))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it left
    return os.waitstatus_to_exitcode(status)


def engine(command: list[str], environment: dict[str, str], stdout: int, parent: int) -> int:
    """In a fork of `parent`: what the command does."""
    from vllm_companion_plugin.engine.run import verify as program

    lead_a_session(parent)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.environ.clear()
    os.environ.update(environment)
    python, option, module, *arguments = command
    assert (python, option, module) == (sys.executable, "-m", program.__name__), command
    return program.main(arguments)


def main() -> int:
    verify.run_to_end = run_to_end
    return cli.main(sys.argv[1:])
