"""Host memory: a memfd, sealed against every writer once it is full.

The writer never maps it writable. It copies through `pwrite` on one descriptor while a second,
read-only one is mapped, because a mapping of a writable descriptor counts as a possible writer
and makes F_SEAL_WRITE fail with EBUSY (Linux before 6.7, fcntl(2)).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ = 22
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_WRITE = 1, 2, 4, 8
SEALS = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE


def _map_readonly(fd: int, size_bytes: int) -> int:
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise ArenaError(f"Cannot map {size_bytes} bytes of host memory: {os.strerror(ctypes.get_errno())}.")
    return int(address)


class MemfdArena(Closing):
    """A sealed memfd, mapped read-only with all its pages present."""

    def __init__(self, info: ArenaInfo, fds: Sequence[int], address: int | None = None) -> None:
        self.info = info
        self._fds = tuple(fds)
        self._address = address
        try:
            self._check()
            if self._address is None:
                self._address = _map_readonly(self._fds[0], info.size_bytes)
            # Fault the pages in now: vLLM's CPU budget counts them by RSS, and the first request
            # should not. EINVAL before Linux 5.14: then they come one by one.
            _libc.madvise(self._address, info.size_bytes, _MADV_POPULATE_READ)
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        if len(self._fds) != 1 or len(self.info.block_sizes) != 1:
            raise ArenaError(f"A memfd arena has one descriptor; got {len(self._fds)}.")
        try:
            seals = fcntl.fcntl(self._fds[0], fcntl.F_GET_SEALS)
        except OSError as error:
            raise ArenaError(f"The descriptor is not a memfd: {error}.") from error
        if seals & SEALS != SEALS:
            raise ArenaError(f"The memfd is not sealed (seals {seals:#x}): others could still write to it.")
        if os.fstat(self._fds[0]).st_size != self.info.size_bytes:
            raise ArenaError("The memfd has another size than its description.")

    @property
    def address(self) -> int:
        assert self._address is not None
        return self._address

    @property
    def fds(self) -> tuple[int, ...]:
        return self._fds

    def close(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self.info.size_bytes)
        for fd in self._fds:
            os.close(fd)
        self._address, self._fds = None, ()


class MemfdWriter:
    """Fills a memfd. The whole size is one block; memory is used as it is written."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._added = 0
        self._fd = self._readonly_fd = -1
        self._address: int | None = None
        self._sealed: MemfdArena | None = None  # which tensors view that refer to us
        try:
            self._fd = os.memfd_create("vllm-companion", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, size_bytes)
            self._readonly_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            self._address = _map_readonly(self._readonly_fd, size_bytes)
        except OSError as error:
            self.abort()
            raise ArenaError(f"Cannot create {size_bytes} bytes of shared host memory: {error}.") from error
        except ArenaError:
            self.abort()
            raise

    @property
    def address(self) -> int:
        assert self._address is not None
        return self._address

    def add_block(self, size_bytes: int) -> None:
        self._added += size_bytes
        if self._added > self._size_bytes:
            raise ArenaError(f"Blocks of {self._added} bytes exceed the {self._size_bytes} reserved.")

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        source = memoryview((ctypes.c_char * size_bytes).from_address(source_address)).cast("B")
        done = 0
        while done < size_bytes:  # Linux writes at most 2 GiB at a time
            try:
                done += os.pwrite(self._fd, source[done:], offset_bytes + done)
            except OSError as error:
                raise ArenaError(f"No host memory for {size_bytes} bytes of weights: {error}.") from error

    def flush(self) -> None:
        """Writes are synchronous."""

    def seal(self) -> MemfdArena:
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        os.close(self._fd)
        fd, address = self._readonly_fd, self._address
        self._fd, self._readonly_fd, self._address = -1, -1, None
        self._sealed = MemfdArena(ArenaInfo("memfd", (self._size_bytes,)), (fd,), address)
        return self._sealed

    def abort(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self._size_bytes)
        for fd in (self._fd, self._readonly_fd):
            if fd >= 0:
                os.close(fd)
        self._fd, self._readonly_fd, self._address = -1, -1, None
