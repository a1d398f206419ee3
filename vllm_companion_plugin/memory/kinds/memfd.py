"""Host memory: a memfd, sealed against every writer once it is full.

An arena's writer never maps it writable. It copies through `pwrite` on one descriptor while a second,
read-only one is mapped, because a mapping of a writable descriptor counts as a possible writer
and makes F_SEAL_WRITE fail with EBUSY (Linux before 6.7, fcntl(2)). Who copies by threads or from a device maps it
writable, and unmaps it before the seal (`SharedWriter`).

A trained arena has F_SEAL_FUTURE_WRITE instead (Linux 5.1): the mapping that its owner had before the seal is the only
one that was ever writable, and the only one that can be made so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.arena import Arena
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.host_copy import HostCopy
from vllm_companion_plugin.memory.kind import Keeper, Kind
from vllm_companion_plugin.memory.mapping import Blocks, Reservation

# Python's mmap module can neither choose addresses nor leave them reserved.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAP_FAILED = ctypes.c_void_p(-1).value
# linux/mman.h, and asm-generic/mman-common.h
_PROT_NONE = 0
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_MADV_DONTFORK = 10
_PART_BYTES = 8 << 20
_ALLOCATING_THREADS = 4
"""Measured for 8 GiB in parts of 64 MiB: 3.5 s by one thread, 1.5 s by four, 1.9 s by eight. Small parts, so that an
adapter has several, too."""
# linux/fcntl.h
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE = 1, 2, 4, 8, 16
SEALS = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_WRITE
TRAINED_SEALS = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_NEEDED_SEALS = _F_SEAL_SHRINK | _F_SEAL_WRITE
"""A writer, or a shrink under a mapping, would reach every engine."""


def _reserve(size_bytes: int, at: int | None = None) -> int:
    """Addresses where nothing can be read: new ones, or those from `at` on in place of what is mapped there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if at is not None else 0)
    reserved = _libc.mmap(at, size_bytes, _PROT_NONE, flags, -1, 0)
    return _address(f"Cannot reserve {size_bytes} bytes of addresses", reserved)


def _address(failed: str, result: int | None) -> int:
    if result is None or result == _MAP_FAILED:
        raise ArenaError(f"{failed}: {os.strerror(ctypes.get_errno())}.")
    return result


def _seals(fd: int) -> int:
    """Raises `OSError` unless `fd` is a memfd."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def _is_full(fd: int) -> bool:
    """Whether it has been filled; else its pages may not exist yet, and reading would make them."""
    try:
        return bool(_seals(fd) & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE))
    except OSError:
        return False


class MemfdMapping(Reservation):
    """Addresses of this process, with memfds mapped into them."""

    def __init__(self, size_bytes: int, *, populates: bool = True) -> None:
        super().__init__(_reserve(size_bytes), size_bytes)
        self._populates = populates

    def populate(self) -> None:
        """Fault the pages in: vLLM's CPU budget counts them by RSS, and the first request should not wait for them."""
        # EINVAL before Linux 5.14: then they come one by one.
        _libc.madvise(self.address, self.size_bytes, _MADV_POPULATE_READ)

    def _prepare(self, undo: contextlib.ExitStack, blocks: Blocks) -> list[_Elsewhere]:
        prepared = []
        for fd, size_bytes in zip(blocks.fds, blocks.sizes, strict=True):
            prepared.append(_Elsewhere(fd, size_bytes, writable=blocks.writable))
            undo.callback(prepared[-1].close)
        return prepared

    def _put(self, prepared: list[_Elsewhere], blocks: Blocks) -> None:
        target = self.address
        try:
            for block in prepared:
                block.move(target)
                target += block.size_bytes
        except BaseException:
            self._take_out()
            raise
        if self._populates and all(_is_full(fd) for fd in blocks.fds):
            self.populate()

    def _take_out(self) -> None:
        _reserve(self.size_bytes, self.address)

    def _make_private(self, number: int, address: int, size_bytes: int) -> None:
        """The same pages, each copied when it is first written to; copied now if somebody else may write to them."""
        assert self._mapped is not None
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        fd, access = self._mapped.fds[number], mmap.PROT_READ | mmap.PROT_WRITE
        if not _seals(fd) & _F_SEAL_WRITE:
            with contextlib.closing(_Elsewhere(None, size_bytes, writable=True)) as copy:
                copy.fill(address)
                copy.move(address)
            return
        mapped = _libc.mmap(address, size_bytes, access, flags, fd, 0)
        _address(f"Cannot make {size_bytes} bytes of host memory private", mapped)

    def _put_private(self, sizes: tuple[int, ...]) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        access = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = _libc.mmap(self.address, sum(sizes), access, flags, -1, 0)
        _address(f"Cannot map {sum(sizes)} bytes of host memory", mapped)

    def _protect(self, size_bytes: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if _libc.mprotect(self.address, size_bytes, access):
            raise ArenaError(
                f"Cannot {'allow' if writable else 'end'} writes to {size_bytes} bytes of host memory: "
                f"{os.strerror(ctypes.get_errno())}."
            )

    def seal(self, blocks: Blocks) -> None:
        """What is mapped are `blocks`, to which nobody gets another writable mapping."""
        self._mapped = blocks

    def _free(self) -> None:
        _libc.munmap(self._address, self.size_bytes)


class _Elsewhere:
    """A block mapped at addresses of its own, from where one call moves it over others.

    So what can fail is done before anything is unmapped, and no address is ever anybody else's for a moment.
    """

    def __init__(self, fd: int | None, size_bytes: int, *, writable: bool) -> None:
        """`fd`: of the block; None: new memory of this process's own."""
        self.size_bytes = size_bytes
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED if fd is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._address: int | None = _address(
            f"Cannot map {size_bytes} bytes of host memory",
            _libc.mmap(None, size_bytes, access, flags, -1 if fd is None else fd, 0),
        )

    def fill(self, source_address: int) -> None:
        assert self._address is not None
        ctypes.memmove(self._address, source_address, self.size_bytes)

    def move(self, target: int) -> None:
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
        moved = _libc.mremap(self._address, self.size_bytes, self.size_bytes, flags, target)
        _address(f"Cannot move {self.size_bytes} bytes of host memory to their place", moved)
        self._address = None

    def close(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self.size_bytes)
            self._address = None


class Memfd(Kind):
    name = "memfd"
    device_type = "cpu"

    def granularity(self, device_index: int | None) -> int:
        return mmap.PAGESIZE

    def create(self, size_bytes: int, device_index: int | None, keeper: Keeper | None) -> MemfdWriter:
        return MemfdWriter(size_bytes)

    def reserve(self, size_bytes: int, device_index: int | None) -> MemfdMapping:
        return MemfdMapping(size_bytes)

    def check(self, info: ArenaInfo, fds: Sequence[int]) -> None:
        super().check(info, fds)
        for index, (fd, size_bytes) in enumerate(zip(fds, info.block_sizes, strict=True)):
            try:
                # First: to ask other files than memfds even for their size may wait for somebody's file system.
                seals = _seals(fd)
            except OSError as error:
                raise ArenaError(f"Descriptor {index} is not a memfd: {error.strerror}.") from error
            if info.trained:
                if seals & TRAINED_SEALS != TRAINED_SEALS or seals & _F_SEAL_WRITE:
                    raise ArenaError(
                        f"Memfd {index} is not sealed against all writers but its owner (seals {seals:#x})."
                    )
            elif seals & _NEEDED_SEALS != _NEEDED_SEALS:
                raise ArenaError(f"Memfd {index} is not sealed against write and shrink (seals {seals:#x}).")
            actual = os.fstat(fd).st_size
            if actual != size_bytes:
                raise ArenaError(f"Block {index} of the arena should have {size_bytes} bytes; the memfd has {actual}.")

    def to_host(self, arena: Arena, device_index: int | None) -> tuple[ArenaInfo, Descriptors]:
        """What is shared is in host memory: the same bytes, once more by descriptor."""
        if not arena.mapping.is_private:
            return ArenaInfo(self.name, arena.info.block_sizes, trained=arena.info.trained), arena.fds.dup()
        with new_memfd(arena.info.size_bytes) as memfd:
            ctypes.memmove(memfd.address, arena.address, arena.info.size_bytes)
            return memfd.seal()

    def fill(
        self, arena: Arena, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> None:
        with contextlib.closing(self.open(host, fds, None)) as source:
            if host.size_bytes != arena.info.size_bytes:
                raise ArenaError(f"A copy of {host.size_bytes} bytes is none of {arena.info.size_bytes}.")
            ctypes.memmove(arena.address, source.address, arena.info.size_bytes)

    def from_host(
        self, info: ArenaInfo, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> Arena:
        return self.open(info, fds, device_index)


class SharedWriter:
    """A memfd that is mapped writable while it is filled, by threads that copy into it."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._fd = Descriptors([os.memfd_create("vllm-companion-filled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)])
        self._address: int | None = None
        self._unmapping: weakref.finalize[..., SharedWriter] | None = None
        try:
            os.ftruncate(self._fd[0], size_bytes)
            access = mmap.PROT_READ | mmap.PROT_WRITE
            mapped = _libc.mmap(None, size_bytes, access, mmap.MAP_SHARED, self._fd[0], 0)
            self._address = _address(f"Cannot map {size_bytes} bytes of host memory", mapped)
            self._unmapping = weakref.finalize(self, _libc.munmap, self._address, size_bytes)
            # In a process that is forked meanwhile, it would be a writer that nobody can seal against.
            _libc.madvise(self._address, size_bytes, _MADV_DONTFORK)
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """Get the pages now: a thread that finds none while it copies would be killed by SIGBUS."""
        starts = range(0, self._size_bytes, _PART_BYTES)
        with ThreadPoolExecutor(_ALLOCATING_THREADS) as executor:
            errors = set(executor.map(self._allocate_part, starts)) - {0}
        if errors == {errno.EINVAL}:  # before Linux 5.14
            os.posix_fallocate(self._fd[0], 0, self._size_bytes)
        elif errors:
            raise ArenaError(f"No host memory for a copy of {self._size_bytes} bytes: {os.strerror(errors.pop())}.")

    def _allocate_part(self, start: int) -> int:
        """The error's number, or 0."""
        size_bytes = min(_PART_BYTES, self._size_bytes - start)
        failed = _libc.madvise(self.address + start, size_bytes, _MADV_POPULATE_WRITE)
        return ctypes.get_errno() if failed else 0

    @property
    def address(self) -> int:
        assert self._address is not None
        return self._address

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def seal(self) -> tuple[ArenaInfo, Descriptors]:
        """Nobody can write any more: what it is, and its read-only descriptor, which the caller owns.

        Raises:
            ArenaError: somebody may still write, or this process has no descriptors left.
        """
        self._unmap()
        try:
            fcntl.fcntl(self._fd[0], fcntl.F_ADD_SEALS, SEALS)
            readonly = Descriptors([os.open(f"/proc/self/fd/{self._fd[0]}", os.O_RDONLY | os.O_CLOEXEC)])
        except OSError as error:
            raise ArenaError(f"{self._size_bytes} bytes of host memory cannot be sealed: {error}.") from error
        return ArenaInfo(Memfd.name, (self._size_bytes,)), readonly

    def _unmap(self) -> None:
        self._address = None
        if self._unmapping is not None:
            self._unmapping()

    def close(self) -> None:
        self._unmap()
        self._fd.close()


@contextlib.contextmanager
def new_memfd(size_bytes: int) -> Iterator[SharedWriter]:
    """A memfd to be filled, and sealed, before the end of `with`. Raises `ArenaError`: no host memory for it."""
    try:
        writer = SharedWriter(size_bytes)
    except OSError as error:
        raise ArenaError(f"Cannot create {size_bytes} bytes of shared host memory: {error}.") from error
    try:
        yield writer
    finally:
        writer.close()


def map_to_read(info: ArenaInfo, fds: Sequence[int]) -> MemfdMapping:
    """Sealed memfds, mapped to be read by several threads, each of which faults in the pages that it reads.

    Raises:
        ArenaError: they are none.
    """
    Memfd().check(info, fds)
    mapping = MemfdMapping(info.size_bytes, populates=False)
    try:
        mapping.map(Blocks(info.block_sizes, fds))
    except BaseException:
        mapping.close()
        raise
    return mapping


class MemfdWriter:
    """Fills a memfd. The whole size is one block; memory is used as it is written."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._added = 0
        self._fd, self._readonly_fd = Descriptors(), Descriptors()
        self._mapping: MemfdMapping | None = None
        self._sealed: Arena | None = None  # which tensors view that refer to us
        try:
            self._fd = Descriptors([os.memfd_create("vllm-companion", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)])
            os.ftruncate(self._fd[0], size_bytes)
            self._readonly_fd = Descriptors([os.open(f"/proc/self/fd/{self._fd[0]}", os.O_RDONLY | os.O_CLOEXEC)])
            self._mapping = MemfdMapping(size_bytes)
            self._mapping.map(Blocks((size_bytes,), self._readonly_fd))
        except OSError as error:
            self.abort()
            raise ArenaError(f"Cannot create {size_bytes} bytes of shared host memory: {error}.") from error
        except ArenaError:
            self.abort()
            raise

    @property
    def address(self) -> int:
        assert self._mapping is not None
        return self._mapping.address

    @property
    def fds(self) -> Sequence[int]:
        return self._fd

    def add_block(self, size_bytes: int) -> None:
        self._added += size_bytes
        if self._added > self._size_bytes:
            raise ArenaError(f"Blocks of {self._added} bytes exceed the {self._size_bytes} reserved.")

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        source = memoryview((ctypes.c_char * size_bytes).from_address(source_address)).cast("B")
        done = 0
        while done < size_bytes:  # Linux writes at most 2 GiB at a time
            try:
                done += os.pwrite(self._fd[0], source[done:], offset_bytes + done)
            except OSError as error:
                raise ArenaError(f"No host memory for {size_bytes} bytes of weights: {error}.") from error

    def flush(self) -> None:
        """Writes are synchronous."""

    def seal(self, *, trained: bool = False) -> Arena:
        assert self._mapping is not None
        if trained:
            self._mapping.replace(self._fd, writable=True)
        try:
            fcntl.fcntl(self._fd[0], fcntl.F_ADD_SEALS, TRAINED_SEALS if trained else SEALS)
        except OSError as error:  # EINVAL before Linux 5.1
            if not trained:
                raise
            raise ArenaError(
                f"This system cannot keep others from writing to memory that is trained: {error.strerror}."
            ) from error
        if trained:
            self._mapping.allow_writes(False)
            self._mapping.seal(Blocks((self._size_bytes,), self._readonly_fd))
        self._fd.close()
        self._mapping.populate()
        info = ArenaInfo(Memfd.name, (self._size_bytes,), trained=trained)
        self._sealed = Arena(info, self._readonly_fd, self._mapping, Memfd().check, is_owner=trained)
        self._readonly_fd, self._mapping = Descriptors(), None
        return self._sealed

    def abort(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        self._fd.close()
        self._readonly_fd.close()
        self._mapping = None
