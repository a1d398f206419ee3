"""Making text from other sources fit for a terminal, a line of a log, or a message."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    r"""Escape all characters of `text` on which a terminal or a reader of lines would act, e.g. `\n`, `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Put `text` into one printable line. Unusual spaces, which a path may hold, are escaped and not replaced."""
    return printable(" ".join(re.split("[ \t\r\n]+", text.strip(" \t\r\n"))))


def sendable(text: str) -> str:
    """Replace what UTF-8 cannot carry, such as the bytes of a path that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
