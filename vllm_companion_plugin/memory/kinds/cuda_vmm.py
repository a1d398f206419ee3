"""Device memory: CUDA virtual memory management, one exportable allocation a block.

A descriptor of such an allocation keeps the memory alive with no CUDA context behind it, so a
process without CUDA can hold it.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory import staging
from vllm_companion_plugin.memory.arena import Arena
from vllm_companion_plugin.memory.cuda_driver import call, copy_to_device, driver, primary_context, wait_for_copies
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.host_copy import HostCopy
from vllm_companion_plugin.memory.kind import Keeper, Kind, required_index
from vllm_companion_plugin.memory.kinds.memfd import map_to_read, new_memfd
from vllm_companion_plugin.memory.mapping import Blocks, Reservation


def _properties(device_index: int) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    properties.requestedHandleTypes = _as_fd()
    return properties


def _as_fd() -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class CudaVmmMapping(Reservation):
    """Addresses of a device, with allocations mapped into them.

    A kernel that writes where it may not, or reads where nothing is mapped, faults its process.
    """

    def __init__(self, size_bytes: int, device_index: int) -> None:
        self.device_index = device_index
        self.context = primary_context(device_index)
        self._parts: list[tuple[int, int]] = []  # address and bytes of what the driver has mapped, block by block
        with self.context:
            reserved = driver.cuMemAddressReserve(size_bytes, 0, 0, 0)
            address = call(f"Reserving {size_bytes} bytes of addresses", reserved)
        super().__init__(int(address), size_bytes)

    @property
    def mapped_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self._parts)

    def add(self, handle: Any, size_bytes: int) -> None:
        """Map an allocation behind the blocks so far, writable. The context must be current."""
        if self.mapped_bytes + size_bytes > self.size_bytes:
            raise ArenaError(f"Blocks of {self.mapped_bytes + size_bytes} bytes exceed the {self.size_bytes} reserved.")
        offset = self.mapped_bytes
        self._map_part(handle, size_bytes)
        self._allow(offset, size_bytes, writable=True)

    def seal(self, blocks: Blocks) -> None:
        """What was added are `blocks`, to which nobody writes any more. The context must be current."""
        self._allow(0, self.mapped_bytes, writable=False)
        self._mapped = blocks

    def _prepare(self, undo: contextlib.ExitStack, blocks: Blocks) -> list[Any]:
        handles = []
        with self.context:
            for fd in blocks.fds:
                handles.append(call("Importing a block", driver.cuMemImportFromShareableHandle(fd, _as_fd())))
                undo.callback(driver.cuMemRelease, handles[-1])  # a mapping keeps the memory
        return handles

    def _put(self, prepared: list[Any], blocks: Blocks) -> None:
        with self.context:
            self._unmap_parts()
            try:
                for handle, size_bytes in zip(prepared, blocks.sizes, strict=True):
                    self._map_part(handle, size_bytes)
                self._allow(0, blocks.size_bytes, blocks.writable)
            except BaseException:
                self._drop_parts()
                raise

    def _take_out(self) -> None:
        with self.context:
            self._unmap_parts()

    def _protect(self, size_bytes: int, *, writable: bool) -> None:
        with self.context:
            self._allow(0, size_bytes, writable)

    def _make_private(self, number: int, address: int, size_bytes: int) -> None:
        assert self._mapped is not None
        shared = Blocks((size_bytes,), self._mapped.fds[number : number + 1])
        with contextlib.ExitStack() as undo, self.context, self._allocated(size_bytes) as own:
            (way_back,) = self._prepare(undo, shared)
            self._copy_aside(own, address, size_bytes)
            call("cuMemUnmap", driver.cuMemUnmap(address, size_bytes))
            try:
                self._map_in_place(address, own, size_bytes, writable=True)
            except ArenaError as error:
                try:
                    self._map_in_place(address, way_back, size_bytes, shared.writable)
                except ArenaError as again:
                    self._parts.remove((address, size_bytes))
                    self._lose_all()
                    raise ArenaError(f"{error} And what was mapped could not be mapped again: {again}") from error
                raise

    def _map_in_place(self, address: int, handle: Any, size_bytes: int, writable: bool) -> None:
        """Map an allocation where that of a part was. Raises `ArenaError`; then nothing is mapped there."""
        call("cuMemMap", driver.cuMemMap(address, size_bytes, 0, handle, 0))
        try:
            self._allow(address - self.address, size_bytes, writable)
        except ArenaError:
            driver.cuMemUnmap(address, size_bytes)
            raise

    def _lose_all(self) -> None:
        """After a block was lost: whoever used the others would find a hole, and fault."""
        self._drop_parts()
        self._mapped = None
        self._private.clear()

    def _copy_aside(self, handle: Any, source_address: int, size_bytes: int) -> None:
        """Map an allocation elsewhere for as long as it takes to copy a block into it."""
        aside = CudaVmmMapping(size_bytes, self.device_index)
        try:
            aside.add(handle, size_bytes)
            copy_to_device(aside.address, source_address, size_bytes)
            wait_for_copies()
        finally:
            aside.close()

    def _put_private(self, sizes: tuple[int, ...]) -> None:
        with self.context:
            try:
                for size_bytes in sizes:
                    with self._allocated(size_bytes) as handle:
                        self._map_part(handle, size_bytes)
                self._allow(0, sum(sizes), writable=True)
            except BaseException:
                self._drop_parts()
                raise

    @contextlib.contextmanager
    def _allocated(self, size_bytes: int) -> Iterator[Any]:
        """A new allocation, which a mapping keeps after `with`."""
        what = f"Allocating {size_bytes} bytes on device {self.device_index}"
        handle = call(what, driver.cuMemCreate(size_bytes, _properties(self.device_index), 0))
        try:
            yield handle
        finally:
            driver.cuMemRelease(handle)

    def _wait(self) -> None:
        """Unmapping under a kernel would fault it."""
        with self.context:
            call("Waiting for the device", driver.cuCtxSynchronize())

    def _free(self) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ArenaError):  # in a process that forked, or ends, there is no context
                stack.enter_context(self.context)
                driver.cuCtxSynchronize()
            self._drop_parts()
            driver.cuMemAddressFree(self._address, self.size_bytes)

    def _map_part(self, handle: Any, size_bytes: int) -> None:
        """Behind the others. No access until `_allow`."""
        address = self.address + self.mapped_bytes
        call("cuMemMap", driver.cuMemMap(address, size_bytes, 0, handle, 0))
        self._parts.append((address, size_bytes))

    def _allow(self, offset_bytes: int, size_bytes: int, writable: bool) -> None:
        """Give this device's kernels access to a mapped part."""
        access, flags = driver.CUmemAccessDesc(), driver.CUmemAccess_flags
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device_index
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        call("cuMemSetAccess", driver.cuMemSetAccess(self.address + offset_bytes, size_bytes, [access], 1))

    def _unmap_parts(self) -> None:
        while self._parts:
            call("cuMemUnmap", driver.cuMemUnmap(*self._parts[-1]))
            self._parts.pop()

    def _drop_parts(self) -> None:
        """As `_unmap_parts`, on the way out of something that failed or ends: without an error."""
        while self._parts:
            driver.cuMemUnmap(*self._parts.pop())


class CudaVmm(Kind):
    name = "cuda_vmm"
    device_type = "cuda"

    def unsupported_reason(self, device_index: int) -> str | None:
        device = primary_context(device_index).device
        attribute = driver.CUdevice_attribute
        for needed in (
            attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ):
            if not call("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(needed, device)):
                return f"device {device_index} lacks {needed.name}"
        # Some hypervisors and sandboxes report the attributes and refuse the export.
        size_bytes = self.granularity(device_index)
        writer = CudaVmmWriter(size_bytes, device_index)
        try:
            writer.add_block(size_bytes)
        except ArenaError as error:
            return f"device {device_index}: {error}"
        finally:
            writer.abort()
        return None

    def granularity(self, device_index: int | None) -> int:
        """2 MiB on Hopper."""
        index = required_index(self.name, device_index)
        primary_context(index)
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        result = driver.cuMemGetAllocationGranularity(_properties(index), minimum)
        return int(call("cuMemGetAllocationGranularity", result))

    def create(self, size_bytes: int, device_index: int | None, keeper: Keeper | None) -> CudaVmmWriter:
        return CudaVmmWriter(size_bytes, required_index(self.name, device_index))

    def reserve(self, size_bytes: int, device_index: int | None) -> CudaVmmMapping:
        return CudaVmmMapping(size_bytes, required_index(self.name, device_index))

    def to_host(self, arena: Arena, device_index: int | None) -> tuple[ArenaInfo, Descriptors]:
        context = primary_context(required_index(self.name, device_index))
        with new_memfd(arena.info.size_bytes) as memfd:
            staging.to_host(context, arena.address, memfd.address, arena.info.size_bytes)
            return memfd.seal()

    def keep(self, host: ArenaInfo, fds: Sequence[int], device_index: int | None) -> HostCopy:
        return HostCopy(map_to_read(host, fds), primary_context(required_index(self.name, device_index)))

    def fill(
        self, arena: Arena, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> None:
        with fds:
            if host.size_bytes != arena.info.size_bytes:
                raise ArenaError(f"A copy of {host.size_bytes} bytes is none of {arena.info.size_bytes}.")
            self._copy_from(host, fds, arena.address, device_index, kept)

    def from_host(
        self, info: ArenaInfo, host: ArenaInfo, fds: Descriptors, device_index: int | None, kept: HostCopy | None = None
    ) -> Arena:
        with fds:
            if host.size_bytes != info.size_bytes:
                raise ArenaError(f"A copy of {host.size_bytes} bytes is none of {info.size_bytes}.")
            writer = self.create(info.size_bytes, device_index, None)
            try:
                for size_bytes in info.block_sizes:
                    writer.add_block(size_bytes)
                self._copy_from(host, fds, writer.address, device_index, kept)
                return writer.seal()
            except BaseException:
                writer.abort()
                raise

    def _copy_from(
        self, host: ArenaInfo, fds: Sequence[int], target: int, device_index: int | None, kept: HostCopy | None
    ) -> None:
        context = primary_context(required_index(self.name, device_index))
        if kept is not None and (source := kept.address) is not None:
            staging.locked_to_device(context, source, target, host.size_bytes)
            return
        with contextlib.closing(map_to_read(host, fds)) as mapping:
            staging.to_device(context, mapping.address, target, host.size_bytes)


class CudaVmmWriter:
    """Fills an arena of device memory, block by block."""

    def __init__(self, size_bytes: int, device_index: int) -> None:
        self._mapping: CudaVmmMapping | None = CudaVmmMapping(size_bytes, device_index)
        self._fds: list[Descriptors] = []  # one in each
        self._block_sizes: list[int] = []
        self._sealed: Arena | None = None  # which tensors view that refer to us

    @property
    def address(self) -> int:
        assert self._mapping is not None
        return self._mapping.address

    @property
    def fds(self) -> Sequence[int]:
        return [each[0] for each in self._fds]

    def add_block(self, size_bytes: int) -> None:
        assert self._mapping is not None
        device_index = self._mapping.device_index
        with self._mapping.context:
            handle = call(
                f"Allocating {size_bytes} bytes on device {device_index}",
                driver.cuMemCreate(size_bytes, _properties(device_index), 0),
            )
            try:
                fd = int(call("Exporting a block", driver.cuMemExportToShareableHandle(handle, _as_fd(), 0)))
                self._fds.append(Descriptors([fd]))
                os.set_inheritable(fd, False)
                self._mapping.add(handle, size_bytes)
            finally:
                driver.cuMemRelease(handle)  # the mapping keeps the memory
        self._block_sizes.append(size_bytes)

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        assert self._mapping is not None
        with self._mapping.context:
            copy_to_device(self.address + offset_bytes, source_address, size_bytes)

    def flush(self) -> None:
        assert self._mapping is not None
        with self._mapping.context:
            wait_for_copies()

    def seal(self, *, trained: bool = False) -> Arena:
        self.flush()
        assert self._mapping is not None
        info = ArenaInfo(CudaVmm.name, tuple(self._block_sizes), trained=trained)
        fds = Descriptors(fd for each in self._fds for fd in each.take())
        self._fds = [fds]
        with self._mapping.context:
            self._mapping.seal(Blocks(info.block_sizes, fds))
        self._sealed = Arena(info, fds, self._mapping, CudaVmm().check, is_owner=trained)
        self._mapping, self._fds = None, []
        return self._sealed

    def abort(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        for fds in self._fds:
            fds.close()
        self._mapping, self._fds = None, []
