"""Making text from other sources fit for a terminal, a line of a log, or a message."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

CUT = ".."
"""Stands for the middle of a text that was cut. Every terminal can show it."""


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


def encodable(text: str, encoding: str) -> str:
    """Make `text` printable, and escape what a stream of that encoding cannot carry."""
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def several(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join `texts`, and say how many more there are than the `most` that are shown."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word nearest to `word`; empty if none is near."""
    near = get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def columns_of(text: str) -> int:
    """Return how many columns of a terminal `text` takes. Characters of East Asia take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def cut_to(text: str, columns: int) -> str:
    """Cut the middle of `text` out, so that it takes at most so many columns: names differ at both of their ends."""
    if columns_of(text) <= columns:
        return text
    left, right = 0, len(text)
    room = max(0, columns - len(CUT))
    while left < right and columns_of(text[: left + 1]) + columns_of(text[right:]) <= room:
        left += 1
        if left < right and columns_of(text[:left]) + columns_of(text[right - 1 :]) <= room:
            right -= 1
    return text[:left] + CUT + text[right:]


def wrapped(text: str, columns: int) -> list[str]:
    """Break `text` into lines of at most so many columns; all but the first are indented. Long words are broken."""
    lines, line, indent = [], "", ""
    for word in text.split(" "):
        while word:
            joined = f"{line} {word}" if line.strip() else indent + word
            if columns_of(joined) <= columns:
                line = joined
                break
            if not line.strip():  # the word alone is too long
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or columns_of(indent + word[:n]) <= columns)
                line, word = indent + word[:fits], word[fits:]
            lines.append(line)
            line, indent = "", "  "
    return [*lines, line] if line else lines


def short_name(model: str) -> str:
    """Return the last part of a model's name or path, as lines for people show it."""
    return model.rstrip("/").rpartition("/")[2] or model


def duration(seconds: float) -> str:
    """Shorten a duration, e.g. "45s", "12m05s", "10m", "3h07m", "2d04h"."""
    whole = max(0, int(seconds))
    for unit, size, below, smaller in (("d", 86400, 3600, "h"), ("h", 3600, 60, "m"), ("m", 60, 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}{rest:02d}{smaller}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"


def percent(done: int, total: int) -> int:
    """Return the share of a total in percent, never above 100: a total that is told may be too low."""
    return min(100, 100 * done // total)
