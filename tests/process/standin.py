"""Stand-ins for engines: processes that take every step of one with the real client library and a real arena.

Run as a program this is their nursery. It imports the library once and forks a stand-in for each request, which
costs milliseconds. It never speaks gRPC itself, so that its forks can.

A stand-in tells each step to the driver (tests/process/chaos.py) before it takes the next one. At a step that it
was armed for it kills itself, freezes, or does that to the companion: exactly there, or a moment later.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.cli import upgrade as upgrade_module
from vllm_companion_plugin.client import mirror as holder_module
from vllm_companion_plugin.client import publication
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.core import placement
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import (
    Manifest,
    ModuleInfo,
    SlotInfo,
    Stage,
    StorageInfo,
    TensorInfo,
    TensorKind,
)
from vllm_companion_plugin.core.status import EntryState, Progress
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, LeaseLostError, TicketError
from vllm_companion_plugin.host import spawn
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.settings import resolve
from vllm_companion_plugin.wire import fd_channel
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes, manifest_to_bytes

PACKET_BYTES = 1 << 16
WAIT_S = 15.0


def key_of(number: int) -> EntryKey:
    return EntryKey(f"{number:02x}" * 32, f"chaos/model-{number}", fields={"number": str(number)})


def content_of(seed: int, number: int) -> list[bytes]:
    """Every tensor of model `number`, as its checkpoint has it."""
    rng = random.Random(f"{seed}/{number}")
    return [rng.randbytes(rng.randint(1, 30_000)) for _ in range(12)]


def companions(runtime_dir: str) -> list[int]:
    """Pids of companions of this directory that live, also of those that have not come to listen yet."""
    wanted = f"COMPANION_RUNTIME_DIR={runtime_dir}".encode()
    return [
        pid
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
        if b"vllm_companion_plugin.holder" in _read(pid, "cmdline") and wanted in _read(pid, "environ").split(b"\0")
    ]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


class StandIn:
    """One process, from its fork to its end."""

    def __init__(self, driver: socket.socket, seed: int, number: int) -> None:
        self.driver = driver
        self.settings = resolve()
        self.key = key_of(number)
        self.content = content_of(seed, number)
        self.armed: dict[str, Any] = {}
        self._arming = threading.Lock()
        self.holder: Mirror | None = None
        self.arena: arenas.Arena | None = None
        self.manifest = self._place()[0]

    # ---- telling, and dying

    def tell(self, **message: Any) -> None:
        self.driver.send(json.dumps(message).encode())

    def step(self, name: str) -> None:
        self.tell(step=name)
        with self._arming:  # who answers that it was armed anew has told before what it does yet
            if self.armed.get("at") == name:
                armed, self.armed = self.armed, {}
                self._carry_out(armed["act"], armed["delay_s"])

    def _carry_out(self, act: str, delay_s: float) -> None:
        if act == "die":
            self.tell(doomed=True)
            if delay_s:
                signal.setitimer(signal.ITIMER_REAL, delay_s)  # nothing handles it: the kernel ends us, wherever we are
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        elif act in ("freeze", "kill and freeze"):
            if act == "kill and freeze":
                self.tell(soon="kill")
                self._harm_companion("kill")
            self.tell(frozen=os.getpid(), for_s=delay_s)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif delay_s:
            self.tell(soon=act)
            threading.Timer(delay_s, self._harm_companion, (act,)).start()
        else:
            self.tell(soon=act)
            self._harm_companion(act)

    def _harm_companion(self, act: str) -> None:
        """`kill` or `stop` (as SIGTERM does) whatever companion there is, or `halt` it for a moment."""
        number = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "halt": signal.SIGSTOP}[act]
        pids = companions(self.settings.runtime_dir)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self.tell(harmed=act, pids=pids)

    def watch_steps(self) -> None:
        """Announce what happens inside the library, too."""

        def told(function: Callable[..., Any], before: str = "", after: str = "") -> Callable[..., Any]:
            @wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if before:
                    self.step(before)
                result = function(*args, **kwargs)
                if after:
                    self.step(after)
                return result

            return wrapper

        spawn._spawn = told(spawn._spawn, "spawning", "spawned")
        fd_channel.deposit = told(fd_channel.deposit, after="deposited")
        publication.Publication._send = told(publication.Publication._send, after="committed")  # type: ignore[method-assign]
        Mirror._attach_again = told(Mirror._attach_again, "noticed", "handed back")  # type: ignore[method-assign]
        holder_module.connect = told(holder_module.connect, after="connected again")  # type: ignore[attr-defined]

    # ---- an engine's life

    def run(self) -> None:
        self.step("started")
        try:
            self._obtain()
        except CompanionError as error:
            self.tell(alone=f"{error.code}: {error}")  # an engine would load by itself
        self.step("serving")
        self.tell(serving=True)
        while True:
            order = json.loads(self.driver.recv(PACKET_BYTES) or '{"do": "leave"}')
            if order["do"] == "leave":
                break
            if order["do"] == "arm":
                with self._arming:
                    self.armed = order["armed"]
            self.tell(answer=self.look())
        self.step("leaving")
        if self.holder is not None:
            self.holder.close()
        if self.arena is not None:
            self.arena.close()

    def _obtain(self) -> None:
        """As engine/session.py does: what ends with a companion is asked for once more."""
        try:
            self._ask()
        except (CompanionUnavailableError, LeaseLostError, TicketError):
            self.step("asking again")
            self._ask()

    def _ask(self) -> None:
        connection = connect("cpu", self.settings, spawn=True)
        self.step("connected")
        done = False
        while not done:
            lease = connection.attach(self.key, may_load=True, client_name="stand-in")
            self.step("asked")
            try:
                outcome = lease.wait(self.settings.wait_timeout_s, lambda loader: self.step("waiting"))
                if isinstance(outcome, Granted):
                    done = self._load(connection, lease, outcome)
                else:
                    done = self._attach(lease, outcome)
            except BaseException:
                lease.release()
                connection.close()
                raise

    def _load(self, connection: CompanionConnection, lease: Lease, granted: Granted) -> bool:
        """False if somebody else had it before we could begin."""
        self.step("granted")
        election = LoaderElection(device_paths("cpu", self.settings))
        with election.acquire(self.settings.wait_timeout_s, self.key.model):
            self.step("elected")
            if any((e.key.id, e.state) == (self.key.id, EntryState.READY) for e in connection.status().entries):
                self.step("was handed back")  # by whoever held the lock before us
                lease.release()
                return False
            granted.publication.report(Progress("loading", 1, 2))
            election.sign_of_life()
            self.step("loading")
            manifest, size_bytes = self._place()
            writer = arenas.create(arenas.MEMFD, size_bytes)
            writer.add_block(size_bytes)
            for storage, data in zip(manifest.storages, self.content, strict=True):
                writer.write(storage.offset_bytes, _address(data), len(data))
                if storage is manifest.storages[5]:
                    self.step("packing")
            writer.flush()
            self.arena = writer.seal()
            self.step("packed")
            encoded = manifest_to_bytes(manifest)
            try:
                generation = granted.publication.publish(
                    self.arena.info, self.arena.fds, encoded, len(manifest.tensors)
                )
            except CompanionError as error:
                if not lease.lost.wait(2):
                    self.tell(alone=f"{error.code}: {error}")  # its model is bound to the arena: it serves from there
                    lease.release()
                    return True
                self.step("the next one gets it")
                generation = granted.publication.generation
            self.step("published")
            published = granted.publication.published
            self._hold(lease, Held(self.key, generation, self.arena.info, self.arena.fds, encoded, published))
            assert self.holder is not None
            self.holder.wait_known(WAIT_S)
        return True

    def _attach(self, lease: Lease, ready: Ready) -> bool:
        self.step("ready")
        manifest = manifest_from_bytes(ready.manifest)
        check_manifest_fits(manifest, ready.arena)
        assert manifest == self.manifest
        fds = ready.redeem()
        self.step("redeemed")
        self.arena = arenas.open_arena(ready.arena, fds)
        self.step("attached")
        assert self.is_right()
        self.step("verified")
        arena = self.arena
        self._hold(lease, Held(ready.key, ready.generation, arena.info, arena.fds, ready.manifest, ready.published))
        return True

    def _hold(self, lease: Lease, held: Held) -> None:
        self.holder = Mirror("cpu", self.settings, held, lease, "stand-in")
        self.step("held")

    def _place(self) -> tuple[Manifest, int]:
        sizes = [len(data) for data in self.content]
        plan = placement.plan(sizes, [0] * len(sizes), 4096)
        storages = tuple(StorageInfo(*place) for place in zip(plan.offsets, sizes, strict=True))
        tensors = tuple(TensorInfo(i, 0, "uint8", (n,), (1,), "Tensor") for i, n in enumerate(sizes))
        slots = tuple(SlotInfo(f"weight_{i}", TensorKind.PARAMETER, i) for i in range(len(sizes)))
        module = ModuleInfo("", (), "Model", slots, {})
        return Manifest(Stage.UNPROCESSED, storages, tensors, (module,)), plan.size_bytes

    # ---- looking

    def is_right(self) -> bool:
        """Whether every mapped byte is the checkpoint's."""
        assert self.arena is not None
        return all(
            ctypes.string_at(self.arena.address + storage.offset_bytes, storage.size_bytes) == data
            for storage, data in zip(self.manifest.storages, self.content, strict=True)
        )

    def look(self) -> dict[str, Any]:
        holder, arena = self.holder, self.arena
        holds = holder is not None and not holder._closed.is_set()
        return {
            "right": arena is None or self.is_right(),
            "inode": os.fstat(arena.fds[0]).st_ino if arena is not None else 0,
            "generation": holder._held.generation if holder is not None and holds else 0,
            "lost": holder.lost if holder is not None and holds else False,
            "fds": _open_fds(),
            "maps": sum("memfd:vllm-companion" in line for line in open("/proc/self/maps")),
            "threads": threading.active_count(),
        }


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def _open_fds() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            kind = (
                "memfd"
                if target.startswith("/memfd:")
                else "file"
                if target.startswith("/")
                else target.partition(":")[0]
            )
            kinds[kind] += 1
    return kinds


class Upgrader(StandIn):
    """`vllm-companion upgrade`, with its steps."""

    def run(self) -> None:
        def tell_end(*args: Any, **kwargs: Any) -> None:
            self.step("ending the old one")
            ended(*args, **kwargs)
            self.step("ended the old one")

        ended, upgrade_module.shut_down = upgrade_module.shut_down, tell_end  # type: ignore[attr-defined]
        upgrade_module.settings_of = lambda parsed: self.settings  # type: ignore[attr-defined]
        try:
            upgrade_module.upgrade(argparse.Namespace(device="cpu"))
        except CompanionError as error:
            self.tell(alone=f"{error.code}: {error}")


ROLES = {"engine": StandIn, "upgrader": Upgrader}


def _be(kind: str, driver: socket.socket, order: dict[str, Any]) -> int:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        standin = ROLES[kind](driver, order["seed"], order["number"])
        standin.armed = order["armed"]
        standin.watch_steps()
        standin.run()
        standin.tell(left=True)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def nursery(control: socket.socket) -> None:
    """Fork a stand-in for each request until the driver closes `control`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        packet, fds, _, _ = socket.recv_fds(control, PACKET_BYTES, 1)
        if not packet:
            return
        order = json.loads(packet)
        pid = os.fork()
        if pid == 0:
            control.close()
            code = _be(order["kind"], socket.socket(fileno=fds[0]), order)
            sys.stderr.flush()
            # As an interpreter that ends: the library's atexit hooks, and no gRPC thread that finds it half gone.
            sys.exit(code)
        os.close(fds[0])
        control.send(json.dumps({"pid": pid}).encode())


if __name__ == "__main__":
    assert "torch" not in sys.modules
    time.sleep(0)
    nursery(socket.socket(fileno=int(sys.argv[1])))
