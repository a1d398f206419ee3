"""Containers that share nothing but the runtime directory share one model: with namespaces of their own, unprivileged.

What unshare(1) makes here is what a container runtime makes: own users, mounts, processes, IPC, network and host
name, a private /tmp and /dev/shm, and one directory that is mounted in all. docs/deploy/ has it for Docker and
Kubernetes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import until
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.settings import resolve

ROOT = Path(__file__).resolve().parent.parent.parent
NAMESPACES = ("mnt", "pid", "ipc", "net", "uts", "user")
UNSHARE = [
    *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("--ipc", "--net", "--uts", "sh", "-c"),
]
# Only /mnt is shared.
ENTER = (
    'mount --bind "$1" /mnt && mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && cd / && shift && exec "$@"'
)


def why_not(shared: str) -> str:
    """Why there can be no containers here; empty if there can."""
    if any(path.startswith("/tmp/") for path in (str(ROOT), sys.prefix)):
        return "the code is in /tmp, which a container has for itself"
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*UNSHARE, ENTER, "sh", shared, "true"], capture_output=True, text=True)
    return tried.stderr.strip() and f"namespaces are not permitted: {tried.stderr.strip()}"


class Container:
    def __init__(self, shared: str, name: str, role: str = "engine", content: str = "") -> None:
        self.name = name
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "COMPANION_RUNTIME_DIR": "/mnt/r",
        }
        environment.pop("XDG_RUNTIME_DIR", None)
        command = [sys.executable, "-m", "tests.process.container_child", name, role, content]
        # `unshare --kill-child` ends the container with itself.
        self.process = subprocess.Popen(
            [*UNSHARE, ENTER, "sh", shared, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.name} has ended"
        return dict(json.loads(line))

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def shared() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    try:
        if reason := why_not(directory):
            pytest.skip(reason)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_containers_that_share_only_the_runtime_directory_share_a_model(shared: str) -> None:
    containers: list[Container] = []

    def start(name: str, *arguments: str) -> Container:
        containers.append(Container(shared, name, *arguments))
        return containers[-1]

    try:
        first = start("web-1", "engine", "weights")
        loaded = first.hear()
        second = start("web-2", "engine", "never loaded")
        for container in (first, second):
            facts = container.facts
            assert (facts["pid"], facts["tmp"], facts["interfaces"]) == (1, [], ["lo"])
            assert facts["processes"] < 5
        ours = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in NAMESPACES]
        apart = zip(first.facts["namespaces"], second.facts["namespaces"], ours, strict=True)
        assert all(len(set(numbers)) == 3 for numbers in apart)

        attached = second.hear()
        assert (loaded["loaded"], loaded["read"]) == (True, "weights")
        assert loaded["companion"] > 1
        # The second one cannot even see the companion's process.
        assert attached == {"loaded": False, "generation": 1, "read": "weights", "companion": 0}

        settings = resolve({"runtime_dir": f"{shared}/r"})
        with connect("cpu", settings, spawn=False) as connection:
            (entry,) = connection.status().entries
        assert [(lease.pid, lease.client) for lease in entry.leases] == [(1, "engine in web-1"), (1, "engine in web-2")]

        began = time.monotonic()
        first.kill()  # and with it the companion
        until(lambda: not (news := second.ask())["lost"] and news["companion"], 10, "the second one has taken over")
        print(f"taken over {time.monotonic() - began:.2f} s after the companion's container was killed")
        assert second.ask()["read"] == "weights"
        third = start("web-3", "engine", "never loaded")
        assert third.hear() == {"loaded": False, "generation": 1, "read": "weights", "companion": 0}
        with connect("cpu", settings, spawn=False) as connection:
            (entry,) = connection.status().entries
        assert (entry.state, entry.generation, len(entry.leases)) == (EntryState.READY, 1, 2)

        stopper = start("admin", "stop")
        said, _ = stopper.process.communicate(timeout=100)
        assert "Stopped the companion of cpu" in said
        assert third.ask()["read"] == "weights"  # what is mapped stays
    finally:
        for container in containers:
            container.kill()
