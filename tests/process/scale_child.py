"""A client in a process of its own that does something often, or at a signal. Prints what it measured as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import Ready, connect
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.settings import resolve
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes

IDLE_S = 30

arenas.create(arenas.MEMFD, 4096).abort()  # imported once, not by each of a crowd


def attach(stay: Callable[[float], None] = lambda seconds: None) -> None:
    """Attach as an engine does, `stay` with the seconds that it took, and detach."""
    key = EntryKey("ab" * 32, "test/model", fields={"dtype": "bfloat16"})
    began = time.perf_counter()
    with connect("cpu", resolve(), spawn=False) as connection:
        lease = connection.attach(key, may_load=False, client_name="client")
        ready = lease.wait(30)
        assert isinstance(ready, Ready)
        manifest = manifest_from_bytes(ready.manifest)
        check_manifest_fits(manifest, ready.arena)
        arena = arenas.open_arena(ready.arena, ready.redeem())
        seconds = time.perf_counter() - began
        held = Held(ready.key, ready.generation, ready.arena, arena.fds, ready.manifest, ready.published)
        holder = Mirror("cpu", resolve(), held, lease, "client")
        stay(seconds)
        holder.close()
        arena.close()


def usage(pid: int) -> dict[str, int]:
    """What grows if something is forgotten."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "maps": len(Path(f"/proc/{pid}/maps").read_text().splitlines()),
        "threads": int(status["Threads"]),
        "space_kb": int(status["VmSize"].split()[0]),
        "resident_kb": int(status["VmRSS"].split()[0]),
    }


def many(cycles: str, companion: str) -> None:
    """Attach and detach; what both processes use after a tenth of the cycles, and after all."""
    measured = []
    for cycle in range(1, int(cycles) + 1):
        attach()
        if cycle in (int(cycles) // 10, int(cycles)):
            time.sleep(1)  # what ends in the background has ended
            for _ in range(IDLE_S):  # gRPC's pool keeps a thread for a while that it does not need any more
                now = {"client": usage(os.getpid()), "companion": usage(int(companion))}
                if not measured or all(now[who]["threads"] <= measured[0][who]["threads"] for who in now):
                    break
                time.sleep(1)
            measured.append(now)
    print(json.dumps([*measured, threading.active_count()]))


def crowd(clients: str) -> None:
    """So many processes attach at the same moment, and stay until standard input closes; the seconds of each."""
    go, leave, told = os.pipe(), os.pipe(), os.pipe()
    for _ in range(int(clients)):
        if os.fork() == 0:
            os.close(go[1]), os.close(leave[1])
            os.read(go[0], 1)  # ends for all at once

            def stay(seconds: float) -> None:
                os.write(told[1], f"{seconds}\n".encode())
                os.read(leave[0], 1)

            attach(stay)
            return
    time.sleep(0.5)
    os.close(go[1])
    with open(told[0]) as lines:
        print(json.dumps([float(lines.readline()) for _ in range(int(clients))]), flush=True)
    sys.stdin.read()
    os.close(leave[1])
    for _ in range(int(clients)):
        os.wait()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
