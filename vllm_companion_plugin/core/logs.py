"""Log lines of this project's processes, as text or as JSON. Text from other processes cannot look like such a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.core.text import printable

TEXT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
"""The format of vLLM's logs (vllm/logger.py), so that both logs look alike."""

PATIENCE_MS = 100
"""How long a write waits for a reader that is merely slow."""

MOST_BYTES, KEPT_BYTES = 4 << 20, 1 << 20
"""Limit of a log file's length, and how much of its end stays when it is shortened."""
_OWN = "/proc/self/fd/"
HEAD_CHARACTERS, CHECK_CHARACTERS = 16 << 10, 64 << 10
"""How much of the beginning of a process's log stays, and how many logged bytes lie between checks of the length."""


class PrintableLines(logging.Filter):
    """Makes every line of a message printable, whatever paths and names the message holds."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
        return True


class Marking(logging.Handler):
    """Begins the lines of a logger and of all below it alike, and makes them printable, before other handlers get them.

    It writes nothing. A handler of the logger above, which this project does not own, gets the record afterwards.
    """

    def __init__(self, mark: str) -> None:
        super().__init__()
        self._mark = mark

    def handle(self, record: logging.LogRecord) -> bool:
        lines = map(printable, record.getMessage().split("\n"))
        record.msg, record.args = f"{self._mark} " + "\n".join(lines), ()
        return True


class MarkedLogger(logging.Logger):
    """A logger whose first handler stays.

    vLLM sets up its logs by `dictConfig`, once more for each configuration of an engine. That takes the handlers from
    all loggers below its own.
    """

    _kept: list[logging.Handler]

    @property
    def handlers(self) -> list[logging.Handler]:
        return self._kept

    @handlers.setter
    def handlers(self, others: list[logging.Handler]) -> None:
        self._kept = [self._kept[0], *(each for each in others if each is not self._kept[0])]


def mark(logger: Any, text: str) -> None:
    """Begin all lines of a logger, and of those below it, with `text`. Idempotent."""
    if not isinstance(logger, MarkedLogger):
        logger._kept = [Marking(text), *logger.handlers]
        logger.__class__ = MarkedLogger


class TextFormatter(logging.Formatter):
    """Writes one line for each record. The lines of a traceback follow, each behind a bar."""

    def __init__(self) -> None:
        super().__init__(TEXT, "%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  | {printable(line)}" for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """Writes one JSON object for each record, in a line.

    Keys: time (RFC 3339, UTC), level, logger, message, pid, device, source; traceback if the record has one.

    Args:
        device: device of the logging process.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": os.getpid(),
            "device": self._device,
            "source": f"{record.filename}:{record.lineno}",
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII: a terminal acts on none of it


class PatientWriter:
    """Writes lines to a descriptor and waits for no reader, because clients of this process would have to wait, too.

    A line that a full pipe or disk cannot take is lost. The next line that gets through follows a note with the
    number of lost lines.

    Args:
        note: makes the note of a number of lost lines.
    """

    def __init__(self, fd: int, note: Callable[[int], str]) -> None:
        self._fd = fd
        self._note = note
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lost = 0

    def write(self, line: str) -> None:
        """Write the line, or drop the line. Never raises `OSError`."""
        lines = ["", self._note(self._lost), line] if self._lost else [line]  # the last line may have been cut
        self.pass_on("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))

    def pass_on(self, data: bytes) -> None:
        """Write the output of another process, or drop that output. Never raises `OSError`."""
        try:
            for at in range(0, len(data), select.PIPE_BUF):  # a pipe takes this much at once, or nothing
                if not self._is_writable():
                    self._lost += 1
                    return
                os.write(self._fd, data[at : at + select.PIPE_BUF])
            self._lost = 0
        except OSError:  # the reader has gone, or the disk is full
            self._lost += 1

    def _is_writable(self) -> bool:
        events = self._poll.poll(0 if self._lost else PATIENCE_MS)
        return any(event & select.POLLOUT and not event & select.POLLERR for _, event in events)


class PatientHandler(logging.Handler):
    """Logs through a `PatientWriter`.

    Args:
        bounded: the descriptor is a log file of this project. The handler shortens the file when it becomes too long
            and keeps the first lines of this process, which say how the process was started.
    """

    def __init__(self, fd: int, *, bounded: bool = False) -> None:
        super().__init__()
        self._fd = fd
        self._bounded = bounded
        self._writer = PatientWriter(fd, self._note)
        self._head = ""
        self._unchecked = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            self._writer.write(line)
            if self._bounded:
                self._bound(line)
        except Exception:
            self.handleError(record)

    def _bound(self, line: str) -> None:
        if len(self._head) + len(line) < HEAD_CHARACTERS:
            self._head += f"{line}\n"
        self._unchecked += len(line)
        if self._unchecked > CHECK_CHARACTERS:
            self._unchecked = 0
            note = self._line("This log was shortened: lines between those above and those below are gone.")
            # The path goes through the descriptor, because the file may have another name by now.
            shorten(f"{_OWN}{self._fd}", f"{self._head}{note}\n".encode(errors="backslashreplace"))

    def _note(self, lost: int) -> str:
        return self._line("%d lines of this log were lost: nobody reads standard error.", lost)

    def _line(self, text: str, *arguments: object) -> str:
        return self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, arguments, None))


def shorten(path: str, head: bytes = b"") -> None:
    """Cut a log that is too long to `head` and its newest lines. Never fails, because a log is not worth an error.

    The file is cut in place, because several processes may append to it. What they write at that moment may be lost.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | (0 if path.startswith(_OWN) else os.O_NOFOLLOW)
    with contextlib.suppress(OSError), open(os.open(path, flags), "rb+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another process is cutting the file
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= MOST_BYTES:
            return
        newest = os.pread(file.fileno(), KEPT_BYTES, size_bytes - KEPT_BYTES)
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), head + newest[newest.find(b"\n") + 1 :])


def configure(level: str, format: str, device: str, *, bounded: bool = False) -> None:
    """Log to standard error from now on, exceptions that no code catches included.

    Args:
        bounded: standard error is a log file of this project, whose length must stay bounded.
    """
    # sys.stderr is None if its descriptor was closed at the start. A socket may have that number by now.
    handler = PatientHandler(sys.stderr.fileno(), bounded=bounded) if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(JsonFormatter(device) if format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = lambda kind, error, trace: logging.critical("Ended by", exc_info=(kind, error, trace))


def fatal(error: Exception) -> None:
    """Log why this process ends, in the configured form, or as text if logging was not configured yet."""
    handlers = logging.getLogger().handlers
    if handlers and isinstance(handlers[0].formatter, JsonFormatter):
        logging.getLogger("vllm.companion").critical("%s", error)
    else:
        print(f"vllm-companion: {printable(str(error))}", file=sys.stderr, flush=True)
