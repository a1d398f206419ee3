"""Detaching a process that must outlive the process that started it."""

from __future__ import annotations

import os
import sys


def detach(log: str) -> None:
    """Leave the caller's process tree, session and terminal; redirect the standard streams to `log`.

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
    """Write "ok" or an error to the process that started us, which may have given up waiting."""
    if ready_fd is None:
        return
    try:
        os.write(ready_fd, text.encode(errors="backslashreplace")[:4000])
        os.close(ready_fd)
    except OSError as error:
        print(
            f"vllm-companion: the process that started this one no longer waits for it ({error}).",
            file=sys.stderr,
            flush=True,
        )
