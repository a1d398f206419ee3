"""Progress for people: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.companion.progress")

_LOG_INTERVAL_S = 10.0


class ProgressBar:
    """Bytes done of bytes in all, under a description that may change. Use as a context."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None
        self._logged_at = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done_bytes: int, total_bytes: int, description: str | None = None) -> None:
        """Show the state. `total_bytes` 0 means unknown."""
        self._description = description or self._description
        if sys.stderr.isatty():
            self._show(done_bytes, total_bytes)
        elif time.monotonic() - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            logger.info("%s: %s", self._description, format_bytes(done_bytes, total_bytes))

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, dynamic_ncols=True)
        self._bar.set_description(self._description, refresh=False)
        self._bar.total = total_bytes or None
        self._bar.n = done_bytes
        self._bar.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def format_bytes(done_bytes: int, total_bytes: int) -> str:
    """ "1.2 of 15.0 GiB (8%)", or less if less is known."""
    if not total_bytes:
        return f"{done_bytes / 2**30:.2f} GiB" if done_bytes else "starting"
    return f"{done_bytes / 2**30:.2f} of {total_bytes / 2**30:.2f} GiB ({100 * done_bytes // total_bytes}%)"
