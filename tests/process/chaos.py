"""Rounds of chaos among stand-ins for engines and the real companion; see tests/process/standin.py.

In each round some stand-ins are started, leave, are killed or frozen, at random steps, and so is the companion. All
that a round does comes from the seed and the round's number. What has to hold once it is quiet again is in `_check`.

    python -m tests.process.chaos --seed 7 --rounds 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tests.process.standin import PACKET_BYTES, companions, content_of, key_of
from tests.support.place import Place, alive
from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, LeaseState
from vllm_companion_plugin.errors import CompanionError, WaitTimeoutError
from vllm_companion_plugin.host import notes

_Answer = TypeVar("_Answer")

ENGINES = 6
MODELS = 2
QUIET_S = 60.0
SOCKETS = 8
"""Of a companion without clients: two to listen, its event loop's, and our last questions' that it has yet to close."""
START = ["started", "spawning", "spawned", "connected", "asked", "waiting"]
LOAD = ["granted", "elected", "loading", "packing", "packed", "deposited", "committed", "published"]
ATTACH = ["ready", "redeemed", "attached", "verified"]
HAND_BACK = ["noticed", "connected again", "deposited", "committed", "handed back"]
UPGRADE = ["ending the old one", "ended the old one", "spawning", "spawned"]

HARM = {signal.SIGKILL: "kill", signal.SIGTERM: "stop", signal.SIGSTOP: "halt"}


class Failure(AssertionError):
    """Something did not hold after a round."""


@dataclass
class StandIn:
    """What the driver knows of one."""

    kind: str
    number: int
    pid: int
    channel: socket.socket
    born: int
    steps: list[str] = field(default_factory=list)
    serving: bool = False
    doomed: bool = False
    soon: int = 0
    left: bool = False
    ended: bool = False
    alone: str = ""
    held: bool = False
    answers: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.pid} of model {self.number} ({', '.join(self.steps[-4:])}; {self.alone or 'shares'})"


class World:
    """One runtime directory with its stand-ins, and what each round does to them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.place = Place(tempfile.mkdtemp(prefix="vc", dir="/tmp"))
        self.log = Path(self.place.settings.runtime_dir).parent / "standins.log"
        self.counts: Counter[str] = Counter()
        self.standins: list[StandIn] = []
        self.round = 0
        self._thaw: dict[int, float] = {}
        self._going: set[int] = set()
        self._kill_at: list[tuple[float, int]] = []
        self.harmed: Counter[str] = Counter()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.log.open("w") as log:
            self.nursery = subprocess.Popen(
                [sys.executable, "-m", "tests.process.standin", str(theirs.fileno())],
                env=self.place.environment | {"COMPANION_WAIT_TIMEOUT_S": "15"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._control = ours
        self._asker = futures.ThreadPoolExecutor(1)

    # ---- a round

    def play(self) -> None:
        """One round. Raises `Failure`."""
        self.round += 1
        rng = random.Random(f"{self.seed}:{self.round}")
        self.harmed = Counter()
        engines = [x for x in self.standins if x.kind == "engine"]
        began = time.monotonic()
        # One of eight, so that states last: most rounds begin with most engines serving.
        plan = rng.choices(("keep", "leave", "die", "arm", "freeze"), (60, 12, 10, 12, 6), k=ENGINES)
        starts = [self._armed(rng, START + LOAD + ATTACH) for _ in range(ENGINES)]
        numbers = [rng.randrange(MODELS) for _ in range(ENGINES)]
        arms = [self._armed(rng, HAND_BACK, sure=True) for _ in range(ENGINES)]
        event = rng.choices(
            ("nothing", "kill", "kill twice", "halt", "stop", "shutdown", "unload", "upgrade"),
            (30, 30, 8, 8, 6, 4, 8, 6),
        )[0]
        delays, unloaded = (
            [rng.choice((0.0, rng.uniform(0, 0.1), rng.uniform(0, 0.8))) for _ in "12"],
            rng.randrange(MODELS),
        )
        upgrade = self._armed(rng, UPGRADE)
        for standin, what, armed in zip(engines, plan, arms, strict=False):
            self._disturb(standin, what, armed, rng)
        for index in range(ENGINES - len(engines)):
            self._start("engine", numbers[index], starts[index])
        self._harm(event, delays, unloaded, upgrade, began)
        self.settle()
        for standin in self.standins:
            self.counts["alone"] += bool(standin.alone)
        self.counts[event] += 1

    def settle(self) -> None:
        """Wait until it is quiet, and see that all that has to hold does."""
        self._until_quiet(time.monotonic())
        self._check()

    def _armed(self, rng: random.Random, steps: list[str], *, sure: bool = False) -> dict[str, Any]:
        acts = ("die", "freeze", "kill", "kill and freeze", "halt", "stop", "")
        act = rng.choices(acts, (40, 10, 15, 5, 5, 3, 0 if sure else 60))[0]
        delay_s = rng.choice((0.0, rng.uniform(0.0005, 0.02), rng.uniform(0.01, 0.4)))
        return {"at": rng.choice(steps), "act": act, "delay_s": delay_s} if act else {}

    def _disturb(self, standin: StandIn, what: str, armed: dict[str, Any], rng: random.Random) -> None:
        if what == "leave" or standin.alone:
            self._send(standin, {"do": "leave"})
            standin.serving = False
        elif what == "die":
            standin.doomed = True
            os.kill(standin.pid, signal.SIGKILL)
        elif what == "arm":
            self._ask(standin, armed)
        elif what == "freeze":
            os.kill(standin.pid, signal.SIGSTOP)
            self._thaw[standin.pid] = time.monotonic() + 0.3

    def _start(self, kind: str, number: int, armed: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            order = {"kind": kind, "seed": self.seed, "number": number, "armed": armed}
            socket.send_fds(self._control, [json.dumps(order).encode()], [theirs.fileno()])
        pid = json.loads(self._control.recv(PACKET_BYTES))["pid"]
        ours.setblocking(False)
        self.standins.append(StandIn(kind, number, pid, ours, self.round))

    def _harm(self, event: str, delays: list[float], number: int, upgrade: dict[str, Any], began: float) -> None:
        if event.startswith("kill"):
            self._kill_at = [(began + delay, signal.SIGKILL) for delay in delays[: 1 + event.endswith("twice")]]
        elif event == "stop":
            self._kill_at = [(began + delays[0], signal.SIGTERM)]
        elif event == "halt":
            self._kill_at = [(began + delays[0], signal.SIGSTOP)]
        elif event == "upgrade":
            self._start("upgrader", 0, upgrade)
            self.harmed["replace"] += 1
        elif event in ("unload", "shutdown"):
            time.sleep(min(delays[0], 0.3))
            with contextlib.suppress(CompanionError), self._connection() as connection:
                if event == "unload":
                    self.harmed["unload", number] += 1
                    self._hearing(partial(connection.unload, model=key_of(number).model, force=True))
                else:
                    self._note_harm("stop", [self._hearing(connection.shutdown)])

    # ---- talking with stand-ins

    def _send(self, standin: StandIn, order: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            standin.channel.send(json.dumps(order).encode())

    def _ask(self, standin: StandIn, armed: dict[str, Any]) -> dict[str, Any]:
        """Arm a serving stand-in; what it sees of itself, or nothing if it is about to die."""
        self._send(standin, {"do": "arm", "armed": armed})
        deadline = time.monotonic() + QUIET_S
        while not standin.answers:
            if standin.doomed:
                return {}
            if time.monotonic() > deadline:
                raise self._failure(f"{standin} does not answer")
            self._hear()
            time.sleep(0.001)
        return standin.answers.pop()

    def _hearing(self, question: Callable[[], _Answer]) -> _Answer:
        """What the companion answers. It may be halted, and then it is we who have to let it go on."""
        answer = self._asker.submit(question)
        while not futures.wait([answer], timeout=0.002).done:
            self._hear()
        try:
            return answer.result()
        except WaitTimeoutError as error:
            raise self._failure(str(error)) from error

    def _connection(self) -> CompanionConnection:
        return self._hearing(partial(connect, "cpu", self.place.settings, spawn=False))

    def _hear(self) -> None:
        """Take in what stand-ins say, and do what is due."""
        now = time.monotonic()
        for standin in self.standins:
            while not standin.ended:
                try:
                    packet = standin.channel.recv(PACKET_BYTES)
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    packet = b""
                if not packet:
                    self._bury(standin)
                    break
                self._take(standin, json.loads(packet), now)
        for pid, when in list(self._thaw.items()):
            # A stand-in tells its own freeze before it stops; who was halted has been stopped already, and may have
            # gone on with an earlier SIGCONT than the one of this halt.
            if when <= now and (_is_stopped(pid) or all(pid != x.pid for x in self.standins)):
                del self._thaw[pid]
                _kill(pid, signal.SIGCONT)
            elif not alive(pid):
                del self._thaw[pid]
        for item in list(self._kill_at):
            if item[0] <= now:
                self._kill_at.remove(item)
                pids = companions(self.place.settings.runtime_dir)
                for pid in pids:
                    _kill(pid, item[1])
                self._note_harm(HARM[item[1]], pids)

    def _note_harm(self, what: str, pids: list[int]) -> None:
        self.harmed[what] += 1
        if what == "halt":
            self._thaw |= dict.fromkeys(pids, time.monotonic() + 0.3)
        else:
            self._going |= set(pids)

    def _take(self, standin: StandIn, message: dict[str, Any], now: float) -> None:
        if "step" in message:
            standin.steps.append(message["step"])
            self.counts[message["step"]] += 1
            standin.held = standin.held or message["step"] == "held"
        elif "frozen" in message:
            self._thaw[message["frozen"]] = now + message["for_s"]
        elif "soon" in message:
            standin.soon += 1
        elif "harmed" in message:
            standin.soon -= 1
            self._note_harm(message["harmed"], message["pids"])
        elif "doomed" in message:
            standin.doomed = True
            self.counts[f"death at {standin.steps[-1]}"] += 1
        elif "alone" in message:
            standin.alone = message["alone"]
        elif "serving" in message:
            standin.serving = True
        elif "left" in message:
            standin.left = True
        else:
            standin.answers.append(message["answer"])

    def _bury(self, standin: StandIn) -> None:
        standin.ended = True
        standin.channel.close()
        if not (standin.doomed or standin.left):
            raise self._failure(f"{standin} ended by itself")

    # ---- quiet, and what holds then

    def _until_quiet(self, began: float) -> None:
        why = ""
        while time.monotonic() < began + QUIET_S:
            self._hear()
            why = self._unrest()
            if not why:
                self.standins = [x for x in self.standins if not x.ended]
                return
            time.sleep(0.004)
        raise self._failure(f"not quiet within {QUIET_S:g} s: {why}")

    def _unrest(self) -> str:
        """What is not at rest yet; "" if all is."""
        self._going = set(filter(alive, self._going))
        if self._kill_at or self._thaw or self._going or any(x.soon and not x.ended for x in self.standins):
            return f"{self._kill_at} is to come, {self._thaw} to go on, {self._going} to end"
        harmed = self.harmed.total()
        for standin in self.standins:
            if alive(standin.pid) if standin.ended else standin.doomed or not standin.serving:
                return f"{standin} is neither serving nor gone"
        # Who was armed to hand back badly may still be about to.
        for standin in self.standins:
            if not standin.ended:
                look = self._ask(standin, {})
                if standin.doomed:
                    return f"{standin} is about to die"
                standin.held = bool(look["generation"])
                standin.before = standin.before or look
        holding = sorted((x.pid, x.number) for x in self.standins if not x.ended and x.held)
        status = self.status()
        if len(companions(self.place.settings.runtime_dir)) != (status is not None):
            return "a companion comes or goes"
        if status is None:
            return "no companion answers" if holding or self.harmed.total() != harmed else ""
        if loading := [entry.key.title for entry in status.entries if entry.state is EntryState.LOADING]:
            return f"{loading} are being loaded, or handed back"
        attached = sorted(
            (lease.pid, int(entry.key.fields["number"]))
            for entry in status.entries
            for lease in entry.leases
            if (lease.state, entry.state) == (LeaseState.ATTACHED, EntryState.READY)
        )
        leases = sum(len(entry.leases) for entry in status.entries if entry.state is not EntryState.RETIRED)
        if self.harmed.total() != harmed or any(x.soon and not x.ended for x in self.standins):
            return "something was harmed a moment ago, or is about to be"
        if attached != holding or leases != len(holding):
            return f"the companion has {attached} of {leases} leases, and {holding} hold"
        return ""

    def status(self) -> CompanionStatus | None:
        with contextlib.suppress(CompanionError), self._connection() as connection:
            return self._hearing(connection.status)
        return None

    def _check(self) -> None:
        status = self.status()
        pids = companions(self.place.settings.runtime_dir)
        self._expect(len(pids) == (status is not None), f"companions {pids}")
        ready: dict[int, int] = {}
        kept: dict[int, tuple[int, int]] = {}
        if status is not None:
            self._expect(status.pid == pids[0], f"companion {status.pid} answers, {pids} live")
            for entry in status.entries:
                if entry.state is EntryState.RETIRED:
                    continue
                number = int(entry.key.fields["number"])
                self._expect(number not in ready, f"model {number} is there twice")
                self._expect(entry.state is EntryState.READY, f"model {number} is {entry.state.value}")
                ready[number] = entry.generation
            kept = self._arenas_of(pids[0])
            self._expect(sorted(kept) == sorted(ready), f"the companion has {ready} and keeps arenas {kept}")
            sockets = sum(target.startswith("socket") for _, target in _open_files(pids[0]))
            leases = sum(len(entry.leases) for entry in status.entries)
            self._expect(sockets <= leases + SOCKETS, f"the companion has {sockets} sockets for {leases} leases")
        for standin in self.standins:
            self._check_standin(standin, ready, kept)
        self._check_processes(pids)

    def _check_standin(self, standin: StandIn, ready: dict[int, int], kept: dict[int, tuple[int, int]]) -> None:
        look, before = self._ask(standin, {}), standin.before
        self._expect(look["right"], f"{standin} maps wrong bytes")
        self._expect(not look["lost"], f"{standin} has lost its lease")
        if look["generation"]:
            self._expect(ready.get(standin.number) == look["generation"], f"{standin} holds {look}, there are {ready}")
            self._expect(kept[standin.number] == (look["inode"], 1), f"{standin} maps a copy: {look}, {kept}")
        elif not standin.alone:
            self._expect(self._may_let_go(standin), f"{standin} does not hold any more")
            standin.alone = "let go"
        else:
            self._expect(self._may_be_alone(standin), f"{standin} is alone")
        assert before is not None
        memfds = 2 if look["generation"] else 1 if look["inode"] else 0
        self._expect(
            look["fds"].get("memfd", 0) == memfds, f"{standin} has open: {look['fds']}, at first {before['fds']}"
        )
        self._expect(look["maps"] == bool(look["inode"]), f"{standin} has {look['maps']} arenas mapped")
        for kind in look["fds"].keys() - {"memfd"}:
            more = look["fds"][kind] - before["fds"].get(kind, 0)
            # A connection of its own, once it has handed back; that to the first companion stays its engine's.
            self._expect(more <= (kind == "socket"), f"{standin} has open: {look['fds']}, at first {before['fds']}")

    def _may_let_go(self, standin: StandIn) -> bool:
        """Its model was unloaded or the companion stopped; or it had not noted its hold when the companion died."""
        if self.harmed["stop"] or self.harmed["unload", standin.number]:
            return True
        self.counts["loaded anew"] += 1
        return standin.born == self.round and self.harmed["kill"] > 0

    def _may_be_alone(self, standin: StandIn) -> bool:
        if standin.alone == "let go":
            return True
        self.counts[f"alone: {standin.alone[:60]}"] += 1
        # One death is survived by everybody; of who is hit twice, or unloaded, an engine loads by itself.
        return self.harmed.total() > 1 or any("stop" in what or "unload" in what for what in self.harmed)

    def _arenas_of(self, pid: int) -> dict[int, tuple[int, int]]:
        """Models whose arena a companion keeps: inode, and how many descriptors."""
        found: dict[int, tuple[int, int]] = {}
        for path, target in _open_files(pid):
            if target.startswith("/memfd:"):
                inode = os.stat(path).st_ino
                number = self._model_of(path)
                self._expect(found.get(number, (inode, 0))[0] == inode, f"two arenas of model {number}")
                found[number] = inode, found.get(number, (inode, 0))[1] + 1
        return found

    def _model_of(self, path: str) -> int:
        firsts = [content_of(self.seed, number)[0] for number in range(MODELS)]
        with open(path, "rb") as file:
            start = file.read(max(map(len, firsts)))
        return next(number for number, first in enumerate(firsts) if start.startswith(first))

    def _check_processes(self, pids: list[int]) -> None:
        wanted = f"COMPANION_RUNTIME_DIR={self.place.settings.runtime_dir}".encode()
        expected = {self.nursery.pid, *pids, *(x.pid for x in self.standins)}
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0") and alive(int(name)):
                    self._expect(int(name) in expected, f"process {name} is left")

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise self._failure(what)

    def _failure(self, what: str) -> Failure:
        tail = ""
        with contextlib.suppress(OSError):
            tail = self.log.read_text()[-3000:]
        with contextlib.suppress(OSError, CompanionError):
            tail += "\n--- companion\n" + Path(self.place.paths.log).read_text()[-3000:]
        steps = "\n".join(
            f"{x.pid} {x.kind} model {x.number} since {x.born}: {x.steps[-15:]} {x.alone}" for x in self.standins
        )
        return Failure(
            f"seed {self.seed}, round {self.round} (harmed {dict(self.harmed)}): {what}\n{steps}\n{tail}\n"
            f"Again: python -m tests.process.chaos --seed {self.seed} --rounds {self.round}"
        )

    # ---- the end

    def finish(self) -> None:
        """All leave. Nothing must be left of them, nor in the companion but its entries."""
        for standin in self.standins:
            self._send(standin, {"do": "leave"})
            standin.serving = False
        deadline = time.monotonic() + QUIET_S
        while any(not x.ended or alive(x.pid) for x in self.standins) and time.monotonic() < deadline:
            self._hear()
            time.sleep(0.005)
        left = [str(x) for x in self.standins if not x.ended]
        self._expect(not left, f"{left} did not end")
        self.standins = []
        self._expect(not list(notes.held(self.place.paths)), "somebody still holds something")
        self._check_processes(companions(self.place.settings.runtime_dir))

    def close(self) -> None:
        for standin in self.standins:
            if not standin.ended:
                _kill(standin.pid, signal.SIGKILL)
                standin.channel.close()
        self._asker.shutdown(wait=False)
        self._control.close()
        self.nursery.kill()
        self.nursery.wait(10)
        for pid in companions(self.place.settings.runtime_dir):
            _kill(pid, signal.SIGKILL)
        shutil.rmtree(Path(self.place.settings.runtime_dir).parent, ignore_errors=True)


def _open_files(pid: int) -> Iterator[tuple[str, str]]:
    """Each descriptor of a process: a path that opens it, and what it is."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield f"/proc/{pid}/fd/{name}", os.readlink(f"/proc/{pid}/fd/{name}")


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--verbose", action="store_true")
    parsed = parser.parse_args()
    world = World(parsed.seed)
    began = time.monotonic()
    try:
        for _ in range(parsed.rounds):
            started = time.monotonic()
            world.play()
            if parsed.verbose:
                print(f"{world.round}: {time.monotonic() - started:.2f} s, {dict(world.harmed)}", flush=True)
        world.finish()
    finally:
        print(f"seed {parsed.seed}: {world.round} rounds in {time.monotonic() - began:.1f} s; {dict(world.counts)}")
        world.close()


if __name__ == "__main__":
    main()
