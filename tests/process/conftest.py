"""Attachments beside one companion, for many tests that each have an entry of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.support.place import Place
from tests.support.publishing import Small
from tests.support.sleeping import Sleeping, new_key


@pytest.fixture(scope="module")
def common() -> Iterator[Place]:
    """A companion for many entries, each of its own test."""
    root = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    made = Place(root)
    try:
        made.companion()
        yield made
    finally:
        made.clean()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def sleeping(common: Place) -> Iterator[Sleeping]:
    made = Sleeping.of(common, new_key(), Small())
    yield made
    made.close()
