"""The keeper of CUDA IPC memory: its socket and its life. The memory here is only numbers; real memory
is the contract's and the GPU tests' business."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.left import none_left_open
from tests.support.place import KEY, Place, until
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import ArenaError, BadRequestError
from vllm_companion_plugin.keeper import client
from vllm_companion_plugin.keeper.process import Keeper
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import ipc_tag

GIB = 1 << 30
pytestmark = pytest.mark.timeout(300)


class Memory:
    """1 GiB to give away, and an allocation by which the keeper stays, however slow a test is."""

    def __init__(self) -> None:
        self.all: dict[int, int] = {}
        self.asked: list[int] = [0]
        self.waits = threading.Event()
        self.waits.set()
        self.next = 0

    @property
    def used(self) -> dict[int, int]:
        """What the test itself has asked for."""
        return {number: size_bytes for number, size_bytes in self.all.items() if number != 1}

    def allocate(self, size_bytes: int) -> tuple[int, bytes]:
        assert self.waits.wait(60)
        self.asked.append(size_bytes)
        if sum(self.used.values()) + size_bytes > GIB:
            raise ArenaError(f"Allocating {size_bytes} bytes failed: CUDA_ERROR_OUT_OF_MEMORY.")
        self.next += 1
        self.all[self.next] = size_bytes
        return self.next, bytes([self.next]) * 64

    def free(self, address: int) -> None:
        del self.all[address]


@pytest.fixture
def memory(place: Place) -> Iterator[Memory]:
    """What a keeper at `place` allocates, until it has nothing left and ends."""
    made = Memory()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(place.paths.keeper_socket)
    listener.listen(8)
    thread = threading.Thread(target=Keeper(listener, made.allocate, made.free).run, args=(1.0,))
    thread.start()
    kept = ask(place, 1)
    yield made
    kept.close()
    thread.join(60)
    listener.close()
    assert not thread.is_alive()
    assert made.all == {}


def ask(place: Place, size_bytes: int) -> Descriptors:
    return client.allocate("cpu", size_bytes, place.settings)


def test_memory_lives_until_the_last_copy_of_its_descriptor_is_closed(place: Place, memory: Memory) -> None:
    first, second = ask(place, 100), ask(place, 200)
    copy = os.dup(first[0])
    assert ipc_tag.read(first[0]) == ipc_tag.read(copy) == ipc_tag.Tag(100, os.getpid(), b"\2" * 64)
    assert ipc_tag.read(second[0]).size_bytes == 200
    second.close()
    until(lambda: memory.used == {2: 100}, 5, "the second allocation is free")
    first.close()
    assert ipc_tag.read(copy).size_bytes == 100
    assert memory.used == {2: 100}
    os.close(copy)
    until(lambda: memory.used == {}, 5, "the first allocation is free")


def test_the_status_names_who_exports_the_memory(place: Place, memory: Memory) -> None:
    fds = ask(place, 100)
    place.companion()
    process = place.run("-m", "vllm_companion_plugin.cli.main", "status")
    assert f"cpu: keeper {os.getpid()} exports the memory." in process.communicate(timeout=100)[0]
    fds.close()


def test_what_a_holder_writes_frees_nothing(place: Place, memory: Memory) -> None:
    fds = ask(place, 100)
    with socket.socket(fileno=os.dup(fds[0])) as sock:
        sock.send(b"x" * 100)
    ask(place, 1).close()
    until(lambda: memory.used == {2: 100}, 5, "only the other allocation is free")
    fds.close()


def test_too_much_is_refused_in_the_keepers_words_and_it_goes_on(place: Place, memory: Memory) -> None:
    text = r"keeper of cpu: Allocating 1073741825 bytes failed: CUDA_ERROR_OUT_OF"
    with none_left_open(), pytest.raises(ArenaError, match=text):  # the keeper, in this process, closes its end later
        ask(place, GIB + 1)
    ask(place, GIB).close()


def test_a_client_that_leaves_before_its_answer_ends_nobody(place: Place, memory: Memory) -> None:
    kept = ask(place, 100)
    for size_bytes in (GIB + 1, 50):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(place.paths.keeper_socket)
            memory.waits.clear()
            sock.send(client.SIZE.pack(size_bytes))
        memory.waits.set()
        until(lambda size_bytes=size_bytes: memory.asked[-1] == size_bytes, 5, "the request was read")
    until(lambda: memory.used == {2: 100}, 5, "nothing of it is left")
    ask(place, 1).close()
    kept.close()


def test_without_a_descriptor_left_nothing_is_allocated_and_the_keeper_goes_on(
    place: Place, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tag: ipc_tag.Tag) -> tuple[socket.socket, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(ipc_tag, "make", full)
        with pytest.raises(ArenaError):
            client.allocate("cpu", 100, replace(place.settings, spawn_timeout_s=1))
    assert memory.used == {}
    ask(place, 5).close()


@pytest.mark.parametrize("request_bytes", [b"", b"x", b"x" * 100])
def test_a_client_that_says_nothing_or_nonsense_disturbs_nobody(
    place: Place, memory: Memory, request_bytes: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(place.paths.keeper_socket)
        if request_bytes:
            sock.send(request_bytes)
        ask(place, 5).close()


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="the driver is here")
@pytest.mark.parametrize("lacks", ["bindings", "driver"])
def test_without_a_driver_no_keeper_starts_and_the_reason_is_told(
    place: Place, lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if lacks == "bindings":
        (tmp_path / "cuda.py").touch()  # no package
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    reason = "No module named 'cuda" if lacks == "bindings" else "There is no CUDA driver: "
    with pytest.raises(ArenaError, match=f"keeper of cpu could not be started: {reason}"):
        ask(place, 100)


@pytest.mark.parametrize("what", ["a file", "another socket"])
def test_a_descriptor_of_something_else_is_no_tag(what: str) -> None:
    ends = socket.socketpair()
    ends[0].send(b"\0" * 200)
    fd = os.open("/etc/hostname", os.O_RDONLY) if what == "a file" else os.dup(ends[1].fileno())
    with pytest.raises(ArenaError, match="something else"):
        ipc_tag.read(fd)
    os.close(fd)
    for end in ends:
        end.close()


# ---- what the companion makes of a keeper's end


@pytest.fixture
def connection(place: Place) -> Iterator[CompanionConnection]:
    place.companion()
    with connect("cpu", place.settings, spawn=False) as made:
        yield made


def published(connection: CompanionConnection) -> socket.socket:
    """Publishes an arena of a keeper's, whose end of the tag is returned."""
    end, fd = ipc_tag.make(ipc_tag.Tag(100, os.getpid(), b"h" * 64))
    outcome = connection.attach(KEY, may_load=True, client_name="loader").wait(30)
    assert isinstance(outcome, Granted)
    outcome.publication.publish(ArenaInfo("cuda_ipc", (100,)), [fd], b"m", 1)
    os.close(fd)
    return end


def test_an_arena_is_handed_out_while_its_keeper_lives_and_loaded_anew_afterwards(
    connection: CompanionConnection,
) -> None:
    end = published(connection)
    ready = connection.attach(KEY, may_load=True, client_name="second").wait(30)
    assert isinstance(ready, Ready)
    with ready.redeem() as redeemed:
        assert ipc_tag.read(redeemed[0]).handle == b"h" * 64
    end.close()
    third = connection.attach(KEY, may_load=True, client_name="third").wait(30)
    assert isinstance(third, Granted)
    old, new = connection.status().entries
    assert (old.state, len(old.leases), new.state) == (EntryState.RETIRED, 2, EntryState.LOADING)


def test_an_arena_whose_keeper_has_ended_is_not_taken(connection: CompanionConnection) -> None:
    end, fd = ipc_tag.make(ipc_tag.Tag(100, os.getpid(), b"h" * 64))
    end.close()
    outcome = connection.attach(KEY, may_load=True, client_name="loader").wait(30)
    assert isinstance(outcome, Granted)
    with pytest.raises(BadRequestError, match="keeper"):
        outcome.publication.publish(ArenaInfo("cuda_ipc", (100,)), [fd], b"m", 1)
    os.close(fd)
