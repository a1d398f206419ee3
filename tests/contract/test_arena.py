"""What every arena kind promises. The CUDA half runs where there is a GPU (`make test-gpu`)."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contract.conftest import Memory
from tests.support.left import none_left_open
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.placement import ALIGNMENT, plan
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import ipc_tag


def duplicates(arena: arenas.Arena) -> Descriptors:
    return arena.fds.dup()


def test_a_second_mapping_reads_what_was_written(memory: Memory) -> None:
    first = memory.filled(b"weights", b"and more")
    second = arenas.open_arena(first.info, duplicates(first), memory.index)
    assert memory.read(second, 0, 7) == b"weights"
    first.close()
    assert memory.read(second, memory.page, 8) == b"and more"
    second.close()


def nothing() -> Descriptors:
    """A descriptor of no memory at all."""
    return Descriptors([os.open("/dev/null", os.O_RDONLY)])


def is_open(fds: Sequence[int]) -> bool:
    try:
        for fd in fds:
            os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("by", ["publisher", "reader"])
def test_an_arena_that_nobody_closes_ends_with_the_last_tensor_that_views_it(memory: Memory, by: str) -> None:
    """A model that is collected gives its memory back; until then nothing is unmapped under a tensor."""
    import torch

    from vllm_companion_plugin.memory.tensors.views import ArenaViews

    device = torch.device("cpu") if memory.index is None else torch.device("cuda", memory.index)
    writer = memory.create(memory.page)
    writer.add_block(memory.page)
    writer.write(0, memory.source(b"weights"), 7)
    if by == "publisher":  # its model views what it writes
        whole = ArenaViews(writer, memory.page, device).bytes_at(0, 7)
        arena = writer.seal()
    else:
        first = writer.seal()
        arena = arenas.open_arena(first.info, duplicates(first), memory.index)
        whole = ArenaViews(arena, memory.page, device).bytes_at(0, 7)
    fds = tuple(arena.fds)
    part = torch.nn.Parameter(whole[2:6].data, requires_grad=False)
    del whole, arena, writer
    gc.collect()
    assert is_open(fds)
    assert bytes(part.data.cpu().numpy()) == b"ight"
    del part
    gc.collect()
    assert not is_open(fds)


READER = """
import socket, sys
from tests.contract.conftest import Memory
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
memory = Memory(sys.argv[1])
end = socket.socket(fileno=int(sys.argv[2]))
_, fds, _, _ = socket.recv_fds(end, 1, 8)
print("got", flush=True)
sys.stdin.readline()  # the writer is gone now
info = ArenaInfo(memory.kind, tuple(map(int, sys.argv[3:])))
arena = arenas.open_arena(info, arenas.Descriptors(fds), memory.index)
print(memory.read(arena, 0, 7).decode())
"""

WRITER = """
import socket, sys
from tests.contract.conftest import Memory
memory = Memory(sys.argv[1])
arena = memory.filled(b"weights")
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], list(arena.fds))
print("sent", flush=True)
sys.stdin.read()
"""


def child(code: str, *arguments: str, fd: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[fd],
    )


def test_memory_outlives_its_writer_and_is_mapped_by_who_holds_the_descriptor(memory: Memory) -> None:
    ends = socket.socketpair()
    writer = child(WRITER, memory.kind, str(ends[0].fileno()), fd=ends[0].fileno())
    blocks = [str(memory.page)]
    reader = child(READER, memory.kind, str(ends[1].fileno()), *blocks, fd=ends[1].fileno())
    try:
        assert writer.stdout is not None
        assert reader.stdout is not None
        assert writer.stdout.readline() == "sent\n"
        assert reader.stdout.readline() == "got\n"
        writer.kill()
        writer.wait()
        assert reader.communicate("\n", timeout=100)[0] == "weights\n"
    finally:
        for process in (writer, reader):
            process.kill()
            process.communicate()
        for end in ends:
            end.close()


def test_nobody_can_write_to_a_sealed_memfd() -> None:
    arena = Memory(arenas.MEMFD).filled(b"weights")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(arena.fds[0], b"x", 0)
    again = os.open(f"/proc/self/fd/{arena.fds[0]}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    os.close(again)
    arena.close()


WRITE_TO_HOST = """
import ctypes
from tests.contract.conftest import Memory
arena = Memory('memfd').filled(b'weights')
ctypes.memmove(arena.address, b'x', 1)
"""

WRITE_TO_DEVICE = """
import sys, torch
from tests.contract.conftest import Memory
from vllm_companion_plugin.memory.tensors.views import ArenaViews
memory = Memory('cuda_vmm')
arena = memory.filled(b'weights')
view = ArenaViews(arena, arena.info.size_bytes, torch.device('cuda', 0)).bytes_at(0, 7)
assert bytes(view.cpu().numpy()) == b'weights'
view.fill_(0)
try:
    torch.cuda.synchronize()
except Exception as error:
    sys.exit(41)
"""


def test_a_write_through_the_mapping_kills_the_writer_alone() -> None:
    code = subprocess.run([sys.executable, "-c", WRITE_TO_HOST], timeout=100).returncode
    assert code == -signal.SIGSEGV


@pytest.mark.gpu
def test_a_kernel_that_writes_through_the_mapping_faults_its_process_alone() -> None:
    mine = Memory(arenas.CUDA_VMM).filled(b"weights")
    result = subprocess.run([sys.executable, "-c", WRITE_TO_DEVICE], timeout=100)
    assert result.returncode != 0
    assert result.returncode == 41 or result.returncode < 0
    assert Memory(arenas.CUDA_VMM).read(mine, 0, 7) == b"weights"
    mine.close()


@pytest.mark.gpu
def test_who_mapped_the_memory_of_a_keeper_outlives_it_and_nobody_maps_it_anew() -> None:
    memory = Memory(arenas.CUDA_IPC)
    arena = memory.filled(b"weights")
    os.kill(ipc_tag.read(arena.fds[0]).keeper_pid, signal.SIGKILL)
    time.sleep(0.5)  # the driver's own work
    assert memory.read(arena, 0, 7) == b"weights"
    other = memory.filled(b"others")  # of another keeper
    code = "import sys; from tests.contract.conftest import Memory; from vllm_companion_plugin import memory as a; "
    code += "from vllm_companion_plugin.core.arena import ArenaInfo; fds = a.Descriptors([int(sys.argv[1])]); "
    code += "a.open_arena(ArenaInfo('cuda_ipc', (int(sys.argv[2]),)), fds, 0)"
    for fd, ended in ((arena.fds[0], True), (other.fds[0], False)):
        command = [sys.executable, "-c", code, str(fd), str(arena.info.size_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, pass_fds=[fd])
        assert ("has it ended?) failed" in done.stderr) == ended, done.stderr
        assert (done.returncode != 0) == ended
    assert memory.read(arena, 0, 7) == b"weights"
    arena.close()
    other.close()


@pytest.mark.parametrize("wrong", ["larger", "more blocks", "no such kind"])
def test_a_wrong_description_is_refused_and_closes_nothing_twice(memory: Memory, wrong: str) -> None:
    page = memory.page
    infos = {
        "larger": ArenaInfo(memory.kind, (page * 2,)),
        "more blocks": ArenaInfo(memory.kind, (page, page)),
        "no such kind": ArenaInfo("tape", (page,)),
    }
    arena = memory.filled(b"weights")
    with none_left_open(), pytest.raises(ArenaError):
        arenas.open_arena(infos[wrong], duplicates(arena), memory.index)
    assert memory.read(arena, 0, 7) == b"weights"
    arena.close()


def test_a_descriptor_of_something_else_is_refused(memory: Memory) -> None:
    with pytest.raises(ArenaError):
        arenas.open_arena(ArenaInfo(memory.kind, (memory.page,)), nothing(), memory.index)


def test_an_unsealed_memfd_is_refused() -> None:
    fds = Descriptors([os.memfd_create("open", os.MFD_ALLOW_SEALING)])
    os.ftruncate(fds[0], 4096)
    with pytest.raises(ArenaError, match="not sealed"):
        arenas.open_arena(ArenaInfo("memfd", (4096,)), fds)


def test_more_blocks_than_were_reserved_are_refused(memory: Memory) -> None:
    writer = memory.create(memory.page)
    writer.add_block(memory.page)
    with pytest.raises(ArenaError, match=r"exceeds?"):
        writer.add_block(memory.page)
    writer.abort()


def test_closing_and_aborting_return_every_descriptor(memory: Memory) -> None:
    memory.filled(b"weights").close()  # what the driver opens once, it keeps
    with none_left_open():
        for _ in range(20):
            arena = memory.filled(b"weights")
            arena.close()
            arena.close()
            writer = memory.create(memory.page)
            writer.add_block(memory.page)
            writer.abort()
            writer.abort()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [arenas.CUDA_VMM, arenas.CUDA_IPC])
@pytest.mark.parametrize("index", [0, 1])
def test_a_thread_of_no_device_makes_maps_and_closes_an_arena_and_waits_for_its_device(kind: str, index: int) -> None:
    """A new thread has no CUDA context; another GPU than the arena's would do as much harm."""
    import torch

    if index >= torch.cuda.device_count():
        pytest.skip("one GPU")

    def in_new_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *arguments).result()

    memory = Memory(kind, index)
    source = memory.source(b"weights")
    busy = torch.cuda.Stream(index)
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1)
    busy.synchronize()

    def make() -> arenas.Arena:
        writer = memory.create(memory.page)
        writer.add_block(memory.page)
        writer.write(0, source, 7)
        return writer.seal()

    arena = in_new_thread(make)
    again = in_new_thread(arenas.open_arena, arena.info, duplicates(arena), index)
    assert memory.read(arena, 0, 7) == memory.read(again, 0, 7) == b"weights"
    for opened in (again, arena):
        with torch.cuda.stream(busy):
            torch.cuda._sleep(1 << 30)  # half a second, as of a kernel that reads
        assert not busy.query()
        in_new_thread(opened.close)
        assert busy.query()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [arenas.CUDA_VMM, arenas.CUDA_IPC])
def test_closing_and_aborting_return_all_device_memory(kind: str) -> None:
    import torch

    memory = Memory(kind)
    kept = memory.filled(b"weights")  # with it, the keeper stays
    before = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        arena = memory.filled(b"weights", b"and more")
        again = arenas.open_arena(arena.info, duplicates(arena), memory.index)
        arena.close()
        again.close()
        writer = memory.create(memory.page)
        writer.add_block(memory.page)
        writer.abort()
    deadline = time.monotonic() + 5
    while torch.cuda.mem_get_info()[0] != before:  # a keeper frees a moment after the last descriptor is closed
        assert kind == arenas.CUDA_IPC
        assert time.monotonic() < deadline
    kept.close()


def test_storages_do_not_overlap_keep_their_alignment_and_fill_bounded_chunks() -> None:
    page = 4096
    sizes, misalignments = [100, 5000, 1, 70000, 300], [0, 256, 3, 0, 511]
    layout = plan(sizes, misalignments, page, chunk_bytes=8192)
    ends = 0
    for size, misalignment, offset in zip(sizes, misalignments, layout.offsets, strict=True):
        assert offset >= ends
        assert offset % ALIGNMENT == misalignment
        ends = offset + size
    assert layout.size_bytes >= ends
    for chunk in layout.chunks:
        assert chunk.size_bytes % page == 0
        assert chunk.size_bytes <= 8192 or chunk.last - chunk.first == 1
    assert sum(chunk.size_bytes for chunk in layout.chunks) == layout.size_bytes
