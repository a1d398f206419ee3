"""A runtime directory of its own for each test that wants one, and nothing left behind."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support.place import Place


@pytest.fixture(autouse=True)
def unmarked() -> None:
    """Log lines as our code says them, also after some test has registered the plugin in this process."""
    ours: Any = logging.getLogger("vllm.companion")
    ours.__class__ = logging.Logger


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path: its name would take most of a socket path's 107 bytes.
    root = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    made = Place(root)
    try:
        yield made
    finally:
        gc.collect(1)  # what the test has left ends now, and not in the middle of the next one
        # One that was closed while it handed back may be starting a companion yet.
        for thread in threading.enumerate():
            if thread.name in ("companion-hand-back", "companion-end"):
                thread.join(30)
        made.clean()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def serve_ends_its_companions(place: Place) -> Iterator[None]:
    """`place` kills what it started, and a killed `serve` cannot end its companions."""
    yield
    for process in place.processes:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test prints or logs reaches the process that reports it: paths may hold bytes that are no UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
