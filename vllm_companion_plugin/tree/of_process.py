"""Numbers and texts that name a thing of one process: an object, an open file, a file that loading made.

In another process they name nothing, or another thing.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import stat
import time
from collections.abc import Collection, Iterator

_ID = re.compile(r"(?<![\w.])(?:\d{9,19}|0x[0-9a-f]{8,16})(?![\w.])")
_TEXT = re.compile(r"'/(?:[^'\\]|\\.)*'|\"/(?:[^\"\\]|\\.)*\"")
_TICK_S = 0.02
"""The kernel's clock of files is behind by up to this."""


class Before:
    """What there was in this process before a model was loaded."""

    def __init__(self) -> None:
        self._opened = _opened()
        self._since = time.time() - _TICK_S

    def found_in(self, text: str, ids: Collection[int]) -> str | None:
        """What of this process the text of a value names; None for nothing.

        Args:
            ids: of the model's objects.
        """
        if any(int(number, 0) in ids for number in _ID.findall(text)):
            return "the id of an object"
        if text.isdecimal() and int(text) in self._new:
            return "a file descriptor"
        if any(self._is_new(path) for path in _paths(text)):
            return "the path of a file that loading made"
        return None

    @functools.cached_property
    def _new(self) -> set[int]:
        """As it is when it is asked for first, when the model has been loaded."""
        return {number for number, *_ in _opened() - self._opened}

    def _is_new(self, path: str) -> bool:
        try:
            return os.lstat(path).st_ctime >= self._since
        except (OSError, ValueError):  # no file, or no name of one
            return False


def _opened() -> set[tuple[int, int, int]]:
    """Return the open files and folders, and which each is, because the number of one that was closed is given again.

    Sockets, pipes and devices come and go in other threads and drivers: their numbers are those of many values.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            status = os.fstat(int(name))
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                found.add((int(name), status.st_dev, status.st_ino))
    return found


def _paths(text: str) -> Iterator[str]:
    for quoted in _TEXT.findall(text):
        try:
            yield ast.literal_eval(quoted)
        except (ValueError, SyntaxError):
            continue
