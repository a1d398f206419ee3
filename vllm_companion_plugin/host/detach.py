"""How a process that must outlive whoever started it begins."""

from __future__ import annotations

import os
import sys


def detach(log: str) -> None:
    """Leave the caller's process tree, session and terminal; standard streams go to `log`.

    vLLM kills the tree of its descendants when it ends; a second fork makes init the parent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for fd in {null, out} - {0, 1, 2}:
        os.close(fd)


def report(ready_fd: int | None, text: str) -> None:
    """Tell whoever started us: "ok" or the error. It may have given up waiting."""
    if ready_fd is None:
        return
    try:
        os.write(ready_fd, text.encode(errors="backslashreplace")[:4000])
        os.close(ready_fd)
    except OSError as error:
        print(f"vllm-companion: nobody waits for our start any more ({error}).", file=sys.stderr, flush=True)
