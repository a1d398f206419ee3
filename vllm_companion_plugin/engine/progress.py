"""Progress for people: a bar on a terminal, and log lines by the clock while this engine waits for another process."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from vllm.logger import init_logger

from vllm_companion_plugin.core.text import duration, percent

logger = init_logger("vllm.companion.progress")

BEAT_S = 10.0
"""Seconds between two lines about one wait."""
SILENT_S = 30.0
"""Silence of a process that is waited for, after which a line says what to do. Long phases report nothing."""
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
_BAR_WITHOUT_TOTAL = "{desc}{n_fmt}"
"""Without a rate: what is shown begins in the middle of another process's work, which would make terabytes a second."""


class ProgressBar:
    """Bytes done of bytes in all, under a description that may change; on a terminal only. Use as a context."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    @property
    def is_shown(self) -> bool:
        return self._bar is not None

    def update(self, done_bytes: int, total_bytes: int, description: str | None = None) -> None:
        """Show the state. `total_bytes` 0 means unknown."""
        self._description = description or self._description
        if sys.stderr is not None and sys.stderr.isatty():  # None: the parent process closed it
            self._show(done_bytes, total_bytes)

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        from tqdm import tqdm

        total, done = total_bytes or None, min(done_bytes, total_bytes or done_bytes)
        form = _BAR if total_bytes else _BAR_WITHOUT_TOTAL
        if self._bar is None:
            options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False, "dynamic_ncols": True}
            self._bar = tqdm(desc=self._description, total=total, initial=done, bar_format=form, **options)
            return
        self._bar.set_description(self._description, refresh=False)
        self._bar.total, self._bar.n, self._bar.bar_format = total, done, form
        self._bar.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class Waiting:
    """Says whom this engine waits for: at once, then by the clock; and what to do if that process says nothing.

    Args:
        what: what is waited for, e.g. "weights of Qwen3-8B".
        whom: who would be silent if no news came, with the remedy.
        gives_up_s: silence in seconds after which this engine waits no longer.
    """

    def __init__(self, what: str, whom: str, gives_up_s: float) -> None:
        self._what, self._whom, self._gives_up_s = what, whom, gives_up_s
        self._text = "no answer yet"
        self._began = time.monotonic()
        self._next_beat = self._began + BEAT_S
        self._next_warning_s = SILENT_S

    def news(self, text: str, whom: str) -> None:
        """Note what the awaited process does now, and say so at once if it is another process than before.

        Args:
            text: who it is and what it does.
            whom: the process and its remedy, for when it is silent.
        """
        is_another, self._text, self._whom, self._next_warning_s = whom != self._whom, text, whom, SILENT_S
        if is_another:
            self._next_beat = time.monotonic() + BEAT_S
            logger.info("Waiting for %s: %s.", self._what, text)
        else:
            self.beat(0.0)

    def beat(self, silent_s: float, *, quiet: bool = False) -> None:
        """Say how long the wait has taken, if it is time to; and that the awaited process is silent, if it is.

        Args:
            silent_s: seconds since it was last heard of.
            quiet: a bar shows the wait already.
        """
        now = time.monotonic()
        if silent_s >= self._next_warning_s:
            self._next_warning_s = 2 * silent_s
            self._next_beat = now + BEAT_S
            logger.warning(
                "Waiting for %s for %s, and nothing was heard for %s of %s After %g s of silence this engine waits no "
                "longer (wait_timeout_s).",
                *(self._what, duration(now - self._began), duration(silent_s), self._whom, self._gives_up_s),
            )
        elif now >= self._next_beat:
            self._next_beat = now + BEAT_S
            if not quiet:
                logger.info("Waiting for %s for %s: %s.", self._what, duration(now - self._began), self._text)


def format_bytes(done_bytes: int, total_bytes: int) -> str:
    """ "1.2 of 15.0 GiB (8%)", or less if less is known."""
    if not total_bytes:
        return f"{done_bytes / 2**30:.2f} GiB" if done_bytes else "starting"
    share = percent(done_bytes, total_bytes)
    return f"{done_bytes / 2**30:.2f} of {total_bytes / 2**30:.2f} GiB ({share}%)"
