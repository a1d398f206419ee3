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
from typing import TextIO

from vllm_companion_plugin.logs import PatientWriter

LOST = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says of output that nobody can take."""

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
