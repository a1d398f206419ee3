"""Copies between a GPU and pageable host memory that another process may share, at the speed of several threads.

Page-locking a shared mapping costs more than a copy (measured on H200: 0.4 to 0.5 s for 8 GiB, besides 0.16 s for the
copy), and has to be done in each process. So pieces go through small page-locked buffers, two a thread: while the
device copies one, the thread copies the other (0.35 s for 8 GiB with eight threads, buffers included).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_companion_plugin.memory.cuda_driver import PrimaryContext, call, driver

THREADS = 8
PIECE_BYTES = 16 << 20


def to_host(context: PrimaryContext, device_address: int, host_address: int, size_bytes: int) -> None:
    """Copy from the device into host memory that this process may write to. Raises `ArenaError`."""

    def work(pieces: list[tuple[int, int]], stream: Any, buffers: list[int]) -> None:
        landing: tuple[int, int, int] | None = None
        for number, (offset, size) in enumerate(pieces):
            buffer = buffers[number % 2]
            call("Copying weights", driver.cuMemcpyDtoHAsync(buffer, device_address + offset, size, stream))
            if landing is not None:
                ctypes.memmove(*landing)
            call("Copying weights", driver.cuStreamSynchronize(stream))
            landing = (host_address + offset, buffer, size)
        if landing is not None:
            ctypes.memmove(*landing)

    _in_threads(context, size_bytes, work)


def to_device(context: PrimaryContext, host_address: int, device_address: int, size_bytes: int) -> None:
    """Copy from host memory into the device. Returns when all has landed. Raises `ArenaError`."""

    def work(pieces: list[tuple[int, int]], stream: Any, buffers: list[int]) -> None:
        for number, (offset, size) in enumerate(pieces):
            buffer = buffers[number % 2]
            ctypes.memmove(buffer, host_address + offset, size)
            call("Copying weights", driver.cuStreamSynchronize(stream))
            call("Copying weights", driver.cuMemcpyHtoDAsync(device_address + offset, buffer, size, stream))
        call("Copying weights", driver.cuStreamSynchronize(stream))

    _in_threads(context, size_bytes, work)


def locked_to_device(context: PrimaryContext, host_address: int, device_address: int, size_bytes: int) -> None:
    """Copy from page-locked host memory into the device. Returns when all has landed. Raises `ArenaError`."""
    with context:
        call("Copying weights", driver.cuMemcpyHtoD(device_address, host_address, size_bytes))


def _in_threads(context: PrimaryContext, size_bytes: int, work: Any) -> None:
    pieces = [(start, min(PIECE_BYTES, size_bytes - start)) for start in range(0, size_bytes, PIECE_BYTES)]

    def one(number: int) -> None:
        mine = pieces[number::THREADS]
        with context, _stream() as stream, _buffers(min(2, len(mine))) as buffers:
            work(mine, stream, buffers)

    with ThreadPoolExecutor(THREADS) as executor:
        list(executor.map(one, range(min(THREADS, len(pieces)))))


@contextlib.contextmanager
def _stream() -> Iterator[Any]:
    flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = call("cuStreamCreate", driver.cuStreamCreate(flags))
    try:
        yield stream
    finally:
        driver.cuStreamDestroy(stream)


@contextlib.contextmanager
def _buffers(count: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as undo:
        buffers = []
        for _ in range(count):
            buffers.append(int(call("Page-locking host memory", driver.cuMemAllocHost(PIECE_BYTES))))
            undo.callback(driver.cuMemFreeHost, buffers[-1])
        yield buffers
