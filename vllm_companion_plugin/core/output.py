"""The output of commands. A reader that is slow or has gone ends no command, and neither does a full disk.

A `serve` that holds the only copy of its weights must not end because of `| tee`, and a command that acts on
several companions must not stop halfway.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from vllm_companion_plugin.core.logs import PatientWriter

LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Error numbers of writes that fail because the reader, the terminal or the space has gone."""

RELAY_END_S = 2.0

_writers: dict[int, PatientWriter] = {}


def say(text: str, *, error: bool = False) -> None:
    """Write a line to standard output or standard error. Never raises, and waits for no reader."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # the parent process closed it
        return
    with contextlib.suppress(OSError, ValueError):
        _say(text, stream)


def _say(text: str, stream: TextIO) -> None:
    try:
        fd = stream.fileno()
    except (OSError, ValueError):  # the stream is no file: a test or program replaced it
        print(text, file=stream, flush=True)
        return
    stream.flush()
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # as the stream itself would write it
    # The writer bypasses the stream's buffer, which would keep a line that cannot be written, and fail again with it.
    _writers.setdefault(fd, PatientWriter(fd, _note)).write(text)


def _note(lost: int) -> str:
    return f"vllm-companion: {lost} lines were lost: no process read them, or the disk was full."


@contextlib.contextmanager
def relayed() -> Iterator[tuple[int | None, int | None]]:
    """Yield standard output and error for a child that may end when its reader goes, as vLLM's processes do.

    A child writes to a terminal directly; when the terminal goes, the child gets a signal.
    """
    with contextlib.ExitStack() as undo:
        yield _relay(sys.stdout, undo), _relay(sys.stderr, undo)


def _relay(stream: TextIO | None, undo: contextlib.ExitStack) -> int | None:
    try:
        fd = stream.fileno() if stream is not None else -1
    except (OSError, ValueError):
        return None
    if fd < 0 or os.isatty(fd):
        return None
    source, sink = os.pipe()
    thread = threading.Thread(target=_pass_on, args=(source, fd), name="relay", daemon=True)
    thread.start()
    undo.callback(thread.join, RELAY_END_S)  # a process that the child started may still be writing
    undo.callback(os.close, sink)
    return sink


def _pass_on(source: int, fd: int) -> None:
    writer = PatientWriter(fd, _note)
    with open(source, "rb", buffering=0) as file:
        while data := file.read(1 << 16):
            writer.pass_on(data)


class _SayingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(f"vllm-companion: {self.format(record)}", error=True)
        except Exception:
            self.handleError(record)


def say_warnings() -> None:
    """Print the library's warnings by `say` from now on."""
    logging.basicConfig(level=logging.WARNING, handlers=[_SayingHandler()])


def settle() -> None:
    """Drop output that cannot be written; otherwise the interpreter would try again at its end, and fail."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
