"""What a user sees while an engine waits."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.place import KEY, Place, arena_of
from vllm_companion_plugin.client.connection import Granted, Ready, connect
from vllm_companion_plugin.core.logs import mark
from vllm_companion_plugin.core.status import Progress
from vllm_companion_plugin.engine import progress
from vllm_companion_plugin.engine.decide import _Watcher
from vllm_companion_plugin.engine.progress import ProgressBar, Waiting, format_bytes
from vllm_companion_plugin.holder.registry.entries import EXPECTED


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Lines of our loggers as vLLM's handler gets them."""
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.levelname} {record.getMessage()}")

    ours: Any = logging.getLogger("vllm.companion")
    before = type(ours)
    mark(ours, "[companion]")
    above, kept = logging.getLogger("vllm"), Kept()
    above.addHandler(kept)
    level = above.level
    above.setLevel(logging.INFO)
    yield found
    above.setLevel(level)
    above.removeHandler(kept)
    ours.__class__ = before


@pytest.fixture
def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BEAT_S", 0.0)


def test_every_line_of_ours_begins_alike(lines: list[str]) -> None:
    """Also of loggers that are made later, and of messages that hold line ends or escapes."""
    logging.getLogger("vllm.companion").info("one %s", "model")
    logging.getLogger("vllm.companion.some.part").warning("a\x1b[2J\nb")
    assert lines == ["INFO [companion] one model", "WARNING [companion] a\\x1b[2J\nb"]


class TestWaiting:
    """An engine that waits is never silent."""

    def test_at_once(self, lines: list[str]) -> None:
        """The first word is said at once, and each new process; progress waits for the clock."""
        waiting = Waiting("weights of m", "the companion.", 600)
        for text, whom in (("pid 1 is loading", "pid 1"), ("pid 1 is packing", "pid 1"), ("pid 2 is loading", "pid 2")):
            waiting.news(text, whom)
        waiting.beat(0.0)
        assert lines == [
            "INFO [companion] Waiting for weights of m: pid 1 is loading.",
            "INFO [companion] Waiting for weights of m: pid 2 is loading.",
        ]

    @pytest.mark.usefixtures("by_the_clock")
    def test_heartbeat(self, lines: list[str]) -> None:
        """After that a line comes by the clock, with or without news; not where a bar shows the same."""
        waiting = Waiting("weights of m", "the companion.", 600)
        waiting.beat(1.0)
        waiting.news("pid 1 is loading", "pid 1")
        waiting.news("pid 1 is packing", "pid 1")
        waiting.beat(1.0)
        waiting.beat(1.0, quiet=True)
        said = [re.sub(r"\d+s", "Ns", line.removeprefix("INFO [companion] Waiting for weights of m")) for line in lines]
        assert said == [
            " for Ns: no answer yet.",
            ": pid 1 is loading.",
            " for Ns: pid 1 is packing.",
            " for Ns: pid 1 is packing.",
        ]

    def test_silence(self, lines: list[str]) -> None:
        """Silence is named with the remedy, again after twice as long, and no more once there is news."""
        waiting = Waiting("weights of m", "the companion.", 600)
        waiting.news("pid 1 is loading", "pid 1. If it hangs, end it: kill 1.")
        lines.clear()
        for silent_s in (29.0, 30.0, 31.0, 59.0, 60.0):
            waiting.beat(silent_s)
        waiting.news("pid 1 is packing", "pid 1. If it hangs, end it: kill 1.")
        waiting.beat(1.0)
        assert len(lines) == 2
        assert "WARNING [companion] Waiting for weights of m for 0s, and nothing was heard for 1m of pid 1." in lines[1]
        assert "kill 1." in lines[1]
        assert "After 600 s of silence this engine waits no longer (wait_timeout_s)." in lines[1]

    def test_for_a_loader(self, place: Place, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside a real companion: who loads, the clock while the loader says nothing, its silence, and the end."""
        monkeypatch.setattr(progress, "BEAT_S", 1.5)
        monkeypatch.setattr(progress, "SILENT_S", 4.5)
        place.companion()
        arena, fds = arena_of(b"weights")
        with connect("cpu", place.settings, spawn=False) as connection:
            granted = connection.attach(KEY, may_load=True, client_name="loader").wait(30)
            assert isinstance(granted, Granted)
            granted.publication.report(Progress("loading", 6 << 30, 15 << 30))
            lease = connection.attach(KEY, may_load=True, client_name="waiter")

            def silent(seconds: float) -> None:
                watcher.silent(seconds)
                if any(line.startswith("WARNING") for line in lines):
                    granted.publication.publish(arena, fds, b"manifest", 1)

            with _Watcher(KEY, place.paths, place.settings) as watcher:
                assert isinstance(lease.wait(60, watcher.changed, silent), Ready)
        fds.close()
        text = "\n".join(lines)
        assert re.search(r"INFO \[companion\] Waiting for weights of model: pid \d+ \(loader\) is ", text)
        assert re.search(r"for \d+s: pid \d+ \(loader\) is loading for \d+s, 6.00 of 15.00 GiB \(40%\)\.", text)
        assert re.search(r"WARNING .* nothing was heard for \d+s of pid \d+ \(loader\)\. .* end it: kill \d+", text)


def test_nobody_is_told_to_end_a_process_that_has_not_come(place: Place, lines: list[str]) -> None:
    """While a companion expects what was mapped, its loader has no pid; `kill 0` would end the reader's own shell."""
    with _Watcher(KEY, place.paths, place.settings) as watcher:
        watcher.changed(EXPECTED)
        watcher.silent(60)
    assert re.search(
        r"Waiting for weights of model: an engine of the companion before is about to hand it back", lines[0]
    )
    assert "nothing was heard for 1m of an engine of the companion before. If none comes, an engine" in lines[1]
    assert "kill" not in "".join(lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent process closed it."""
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBar("loads") as bar:
        bar.update(1, 2)
        assert not bar.is_shown


@pytest.mark.parametrize(("total", "text"), [(15 << 30, "80%"), (0, "12.0G"), (6 << 30, "100%")])
def test_a_bar_shows_no_rate(monkeypatch: pytest.MonkeyPatch, total: int, text: str) -> None:
    """A bar that begins in the middle of another process's load would show terabytes a second, and more than all."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("Waiting") as bar:
        bar.update(12 << 30, total)
        assert bar.is_shown
    assert text in terminal.getvalue()
    assert "/s" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 0, "starting"),
        (1 << 30, 0, "1.00 GiB"),
        (3 << 30, 4 << 30, "3.00 of 4.00 GiB (75%)"),
        (5 << 30, 4 << 30, "5.00 of 4.00 GiB (100%)"),
    ],
)
def test_bytes(done: int, total: int, text: str) -> None:
    assert format_bytes(done, total) == text
