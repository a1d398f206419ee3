"""Log lines of our own processes, as text or as JSON. What others wrote cannot look like a line of ours."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

TEXT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
"""As vLLM's logs (vllm/logger.py), so that both read alike side by side."""

PATIENCE_MS = 100
"""For a reader that is merely slow."""


def printable(text: str) -> str:
    r"""`text` with everything a terminal or a reader of lines would act on as an escape, e.g. `\n`, `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """One line a record; a traceback follows, each line behind a bar."""

    def __init__(self) -> None:
        super().__init__(TEXT, "%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  | {printable(line)}" for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, message, pid, device, source; traceback if there is one.

    Args:
        device: whose process this is.
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
        return json.dumps(line)  # in ASCII: nothing in it acts


class PatientWriter:
    """Writes lines to a descriptor, and waits for no reader: whoever needs us would wait, too.

    Lines that a full pipe or disk cannot take are lost. The next one that it takes is preceded by their number.

    Args:
        note: says how many were lost.
    """

    def __init__(self, fd: int, note: Callable[[int], str]) -> None:
        self._fd = fd
        self._note = note
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lost = 0

    def write(self, line: str) -> None:
        """Write the line, or lose it. Never raises `OSError`."""
        lines = ["", self._note(self._lost), line] if self._lost else [line]  # the last one may have been cut
        data = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        try:
            for at in range(0, len(data), select.PIPE_BUF):  # so much is taken at once, or none
                if not self._is_writable():
                    self._lost += 1
                    return
                os.write(self._fd, data[at : at + select.PIPE_BUF])
            self._lost = 0
        except OSError:  # nobody will read it any more, or there is no space
            self._lost += 1

    def _is_writable(self) -> bool:
        events = self._poll.poll(0 if self._lost else PATIENCE_MS)
        return any(event & select.POLLOUT and not event & select.POLLERR for _, event in events)


class PatientHandler(logging.Handler):
    """Logs through a `PatientWriter`."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._writer = PatientWriter(fd, self._note)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record))
        except Exception:
            self.handleError(record)

    def _note(self, lost: int) -> str:
        text = "%d lines of this log were lost: nobody reads standard error."
        return self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (lost,), None))


def configure(level: str, format: str, device: str) -> None:
    """Log to standard error from now on, also what nobody catches."""
    # Python has none where its descriptor was closed, whose number may be a socket's by now.
    handler = PatientHandler(sys.stderr.fileno()) if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(JsonFormatter(device) if format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = lambda kind, error, trace: logging.critical("Ended by", exc_info=(kind, error, trace))


def fatal(error: Exception) -> None:
    """Say why this process ends; in the form that was configured, or as text if it did not come to that."""
    handlers = logging.getLogger().handlers
    if handlers and isinstance(handlers[0].formatter, JsonFormatter):
        logging.getLogger("vllm_companion_plugin").critical("%s", error)
    else:
        print(f"vllm-companion: {printable(str(error))}", file=sys.stderr, flush=True)
