"""Runs commands of the command line, each in a fork, with an output of a chosen width, as a terminal or a pipe.

A process that has imported all commands starts one in milliseconds; a new Python would take a second. Each line of
standard input is a request in JSON: `arguments`, `columns`, `terminal`. The answer is a line in JSON: `status`, `out`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import sys
import termios
import traceback

from vllm_companion_plugin.cli import (  # noqa: F401 - imported once, for all forks
    advance,
    completion,
    generations,
    look,
    main,
    metrics,
    parser,
    serve,
    upgrade,
    verify,
)
from vllm_companion_plugin.cli.doctor import command, installation, states, trial  # noqa: F401

LONGEST_S = 180
installation._BESIDES_TORCH = ()  # importing one takes seconds; tests/process/test_cli.py does it
look.SUCCESSOR_S = 0.2  # no companion follows


def run(arguments: list[str], columns: int, terminal: bool) -> tuple[int, str]:
    """Run a command; return its exit status and what it wrote to standard output and error."""
    if terminal:
        reading, writing = pty.openpty()
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    else:
        reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(LONGEST_S)
        os.setsid()
        for fd in (1, 2):
            os.dup2(writing, fd)
        os.closerange(3, 64)
        # What was opened for another kind of output remembers whether that could be sought in.
        sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding=sys.stderr.encoding, closefd=False, buffering=1)  # noqa: SIM115
        if not terminal:
            os.environ["COLUMNS"] = str(columns)
        status = 70
        try:
            status = main.main(arguments)
            sys.stdout.flush()
        except SystemExit as error:
            status = int(error.code or 0)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    parts = []
    with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed
        while part := os.read(reading, 1 << 16):
            parts.append(part)
    os.close(reading)
    _, ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended), b"".join(parts).decode("utf-8").replace("\r\n", "\n")


if __name__ == "__main__":
    answers = os.dup(1)
    for request in sys.stdin:
        status, out = run(**json.loads(request))
        os.write(answers, f"{json.dumps({'status': status, 'out': out})}\n".encode())
