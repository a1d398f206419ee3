"""Attachments renew what is private to them, and become private themselves."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import sleeping as support_sleeping
from tests.support.place import memfd
from tests.support.sleeping import Sleeping, clone, content, raising, states, write
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client import attachment as client_attachment
from vllm_companion_plugin.core.status import EntryState, LeaseState
from vllm_companion_plugin.errors import ArenaError, WaitTimeoutError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.mapping import Reservation
from vllm_companion_plugin.tree import pack

READY = EntryState.READY
PAGE = 4096


class TestPrivate:
    def test_is_renewed(self, sleeping: Sleeping) -> None:
        """A clone gets the arena's bytes again, whatever was written to it."""
        one = sleeping.attach()
        made = clone(one)
        expected = bytes(made.numpy())
        made.zero_()
        one.renew()
        assert bytes(made.numpy()) == expected
        assert any(expected)

    def test_tensors_stay(self, sleeping: Sleeping) -> None:
        """What viewed the shared memory views the private one, and can be written to."""
        one, other = sleeping.attach(), sleeping.attach()
        tensor, expected = one.tensors["embed.weight"], other.tensors["embed.weight"].clone()
        one.privatize(None)
        assert torch.equal(tensor, expected)
        tensor.zero_()
        assert torch.equal(other.tensors["embed.weight"], expected)
        assert one.arena.fds.closed

    def test_others_asleep(self, sleeping: Sleeping) -> None:
        """Whoever sleeps meanwhile wakes with what was published."""
        one, other = sleeping.attach(), sleeping.attach()
        expected = content(other)
        sleeping.sleep(other, 1)
        one.privatize(sleeping.connection())
        write(one, 1)
        assert sleeping.wake(other) in ("device", "host")
        assert content(other) == expected


class TestNoRoom:
    """There is no memory of one's own: whoever wanted to write stays what it was."""

    @pytest.fixture(autouse=True)
    def _blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The entry has several."""

        def copy(*arguments: Any, **named: Any) -> arenas.Arena:
            with contextlib.closing(pack.copy(*arguments, **named)) as arena:
                size_bytes = arena.info.size_bytes
                content = os.pread(arena.fds[0], size_bytes, 0)
                fds = Descriptors([memfd(content[:PAGE]), memfd(content[PAGE:])])
                return arenas.open_arena(replace(arena.info, block_sizes=(PAGE, size_bytes - PAGE)), fds)

        monkeypatch.setattr(pack, "plan", functools.partial(pack.plan, chunk_bytes=1))  # more than a page in all
        monkeypatch.setattr(support_sleeping, "copy", copy)

    @pytest.mark.parametrize("others", [0, 1])
    def test_known_before(self, sleeping: Sleeping, others: int) -> None:
        """As much is asked for as will be needed: all, if others keep what is shared; else one block at a time."""
        one = sleeping.attach()
        for _ in range(others):
            sleeping.attach()
        sizes = one.held.arena.block_sizes
        needed = sum(sizes) if others else max(sizes)
        assert sum(sizes) > max(sizes)
        with pytest.raises(ArenaError, match="others use the entry" if others else "first block of its own"):
            one.privatize(sleeping.connection(), lambda _: needed - 1)
        assert states(sleeping) == (READY, [LeaseState.ATTACHED] * (1 + others))
        one.privatize(sleeping.connection(), lambda _: needed)
        assert one.is_private

    def test_in_the_middle(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """While others use the entry, the companion knows of this one until all blocks are its own."""
        one, _ = sleeping.attach(), sleeping.attach()
        expected, sizes = content(one), one.held.arena.block_sizes
        with self.half_private(monkeypatch), pytest.raises(ArenaError, match="no memory"):
            one.privatize(sleeping.connection())
        assert (one.is_private, one.arena.shared_sizes) == (False, list(sizes[1:]))
        assert states(sleeping) == (READY, [LeaseState.ATTACHED] * 2)
        with pytest.raises(ArenaError, match="is private"):
            one.prepare(0, sleeping.settings)
        one.privatize(sleeping.connection(), lambda _: sum(sizes[1:]))
        assert content(one) == expected

    def test_in_the_middle_and_asleep(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody else has it any more: it can sleep, and loads it when it wakes."""
        one = sleeping.attach()
        expected = content(one)
        with self.half_private(monkeypatch), pytest.raises(ArenaError, match="no memory"):
            one.privatize(sleeping.connection())
        assert sleeping.sleep(one, 2) == "nowhere"
        assert sleeping.wake(one) == "checkpoint"
        assert content(one) == expected

    def test_a_companion_that_is_silent_then(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether anybody else uses the entry is not known, and all of it is private all the same."""
        one = sleeping.attach()
        connection = sleeping.connection()
        with monkeypatch.context() as patch:
            patch.setattr(type(connection), "status", raising(WaitTimeoutError("no answer")))
            one.privatize(connection)
        assert one.is_private

    @contextlib.contextmanager
    def half_private(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """There is memory for the first block alone."""
        inner = Reservation.privatize

        def privatize(self: Reservation, release: Callable[[int], None]) -> None:
            make = self._make_private

            def make_first(number: int, address: int, size_bytes: int) -> None:
                if number:
                    raise ArenaError("no memory")
                make(number, address, size_bytes)

            vars(self)["_make_private"] = make_first
            try:
                inner(self, release)
            finally:
                del vars(self)["_make_private"]

        with monkeypatch.context() as patch:
            patch.setattr(Reservation, "privatize", privatize)
            yield


def test_what_is_mapped_already_is_not_proved_again(sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing it takes no reading of all its bytes; another generation's is read."""
    one = sleeping.attach()
    with monkeypatch.context() as patch:
        patch.setattr(client_attachment, "Verification", raising(AssertionError("read")))
        one.prepare(0, sleeping.settings).close()
