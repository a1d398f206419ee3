"""Waiting for descriptors, of any number: `select` takes none above 1023, and a trainer may have more files open."""

from __future__ import annotations

import math
import select
from collections.abc import Iterable

MOST_MS = (1 << 31) - 1
"""What the kernel takes. Whoever waits for longer asks again."""


def readable(fds: Iterable[int], timeout_s: float | None = None) -> set[int]:
    """Those of `fds` that can be read from, or have ended, as soon as there is one; none if the time is over.

    Args:
        timeout_s: None: for as long as it takes; 0 or less: only look. At most 24 days.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    timeout_ms = None if timeout_s is None else min(max(0, math.ceil(timeout_s * 1000)), MOST_MS)
    return {fd for fd, _ in poll.poll(timeout_ms)}
