"""What a piece of a test has left open or mapped in its process.

Of the same process other things end at any time: what earlier tests have dropped and nobody has collected, connections
that gRPC closes a little later. So what is there is not counted; what is new is looked for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.place import until

Opened = frozenset[tuple[int, int, int]]


def open_now() -> Opened:
    """Every open descriptor: its number, and the device and inode of what it is of."""
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed since it was listed, as the one that listed them
            what = os.fstat(number)
            found.add((number, what.st_dev, what.st_ino))
    return frozenset(found)


def mapped_now(part: str) -> frozenset[str]:
    """The addresses of each line with `part` in this process's memory map."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return frozenset(line.partition(" ")[0] for line in lines if part in line)


def settle(for_s: float = 0.3) -> None:
    """Wait until nothing has been opened or closed for a moment: before a test that leaves few descriptors free."""
    before, changed = open_now(), time.monotonic()
    while time.monotonic() - changed < for_s:
        time.sleep(0.01)
        if (now := open_now()) != before:
            before, changed = now, time.monotonic()


def opened_since(before: Opened) -> int:
    return len(open_now() - before)


@contextlib.contextmanager
def none_left_open(within_s: float = 5) -> Iterator[None]:
    """None of the descriptors that were opened inside is open `within_s` after it."""
    before = open_now()
    yield
    until(lambda: not opened_since(before), within_s, "what was opened is closed")


@contextlib.contextmanager
def no_more_open(within_s: float = 5) -> Iterator[None]:
    """For what replaces descriptors: others than before are open, and not more of them."""
    before = len(open_now())
    yield
    until(lambda: len(open_now()) <= before, within_s, "as few are open as before")


@contextlib.contextmanager
def none_left_mapped(part: str, within_s: float = 5) -> Iterator[None]:
    before = mapped_now(part)
    yield
    until(lambda: mapped_now(part) <= before, within_s, f"what was mapped of {part} is unmapped")
