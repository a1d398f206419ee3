"""Host memory that is made ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.place import until
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
    assert spare._next is not None
    return spare._next.result().address


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
    spare.prepare(SIZE)
    prepared_address(spare)
    before = len(os.listdir("/proc/self/fd"))
    assert sealed(spare, 4096, 3) == b"\3\3"
    assert len(os.listdir("/proc/self/fd")) == before - 1, "what did not fit is freed"


def test_no_memory(spare: Spare, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare that could not be made is nobody's error; what is asked for then is made, or fails by itself."""

    def fail(size_bytes: int) -> None:
        raise ArenaError("none")

    monkeypatch.setattr(spare_module, "SharedWriter", fail)
    spare.prepare(SIZE)
    assert sealed(spare, SIZE, 1) == b"\1\1"


def test_freed(spare: Spare) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        spare.prepare(SIZE)
        spare.close()
    until(lambda: len(os.listdir("/proc/self/fd")) == before, 5, "nothing of it is open")
