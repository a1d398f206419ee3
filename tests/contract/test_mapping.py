"""What a kind of memory promises that can leave its addresses: they stay, and what views them sees what comes there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import Memory, marked
from tests.support.left import mapped_now, none_left_mapped, none_left_open, open_now, opened_since
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo, Checksums
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import memfd
from vllm_companion_plugin.memory.mapping import Blocks

ROUNDS = 1000


@pytest.fixture(params=marked(kind for kind in arenas.KINDS.values() if kind.can_remap))
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


def view(memory: Memory, arena: arenas.Arena, offset: int, size: int) -> Any:
    """A tensor on the arena, as a model has it."""
    import torch

    from vllm_companion_plugin.memory.tensors.views import ArenaViews

    device = torch.device("cpu") if memory.index is None else torch.device("cuda", memory.index)
    return ArenaViews(arena, arena.info.size_bytes, device).bytes_at(offset, size)


def content(tensor: Any) -> bytes:
    return bytes(tensor.cpu().numpy())


def maps(part: str = "") -> int:
    """Lines of this process's memory map with `part` in them."""
    return sum(part in line for line in Path("/proc/self/maps").read_text().splitlines())


def free_bytes(memory: Memory) -> int:
    """On the device; of a host, which others use too, nothing can be said."""
    import torch

    return 0 if memory.index is None else torch.cuda.mem_get_info(memory.index)[0]


@pytest.fixture
def pair(memory: Memory) -> tuple[arenas.Arena, arenas.Arena]:
    """Two arenas of the same layout, of two blocks where the kind has blocks."""
    return memory.filled(b"weights", b"and more"), memory.filled(b"another", b"and less")


def test_memory_goes_and_comes_back_at_its_addresses(memory: Memory) -> None:
    arena = memory.filled(b"weights", b"and more")
    kept, address, seen = arena.fds.dup(), arena.address, view(memory, arena, memory.page, 8)
    for _ in range(2):
        arena.unmap()
        arena.unmap()
        assert not arena.mapping.is_mapped
        assert arena.fds.closed
        arena.map_again(arena.info, kept.dup())
        assert arena.mapping.is_mapped
        assert arena.address == address == seen.data_ptr() - memory.page
        assert (memory.read(arena, 0, 7), content(seen)) == (b"weights", b"and more")
    kept.close()
    arena.close()


def test_what_is_unmapped_is_free(memory: Memory) -> None:
    memory.filled(b"weights").close()  # what the driver opens once, it keeps
    before = free_bytes(memory)
    with none_left_open(), none_left_mapped("memfd:vllm"):
        arena = memory.filled(b"weights")
        arena.unmap()
    assert free_bytes(memory) == before
    arena.close()


def test_another_arena_takes_its_place_and_gives_it_back(
    memory: Memory, pair: tuple[arenas.Arena, arenas.Arena]
) -> None:
    """A view knows addresses; it sees whatever is there."""
    arena, other = pair
    own, own_fds, before = arena.info, arena.fds.dup(), arena.fds
    published = replace(other.info, checksums=Checksums("sum", (1,)))
    seen = view(memory, arena, 0, 7), view(memory, arena, memory.page, 8)
    addresses = [tensor.data_ptr() for tensor in seen]
    arena.replace(published, other.fds.dup())
    assert [content(tensor) for tensor in seen] == [b"another", b"and less"]
    assert (arena.info, before.closed) == (published, True)
    other.close()
    assert memory.read(arena, 0, 7) == b"another"
    arena.replace(own, own_fds)
    assert [content(tensor) for tensor in seen] == [b"weights", b"and more"]
    assert (arena.info, arena.fds) == (own, own_fds)
    assert [tensor.data_ptr() for tensor in seen] == addresses
    arena.close()


def test_another_arena_may_come_where_the_first_was_unmapped(
    memory: Memory, pair: tuple[arenas.Arena, arenas.Arena]
) -> None:
    arena, other = pair
    seen = view(memory, arena, 0, 7)
    arena.unmap()
    arena.map_again(other.info, other.fds.dup())
    assert content(seen) == b"another"
    arena.close()
    other.close()


def test_a_thousand_changes_leave_nothing_behind(memory: Memory, pair: tuple[arenas.Arena, arenas.Arena]) -> None:
    arena, other = pair
    kept = [(arena.info, arena.fds.dup()), (other.info, other.fds.dup())]
    words = [b"weights", b"another"]
    seen = view(memory, arena, 0, 7)

    def change(number: int) -> None:
        info, fds = kept[number % 2]
        arena.replace(info, fds.dup())
        assert content(seen) == words[number % 2]
        arena.unmap()
        info, fds = kept[(number + 1) % 2]
        arena.map_again(info, fds.dup())
        assert content(seen) == words[(number + 1) % 2]

    for number in range(20):
        change(number)
    before, opened, lines = free_bytes(memory), open_now(), maps()
    for number in range(ROUNDS):
        change(number)
    assert opened_since(opened) <= len(arena.fds)
    assert free_bytes(memory) == before
    assert maps() <= lines + 5  # Python's own
    for _, fds in kept:
        fds.close()
    arena.close()
    other.close()


def refused(memory: Memory, arena: arenas.Arena, change: Callable[[], None], fds: Descriptors, match: str) -> None:
    """`change` raises, owned `fds` are closed, and of `arena` nothing is changed."""
    before, address, reserved = (arena.info, arena.fds), arena.address, maps("---p")
    with none_left_open(), none_left_mapped("memfd:"), pytest.raises(ArenaError, match=match):
        change()
    assert fds.closed
    assert maps("---p") <= reserved
    assert ((arena.info, arena.fds), arena.address) == (before, address)
    assert not arena.fds.closed
    assert arena.mapping.is_mapped
    assert memory.read(arena, 0, 7) == b"weights"
    assert memory.read(arena, memory.page, 8) == b"and more"


@pytest.mark.parametrize("wrong", ["size", "blocks", "kind"])
def test_another_layout_is_refused(memory: Memory, wrong: str) -> None:
    arena = memory.filled(b"weights", b"and more")
    other = memory.filled(b"x", b"y", b"z") if wrong == "size" else memory.filled(b"x", b"y")
    infos = {
        "size": other.info,
        "blocks": ArenaInfo(memory.kind, (memory.page // 2, memory.page // 2, memory.page)),
        "kind": replace(other.info, kind=arenas.CUDA_IPC),
    }
    info = infos[wrong]
    assert (info.kind, info.block_sizes) != (arena.info.kind, arena.info.block_sizes)
    fds = other.fds.dup()
    refused(memory, arena, lambda: arena.replace(info, fds), fds, "the same layout")
    arena.close()
    other.close()


def test_what_is_no_such_memory_changes_nothing(memory: Memory) -> None:
    """The last of its descriptors is of something else: what could be mapped of it is not, either."""
    arena, other = memory.filled(b"weights", b"and more"), memory.filled(b"x", b"y")
    with other.fds.dup() as good:
        fds = Descriptors([*(os.dup(fd) for fd in good[:-1]), os.open("/dev/null", os.O_RDONLY)])
    refused(memory, arena, lambda: arena.replace(other.info, fds), fds, "memfd|Importing")
    few = Descriptors(())
    refused(memory, arena, lambda: arena.replace(other.info, few), few, "blocks, and 0 descriptors")
    arena.close()
    other.close()


def test_each_change_has_its_time(memory: Memory) -> None:
    arena = memory.filled(b"weights", b"and more")
    info, kept = arena.info, arena.fds.dup()
    fds = kept.dup()
    refused(memory, arena, lambda: arena.map_again(info, fds), fds, "mapped at these addresses already")
    arena.unmap()
    fds = kept.dup()
    with pytest.raises(ArenaError, match="No memory is mapped"):
        arena.replace(info, fds)
    assert fds.closed
    arena.close()
    arena.close()
    for change in (arena.unmap, lambda: arena.map_again(info, kept.dup()), lambda: arena.replace(info, kept.dup())):
        with pytest.raises(ArenaError, match="closed"):
            change()
    assert not kept.closed
    kept.close()


@pytest.mark.parametrize("where", ["replace", "map"])
def test_a_system_that_refuses_the_last_step_leaves_what_was_there(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two memfds, of which the second cannot be moved to its place; the first was there already."""
    memory = Memory(arenas.MEMFD)
    info = ArenaInfo(arenas.MEMFD, (memory.page, memory.page))

    def of(*words: bytes) -> Descriptors:
        sealed = [memory.filled(word) for word in words]
        fds = Descriptors.duplicates(fd for arena in sealed for fd in arena.fds)
        for arena in sealed:
            arena.close()
        return fds

    before = mapped_now("memfd:vllm")
    arena = arenas.open_arena(info, of(b"weights", b"and more"))
    assert memory.read(arena, memory.page, 8) == b"and more"
    moves: list[int] = []

    def failing(number: int, then: int = 0) -> Any:
        real = memfd._libc.mremap

        def mremap(*arguments: Any) -> Any:
            moves.append(1)
            return memfd._MAP_FAILED if len(moves) in (number, then) else real(*arguments)

        return mremap

    if where == "replace":
        fds = of(b"another", b"and less")
        with monkeypatch.context() as patch:
            patch.setattr(memfd._libc, "mremap", failing(2))
            refused(memory, arena, lambda: arena.replace(info, fds), fds, "Cannot move")
        assert len(moves) == 4  # the way back took two
        moves.clear()
        fds, change, failures, match = (
            of(b"another", b"and less"),
            arena.replace,
            (2, 4),
            "be mapped again: Cannot move",
        )
    else:
        arena.unmap()
        fds, change, failures, match = of(b"another", b"and less"), arena.map_again, (2, 0), "Cannot move"
    with monkeypatch.context() as patch:
        patch.setattr(memfd._libc, "mremap", failing(*failures))
        with pytest.raises(ArenaError, match=match):
            change(info, fds)
    assert fds.closed
    assert not arena.mapping.is_mapped
    assert mapped_now("memfd:vllm") <= before
    arena.unmap()
    arena.map_again(info, of(b"weights", b"and more"))
    assert memory.read(arena, 0, 7) + memory.read(arena, memory.page, 8) == b"weightsand more"
    arena.close()


AFTERWARDS = """
import ctypes, sys
from tests.contract.conftest import Memory
from tests.contract.test_mapping import view
memory = Memory(sys.argv[1])
arena, other = memory.filled(b'weights'), memory.filled(b'another')
seen = view(memory, arena, 0, 7)
arena.replace(other.info, other.fds.dup())
if 'again' in sys.argv:
    arena.unmap()
    arena.map_again(other.info, other.fds.dup())
assert memory.read(arena, 0, 7) == b'another'
if 'unmapped' in sys.argv:
    arena.unmap()
print('so far', flush=True)
try:
    seen.fill_(0) if 'write' in sys.argv else print(seen.cpu())
    if memory.index is not None:
        import torch
        torch.cuda.synchronize()
except Exception as error:
    sys.exit(41)
print('further', flush=True)
"""


@pytest.mark.parametrize("what", [("write",), ("write", "again"), ("read", "unmapped")], ids=" ".join)
def test_who_writes_or_reads_what_is_unmapped_dies(memory: Memory, what: tuple[str, ...]) -> None:
    """Read-only stays read-only, whatever was mapped there how often; and nothing can be read where nothing is."""
    command = [sys.executable, "-c", AFTERWARDS, memory.kind, *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "so far\n", done.stderr
    if memory.index is None:
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == 41 or done.returncode < 0


def poke(memory: Memory, address: int, text: bytes) -> None:
    source = memory.source(text)
    if memory.index is None:
        ctypes.memmove(address, source, len(text))
        return
    from vllm_companion_plugin.memory.cuda_driver import copy_to_device, primary_context, wait_for_copies

    with primary_context(memory.index):
        copy_to_device(address, source, len(text))
        wait_for_copies()


def unsealed(memory: Memory) -> Descriptors:
    """A page of memory that its owner may write to."""
    if memory.index is not None:  # no seal is on the allocation: each mapping has its own access
        with contextlib.closing(memory.filled(b"weights")) as arena:
            return arena.fds.dup()
    fds = Descriptors([os.memfd_create("open", os.MFD_CLOEXEC)])
    os.pwrite(fds[0], b"weights".ljust(memory.page, b"\0"), 0)
    return fds


def test_memory_can_be_mapped_writable_by_who_owns_it(memory: Memory) -> None:
    fds, kind = unsealed(memory), arenas.KINDS[memory.kind]
    info = ArenaInfo(memory.kind, (memory.page,))
    mine, others = (kind.reserve(memory.page, memory.index) for _ in range(2))
    mine.map(Blocks(info.block_sizes, fds, writable=True))
    others.map(Blocks(info.block_sizes, fds))
    seen = view(memory, arenas.Arena(info, Descriptors(), others, kind.check), 0, 7)
    assert content(seen) == b"weights"
    poke(memory, mine.address, b"written")
    assert content(seen) == b"written"
    again = unsealed(memory)
    mine.replace(again)
    poke(memory, mine.address, b"private")
    assert content(seen) == b"written"
    mine.close()
    mine.close()
    for owned in (fds, again):
        owned.close()


def test_more_than_was_reserved_is_refused(memory: Memory) -> None:
    fds = unsealed(memory)
    mapping = arenas.KINDS[memory.kind].reserve(memory.page, memory.index)
    with pytest.raises(ArenaError, match="exceed"):
        mapping.map(Blocks((memory.page, memory.page), [fds[0], fds[0]]))
    assert not mapping.is_mapped
    mapping.map(Blocks((memory.page,), fds))
    mapping.close()
    fds.close()


def test_sealed_host_memory_cannot_be_mapped_writable() -> None:
    memory = Memory(arenas.MEMFD)
    arena = memory.filled(b"weights")
    mapping = arenas.KINDS[arenas.MEMFD].reserve(memory.page, None)
    with pytest.raises(ArenaError, match=r"Cannot map \d+ bytes of host memory"):
        mapping.map(Blocks(arena.info.block_sizes, arena.fds, writable=True))
    assert not mapping.is_mapped
    mapping.map(Blocks(arena.info.block_sizes, arena.fds))
    assert ctypes.string_at(mapping.address, 7) == b"weights"
    mapping.close()
    arena.close()


@pytest.mark.parametrize("kind", marked(kind for kind in arenas.KINDS.values() if not kind.can_remap))
def test_a_kind_that_cannot_says_so_and_changes_nothing(kind: str) -> None:
    memory = Memory(kind)
    arena, other = memory.filled(b"weights"), memory.filled(b"another")
    for change in (
        arena.unmap,
        lambda: arena.map_again(other.info, other.fds.dup()),
        lambda: arena.replace(other.info, other.fds.dup()),
        lambda: arenas.KINDS[kind].reserve(memory.page, memory.index),
    ):
        with pytest.raises(ArenaError, match="arena=cuda_vmm"):
            change()
        assert memory.read(arena, 0, 7) == b"weights"
    arena.close()
    other.close()


def test_what_views_an_arena_can_fill_another_one(memory: Memory) -> None:
    """At the same addresses. Then the arena is back, and the other one has what was written, and is sealed."""
    arena, writer = memory.filled(b"weights", b"and more"), memory.create(2 * memory.page)
    seen, there, before = view(memory, arena, memory.page, 8), content(view(memory, arena, 0, 7)), open_now()
    sizes = arena.info.block_sizes
    for size_bytes in sizes:
        writer.add_block(size_bytes)
    added = opened_since(before)
    with arena.written_through(writer):
        seen.fill_(ord("x"))
        with pytest.raises(ArenaError):
            arena.mapping.map(Blocks(sizes, arena.fds))
    assert (content(seen), content(view(memory, arena, 0, 7))) == (b"and more", there)
    assert opened_since(before) == added
    with contextlib.closing(writer.seal()) as other:
        assert memory.read(other, memory.page, 8) == b"x" * 8
        arena.replace(other.info, other.fds.dup())
        assert content(seen) == b"x" * 8
    arena.close()


def test_an_error_while_another_arena_is_filled_brings_the_arena_back(memory: Memory) -> None:
    arena, writer = memory.filled(b"weights"), memory.create(memory.page)
    writer.add_block(memory.page)
    seen = view(memory, arena, 0, 7)
    with contextlib.suppress(ZeroDivisionError), arena.written_through(writer):
        seen.fill_(1)
        _ = 1 // 0
    writer.abort()
    assert content(seen) == b"weights"
    arena.close()
