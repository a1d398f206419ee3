"""What every arena kind promises. CUDA arenas run the same suite where there is a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from vllm_companion_plugin import arena as arenas
from vllm_companion_plugin.arena.layout import ALIGNMENT, plan
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.types import ArenaInfo

PAGE = 4096


def filled(content: bytes) -> arenas.Arena:
    writer = arenas.create(arenas.MEMFD, PAGE)
    source = ctypes.create_string_buffer(content, len(content))
    writer.add_block(PAGE)
    writer.write(0, ctypes.addressof(source), len(content))
    return writer.seal()


def test_a_second_mapping_reads_what_was_written() -> None:
    first = filled(b"weights")
    second = arenas.open_arena(first.info, [os.dup(fd) for fd in first.fds])
    assert ctypes.string_at(second.address, 7) == b"weights"
    first.close()
    assert ctypes.string_at(second.address, 7) == b"weights"
    second.close()


def test_nobody_can_write_to_a_sealed_arena() -> None:
    arena = filled(b"weights")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(arena.fds[0], b"x", 0)
    again = os.open(f"/proc/self/fd/{arena.fds[0]}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    os.close(again)
    arena.close()


def test_a_write_through_the_mapping_kills_the_writer_alone() -> None:
    code = (
        "import ctypes\n"
        "from tests.contract.test_arena import filled\n"
        "arena = filled(b'weights')\n"
        "ctypes.memmove(arena.address, b'x', 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "info", [ArenaInfo("memfd", (PAGE * 2,)), ArenaInfo("memfd", (PAGE, PAGE)), ArenaInfo("tape", (PAGE,))]
)
def test_a_wrong_description_is_refused_and_closes_nothing_twice(info: ArenaInfo) -> None:
    arena = filled(b"weights")
    with pytest.raises(ArenaError):
        arenas.open_arena(info, [os.dup(fd) for fd in arena.fds])
    assert ctypes.string_at(arena.address, 7) == b"weights"
    arena.close()


def test_an_unsealed_memfd_is_refused() -> None:
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(ArenaError, match="not sealed"):
        arenas.open_arena(ArenaInfo("memfd", (PAGE,)), [fd])


def test_closing_and_aborting_return_every_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        arena = filled(b"weights")
        arena.close()
        arena.close()
        writer = arenas.create(arenas.MEMFD, PAGE)
        writer.abort()
        writer.abort()
    assert len(os.listdir("/proc/self/fd")) == before


def test_storages_do_not_overlap_keep_their_alignment_and_fill_bounded_chunks() -> None:
    sizes, misalignments = [100, 5000, 1, 70000, 300], [0, 256, 3, 0, 511]
    layout = plan(sizes, misalignments, PAGE, chunk_bytes=8192)
    ends = 0
    for size, misalignment, offset in zip(sizes, misalignments, layout.offsets, strict=True):
        assert offset >= ends
        assert offset % ALIGNMENT == misalignment
        ends = offset + size
    assert layout.size_bytes >= ends
    for chunk in layout.chunks:
        assert chunk.size_bytes % PAGE == 0
        assert chunk.size_bytes <= 8192 or chunk.last - chunk.first == 1
    assert sum(chunk.size_bytes for chunk in layout.chunks) == layout.size_bytes
