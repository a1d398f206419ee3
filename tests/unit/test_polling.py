"""Waiting for descriptors, also for those with large numbers."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_companion_plugin.core.polling import readable

LARGE = 1500
"""`select` refuses numbers above 1023."""


@contextmanager
def pipe(number: int | None) -> Iterator[tuple[int, int]]:
    """A pipe, whose reading end has this number."""
    read, write = os.pipe()
    if number is not None:
        os.dup2(read, number)
        os.close(read)
        read = number
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("number", [None, LARGE])
def test_readable(number: int | None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft <= LARGE:
        resource.setrlimit(resource.RLIMIT_NOFILE, (LARGE + 1, hard))
    try:
        with pipe(number) as (read, write), pipe(None) as (other, _):
            began = time.monotonic()
            assert readable([read, other], 0.05) == set()
            assert time.monotonic() - began > 0.04
            assert readable([read, other], -1) == set()
            os.write(write, b"x")
            assert readable([other, read]) == readable([other, read], 1e9) == {read}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_has_ended_is_readable() -> None:
    read, write = os.pipe()
    os.close(write)
    assert readable([read], 5) == {read}
    os.close(read)
