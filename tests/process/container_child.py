"""What runs in a container of tests/process/test_containers.py. Prints one JSON line for each step; stdin ends it."""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from typing import Any

from tests.support.place import KEY, arena_of
from vllm_companion_plugin.cli.main import main
from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import listener_pid
from vllm_companion_plugin.settings import resolve


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


name, role, content = sys.argv[1:]
socket.sethostname(name)
settings = resolve()
tell(
    pid=os.getpid(),
    namespaces=[os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("mnt", "pid", "ipc", "net", "uts", "user")],
    tmp=os.listdir("/tmp") + os.listdir("/dev/shm"),
    processes=sum(entry.isdecimal() for entry in os.listdir("/proc")),
    interfaces=[interface for _, interface in socket.if_nameindex()],
)
if role == "stop":
    main(["stop"])
    sys.exit()
connection = connect("cpu", settings, spawn=True)
lease = connection.attach(KEY, may_load=True, client_name="engine")
outcome = lease.wait(30)
if isinstance(outcome, Granted):
    arena, fds = arena_of(content.encode())
    generation = outcome.publication.publish(arena, fds, b"manifest", 1)
    held = Held(KEY, generation, arena, fds, b"manifest", outcome.publication.published)
else:
    fds = outcome.redeem()
    held = Held(outcome.key, outcome.generation, outcome.arena, fds, outcome.manifest, outcome.published)
holder = Mirror("cpu", settings, held, lease, "engine")
mapped = mmap.mmap(fds[0], 0, mmap.MAP_SHARED, mmap.PROT_READ)
tell(
    loaded=isinstance(outcome, Granted),
    generation=held.generation,
    read=mapped[:].decode(),
    companion=listener_pid(device_paths("cpu", settings)),
)
for _ in sys.stdin:
    tell(read=mapped[:].decode(), lost=holder.lost, companion=listener_pid(device_paths("cpu", settings)))
