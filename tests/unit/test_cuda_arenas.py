"""What only a driver that fails can show of the arenas on CUDA memory: at whatever call, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cuda.bindings import driver

from tests.support.left import none_left_open
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory import cuda_driver
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kind import Keeper
from vllm_companion_plugin.memory.kinds import cuda_ipc, cuda_vmm, ipc_tag

BLOCK = 2 << 20
DEVICE = 1
HANDLE = bytes(range(64))
TAKES = {
    "cuMemAddressReserve": "addresses",
    "cuMemCreate": "blocks",
    "cuMemImportFromShareableHandle": "blocks",
    "cuMemMap": "mappings",
    "cuMemAlloc": "allocations",
    "cuIpcOpenMemHandle": "opened",
    "cuCtxPushCurrent": "contexts",
}
GIVES = {
    "cuMemAddressFree": "addresses",
    "cuMemRelease": "blocks",
    "cuMemUnmap": "mappings",
    "cuMemFree": "allocations",
    "cuIpcCloseMemHandle": "opened",
    "cuCtxPopCurrent": "contexts",
}
IN_CONTEXT = {
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuMemcpyDtoDAsync",
    "cuMemAlloc",
    "cuMemFree",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle",
    "cuIpcCloseMemHandle",
}
PLAIN = {"cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemSetAccess"}


class Driver:
    """The real types and constants; functions that count what they take and give back, and fail at calls by number."""

    def __init__(self, *fails_at: int) -> None:
        self.fails_at = fails_at
        self.calls: list[str] = []
        self.held: Counter[str] = Counter()
        self.mapped_at: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(driver, name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            if name == "cuGetErrorName":
                return driver.CUresult.CUDA_SUCCESS, b"CUDA_ERROR_OUT_OF_MEMORY"
            self.calls.append(name)
            assert name not in IN_CONTEXT or self.held["contexts"], f"{name} without a context"
            if len(self.calls) in self.fails_at:
                return (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
            self.held[TAKES.get(name, "")] += name in TAKES
            self.held[GIVES.get(name, "")] -= name in GIVES
            if name in ("cuMemMap", "cuMemUnmap"):
                self.mapped_at[arguments[0]] += 1 if name == "cuMemMap" else -1
            return driver.CUresult.CUDA_SUCCESS, self._value(name)

        return function

    def _value(self, name: str) -> Any:
        if name == "cuMemAddressReserve":
            return self.calls.count(name) << 40
        if name == "cuMemExportToShareableHandle":
            return os.open(os.devnull, os.O_RDONLY)
        if name == "cuMemGetAllocationGranularity":
            return BLOCK
        if name == "cuIpcGetMemHandle":
            return cuda_ipc.from_bytes(HANDLE)
        assert name in TAKES or name in GIVES or name in IN_CONTEXT or name in PLAIN, name
        return 1 << 40


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """A driver that fails at its n-th call, or at several, for a process that has made no context."""

    def install(*fails_at: int) -> Driver:
        fake = Driver(*fails_at)
        for module in (cuda_driver, cuda_vmm, cuda_ipc):
            monkeypatch.setattr(module, "driver", fake)
        cuda_driver.primary_context.cache_clear()
        return fake

    yield install
    cuda_driver.primary_context.cache_clear()


def fill(kind: str, keeper: Keeper | None = None) -> None:
    blocks = 3 if kind == arenas.CUDA_VMM else 1
    writer = arenas.create(kind, blocks * BLOCK, DEVICE, keeper)
    try:
        for number in range(blocks):
            writer.add_block(BLOCK)
            writer.write(number * BLOCK, 1 << 40, 7)
        arena = writer.seal()
    except ArenaError:
        writer.abort()
        raise
    arena.close()


def train_vmm() -> None:
    """Its owner writes, and after an error may try again."""
    writer = arenas.create(arenas.CUDA_VMM, BLOCK, DEVICE, None)
    try:
        writer.add_block(BLOCK)
        arena = writer.seal(trained=True)
    except ArenaError:
        writer.abort()
        raise
    with contextlib.closing(arena):
        assert arena.info.trained
        with arena.writing():
            assert arena.mapping.is_mapped
        with arena.writing():
            assert arena.mapping.is_mapped


def fill_keepers() -> None:
    ends: list[socket.socket] = []

    def keeper(size_bytes: int) -> Descriptors:
        end, fd = ipc_tag.make(ipc_tag.Tag(size_bytes, os.getpid(), HANDLE))
        ends.append(end)
        return Descriptors([fd])

    try:
        fill(arenas.CUDA_IPC, keeper)
    finally:
        for end in ends:
            end.close()


def two() -> Descriptors:
    return Descriptors(os.open(os.devnull, os.O_RDONLY) for _ in range(2))


def mapped(arena: arenas.Arena) -> int:
    """How many blocks the driver has mapped at the addresses of an arena."""
    at: Counter[int] = cuda_vmm.driver.mapped_at
    return sum(at[address] for address in at if 0 <= address - arena.address < arena.info.size_bytes)


def map_vmm() -> None:
    arenas.open_arena(ArenaInfo(arenas.CUDA_VMM, (BLOCK, BLOCK)), two(), DEVICE).close()


def change_vmm() -> None:
    """Unmapped, mapped again, replaced: then the other arena is there, or what was there, or an error that says why."""
    info = ArenaInfo(arenas.CUDA_VMM, (BLOCK, BLOCK))
    with contextlib.closing(arenas.open_arena(info, two(), DEVICE)) as arena:
        arena.unmap()
        assert not arena.mapping.is_mapped
        try:
            arena.map_again(info, two())
        finally:
            assert mapped(arena) == 2 * arena.mapping.is_mapped
        before, fds = arena.fds, two()
        failure = ""
        try:
            arena.replace(info, fds)
        except ArenaError as error:
            failure = str(error)
        assert arena.fds is (before if failure else fds)
        assert (before.closed, fds.closed) == (not failure, bool(failure))
        assert arena.mapping.is_mapped is ("could not be mapped again" not in failure)
        assert mapped(arena) == 2 * arena.mapping.is_mapped
    if failure:
        raise ArenaError(failure)


def privatize_vmm() -> None:
    """Every block is mapped, private or as it was, and it can be tried again; or nothing is, and the error says so."""
    with contextlib.closing(arenas.open_arena(ArenaInfo(arenas.CUDA_VMM, (BLOCK, BLOCK)), two(), DEVICE)) as arena:
        failure = ""
        try:
            arena.privatize()
        except ArenaError as error:
            failure = str(error)
        is_lost = "could not be mapped again" in failure
        assert arena.mapping.is_mapped is not is_lost
        assert mapped(arena) == 2 * arena.mapping.is_mapped, failure
        if failure and not is_lost:
            arena.privatize()
            assert mapped(arena) == 2
    if failure:
        raise ArenaError(failure)


def map_ipc() -> None:
    end, fd = ipc_tag.make(ipc_tag.Tag(BLOCK, os.getpid(), HANDLE))
    with end:
        arenas.open_arena(ArenaInfo(arenas.CUDA_IPC, (BLOCK,)), Descriptors([fd]), DEVICE).close()


def keep() -> None:
    address, handle = cuda_ipc.allocate(BLOCK)
    assert handle == HANDLE
    cuda_ipc.free(address)


SCENARIOS: dict[str, Callable[[], None]] = {
    "fill vmm": lambda: fill(arenas.CUDA_VMM),
    "fill ipc": fill_keepers,
    "train vmm": train_vmm,
    "map vmm": map_vmm,
    "change vmm": change_vmm,
    "privatize vmm": privatize_vmm,
    "map ipc": map_ipc,
    "keep": keep,
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_whichever_call_fails_nothing_is_left_behind(
    scenario: Callable[[], None], failing: Callable[..., Driver]
) -> None:
    fake = failing()
    scenario()
    count = len(fake.calls)
    assert +fake.held == Counter()
    outcomes = set()
    for number in range(1, count + 1):
        fake = failing(number)
        with none_left_open():
            try:
                scenario()
                outcomes.add("done")
            except ArenaError as error:
                outcomes.add(str(error).rpartition(": ")[2])
        failed = fake.calls[number - 1]
        left = +fake.held
        # What the driver does not take back stays; what needs a context cannot be given back without.
        stays = {"opened", "allocations"} if failed == "cuCtxPushCurrent" else {GIVES.get(failed)}
        assert set(left) <= stays, (failed, left)
    assert outcomes - {"done"} == {"CUDA_ERROR_OUT_OF_MEMORY."}


def test_a_block_that_cannot_be_mapped_again_either_takes_the_others_with_it(failing: Callable[..., Driver]) -> None:
    """A call that maps fails, and so does the next one, if that is the way back."""
    fake = failing()
    privatize_vmm()
    lost = 0
    for first in range(1, len(fake.calls)):
        fake = failing(first)
        with contextlib.suppress(ArenaError):
            privatize_vmm()
        if fake.calls[first - 1 : first + 1] == ["cuMemMap", "cuMemMap"]:
            fake = failing(first, first + 1)
            with pytest.raises(ArenaError, match="And what was mapped could not be mapped again"):
                privatize_vmm()
            assert +fake.held == Counter()
            lost += 1
    assert lost == 2  # each of the blocks


def test_a_device_that_has_no_memory_for_a_context_says_so_and_is_asked_again(
    failing: Callable[..., Driver],
) -> None:
    failing(3)
    with pytest.raises(ArenaError, match=r"CUDA context on device 1 .*0\.5 GiB.* failed: CUDA_ERROR_OUT_OF_MEMORY"):
        cuda_driver.primary_context(DEVICE)
    assert cuda_driver.primary_context(DEVICE) is cuda_driver.primary_context(DEVICE)


def test_a_handle_is_the_same_in_another_process() -> None:
    """By the memory that it is: cuda-bindings 13.4 and later have no name for it."""
    handle = cuda_ipc.from_bytes(HANDLE)
    assert type(handle) is driver.CUipcMemHandle
    assert cuda_ipc.to_bytes(handle) == HANDLE
