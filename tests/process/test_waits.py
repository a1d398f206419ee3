"""Every wait ends, and says who was waited for: a process that is stopped, slow or silent keeps nobody else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.place import KEY, Place, arena_of, until
from vllm_companion_plugin.client import lease
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import CompanionUnavailableError, RuntimeDirError, WaitTimeoutError
from vllm_companion_plugin.holder.process import InstanceLock
from vllm_companion_plugin.host import notes, spawn
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.locks import owner_text
from vllm_companion_plugin.wire import codec, messages

pytestmark = pytest.mark.timeout(300)

MANIFEST = b"m" * (48 << 20)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def publish(connection: CompanionConnection, manifest: bytes = b"manifest") -> Lease:
    loader = connection.attach(KEY, may_load=True, client_name="loader")
    outcome = loader.wait(30)
    assert isinstance(outcome, Granted)
    arena, fds = arena_of(b"weights")
    outcome.publication.publish(arena, fds, manifest, 3)
    fds.close()
    return loader


def answer_within(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompanionConnection._call, "__defaults__", (seconds,))
    monkeypatch.setattr(CompanionConnection.check_protocol, "__defaults__", (seconds,))
    monkeypatch.setattr(CompanionConnection.status, "__defaults__", (seconds,))


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


# ---- a companion


def test_a_stopped_companion_is_waited_for_no_longer_than_said_and_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = place.companion().pid
    named = rf"0.5 s.*pid {pid}.*kill -CONT {pid}.*kill -9 {pid}"
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        ready = connection.attach(KEY, may_load=False, client_name="reader").wait(30)
        assert isinstance(ready, Ready)
        answer_within(0.5, monkeypatch)
        monkeypatch.setattr(lease, "FD_TIMEOUT_S", 0.5)
        with stopped(pid):
            with pytest.raises(WaitTimeoutError, match=named):
                connect("cpu", place.settings, spawn=True)
            with pytest.raises(WaitTimeoutError, match=named):
                connection.status()
            with pytest.raises(WaitTimeoutError, match=named):
                connection.attach(KEY, may_load=True, client_name="reader").wait(0.5)
            with pytest.raises(WaitTimeoutError, match=r"fd.sock did not answer within 0.5 s"):
                ready.redeem()
        monkeypatch.undo()
        until(lambda: len(connection.status().entries[0].leases) >= 2, 5, "it goes on as if nothing had been")


@contextlib.contextmanager
def crowded(path: str, kind: socket.SocketKind) -> Iterator[None]:
    """So many connect there that the kernel keeps no more waiting, until somebody accepts."""
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = undo.enter_context(socket.socket(socket.AF_UNIX, kind))
                sock.setblocking(False)
                sock.connect(path)
        yield


def test_a_stopped_companion_to_which_nobody_can_connect_any_more_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = place.companion().pid
    monkeypatch.setattr(spawn, "CONNECT_TIMEOUT_S", 0.3)
    with (
        stopped(pid),
        crowded(place.paths.grpc_socket, socket.SOCK_STREAM),
        pytest.raises(CompanionUnavailableError, match=rf"Waited 0.3 s.*pid {pid}"),
    ):
        spawn.is_listening(place.paths)


@pytest.mark.parametrize("which", ["grpc_socket", "fd_socket"])
def test_who_finds_a_crowd_at_a_socket_waits_for_its_turn(place: Place, which: str) -> None:
    """Such a socket refuses at once whoever does not block; it used to be taken for a companion that is gone."""
    pid = place.companion().pid
    kind = socket.SOCK_STREAM if which == "grpc_socket" else socket.SOCK_SEQPACKET
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        ready = connection.attach(KEY, may_load=False, client_name="reader").wait(30)
        assert isinstance(ready, Ready)
        os.kill(pid, signal.SIGSTOP)
        with crowded(getattr(place.paths, which), kind):
            threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
            if which == "grpc_socket":
                assert spawn.is_listening(place.paths)
            else:
                ready.redeem().close()


def test_a_companion_that_ends_while_another_is_wanted_is_followed_by_it(place: Place) -> None:
    """It holds its lock, and listens no more. It used to be waited for until the time was over."""
    lock = InstanceLock(place.paths)
    timer = threading.Timer(1.5, lock.release)
    timer.start()
    began = time.monotonic()
    connect("cpu", replace(place.settings, spawn_timeout_s=60), spawn=True).close()
    assert time.monotonic() - began < 40
    timer.join()


def test_who_starts_a_companion_and_hangs_is_named(place: Place) -> None:
    place.environment["COMPANION_SPAWN_TIMEOUT_S"] = "0.5"
    with open(place.paths.spawn_lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, err = place.client("waiting", "spawn", "exit").communicate(timeout=100)
    assert f"Waited 0.5 s for pid {os.getpid()}, which has been starting the companion of cpu" in err


# ---- a loader


def test_a_stopped_loader_is_waited_for_as_long_as_it_may_be_silent_and_named(place: Place) -> None:
    place.companion()
    loader = place.client("loader", "attach")
    assert (line(loader), line(loader)) == ("connected", "granted")
    with connect("cpu", place.settings, spawn=False) as connection, stopped(loader.pid):
        began = time.monotonic()
        with pytest.raises(WaitTimeoutError, match=rf"0.5 s without progress: loader \(pid {loader.pid}\).*kill -9"):
            connection.attach(KEY, may_load=True, client_name="waiting").wait(0.5)
        assert time.monotonic() - began < 30


def test_a_stopped_process_that_holds_the_loaders_lock_is_waited_for_as_long_as_it_may_be_silent(place: Place) -> None:
    code = (
        "import sys\n"
        "from vllm_companion_plugin.host.election import LoaderElection\n"
        "from vllm_companion_plugin.host.runtime_dir import device_paths\n"
        "from vllm_companion_plugin.settings import resolve\n"
        "held = LoaderElection(device_paths('cpu', resolve())).acquire(5, 'model A')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    child = place.run("-c", code)
    assert line(child) == "held"
    with stopped(child.pid), pytest.raises(WaitTimeoutError, match=rf"pid {child.pid} \(model A\).*0.5 s without"):
        LoaderElection(place.paths).acquire(0.5)


def test_a_process_that_was_stopped_while_it_noted_a_hold_does_not_keep_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "LOCK_TIMEOUT_S", 0.3)
    os.close(notes.hold(place.paths, KEY, 1))
    path = os.path.join(place.paths.holders, f"{KEY.id}.1")
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeDirError, match=f"pid {os.getpid()} has kept .* locked for 0.3 s"):
            notes.hold(place.paths, KEY, 1)
    os.close(notes.hold(place.paths, KEY, 1))


# ---- readers


def test_clients_that_never_read_cost_the_companion_little_and_others_nothing(place: Place) -> None:
    process = place.companion()
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(connect("cpu", place.settings, spawn=False))
        publish(connection, MANIFEST)
        before = resident_kb(process.pid)
        request = messages.AttachRequest(protocol_version=PROTOCOL_VERSION, key=codec.key_to_message(KEY), client="x")
        for _ in range(20):
            silent = undo.enter_context(connect("cpu", place.settings, spawn=False))
            undo.callback(silent._stub.Attach(request).cancel)  # nobody iterates over it
            undo.callback(silent._stub.Watch(messages.StatusRequest()).cancel)
        until(lambda: len(connection.status().entries[0].leases) == 21, 10, "all have asked")
        for _ in range(50):  # changes, which watchers are told
            connection.attach(KEY, may_load=False, client_name="reader").release()
        began = time.monotonic()
        ready = connection.attach(KEY, may_load=False, client_name="reader").wait(30)
        seconds = time.monotonic() - began
        grown = (resident_kb(process.pid) - before) / 1024
        print(f"20 that never read: {grown:.0f} MiB; another one had 48 MiB of manifest in {seconds:.2f} s")
        assert isinstance(ready, Ready)
        assert seconds < 20
        assert grown < 200  # 20 times the manifest would be 960


def test_a_client_that_reads_slowly_gets_everything(place: Place) -> None:
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection, MANIFEST)
        request = messages.AttachRequest(protocol_version=PROTOCOL_VERSION, key=codec.key_to_message(KEY), client="x")
        call, received = connection._stub.Attach(request), 0
        for event in call:
            received += len(event.manifest_chunk)
            time.sleep(0.02)
            if received == len(MANIFEST):
                break
        call.cancel()


# ---- process numbers that mean another process by now


def test_a_number_in_a_file_is_not_taken_for_the_companion(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    process = place.companion()
    Path(place.paths.companion_lock).write_text(f"{os.getppid()}\n")
    with connect("cpu", place.settings, spawn=False) as connection:
        answer_within(0.3, monkeypatch)
        with stopped(process.pid), pytest.raises(WaitTimeoutError, match=f"kill -9 {process.pid}"):
            connection.status()


def test_who_holds_a_lock_is_known_from_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("pid 1")
    assert owner_text(str(path)) == "another process"
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert owner_text(str(path)) == f"pid {os.getpid()}"
    assert owner_text(str(tmp_path / "none")) == "another process"
