"""What a kind of memory promises that can be trained: its owner writes to it, everybody sees that, nobody else can."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys

import pytest

from tests.contract.conftest import Memory, marked
from tests.contract.test_mapping import poke
from tests.support.place import SEALS, memfd
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds.memfd import TRAINED_SEALS


@pytest.fixture(params=marked(kind for kind in arenas.KINDS.values() if kind.can_remap))
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


def trained(memory: Memory, *contents: bytes) -> arenas.Arena:
    """A trained arena of this process, as `Memory.filled`."""
    writer = memory.create(memory.page * len(contents))
    for number, content in enumerate(contents):
        writer.add_block(memory.page)
        writer.write(number * memory.page, memory.source(content), len(content))
    return writer.seal(trained=True)


def again(memory: Memory, arena: arenas.Arena) -> arenas.Arena:
    """The same memory, mapped once more, as another process has it."""
    return arenas.open_arena(arena.info, arena.fds.dup(), memory.index)


class TestOwner:
    def test_is_seen(self, memory: Memory) -> None:
        """What it writes, through the address that it filled the arena at, who maps it sees at once."""
        arena = trained(memory, b"weights", b"and more")
        reader = again(memory, arena)
        assert arena.info.trained
        with arena.writing():
            poke(memory, arena.address + memory.page, b"and less")
        assert memory.read(reader, 0, 7) == b"weights"
        assert memory.read(reader, memory.page, 8) == b"and less"
        arena.close()
        assert memory.read(reader, memory.page, 8) == b"and less"
        reader.close()

    def test_is_alone(self, memory: Memory) -> None:
        """Who maps the arena besides, or one that is not trained, is refused."""
        arena = trained(memory, b"weights")
        for other in (again(memory, arena), memory.filled(b"weights")):
            with contextlib.closing(other), pytest.raises(ArenaError, match="Nobody writes"), other.writing():
                raise AssertionError("it writes")
        arena.close()

    def test_is_followed_no_further_by_a_copy(self, memory: Memory) -> None:
        """Memory that a process has made its own keeps its bytes, which the owner changes for others."""
        arena = trained(memory, b"weights")
        reader = again(memory, arena)
        reader.privatize()
        with arena.writing():
            poke(memory, arena.address, b"changed")
        assert memory.read(reader, 0, 7) == b"weights"
        poke(memory, reader.address, b"private")
        assert memory.read(arena, 0, 7) == b"changed"
        reader.close()
        arena.close()

    def test_can_be_replaced(self, memory: Memory) -> None:
        """In a reader's mapping, by an arena that is not trained, and back."""
        arena, before = trained(memory, b"trained"), memory.filled(b"before!")
        reader = again(memory, arena)
        reader.replace(before.info, before.fds.dup())
        assert memory.read(reader, 0, 7) == b"before!"
        reader.replace(arena.info, arena.fds.dup())
        assert memory.read(reader, 0, 7) == b"trained"
        for each in (reader, before, arena):
            each.close()

    def test_parks(self, memory: Memory) -> None:
        """A copy in host memory has the bytes, and they come back."""
        arena = trained(memory, b"weights")
        kind = arenas.KINDS[memory.kind]
        host, fds = kind.to_host(arena, memory.index)
        back = kind.from_host(arena.info, host, fds, memory.index)
        arena.close()
        assert memory.read(back, 0, 7) == b"weights"
        back.close()


WRITE = """
import ctypes, sys
from tests.contract.conftest import Memory
from tests.contract.test_trained import again, trained
memory = Memory("memfd")
arena = trained(memory, b"weights")
target = again(memory, arena) if sys.argv[1] == "reader" else arena
if sys.argv[1] == "early":
    ctypes.memmove(arena.address, b"x", 1)
with arena.writing():
    ctypes.memmove(arena.address, b"x", 1)
    if sys.argv[1] == "reader":
        ctypes.memmove(target.address, b"y", 1)
print("written", flush=True)
ctypes.memmove(target.address, b"y", 1)
"""


@pytest.mark.parametrize(("who", "said"), [("owner", "written\n"), ("early", ""), ("reader", "")])
def test_a_write_outside_of_writing_or_by_a_reader_kills_the_writer(who: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", WRITE, who], timeout=100, stdout=subprocess.PIPE, text=True)
    assert (done.stdout, done.returncode) == (said, -signal.SIGSEGV)


def test_nobody_gets_a_way_to_write_to_a_trained_memfd() -> None:
    """Not by the descriptor that is handed out, nor by opening its file again; the mapping cannot be made writable."""
    memory = Memory(arenas.MEMFD)
    arena = trained(memory, b"weights")
    assert fcntl.fcntl(arena.fds[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(arena.fds[0], b"x", 0)
    fd = os.open(f"/proc/self/fd/{arena.fds[0]}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, memory.page)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):  # engines would read zeros
        os.posix_fallocate(fd, 0, 2 * memory.page)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    os.close(fd)
    reader = again(memory, arena)
    with pytest.raises(ArenaError, match="Cannot allow writes"):
        reader.mapping.allow_writes(True)
    assert ctypes.string_at(reader.address, 7) == b"weights"
    reader.close()
    arena.close()


@pytest.mark.parametrize(
    ("seals", "claims", "is_taken"),
    [
        (SEALS, False, True),
        (SEALS, True, False),
        (TRAINED_SEALS, False, False),
        (TRAINED_SEALS, True, True),
        (TRAINED_SEALS & ~fcntl.F_SEAL_SEAL, True, False),
        (TRAINED_SEALS & ~fcntl.F_SEAL_SHRINK, True, False),
        (TRAINED_SEALS & ~fcntl.F_SEAL_GROW, True, False),
        (fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, True, False),
        (0, True, False),
        (0, False, False),
    ],
)
def test_a_memfd_is_taken_for_what_its_seals_say(seals: int, claims: bool, is_taken: bool) -> None:
    page = b"x" * mmap.PAGESIZE
    info, fds = ArenaInfo("memfd", (len(page),), trained=claims), Descriptors([memfd(page, seals=seals)])
    if is_taken:
        arenas.open_arena(info, fds).close()
        return
    with pytest.raises(ArenaError, match="is not sealed against"):
        arenas.open_arena(info, fds)
    assert fds.closed


@pytest.mark.gpu
def test_memory_that_cannot_leave_its_addresses_cannot_be_trained() -> None:
    memory = Memory(arenas.CUDA_IPC)
    writer = memory.create(memory.page)
    writer.add_block(memory.page)
    with pytest.raises(ArenaError, match="cannot be trained"):
        writer.seal(trained=True)
    writer.abort()
