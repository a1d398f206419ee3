"""Attachments fall asleep, and wake at their addresses wherever their bytes are by then."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.left import open_now, settle
from tests.support.place import KEY, Place, until
from tests.support.publishing import Small
from tests.support.sleeping import Sleeping, clone, content, new_key, raising, states, write
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client import mapped
from vllm_companion_plugin.client import sleeping as client_sleeping
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import Granted, Lease
from vllm_companion_plugin.client.parked import bring_back
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import EntryState, LeaseState, LoaderInfo
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    LayoutError,
    TicketError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import KINDS
from vllm_companion_plugin.wire import fd_channel

AUTO, STAY, PARK, DROP = WhenAsleep
READY, PARKED, DROPPED = EntryState.READY, EntryState.PARKED, EntryState.DROPPED
WHERE = {READY: "device", PARKED: "host", DROPPED: "nowhere"}
SOURCE = {READY: "device", PARKED: "host", DROPPED: "checkpoint"}


# ---- all transitions

OTHERS = ("nobody", "awake", "asleep 1", "asleep 2")
STARTS = ("shared", "asleep 1", "asleep 2", "private", "private asleep 1", "private asleep 2")
ACTIONS = (
    *(f"sleep {level} {wish.value}" for level in (1, 2) for wish in WhenAsleep),
    *("wake", "renew", "privatize", "close"),
)

LEFT_BEHIND = {
    # How the other sleeps, how the last one falls asleep, and what becomes of the entry.
    ("nobody", "1 auto"): PARKED,
    ("nobody", "2 auto"): DROPPED,
    ("asleep 1", "1 auto"): PARKED,
    ("asleep 1", "2 auto"): PARKED,
    ("asleep 2", "1 auto"): PARKED,
    ("asleep 2", "2 auto"): DROPPED,
} | {
    (other, f"{level} {wish}"): state
    for other in ("nobody", "asleep 1", "asleep 2")
    for level in (1, 2)
    for wish, state in (("stay", READY), ("park", PARKED), ("drop", DROPPED))
}
"""While another one is awake nothing moves."""

GIVEN_UP = {"nobody": None, "awake": READY, "asleep 1": READY, "asleep 2": DROPPED}
"""What becomes of the entry once one that was awake uses it no more, and it is not kept for others to come.

Nobody is there to make the copy that a sleeper at level 1 wishes for.
"""

REFUSED = {
    "asleep": {"sleep": "sleeps", "renew": "sleeps", "privatize": "sleeps"},
    "awake": {"wake": "is awake"},
}
PRIVATE_BYTE = 7
PAGE = 4096


class Case:
    """One attachment in a state, and perhaps another one of the same entry."""

    def __init__(self, sleeping: Sleeping, start: str, other: str) -> None:
        self.sleeping, self.start, self.other_state = sleeping, start, other
        self.other: Attachment | None = None
        self.subject = sleeping.attach()
        self.expected, self.address = content(self.subject), self.subject.arena.address
        self.original = self.expected
        self.clone = clone(self.subject)
        if other != "nobody":
            self.other = sleeping.attach()
        if other.startswith("asleep"):
            assert sleeping.sleep(self.other, int(other[-1])) == "device"  # type: ignore[arg-type]
        self.entry: EntryState | None = READY
        if start.startswith("private"):
            self.privatize()
            write(self.subject, PRIVATE_BYTE)
            self.expected = bytes([PRIVATE_BYTE]) * len(self.original)
        if start.endswith(("1", "2")):
            self.sleep(int(start[-1]), AUTO)

    @property
    def is_asleep(self) -> bool:
        return "asleep" in self.start

    def sleep(self, level: int, wish: WhenAsleep) -> None:
        """Fall asleep, and know what comes of it."""
        where = self.sleeping.sleep(self.subject, level, wish)
        if self.subject.is_private:
            assert where == ("host" if level == 1 else "nowhere")
            self.level = level
            return
        self.entry = LEFT_BEHIND.get((self.other_state, f"{level} {wish.value}"), READY)
        assert where == WHERE[self.entry]

    def privatize(self) -> None:
        self.subject.privatize(self.sleeping.connection())
        self.entry = GIVEN_UP[self.other_state]

    def check_status(self) -> None:
        """The companion shows the entry where its bytes are, and who sleeps."""
        leases = [] if self.other is None else [self.lease_state(self.other)]
        if not self.subject.is_private and self.subject.in_use:
            leases.append(self.lease_state(self.subject))
        expected = (self.entry, sorted(leases, key=lambda x: x.value)) if self.entry is not None else None
        until(lambda: states(self.sleeping) == expected, 5, f"{expected}, not {states(self.sleeping)}")

    @staticmethod
    def lease_state(attachment: Attachment) -> LeaseState:
        return LeaseState.ASLEEP if attachment.asleep else LeaseState.ATTACHED

    def check_bytes(self, attachment: Attachment, expected: bytes) -> None:
        assert not attachment.asleep
        assert content(attachment) == expected

    def wake_subject(self) -> None:
        loads = self.sleeping.loads
        source = self.sleeping.wake(self.subject)
        if self.subject.is_private:
            assert source == ("host" if self.level == 1 else "nowhere")
            if self.level == 1:
                self.check_bytes(self.subject, self.expected)
            write(self.subject, PRIVATE_BYTE)  # after level 2 it holds anything, and can be written to
        else:
            assert self.entry is not None
            assert source == SOURCE[self.entry]
            assert self.sleeping.loads - loads == (source == "checkpoint")
            self.entry = READY
        self.check_bytes(self.subject, self.expected)
        assert self.subject.arena.address == self.address

    def finish(self) -> None:
        """Whatever happened, who sleeps can wake, with its bytes."""
        if self.subject.in_use and self.subject.asleep:
            self.wake_subject()
            self.check_status()
        elif self.subject.in_use:
            self.check_bytes(self.subject, self.expected)
        if self.other is not None:
            if self.other.asleep:
                self.sleeping.wake(self.other)
            self.check_bytes(self.other, self.original)


def expected_error(start: str, action: str) -> str | None:
    return REFUSED["asleep" if "asleep" in start else "awake"].get(action.split()[0])


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("start", STARTS)
class TestTransitions:
    """From each state, each thing that can be asked for, beside each kind of another attachment."""

    def test_all(self, common: Place, start: str, other: str) -> None:
        """State, bytes, addresses and status are those of the tables above, or there is the typed error."""
        for action in ACTIONS:
            sleeping = Sleeping.of(common, new_key(), Small())
            try:
                self.check(Case(sleeping, start, other), action)
            finally:
                sleeping.close()

    @staticmethod
    def check(case: Case, action: str) -> None:
        case.check_status()
        subject, before = case.subject, case.subject.is_private
        match = expected_error(case.start, action)
        if match is not None:
            with pytest.raises(ArenaError, match=match):
                ask(case, action)
            assert (subject.asleep, subject.is_private) == (case.is_asleep, before)
        else:
            ask(case, action)
            if subject.in_use:
                assert subject.asleep == action.startswith("sleep")
            assert subject.is_private == (before or action == "privatize")
        case.check_status()
        case.finish()


def ask(case: Case, action: str) -> None:
    name, *rest = action.split()
    if name == "sleep":
        case.sleep(int(rest[0]), WhenAsleep(rest[1]))
    elif name == "wake":
        case.wake_subject()
    elif name == "renew":
        case.clone.fill_(3)
        case.subject.renew()
        assert bytes(case.clone.numpy()) in case.expected
    elif name == "privatize":
        case.privatize()
        write(case.subject, PRIVATE_BYTE)
        case.expected = bytes([PRIVATE_BYTE]) * len(case.original)
    else:
        case.subject.close()
        assert not case.subject.in_use
        if case.start == "shared" and case.other is not None:
            case.entry = GIVEN_UP[case.other_state]
        elif case.entry is DROPPED and case.other is None:
            case.entry = None


# ---- what happens to companions, loaders and other clients meanwhile


@pytest.fixture
def alone(place: Place) -> Iterator[Sleeping]:
    """With a companion that may be killed."""
    place.companion()
    made = Sleeping.of(place, KEY, Small())
    yield made
    made.close()


def kill_companion(place: Place, sleeping: Sleeping) -> None:
    """And wait until everybody knows."""
    place.processes[0].kill()
    place.processes[0].wait(30)
    leases = [attachment.lease for attachment in sleeping.attachments]
    until(lambda: all(lease.lost.is_set() for lease in leases), 5, "all know")


class TestCompanionDies:
    def test_all_asleep(self, alone: Sleeping, place: Place) -> None:
        """What only it held is lost: who wakes loads again, and says so; the other one maps that."""
        first, second = alone.attach(), alone.attach()
        expected = content(first)
        for attachment in (first, second):
            alone.sleep(attachment, 1)
        kill_companion(place, alone)
        assert alone.wake(first) == "checkpoint"
        assert alone.loads == 2
        assert alone.wake(second) == "device"
        assert content(first) == content(second) == expected

    def test_sleepers_are_told_to_the_next(self, alone: Sleeping, place: Place) -> None:
        """It shows them, and knows that the entry is nowhere; nobody starts it for their sake."""
        attachments = [alone.attach(), alone.attach()]
        alone.sleep(attachments[0], 2)
        alone.sleep(attachments[1], 1)
        kill_companion(place, alone)
        time.sleep(1.5)
        assert place.companion_pid() == place.processes[0].pid, "nobody starts one"
        place.companion()
        told = (DROPPED, [LeaseState.ASLEEP] * 2)
        until(lambda: states(alone) == told, 10, "the next companion is told")
        assert alone.wake(attachments[1]) == "checkpoint"
        assert states(alone) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
        alone.sleep(attachments[1], 2)
        assert states(alone) == told

    def test_another_is_awake(self, alone: Sleeping, place: Place) -> None:
        """It hands the entry back, and who sleeps wakes from there, in the same generation."""
        sleeper, awake = alone.attach(), alone.attach()
        expected, generation = content(awake), awake.generation
        alone.sleep(sleeper, 2)
        kill_companion(place, alone)
        until(lambda: not awake.lost, 20, "it is handed back")
        until(lambda: states(alone) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED]), 10, "the sleeper is told")
        assert alone.wake(sleeper) == "device"
        assert (alone.loads, sleeper.generation) == (1, generation)
        assert content(sleeper) == content(awake) == expected

    def test_while_one_falls_asleep(self, alone: Sleeping, place: Place) -> None:
        """Who was told to sleep and is not asked any more is awake; it falls asleep beside the next companion."""
        one = alone.attach()
        expected = content(one)
        assert one.fall_asleep(1, AUTO) == "host"
        kill_companion(place, alone)
        one.stay_awake()
        assert not one.asleep
        until(lambda: states(alone) == (READY, [LeaseState.ATTACHED]), 10, "the next companion has it")
        assert alone.sleep(one, 1) == "host"
        assert alone.wake(one) == "host"
        assert content(one) == expected


class TestAnswers:
    """That are lost, or refusals: nobody is left in a state that it cannot leave."""

    def test_of_a_sleep(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """The companion takes the client for asleep, and is told better: at once, or the next time that it sleeps."""
        one, inner = sleeping.attach(), Lease.fall_asleep
        expected = content(one)

        def fall_asleep(self: Lease, *arguments: Any) -> str:
            inner(self, *arguments)
            raise WaitTimeoutError("no answer")

        for told_at_once in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(Lease, "fall_asleep", fall_asleep)
                with pytest.raises(WaitTimeoutError):
                    one.fall_asleep(2, AUTO)
            assert states(sleeping) == (DROPPED, [LeaseState.ASLEEP])
            if told_at_once:
                one.stay_awake()
                assert states(sleeping) == (READY, [LeaseState.ATTACHED])
            assert sleeping.sleep(one, 1) == "host"
            assert states(sleeping) == (PARKED, [LeaseState.ASLEEP])
            assert sleeping.wake(one) == "host"
            assert content(one) == expected

    def test_of_a_deposit(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """The client is not taken for one that leaves a copy, who could not write."""
        one = sleeping.attach()
        with monkeypatch.context() as patch:
            patch.setattr(fd_channel, "deposit", raising(TicketError("refused")))
            with pytest.raises(TicketError):
                one.fall_asleep(1, AUTO)
        assert states(sleeping) == (READY, [LeaseState.ATTACHED])
        one.lease.stage()
        one.lease.abort_staged()

    def test_without_a_mirror(self, sleeping: Sleeping) -> None:
        """What is not handed back sleeps like the others: the companion is told."""
        lease = sleeping.connection().attach(sleeping.key, may_load=True, client_name="test")
        granted = lease.wait(30)
        assert isinstance(granted, Granted)
        one = sleeping.load(lease, granted)
        sleeping.attachments.append(one)
        assert sleeping.sleep(one, 1) == "host"
        assert states(sleeping) == (PARKED, [LeaseState.ASLEEP])
        assert sleeping.wake(one) == "host"


class Late:
    """A client that maps what `one` held, and hands that back just when another one has been elected."""

    def __init__(self, alone: Sleeping, one: Attachment) -> None:
        self.alone, self.held = alone, one.held
        self.fds = Descriptors.duplicates(one.held.fds)
        self.leases: list[Lease] = []

    def overtakes(self, act: Callable[[], Any]) -> Any:
        """Run `act` of the one that was elected; hand back once it has failed."""
        connection, held = self.alone.connection(), self.held
        lease = connection.attach(self.alone.key, may_load=False, client_name="late", held_generation=held.generation)
        self.leases.append(lease)
        outcome = lease.wait(30)
        assert isinstance(outcome, Granted)
        try:
            return act()
        finally:
            outcome.publication.hand_back(held.arena, self.fds, held.manifest, held.published, held.generation)

    def close(self) -> None:
        [lease] = self.leases
        lease.release()
        self.fds.close()


class TestOvertaken:
    """Who was elected to load or to bring back, and is overtaken by one that hands the entry back, maps that."""

    @pytest.fixture
    def late(self, alone: Sleeping, monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
        made = Late(alone, alone.attach())
        overtaken = lambda *arguments: made.overtakes(lambda: bring_back(*arguments))  # noqa: E731
        for module in (mapped, client_sleeping):
            monkeypatch.setattr(module, "bring_back", overtaken)
        yield made
        made.close()

    @pytest.mark.parametrize("level", [1, 2])
    def test_wakes(self, alone: Sleeping, late: Late, level: int) -> None:
        [one] = alone.attachments
        expected = content(one)
        alone.sleep(one, level)

        def load(lease: Lease, granted: Granted) -> Attachment:
            return late.overtakes(lambda: alone.load(lease, granted))

        assert one.wake(alone.connection(), alone.settings, "sleeper", load) == "device"
        assert (content(one), one.generation) == (expected, late.held.generation)

    def test_reads(self, alone: Sleeping, late: Late) -> None:
        """A client of the API that asks for what is parked."""
        [one] = alone.attachments
        expected = content(one)
        alone.sleep(one, 1)
        with CompanionClient("cpu", runtime_dir=alone.settings.runtime_dir).attach(KEY.model) as reader:
            assert (content(reader), reader.generation) == (expected, late.held.generation)


class TestWakesByLease:
    """Who wakes while the bytes are on the device goes on with the lease that slept."""

    def test_many_times(self, alone: Sleeping) -> None:
        """It is the same lease, and nothing piles up: descriptors, leases, what is to be called."""
        one, _ = alone.attach(), alone.attach()
        lease, expected, before = one.lease, content(one), 0
        for turn in range(30):
            alone.sleep(one, 1 + turn % 2)
            assert states(alone) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
            assert alone.wake(one) == "device"
            assert states(alone) == (READY, [LeaseState.ATTACHED] * 2)
            assert one.lease is lease
            assert (len(lease._callbacks), len(lease._retired_callbacks)) == (1, 1)
            before = before or len(open_now())
        assert content(one) == expected
        until(lambda: len(open_now()) <= before, 5, "descriptors are flat")

    def test_next_companion(self, alone: Sleeping, place: Place) -> None:
        """It hands the entry back if the companion dies afterwards, and has the news of the one that follows."""
        one, two = alone.attach(), alone.attach()
        alone.sleep(one, 1)
        alone.wake(one)
        two.close()
        alone.attachments.remove(two)
        kill_companion(place, alone)
        until(lambda: not one.lost, 20, "it is handed back")
        assert states(alone) == (READY, [LeaseState.ATTACHED])
        other = alone.attach()
        assert (content(other), alone.loads) == (content(one), 1)

    @pytest.mark.parametrize("wish", [AUTO, DROP])
    def test_cannot_map(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch, wish: WhenAsleep) -> None:
        """It sleeps on, as the companion knows, with what was wished, and can be woken again."""
        one, two = sleeping.attach(), sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 2, wish)
        with monkeypatch.context() as patch:
            patch.setattr(Attachment, "_map", raising(ArenaError("no room")))
            with pytest.raises(ArenaError, match="no room"):
                sleeping.wake(one)
        assert one.asleep
        assert states(sleeping) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
        two.close()
        until(lambda: states(sleeping) == (DROPPED, [LeaseState.ASLEEP]), 5, "nobody wants it")
        assert sleeping.wake(one) == "checkpoint"
        assert content(one) == expected

    @pytest.mark.parametrize("parked", [False, True])
    def test_woken_in_vain(self, sleeping: Sleeping, parked: bool) -> None:
        """As without room for the engine's other memory: it sleeps on as before, wherever it woke from."""
        one, two = sleeping.attach(), sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 1, AUTO if parked else DROP)
        if parked:
            assert sleeping.sleep(two, 1) == "host"
        assert sleeping.wake(one) == ("host" if parked else "device")
        one.sleep_on()
        one.let_go(sleeping.settings, "sleeper")
        if parked:
            assert states(sleeping) == (PARKED, [LeaseState.ASLEEP] * 2)
        else:
            assert states(sleeping) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED])
            two.close()
            until(lambda: states(sleeping) == (DROPPED, [LeaseState.ASLEEP]), 5, "nobody wants it")
        assert sleeping.wake(one) == ("host" if parked else "checkpoint")
        assert content(one) == expected

    @pytest.mark.parametrize("waits", [False, True])
    def test_in_vain_while_the_companion_dies(self, alone: Sleeping, place: Place, waits: bool) -> None:
        """It is handed back before it is let go, and the next companion knows that nobody is awake."""
        one = alone.attach()
        expected = content(one)
        alone.sleep(one, 1, STAY)
        assert alone.wake(one) == "device"
        kill_companion(place, alone)
        if waits:
            until(lambda: not one.lost, 20, "it is handed back")
        one.sleep_on()
        one.let_go(alone.settings, "sleeper")
        until(lambda: states(alone) == (READY, [LeaseState.ASLEEP]), 10, "it sleeps, and its bytes are there")
        assert alone.wake(one) == "device"
        assert (content(one), alone.loads) == (expected, 1)

    def test_lost_answer(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """To its waking: the companion does not take it for awake for good, if it then cannot attach either."""
        one, two = sleeping.attach(), sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 1, DROP)
        inner = Lease.wake

        def wake(self: Lease, key: EntryKey, manifest: bytes) -> Any:
            inner(self, key, manifest)
            raise WaitTimeoutError("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(Lease, "wake", wake)
            patch.setattr(Attachment, "_map", raising(ArenaError("no room")))
            with pytest.raises(ArenaError, match="no room"):
                sleeping.wake(one)
        two.close()
        until(lambda: states(sleeping) == (DROPPED, [LeaseState.ASLEEP]), 5, "nobody wants it")
        assert sleeping.wake(one) == "checkpoint"
        assert content(one) == expected

    def test_one_round_trip(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """The companion tells what to map, and gives it, in one answer."""
        one, _ = sleeping.attach(), sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Lease, "_call_with_token", raising(AssertionError("asked over gRPC, too")))
            patch.setattr(fd_channel, "redeem", raising(AssertionError("asked with a ticket, too")))
            assert sleeping.wake(one) == "device"
        assert content(one) == expected

    def test_no_descriptor_is_left(self, sleeping: Sleeping) -> None:
        """It cannot have what it is given: it sleeps on, as the companion knows, and can be woken again."""
        one, two = sleeping.attach(), sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 1)
        with one_descriptor_left(), pytest.raises(BadRequestError, match="limit of open files"):
            sleeping.wake(one)
        assert one.asleep
        until(lambda: states(sleeping) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED]), 5, "it is known to sleep")
        assert sleeping.wake(one) == "device"
        assert content(one) == content(two) == expected

    def test_hangs_up(self, alone: Sleeping, place: Place) -> None:
        """Who asked, and was gone when the answer came, has not woken: it still can, with the lease that slept."""
        one, two = alone.attach(), alone.attach()
        alone.sleep(one, 2)
        lease = one.lease
        place.processes[0].send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(WaitTimeoutError):
                fd_channel.wake(
                    place.paths.fd_socket, lease._token, hashlib.sha256(one.held.manifest).digest(), timeout_s=0.1
                )
        finally:
            place.processes[0].send_signal(signal.SIGCONT)
        assert alone.wake(one) == "device"
        assert one.lease is lease
        assert content(one) == content(two)

    def test_private_in_vain(self, sleeping: Sleeping) -> None:
        """It has its own bytes afterwards."""
        one, expected = asleep_with_its_own(sleeping)
        for _ in range(2):
            assert sleeping.wake(one) == "host"
            assert content(one) == expected
            one.sleep_on()
            one.let_go(sleeping.settings, "sleeper")
        sleeping.wake(one)
        assert content(one) == expected

    def test_private_without_room(self, alone: Sleeping) -> None:
        """It sleeps on, and has its own bytes when there is room."""
        alone.model = torch.nn.Linear(1 << 20, 16, bias=False)
        one, expected = asleep_with_its_own(alone)
        for _ in range(2):
            with no_more_addresses(), pytest.raises(ArenaError, match="memory"):
                alone.wake(one)
            assert one.asleep
            assert not one.arena.mapping.is_mapped
        assert alone.wake(one) == "host"
        assert content(one) == expected

    def test_older_companion(self, place: Place) -> None:
        """It does not know the call: who wakes attaches, and the lease that slept ends."""
        place.run("-c", WITHOUT_WAKE)
        until(lambda: is_listening(place.paths), 20, "the companion listens")
        sleeping = Sleeping.of(place, KEY, Small())
        try:
            one, _ = sleeping.attach(), sleeping.attach()
            expected, lease = content(one), one.lease
            for _ in range(2):
                sleeping.sleep(one, 1)
                assert sleeping.wake(one) == "device"
            assert one.lease is not lease
            until(lambda: states(sleeping) == (READY, [LeaseState.ATTACHED] * 2), 5, "those that slept have ended")
            assert content(one) == expected
        finally:
            sleeping.close()

    def test_is_not_asked_in_vain(self, alone: Sleeping, place: Place) -> None:
        """A companion that does not know that the lease sleeps: it is the next one, or the client has not slept."""
        one, two = alone.attach(), alone.attach()
        assert one.lease.wake(one.held.key, one.held.manifest) is None
        alone.sleep(one, 1)
        kill_companion(place, alone)
        until(lambda: states(alone) == (READY, [LeaseState.ASLEEP, LeaseState.ATTACHED]), 20, "both are known")
        assert alone.wake(one) == "device"
        assert content(one) == content(two)
        assert [
            series for series in alone.connection().metrics()[1] if series.name == "failures" and series.value
        ] == []


WITHOUT_WAKE = """
import sys
from vllm_companion_plugin.holder.__main__ import main
from vllm_companion_plugin.wire import fd_channel
del fd_channel._REQUEST_BYTES[fd_channel.WAKE]
sys.exit(main(["--device", "cpu"]))
"""


def asleep_with_its_own(sleeping: Sleeping) -> tuple[Attachment, bytes]:
    """One that has written to memory of its own, and sleeps at level 1; and what it has written."""
    one = sleeping.attach()
    one.privatize(sleeping.connection())
    write(one, PRIVATE_BYTE)
    expected = content(one)
    sleeping.sleep(one, 1)
    return one, expected


@contextlib.contextmanager
def no_more_addresses() -> Iterator[None]:
    """While open, this process can map a MiB more, and nothing larger."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def one_descriptor_left() -> Iterator[None]:
    """While open, this process can have one more file, and no other."""
    gc.collect()  # else what other tests have left may end meanwhile
    for thread in threading.enumerate():
        if thread.name == "companion-end":
            thread.join(30)
    settle()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        Descriptors(taken).close()


class TestUnloaded:
    @pytest.mark.parametrize("level", [1, 2])
    def test_asleep(self, sleeping: Sleeping, level: int) -> None:
        """Forced while all sleep: whoever wakes loads."""
        one = sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, level)
        sleeping.unload()
        assert sleeping.wake(one) == "checkpoint"
        assert content(one) == expected

    @pytest.mark.parametrize(
        ("level", "wish", "kept"),
        [(1, AUTO, True), (1, STAY, True), (1, DROP, False), (2, AUTO, False), (2, PARK, True)],
    )
    def test_awake(self, sleeping: Sleeping, level: int, wish: WhenAsleep, kept: bool) -> None:
        """It can sleep all the same. Nobody else has the bytes, so it keeps them if they are to stay anywhere."""
        one = sleeping.attach()
        expected, address = content(one), one.arena.address
        for _ in range(2):
            forget(sleeping, one)
            assert sleeping.sleep(one, level, wish) == ("host" if kept else "nowhere")
            assert not one.arena.mapping.is_mapped
            assert sleeping.wake(one) == ("host" if kept else "checkpoint")
            assert (content(one), one.arena.address) == (expected, address)

    @pytest.mark.parametrize("level", [1, 2])
    def test_written(self, sleeping: Sleeping, level: int) -> None:
        """No checkpoint has what a trainer wrote."""
        one = sleeping.attach()
        with (
            contextlib.closing(CompanionClient("cpu", runtime_dir=sleeping.settings.runtime_dir)) as client,
            client.update(sleeping.key.model, "step-1", mode="direct") as update,
        ):
            update.load({"turned": sleeping.model.turned.detach() + 1})
        one.advance(one.prepare(0, sleeping.settings))
        expected = content(one)
        forget(sleeping, one)
        assert sleeping.sleep(one, level) == "host"
        assert sleeping.wake(one) == "host"
        assert content(one) == expected
        one.privatize(None)
        assert content(one) == expected


def forget(sleeping: Sleeping, one: Attachment) -> None:
    """Have the companion forget the entry, and this attachment know it."""
    sleeping.unload()
    until(lambda: one._is_forgotten, 5, "the client is told")


class TestStayAwake:
    @pytest.mark.parametrize(("level", "where"), [(1, "host"), (2, "nowhere")])
    @pytest.mark.parametrize("other", [False, True])
    def test_takes_it_back(self, sleeping: Sleeping, level: int, where: str, other: bool) -> None:
        """The bytes were never unmapped, and the companion has them again."""
        one = sleeping.attach()
        expected = content(one)
        if other:
            sleeping.attach()
        assert one.fall_asleep(level, AUTO) == ("device" if other else where)
        one.stay_awake()
        known = (READY, [LeaseState.ATTACHED] * (1 + other))
        until(lambda: states(sleeping) == known, 5, f"{known}, not {states(sleeping)}")
        assert content(one) == expected
        entry = sleeping.entry()
        assert entry is not None
        copies = one.size_bytes if (level, other) == (1, False) else 0  # it stays as long as the generation
        assert (sleeping.loads, entry.generation, entry.host_bytes) == (1, one.generation, copies)
        other_one = sleeping.attach()
        assert content(other_one) == expected

    def test_no_copy(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without memory for the copy nothing has changed, and it can be tried again."""
        one = sleeping.attach()

        def fails(*_: object) -> Any:
            raise ArenaError("No host memory")

        with monkeypatch.context() as patch:
            patch.setattr(type(KINDS["memfd"]), "to_host", fails)
            with pytest.raises(ArenaError, match="No host memory"):
                one.fall_asleep(1, AUTO)
        assert states(sleeping) == (READY, [LeaseState.ATTACHED])
        assert content(one)
        assert sleeping.sleep(one, 1) == "host"


class Loads:
    """A `load` that does what a test says."""

    def __init__(self, sleeping: Sleeping, *errors: BaseException) -> None:
        self.sleeping, self.errors, self.calls = sleeping, list(errors), 0

    def __call__(self, lease: Lease, granted: Granted) -> Attachment:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.sleeping.load(lease, granted)


class TestLoadAgain:
    def wake(self, sleeping: Sleeping, attachment: Attachment, load: Callable[..., Attachment]) -> str:
        return attachment.wake(sleeping.connection(), sleeping.settings, "sleeper", load)

    def test_fails(self, sleeping: Sleeping) -> None:
        """It stays asleep, others may try, and so may it."""
        one, two = sleeping.attach(), sleeping.attach()
        expected = content(one)
        for attachment in (one, two):
            sleeping.sleep(attachment, 2)
        load = Loads(sleeping, ArenaError("no room: 3 of 5 GiB"))
        with pytest.raises(ArenaError, match="no room: 3 of 5 GiB"):
            self.wake(sleeping, one, load)
        assert one.asleep
        until(lambda: states(sleeping) == (DROPPED, [LeaseState.ASLEEP] * 2), 5, "both sleep")
        assert self.wake(sleeping, two, load) == "checkpoint"
        assert self.wake(sleeping, one, load) == "device"
        assert load.calls == 2
        assert content(one) == content(two) == expected

    def test_another_layout(self, sleeping: Sleeping) -> None:
        """What was loaded cannot take the place: it sleeps, and wakes once the entry is what it was."""
        one = sleeping.attach()
        expected, model = content(one), sleeping.model
        sleeping.sleep(one, 2)
        sleeping.model = torch.nn.Linear(5, 5)
        for _ in range(2):
            with pytest.raises(LayoutError, match=r"test/model-\d+ .* generation \d, and is laid out differently"):
                sleeping.wake(one)
            assert one.asleep
        sleeping.model = model
        sleeping.unload()
        assert sleeping.wake(one) == "checkpoint"
        assert content(one) == expected

    def test_other_bytes(self, sleeping: Sleeping) -> None:
        """Of the same layout: they come to the same addresses, are proved, and what is private is renewed."""
        one = sleeping.attach()
        copied, before = clone(one), content(one)
        sleeping.sleep(one, 2)
        with torch.no_grad():
            sleeping.model.turned.add_(1)
            sleeping.model.embed.weight.add_(1)
        assert sleeping.wake(one) == "checkpoint"
        assert one.generation == 2
        assert content(one) != before
        assert one.is_stale
        one.renew()
        assert bytes(copied.numpy()) == content(one)[: copied.numel()]
        assert not one.is_stale

    def test_waits_for_another_that_loads(self, alone: Sleeping, place: Place) -> None:
        """With progress, and no longer than it shall; when the loader dies, it loads."""
        one = alone.attach()
        expected = content(one)
        alone.sleep(one, 2)
        loader = place.client("another", "attach")
        assert loader.stdout is not None
        assert [loader.stdout.readline() for _ in range(2)] == ["connected\n", "granted\n"]
        waited: list[LoaderInfo] = []
        hurried = replace(alone.settings, wait_timeout_s=0.3)
        with pytest.raises(WaitTimeoutError, match=rf"another \(pid {loader.pid}\)"):
            one.wake(alone.connection(), hurried, "sleeper", alone.load, waited.append)
        assert one.asleep
        assert {info.pid for info in waited} == {loader.pid}
        sources: list[str] = []
        thread = threading.Thread(target=lambda: sources.append(alone.wake(one, waited.append)))
        del waited[:]
        thread.start()
        until(lambda: waited, 5, "it waits")
        assert thread.is_alive()
        loader.kill()
        thread.join(30)
        assert sources == ["checkpoint"]
        assert content(one) == expected


class TestBringBack:
    def test_newcomer(self, sleeping: Sleeping) -> None:
        """Somebody who attaches while the entry is parked brings it back; whoever only reads does so, too."""
        one = sleeping.attach()
        expected, generation = content(one), one.generation
        assert sleeping.sleep(one, 1) == "host"
        newcomer = sleeping.attach()
        assert (content(newcomer), newcomer.generation, sleeping.loads) == (expected, generation, 1)
        assert sleeping.sleep(newcomer, 1) == "host"
        client = CompanionClient("cpu", runtime_dir=sleeping.settings.runtime_dir)
        with client.attach(sleeping.key.model) as reader:
            assert content(reader) == expected
            assert sleeping.wake(one) == "device"
            assert sleeping.wake(newcomer) == "device"

    def test_waker_dies(self, alone: Sleeping, place: Place) -> None:
        """In the middle, before it has published: the copy is still there, and another wakes from it."""
        one = alone.attach()
        expected = content(one)
        assert alone.sleep(one, 1) == "host"
        waker = place.client("another", "attach")
        assert waker.stdout is not None
        assert [waker.stdout.readline() for _ in range(2)] == ["connected\n", "granted\n"]
        assert states(alone) == (EntryState.LOADING, [LeaseState.ASLEEP, LeaseState.LOADING])
        waker.kill()
        until(lambda: states(alone) == (PARKED, [LeaseState.ASLEEP]), 5, "it is parked again")
        assert alone.wake(one) == "host"
        assert (alone.loads, content(one)) == (1, expected)

    def test_publishing_fails(self, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch) -> None:
        """It stays asleep, and can be woken again."""
        from vllm_companion_plugin.client.publication import Publication

        one = sleeping.attach()
        expected = content(one)
        sleeping.sleep(one, 1)

        def fails(*_: object) -> Any:
            raise CompanionUnavailableError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(Publication, "hand_back", fails)
            with pytest.raises(CompanionError, match="gone"):
                sleeping.wake(one)
        assert one.asleep
        until(lambda: states(sleeping) == (PARKED, [LeaseState.ASLEEP]), 5, "it is parked again")
        assert sleeping.wake(one) == "host"
        assert content(one) == expected
