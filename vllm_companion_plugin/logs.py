"""Log lines of our own processes, as text or as JSON. What others wrote cannot look like a line of ours."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
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


def one_line(text: str) -> str:
    """`text` in a line, printable. A space of another kind, as a path may have it, is escaped and not replaced."""
    return printable(" ".join(re.split("[ \t\r\n]+", text.strip(" \t\r\n"))))


def sendable(text: str) -> str:
    """`text` without what no UTF-8 can carry, such as bytes of a path that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


class PrintableLines(logging.Filter):
    """Lets every line of a message be printable, whatever paths and names are in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
        return True


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


class PatientHandler(logging.Handler):
    """Writes to a descriptor, and waits for no reader: whoever attaches would wait with us.

    Lines that a full pipe cannot take are lost. The next one that it takes is preceded by their number.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = [self.format(record)]
            if self._lost:
                text = "%d lines of this log were lost: nobody reads standard error."
                note = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (self._lost,), None)
                lines = ["", self.format(note), *lines]  # the last one may have been cut
            data = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
            for at in range(0, len(data), select.PIPE_BUF):  # so much is taken at once, or none
                if not self._is_writable():
                    self._lost += 1
                    return
                os.write(self._fd, data[at : at + select.PIPE_BUF])
            self._lost = 0
        except OSError:  # nobody will read it any more
            self._lost += 1
        except Exception:
            self.handleError(record)

    def _is_writable(self) -> bool:
        events = self._poll.poll(0 if self._lost else PATIENCE_MS)
        return any(event & select.POLLOUT and not event & select.POLLERR for _, event in events)


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
