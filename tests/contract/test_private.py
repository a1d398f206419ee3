"""What a kind of memory promises that can leave its addresses: to be a process's own there, and to go to the host."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.contract.conftest import Memory, marked
from tests.contract.test_mapping import content, free_bytes, maps, poke, view
from tests.support.left import none_left_open, open_now, opened_since
from tests.support.place import until
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.descriptors import Descriptors

ROUNDS = 200
WORDS = (b"weights", b"and more", b"the last")


@pytest.fixture(params=marked(kind for kind in arenas.KINDS.values() if kind.can_remap))
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


def in_blocks(memory: Memory, *words: bytes) -> arenas.Arena:
    """An arena with a block for each word, also where its writer would make one for all."""
    if memory.kind != arenas.MEMFD:
        return memory.filled(*words)
    sealed = [memory.filled(word) for word in words]
    fds = Descriptors.duplicates(fd for arena in sealed for fd in arena.fds)
    for arena in sealed:
        arena.close()
    return arenas.open_arena(ArenaInfo(arenas.MEMFD, (memory.page,) * len(words)), fds)


def read(memory: Memory, arena: arenas.Arena, count: int = len(WORDS)) -> list[bytes]:
    """The word in each of its blocks."""
    return [memory.read(arena, number * memory.page, len(WORDS[number])) for number in range(count)]


def again(memory: Memory, arena: arenas.Arena) -> arenas.Arena:
    """The same memory, mapped once more, as another process has it."""
    return arenas.open_arena(arena.info, arena.fds.dup(), memory.index)


class TestPrivatize:
    def test_bytes_stay(self, memory: Memory) -> None:
        """At their addresses, for whatever views them; and what is written to them nobody else sees."""
        arena = in_blocks(memory, *WORDS)
        others, address, seen = again(memory, arena), arena.address, view(memory, arena, memory.page, 8)
        arena.privatize()
        assert arena.is_private
        assert arena.fds.closed
        assert (arena.address, read(memory, arena), content(seen)) == (address, [*WORDS], b"and more")
        poke(memory, arena.address + memory.page, b"and less")
        assert content(seen) == b"and less"
        assert read(memory, others) == [*WORDS]
        others.close()
        assert read(memory, arena) == [b"weights", b"and less", b"the last"]
        arena.privatize()
        assert read(memory, arena) == [b"weights", b"and less", b"the last"]
        arena.close()

    @pytest.mark.parametrize("number", range(len(WORDS)))
    def test_fails_in_the_middle(self, memory: Memory, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """Every block has its bytes, those before it are private, and it can be tried again."""
        arena = in_blocks(memory, *WORDS)
        others, mapping = again(memory, arena), type(arena.mapping)
        real = mapping._make_private  # type: ignore[attr-defined]

        def fails_once(self: Any, block: int, *rest: Any) -> None:
            if block == number:
                raise ArenaError("No memory for a block")
            real(self, block, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(mapping, "_make_private", fails_once)
            for _ in range(2):
                with pytest.raises(ArenaError, match="No memory for a block"):
                    arena.privatize()
                assert read(memory, arena) == [*WORDS]
                assert [fd < 0 for fd in arena.fds] == [block < number for block in range(len(WORDS))]
        arena.privatize()
        poke(memory, arena.address + number * memory.page, b"written")
        assert memory.read(arena, number * memory.page, 7) == b"written"
        assert read(memory, others) == [*WORDS]
        arena.close()
        others.close()

    def test_needs_something_mapped(self, memory: Memory) -> None:
        """And what is private is replaced by nobody."""
        arena = in_blocks(memory, *WORDS)
        kept, info = arena.fds.dup(), arena.info
        arena.unmap()
        with pytest.raises(ArenaError, match="No memory is mapped"):
            arena.privatize()
        arena.map_again(info, kept.dup())
        arena.privatize()
        with pytest.raises(ArenaError, match=r"No memory is mapped .* replace"):
            arena.replace(info, kept.dup())
        assert read(memory, arena) == [*WORDS]
        arena.close()
        with pytest.raises(ArenaError, match="closed"):
            arena.privatize()
        kept.close()

    def test_is_given_up_for_what_is_shared(self, memory: Memory) -> None:
        """After it was unmapped, the shared memory comes back, with its bytes."""
        arena = in_blocks(memory, *WORDS)
        kept, info = arena.fds.dup(), arena.info
        arena.privatize()
        poke(memory, arena.address, b"written")
        arena.unmap()
        arena.map_again(info, kept)
        assert not arena.is_private
        assert read(memory, arena) == [*WORDS]
        arena.close()


class TestMapPrivate:
    def test_is_writable(self, memory: Memory) -> None:
        """New memory at the old addresses, in blocks of the same sizes."""
        arena = in_blocks(memory, *WORDS)
        address, seen = arena.address, view(memory, arena, memory.page, 8)
        arena.privatize()
        arena.unmap()
        arena.map_private()
        assert (arena.is_private, arena.address) == (True, address)
        for number, word in enumerate(WORDS):
            poke(memory, arena.address + number * memory.page, word)
        assert (read(memory, arena), content(seen)) == ([*WORDS], b"and more")
        with pytest.raises(ArenaError, match="mapped at these addresses already"):
            arena.map_private()
        arena.close()
        with pytest.raises(ArenaError, match="closed"):
            arena.map_private()


class TestHost:
    def test_there_and_back(self, memory: Memory) -> None:
        """A copy in host memory, which any process can read and none can write, makes the same arena again."""
        arena = in_blocks(memory, *WORDS)
        kind = arenas.KINDS[memory.kind]
        with none_left_open():
            info, fds = kind.to_host(arena, memory.index)
            assert (info.kind, info.size_bytes) == (arenas.MEMFD, arena.info.size_bytes)
            arenas.KINDS[arenas.MEMFD].check(info, fds)  # sealed
            made = kind.from_host(arena.info, info, fds.dup(), memory.index)
            assert made.info == arena.info
            assert read(memory, made) == read(memory, arena) == [*WORDS]
            made.close()
            fds.close()
        arena.close()

    def test_outlives_the_arena(self, memory: Memory) -> None:
        arena = in_blocks(memory, *WORDS)
        kind, info = arenas.KINDS[memory.kind], arena.info
        host, fds = kind.to_host(arena, memory.index)
        arena.close()
        made = kind.from_host(info, host, fds, memory.index)
        assert read(memory, made) == [*WORDS]
        made.close()

    def test_of_private_memory(self, memory: Memory) -> None:
        """What was written is what is copied, and what comes back."""
        arena = in_blocks(memory, *WORDS)
        kind = arenas.KINDS[memory.kind]
        arena.privatize()
        poke(memory, arena.address, b"written")
        host, fds = kind.to_host(arena, memory.index)
        poke(memory, arena.address, b"later!!")
        arena.unmap()
        arena.map_private()
        kind.fill(arena, host, fds, memory.index)
        assert fds.closed
        assert read(memory, arena) == [b"written", *WORDS[1:]]
        poke(memory, arena.address, b"writes!")
        assert memory.read(arena, 0, 7) == b"writes!"
        arena.close()

    def test_of_another_size(self, memory: Memory) -> None:
        """A copy of something else is refused, and closed."""
        small, arena = in_blocks(memory, *WORDS[:2]), in_blocks(memory, *WORDS)
        kind, own = arenas.KINDS[memory.kind], arena.fds
        with none_left_open():
            host, fds = kind.to_host(small, memory.index)
            copies = [fds.dup(), fds]
            with pytest.raises(ArenaError, match=r"bytes is none of|blocks"):
                kind.from_host(arena.info, host, copies[0], memory.index)
            arena.privatize()
            with pytest.raises(ArenaError, match="bytes is none of"):
                kind.fill(arena, host, copies[1], memory.index)
        assert all(copy.closed for copy in (*copies, own))
        assert read(memory, arena) == [*WORDS]
        arena.close()
        small.close()


def test_nothing_is_left_behind(memory: Memory) -> None:
    """However often memory becomes private, goes to the host, and comes back as either."""
    arena = in_blocks(memory, *WORDS)
    kind, kept, info = arenas.KINDS[memory.kind], arena.fds.dup(), arena.info

    def cycle() -> None:
        arena.privatize()
        poke(memory, arena.address, b"written")
        host, fds = kind.to_host(arena, memory.index)
        arena.unmap()
        arena.map_private()
        kind.fill(arena, host, fds, memory.index)
        assert read(memory, arena) == [b"written", *WORDS[1:]]
        arena.unmap()
        arena.map_again(info, kept.dup())
        host, fds = kind.to_host(arena, memory.index)
        with contextlib.closing(kind.from_host(info, host, fds, memory.index)) as made:
            assert read(memory, made) == [*WORDS]

    for _ in range(10):
        cycle()
    before, mapped, lines, free = open_now(), maps("memfd:vllm"), maps(), free_bytes(memory)
    for _ in range(ROUNDS):
        cycle()
    assert opened_since(before) <= len(arena.fds)
    assert maps("memfd:vllm") <= mapped
    until(lambda: free_bytes(memory) >= free, 5, "the device has its memory back")  # others may free some, too
    assert maps() <= lines + 30  # of threads
    kept.close()
    arena.close()


AFTERWARDS = """
import sys
from tests.contract.conftest import Memory
from tests.contract.test_mapping import view
memory = Memory(sys.argv[1])
arena = memory.filled(b'weights')
seen, kept, info = view(memory, arena, 0, 7), arena.fds.dup(), arena.info
arena.privatize()
seen.fill_(1)
assert memory.read(arena, 0, 7) == bytes([1] * 7)
arena.unmap()
arena.map_again(info, kept)
assert memory.read(arena, 0, 7) == b'weights'
print('so far', flush=True)
try:
    seen.fill_(0)
    if memory.index is not None:
        import torch
        torch.cuda.synchronize()
except Exception as error:
    sys.exit(41)
print('further', flush=True)
"""


def test_what_is_shared_again_cannot_be_written_to(memory: Memory) -> None:
    """A tensor can be written to while its memory is private, and not before or after."""
    command = [sys.executable, "-c", AFTERWARDS, memory.kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "so far\n", done.stderr
    if memory.index is None:
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == 41 or done.returncode < 0


@pytest.mark.parametrize("kind", marked(kind for kind in arenas.KINDS.values() if not kind.can_remap))
def test_a_kind_that_cannot_says_so(kind: str) -> None:
    memory = Memory(kind)
    arena, other = memory.filled(b"weights"), memory.filled(b"another")
    for change in (
        arena.privatize,
        lambda: arenas.KINDS[kind].to_host(arena, memory.index),
        lambda: arenas.KINDS[kind].fill(arena, other.info, other.fds.dup(), memory.index),
        lambda: arenas.KINDS[kind].from_host(arena.info, other.info, other.fds.dup(), memory.index),
    ):
        with pytest.raises(ArenaError):
            change()
        assert memory.read(arena, 0, 7) == b"weights"
    arena.close()
    other.close()
