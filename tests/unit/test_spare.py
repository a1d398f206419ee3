"""Host memory that is made ahead."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.support.left import mapped_now, none_left_mapped, none_left_open
from vllm_companion_plugin.client import spare as spare_module
from vllm_companion_plugin.client.spare import Spare
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.tensors.views import host_bytes

SIZE = 8 << 20


@pytest.fixture
def spare() -> Iterator[Spare]:
    made = Spare()
    yield made
    made.close()


def sealed(spare: Spare, size_bytes: int, value: int) -> bytes:
    """What is read of memory that was filled with a value."""
    with spare.memory(size_bytes) as writer:
        host_bytes(writer.address, size_bytes).fill_(value)
        info, fds = writer.seal()
    with fds:
        assert info.size_bytes == os.fstat(fds[0]).st_size == size_bytes
        return os.pread(fds[0], 2, size_bytes - 2)


def prepared_address(spare: Spare) -> int:
    return spare._made[SIZE].result().address


def test_taken(spare: Spare) -> None:
    """What was made ahead is taken once, and holds what is written to it."""
    spare.prepare(SIZE)
    address = prepared_address(spare)
    spare.prepare(SIZE)
    assert prepared_address(spare) == address
    with spare.memory(SIZE) as writer:
        assert writer.address == address
    assert sealed(spare, SIZE, 7) == b"\7\7"


def test_another_size(spare: Spare) -> None:
    """What has another size stays, as long as there are few."""
    spare.prepare(SIZE)
    address = prepared_address(spare)
    assert sealed(spare, 4096, 3) == b"\3\3"
    assert prepared_address(spare) == address
    for pages in range(1, spare_module.MOST + 1):
        spare.prepare(4096 * pages)
    assert list(spare._made) == [4096 * pages for pages in range(1, spare_module.MOST + 1)]


def test_forked(spare: Spare) -> None:
    """A process that was forked meanwhile, as PyTorch's loaders of data are, is no writer."""
    spare.prepare(SIZE)
    prepared_address(spare)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        assert sealed(spare, SIZE, 5) == b"\5\5"
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize("error", [ArenaError("none"), RuntimeError("can't start new thread")], ids=str)
def test_no_memory(spare: Spare, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A spare that could not be made is nobody's error; what is asked for then is made, or fails by itself."""

    def fail(size_bytes: int) -> None:
        raise error

    monkeypatch.setattr(spare_module, "SharedWriter", fail)
    spare.prepare(SIZE)
    assert sealed(spare, SIZE, 1) == b"\1\1"


def test_freed(spare: Spare) -> None:
    with none_left_open():
        for _ in range(3):
            spare.prepare(SIZE)
            spare.close()


def test_forgotten() -> None:
    """Who closes nothing leaves nothing, and after its end nothing is made."""
    with none_left_mapped("memfd:vllm-companion-filled"):
        made = Spare()
        before = mapped_now("memfd:vllm-companion-filled")
        made.prepare(SIZE)
        prepared_address(made)
        assert len(mapped_now("memfd:vllm-companion-filled") - before) == 1
        made.close()
        made.prepare(SIZE)
        assert mapped_now("memfd:vllm-companion-filled") <= before
        assert made._made == {}
        made = Spare()
        made.prepare(SIZE)
        prepared_address(made)
        del made
        gc.collect()
