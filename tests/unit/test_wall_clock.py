"""The wall clock may jump: it is shown, and measures nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import time

import pytest

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import Published
from vllm_companion_plugin.holder import process
from vllm_companion_plugin.holder.registry.entries import StoredManifest
from vllm_companion_plugin.holder.registry.state import Registry
from vllm_companion_plugin.holder.service.service import CompanionService
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.settings import resolve


def test_how_long_a_load_took_is_right_though_the_clock_was_set_back() -> None:
    wall, monotonic = [1e9], [50.0]
    registry = Registry(close_fds=lambda fds: None, wall=lambda: wall[0], monotonic=lambda: monotonic[0])
    lease = registry.attach(EntryKey("a", "m"), may_load=True, pid=1, client="loader")
    wall[0], monotonic[0] = 5.0, 57.0
    registry.deposit(lease, (7,))
    registry.commit(lease, ArenaInfo("memfd", (1,)), StoredManifest((b"",), 0, b""), Published(1))
    (entry,) = registry.status()
    assert (entry.load_s, entry.ready_unix_s) == (7.0, 5.0)
    registry.end_lease(lease)
    assert registry.lifetime.idle_since == 57.0


def test_what_fails_in_time_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the companion would hold what it has for ever, without a word."""
    monkeypatch.setattr(process, "CHECK_INTERVAL_S", 0.01)
    tries = 0

    async def clock() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("Stale file handle")

    asyncio.run(asyncio.wait_for(process._go_on(clock), 60))
    assert tries == 3


def test_a_companion_lingers_as_long_as_it_should_while_the_clock_jumps_by_days(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jumps = itertools.cycle((0.0, 1e6, -1e6))
    monkeypatch.setattr(process.time, "time", lambda: 1.7e9 + next(jumps))

    async def linger() -> float:
        service = CompanionService("cpu", 0.5)
        began = time.monotonic()
        waiting = asyncio.ensure_future(process._keep_time(service))
        while not waiting.done():
            service._on_change()  # makes it look at the time again
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    assert 0.4 < asyncio.run(linger()) < 60


def test_a_sign_of_life_counts_though_the_clock_was_set_back(tmp_path: object) -> None:
    paths = device_paths("cpu", resolve({"runtime_dir": f"{tmp_path}/r"}))
    with LoaderElection(paths).acquire(1) as held:
        before = LoaderElection(paths)._last_sign()
        os.utime(held._holder_path, (1, 1))
        assert LoaderElection(paths)._last_sign() != before
