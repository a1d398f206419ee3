"""A random walk of attachments that sleep, wake, become private and die, with everything compared after each step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.place import KEY, Place, alive, until
from tests.support.sleeping import Sleeping, content, seeded, write
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.errors import CompanionUnavailableError, LeaseLostError, TicketError

T = TypeVar("T")

ATTACHMENTS = 3
STEPS = {
    **{"sleep": 30, "wake": 40, "privatize": 4, "begin anew": 6, "stay awake": 4},
    **{"kill companion": 1, "start client": 3, "kill client": 3, "unload": 1},
}
"""What is done, and how often among all."""
CLIENTS = ("awake", "asleep 1", "asleep 2", "wake")


STEPS_OF_A_WALK = 1000
WARM_STEPS = 100
"""Until then libraries open what they keep."""
SOCKETS, STACKS = 20, 60
"""By how many descriptors and lines of its map a process may have grown: of connections to the last companions, and of
threads that are there at that moment."""


class Walk:
    """Attachments of one entry, in this process, and other clients of it to be killed."""

    def __init__(self, place: Place, seed: int) -> None:
        gc.collect()  # of tests before this one, whose ends may take a moment longer
        self.before = there_now()
        self.place = place
        self.random = random.Random(seed)
        self.sleeping = Sleeping.of(place, KEY, seeded())
        self.nursery = place.run("-m", "tests.process.asleep_child")
        assert self.nursery.stdout is not None
        assert self.nursery.stdout.readline() == "ready\n"
        self.clients: list[int] = []
        self.attachments = [self.sleeping.attach() for _ in range(ATTACHMENTS)]
        self.expected = content(self.attachments[0])
        self.own: dict[
            int, int | None
        ] = {}  # by number of a private attachment: the byte that fills it, if it is known
        self.level = [0] * ATTACHMENTS
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        what = self.random.choices(list(STEPS), list(STEPS.values()))[0]
        number = self.random.randrange(ATTACHMENTS)
        attachment = self.attachments[number]
        if what == "sleep" and not attachment.asleep:
            self.level[number], wish = self.random.choice((1, 2)), self.random.choice(list(WhenAsleep))
            where = self.sleeping.sleep(attachment, self.level[number], wish)
            what = f"sleep {self.level[number]} {wish.value}: {where}"
        elif what == "wake" and attachment.asleep:
            source = self.insist(lambda: self.sleeping.wake(attachment), attachment)
            if attachment.is_private and self.level[number] == 2:
                self.fill(number)
            what = f"wake: {source}"
        elif what == "privatize" and not attachment.asleep and not attachment.is_private:
            attachment.privatize(self.sleeping.connection())
            assert content(attachment) == self.expected
            self.fill(number)
        elif what == "begin anew":
            self.begin_anew(number)
        elif what == "stay awake" and not attachment.asleep and not attachment.is_private:
            attachment.fall_asleep(self.random.choice((1, 2)), self.random.choice(list(WhenAsleep)))
            with contextlib.suppress(LeaseLostError):  # it was unloaded a moment ago
                attachment.stay_awake()
        elif what == "kill companion":
            pid = self.place.companion_pid()
            if pid and alive(pid):
                kill(pid)
        elif what == "start client" and len(self.clients) < 3:
            what = f"start client {self.start_client()}"
        elif what == "kill client" and self.clients:
            kill(self.clients.pop(self.random.randrange(len(self.clients))))
        elif what == "unload":
            self.insist(self.sleeping.unload)
        else:
            return
        self.counts[what.split(":")[0]] += 1
        self.counts[what.split(": ")[-1]] += what.startswith("wake: ")
        self.log.append(f"{number} {what}")
        self.check()

    def insist(self, act: Callable[[], T], asleep: Attachment | None = None) -> T:
        """Again and again, if the companion has been killed a moment ago; who could not wake sleeps."""
        late = time.monotonic() + 60
        while True:
            try:
                return act()
            except (CompanionUnavailableError, LeaseLostError, TicketError):
                assert asleep is None or asleep.asleep
                assert time.monotonic() < late
                time.sleep(0.02)

    def fill(self, number: int) -> None:
        self.own[number] = self.random.randrange(256)
        write(self.attachments[number], self.own[number])

    def begin_anew(self, number: int) -> None:
        self.attachments[number].close()
        self.sleeping.attachments.remove(self.attachments[number])
        self.own.pop(number, None)
        self.attachments[number] = self.insist(self.sleeping.attach)

    def start_client(self) -> str:
        what = self.random.choice(CLIENTS)
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps({"do": what, "key": KEY.id, "model": KEY.model}) + "\n")
        self.nursery.stdin.flush()
        self.clients.append(int(self.nursery.stdout.readline()))
        return what

    # ---- what holds after each step

    def check(self) -> None:
        for number, attachment in enumerate(self.attachments):
            if not attachment.asleep:
                byte = self.own.get(number)
                expected = self.expected if byte is None else bytes([byte]) * len(self.expected)
                assert content(attachment) == expected, self.story(number)
        until(lambda: self.held() == self.wanted(), 10, f"{self.wanted()}, not {self.held()}: {self.log[-20:]}")

    def wanted(self) -> dict[str, int]:
        """Memory that this process has by descriptor or mapping, and notes of what it would hand back."""
        shared = [x for x in self.attachments if not x.asleep and not x.is_private]
        mirrored = [x for x in shared if x._mirror is not None and not x._mirror.ended]
        backups = [x for x in self.attachments if x.asleep and x._backup is not None]
        private = [x for x in self.attachments if not x.asleep and x.is_private]
        return {
            "memfds": len(shared) + len(mirrored) + len(backups),
            "notes": len(mirrored),
            # What was shared before it became private is the same memfd, copied page by page.
            "maps": len(shared) + sum(x.arena.mapping._mapped.fds != () for x in private),  # type: ignore[attr-defined]
        }

    def held(self) -> dict[str, int]:
        return {what: len(found - self.before[what]) for what, found in there_now().items()}

    def story(self, number: int) -> str:
        return f"attachment {number} after {len(self.log)} steps: {self.log[-30:]}"

    def close(self) -> None:
        for pid in self.clients:
            kill(pid)
        self.nursery.kill()
        self.sleeping.close()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # one that wakes kills itself
        os.kill(pid, signal.SIGKILL)


def there_now() -> dict[str, set[tuple[str, str]]]:
    """Numbers and files of descriptors, and addresses and files of what is mapped."""
    found, mapped = descriptors(), [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return {
        **{f"{kind}s": {each for each in found if kind_of(each[1]) == kind} for kind in ("memfd", "note")},
        "maps": {(line[0], line[4]) for line in mapped if "memfd:vllm-companion" in line[-2] + line[-1]},
    }


def descriptors() -> list[tuple[str, str]]:
    """Number and target of each, and of a file without a name what tells it from others of its kind."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/self/fd/{number}"
            found.append((number, f"{os.readlink(path)} {os.stat(path).st_ino}"))
    return found


def kind_of(target: str) -> str:
    if target.startswith("/memfd:vllm-companion"):
        return "memfd"
    return "note" if "/cpu/" in target and not target.startswith("socket") else "other"


def count_others() -> int:
    return sum(kind_of(target) == "other" for _, target in descriptors())


@pytest.fixture
def walk(place: Place, request: pytest.FixtureRequest) -> Iterator[Walk]:
    place.companion()
    place.environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    made = Walk(place, request.param)
    yield made
    made.close()


def go(walk: Walk, steps: int) -> None:
    while len(walk.log) < WARM_STEPS:
        walk.step()
    others, lines = count_others(), len(Path("/proc/self/maps").read_text().splitlines())
    while len(walk.log) < steps:
        walk.step()
    until(lambda: count_others() <= others + SOCKETS, 10, "connections are given back")
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= lines + STACKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("walk", [1], indirect=True)
def test_walk(walk: Walk) -> None:
    """After each step every byte is right, and there are as many descriptors and mappings as who is awake needs."""
    go(walk, STEPS_OF_A_WALK)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("walk", range(2, 12), indirect=True)
def test_more_walks(walk: Walk) -> None:
    """The same from other seeds; every kind of step is among them."""
    go(walk, STEPS_OF_A_WALK)
    assert {"device", "host", "checkpoint", "kill companion", "privatize", "stay awake", "unload"} <= walk.counts.keys()
    assert {f"start client {what}" for what in CLIENTS} <= walk.counts.keys()
