"""What commands say. Whoever reads it may have gone, or be slow, or sit on a full disk: that ends no command.

A `serve` whose weights would go with it must not end because of `| tee`, and a command that acts on several
companions must not stop in the middle.
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
"""What the system says of output that nobody can take."""

RELAY_END_S = 2.0

_writers: dict[int, PatientWriter] = {}


def say(text: str, *, error: bool = False) -> None:
    """Write a line to standard output, or to standard error. Never raises, and waits for nobody."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed by whoever started us
        return
    with contextlib.suppress(OSError, ValueError):
        _say(text, stream)


def _say(text: str, stream: TextIO) -> None:
    try:
        fd = stream.fileno()
    except (OSError, ValueError):  # no file: somebody has replaced it
        print(text, file=stream, flush=True)
        return
    stream.flush()
    # Past the stream's buffer, which would keep what cannot be written, and fail with it again.
    _writers.setdefault(fd, PatientWriter(fd, _note)).write(text)


def _note(lost: int) -> str:
    return f"vllm-companion: {lost} lines were lost: nobody read them, or there was no space."


@contextlib.contextmanager
def relayed() -> Iterator[tuple[int | None, int | None]]:
    """Standard output and error for a child that, unlike us, may end when nobody reads them: vLLM's do.

    A terminal is the child's own; when it goes, a signal says so.
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
    undo.callback(thread.join, RELAY_END_S)  # somebody the child has started may be writing yet
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
    """Warnings of the library are said like everything else, from now on."""
    logging.basicConfig(level=logging.WARNING, handlers=[_SayingHandler()])


def settle() -> None:
    """Give up what cannot be written: the interpreter would try once more at its end, and fail."""
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
