"""`vllm-companion verify` in a process that has imported vLLM: its engines are forks of it, not commands.

A fork runs what the command line says, with the environment and the standard output that the command would have.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from typing import Any

from tests.vllm.nursery import lead_a_session
from vllm_companion_plugin.cli import main as cli
from vllm_companion_plugin.cli import verify


def run_to_end(command: list[str], environment: dict[str, str], signals: Any, *, stdout: int) -> int:
    """As `supervise.children.run_to_end`, of `python -m MODULE ...`."""
    from vllm_companion_plugin.engine.run import verify as engine

    python, option, module, *arguments = command
    assert (python, option, module) == (sys.executable, "-m", engine.__name__), command
    sys.stdout.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it left
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        lead_a_session(parent)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(stdout, 1)
        os.environ.clear()
        os.environ.update(environment)
        status = engine.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    verify.run_to_end = run_to_end
    return cli.main(sys.argv[1:])
