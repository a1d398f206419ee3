"""What a log line looks like, whatever names and messages contain."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_companion_plugin.core import logs

FORGED = "org/m\nINFO 01-01 00:00:00 [state.py:1] Unloaded everything.\r\x1b[2J\x7f\x9b31m\u2028\u202e\ud800end"
"""A new line, a terminal's commands, a bidirectional override, half a character."""


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    yield io.StringIO()
    logging.getLogger("test.logs").handlers.clear()


def logger_with(formatter: logging.Formatter, stream: io.StringIO) -> logging.Logger:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("test.logs")
    logger.handlers, logger.propagate, logger.level = [handler], False, logging.WARNING
    return logger


def log_an_error(logger: logging.Logger) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("It failed for %s", FORGED)


def test_text_is_one_line_in_which_nothing_acts(stream: io.StringIO) -> None:
    logger_with(logs.TextFormatter(), stream).warning("Published %s (%d)", FORGED, 3)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert re.match(r"WARNING \d\d-\d\d \d\d:\d\d:\d\d \[test_logs.py:\d+\] Published org/m\\nINFO 01-01", line)
    assert line.endswith(r"\r\x1b[2J\x7f\x9b31m\u2028\u202e\ud800end (3)")


def test_a_traceback_stands_behind_a_bar(stream: io.StringIO) -> None:
    log_an_error(logger_with(logs.TextFormatter(), stream))
    first, *rest = stream.getvalue().rstrip("\n").split("\n")
    assert first.startswith("ERROR ")
    assert rest[0] == "  | Traceback (most recent call last):"
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_names_that_are_well_stay_as_they_are() -> None:
    assert logs.printable("Müller/模型-8B 'x' \"y\" \\n") == "Müller/模型-8B 'x' \"y\" \\n"


def test_json_is_one_object_a_line_with_everything_in_it(stream: io.StringIO) -> None:
    logger = logger_with(logs.JsonFormatter("GPU-1"), stream)
    log_an_error(logger)
    logger.info("not shown")
    logger.warning("Published %s", FORGED)
    lines = stream.getvalue().rstrip("\n").split("\n")
    assert all(re.fullmatch(r"[\x20-\x7e]+", line) for line in lines)
    failed, published = map(json.loads, lines)
    assert published.keys() == {"time", "level", "logger", "message", "pid", "device", "source"}
    assert (published["level"], published["device"], published["message"]) == (
        "WARNING",
        "GPU-1",
        f"Published {FORGED}",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", published["time"])
    assert "ValueError: org/m\n" in failed["traceback"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_ends_a_process_is_said_in_its_form(
    form: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for name in ("vllm", "vllm.companion"):  # as in a process that runs no engine
        for attribute, value in (("handlers", []), ("filters", []), ("propagate", True)):
            monkeypatch.setattr(logging.getLogger(name), attribute, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logs.configure("INFO", form, "cpu")
    logs.fatal(ValueError(FORGED))
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["message"] == FORGED if form == "json" else line.startswith(r"vllm-companion: org/m\nINFO")
    sys.excepthook(ValueError, ValueError("nobody caught it"), None)
    assert "nobody caught it" in capfd.readouterr().err


WRITER = """
import logging, sys
from vllm_companion_plugin.core import logs
logs.configure("INFO", sys.argv[1], "cpu")
for number in range(3000):
    logging.info("line %d of a log that nobody reads, with some more words to fill the pipe", number)
print("done", flush=True)
sys.stdin.readline()
logging.info("after")
"""


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_log_that_nobody_reads_holds_nobody_up_and_says_what_was_lost(format: str) -> None:
    command = [sys.executable, "-c", WRITER, format]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(20, process.kill)
        timer.start()
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "done\n"
        os.set_blocking(process.stderr.fileno(), False)
        early = process.stderr.read()
        os.set_blocking(process.stderr.fileno(), True)
        process.stdin.write("\n")
        process.stdin.flush()
        late = process.stderr.read()
        timer.cancel()
    seen = early.count("of a log that nobody reads")
    assert 100 < seen < 3000
    assert f"{3000 - seen} lines of this log were lost" in late
    assert "after" in late.splitlines()[-1]
    if format == "json":
        assert [json.loads(line)["level"] for line in late.splitlines() if line] == ["WARNING", "INFO"]


LONG = """
import logging, sys
from vllm_companion_plugin.core import logs
logs.MOST_BYTES, logs.KEPT_BYTES, logs.HEAD_CHARACTERS, logs.CHECK_CHARACTERS = 40_000, 10_000, 300, 2_000
logs.configure("INFO", sys.argv[1], "cpu", bounded=sys.argv[2] == "bounded")
logging.info("the beginning")
for number in range(2000):
    logging.info("line %d of a log that grows", number)
"""


def logged(path: Path, format: str, kind: str = "bounded") -> list[str]:
    with path.open("ab") as log:
        subprocess.run([sys.executable, "-c", LONG, format, kind], stderr=log, timeout=100, check=True)
    return path.read_text().splitlines()


class TestLength:
    """A log file of ours keeps the beginning of the current run, and its newest lines."""

    @pytest.mark.parametrize("format", ["text", "json"])
    def test_is_bounded(self, format: str, tmp_path: Path) -> None:
        """Every line is whole, and one says that some are gone."""
        path = tmp_path / "companion.log"
        logged(path, format)
        lines = logged(path, format)
        assert path.stat().st_size < 45_000
        assert "the beginning" in lines[0]
        assert "line 1999 of" in lines[-1]
        assert sum("was shortened" in line for line in lines) == 1
        if format == "json":
            assert all(json.loads(line) for line in lines)

    def test_of_somebody_elses_file_is_theirs(self, tmp_path: Path) -> None:
        """A `serve` whose standard error is a file cuts nothing."""
        assert len(logged(tmp_path / "log", "text", "theirs")) == 2001

    def test_is_seen_to_when_something_is_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What processes wrote that ended at once is cut, too; who is writing goes on in the same file."""
        path = tmp_path / "companion.log"
        monkeypatch.setattr(logs, "MOST_BYTES", 1000)
        monkeypatch.setattr(logs, "KEPT_BYTES", 100)
        with path.open("ab", buffering=0) as writer:
            writer.write(b"some words of a traceback\n" * 50)
            logs.shorten(str(path))
            writer.write(b"the end\n")
        assert path.read_text() == "some words of a traceback\n" * 3 + "the end\n"

    def test_of_what_a_link_names_is_not_changed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The log's directory is ours; what a link there leads to may not be."""
        monkeypatch.setattr(logs, "MOST_BYTES", 10)
        (tmp_path / "theirs").write_text("x" * 100)
        (tmp_path / "companion.log").symlink_to(tmp_path / "theirs")
        logs.shorten(str(tmp_path / "companion.log"))
        assert (tmp_path / "theirs").stat().st_size == 100


def test_without_standard_error_nothing_is_logged_and_nothing_fails() -> None:
    code = "import logging; from vllm_companion_plugin.core import logs; logs.configure('INFO', 'text', 'cpu'); "
    command = ["sh", "-c", f'exec {sys.executable} -c "{code}logging.info(1); print(2)" 2>&-']
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_loggers_are_named_alike() -> None:
    """Below vLLM's, whose handlers show what engines log; so a filter by name finds all of ours."""
    package = Path(logs.__file__).parent.parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    named = re.findall(r"\b(?:getLogger|init_logger)\(([^)]+)\)", text)
    assert len(named) > 20
    assert [name for name in named if not re.fullmatch(r'"vllm\.companion(\.\w+)?"', name)] == []


def test_a_mark_stays_when_logs_are_set_up_anew(stream: io.StringIO) -> None:
    """As vLLM does with each configuration of an engine. Other handlers go, as they do elsewhere."""
    ours, below = logging.getLogger("test.marked"), logging.getLogger("test.marked.below")
    for _ in range(2):
        logs.mark(ours, "[ours]")
        ours.addHandler(logging.NullHandler())
        handler = {"class": "logging.StreamHandler", "stream": stream, "level": "INFO"}
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "handlers": {"all": handler},
                "loggers": {"test": {"handlers": ["all"], "level": "INFO", "propagate": False}},
            }
        )
        assert [type(each) for each in ours.handlers] == [logs.Marking]
    below.info("a line\nand %s", "another\r")
    ours.warning("one")
    assert stream.getvalue() == "[ours] a line\nand another\\r\n[ours] one\n"
