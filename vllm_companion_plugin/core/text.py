"""Text that came from elsewhere, made fit for a terminal, a line of a log, or a message."""

from __future__ import annotations

import re


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
