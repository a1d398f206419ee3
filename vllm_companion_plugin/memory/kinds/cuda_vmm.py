"""Device memory: CUDA virtual memory management, one exportable allocation a block.

A descriptor of such an allocation keeps the memory alive with no CUDA context behind it, so a
process without CUDA can hold it.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.memory.closing import Closing
from vllm_companion_plugin.memory.cuda_driver import call, copy_to_device, primary_context, wait_for_copies

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
_READ_WRITE = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


def unsupported_reason(device_index: int) -> str | None:
    """Why this device cannot share memory by file descriptor, or None if it can."""
    device = primary_context(device_index).device
    attribute = driver.CUdevice_attribute
    for needed in (
        attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
    ):
        if not call("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(needed, device)):
            return f"device {device_index} lacks {needed.name}"
    # Some hypervisors and sandboxes report the attributes and refuse the export.
    writer = CudaVmmWriter(granularity(device_index), device_index)
    try:
        writer.add_block(granularity(device_index))
    except ArenaError as error:
        return f"device {device_index}: {error}"
    finally:
        writer.abort()
    return None


def _properties(device_index: int) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    properties.requestedHandleTypes = _FD
    return properties


def granularity(device_index: int) -> int:
    """Bytes that allocations on this device must be a multiple of (2 MiB on Hopper)."""
    primary_context(device_index)
    minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(
        call("cuMemGetAllocationGranularity", driver.cuMemGetAllocationGranularity(_properties(device_index), minimum))
    )


class _Range:
    """A reserved address range and the blocks mapped into it. Undoes itself in `close`."""

    def __init__(self, size_bytes: int, device_index: int) -> None:
        self.device_index = device_index
        self.size_bytes = size_bytes
        self.mapped_bytes = 0
        self._undo: list[Callable[[], object]] = []
        self.context = primary_context(device_index)
        with self.context:
            self.address = int(
                call(f"Reserving {size_bytes} bytes of addresses", driver.cuMemAddressReserve(size_bytes, 0, 0, 0))
            )
        self._undo.append(lambda: driver.cuMemAddressFree(self.address, size_bytes))

    def map(self, handle: Any, size_bytes: int) -> None:
        """Map `handle` behind the blocks so far. No access until `allow`."""
        if self.mapped_bytes + size_bytes > self.size_bytes:
            raise ArenaError(f"Blocks of {self.mapped_bytes + size_bytes} bytes exceed the {self.size_bytes} reserved.")
        address = self.address + self.mapped_bytes
        call("cuMemMap", driver.cuMemMap(address, size_bytes, 0, handle, 0))
        self._undo.append(lambda: driver.cuMemUnmap(address, size_bytes))
        self.mapped_bytes += size_bytes

    def allow(self, offset_bytes: int, size_bytes: int, flags: Any) -> None:
        """Give this device's kernels access of kind `flags` to a mapped part."""
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device_index
        access.flags = flags
        call("cuMemSetAccess", driver.cuMemSetAccess(self.address + offset_bytes, size_bytes, [access], 1))

    def close(self) -> None:
        """Unmap everything. Kernels that use the range must be done: synchronizes first."""
        if not self._undo:
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ArenaError):  # in a process that forked, or ends, there is no context
                stack.enter_context(self.context)
                driver.cuCtxSynchronize()
            while self._undo:
                self._undo.pop()()


class CudaVmmArena(Closing):
    """A sealed arena of device memory, mapped read-only: a kernel's write faults that process."""

    def __init__(
        self, info: ArenaInfo, fds: Sequence[int], device_index: int, sealed_range: _Range | None = None
    ) -> None:
        self.info = info
        self._fds = tuple(fds)
        self._range = sealed_range
        if sealed_range is not None:
            return
        try:
            if len(fds) != len(info.block_sizes):
                raise ArenaError(f"{len(info.block_sizes)} blocks need as many descriptors; got {len(fds)}.")
            self._range = _Range(info.size_bytes, device_index)
            with self._range.context:
                for fd, size_bytes in zip(fds, info.block_sizes, strict=True):
                    handle = call("Importing a block", driver.cuMemImportFromShareableHandle(fd, _FD))
                    try:
                        self._range.map(handle, size_bytes)
                    finally:
                        driver.cuMemRelease(handle)  # the mapping keeps the memory
                self._range.allow(0, info.size_bytes, _READ)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        assert self._range is not None
        return self._range.address

    @property
    def fds(self) -> tuple[int, ...]:
        return self._fds

    def close(self) -> None:
        if self._range is not None:
            self._range.close()
        for fd in self._fds:
            os.close(fd)
        self._range, self._fds = None, ()


class CudaVmmWriter:
    """Fills an arena of device memory, block by block."""

    def __init__(self, size_bytes: int, device_index: int) -> None:
        self._range: _Range | None = _Range(size_bytes, device_index)
        self._fds: list[int] = []
        self._block_sizes: list[int] = []
        self._sealed: CudaVmmArena | None = None  # which tensors view that refer to us

    @property
    def address(self) -> int:
        assert self._range is not None
        return self._range.address

    def add_block(self, size_bytes: int) -> None:
        assert self._range is not None
        device_index, offset = self._range.device_index, self._range.mapped_bytes
        with self._range.context:
            handle = call(
                f"Allocating {size_bytes} bytes on device {device_index}",
                driver.cuMemCreate(size_bytes, _properties(device_index), 0),
            )
            try:
                self._fds.append(int(call("Exporting a block", driver.cuMemExportToShareableHandle(handle, _FD, 0))))
                os.set_inheritable(self._fds[-1], False)
                self._range.map(handle, size_bytes)
            finally:
                driver.cuMemRelease(handle)
            self._range.allow(offset, size_bytes, _READ_WRITE)
        self._block_sizes.append(size_bytes)

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        assert self._range is not None
        with self._range.context:
            copy_to_device(self.address + offset_bytes, source_address, size_bytes)

    def flush(self) -> None:
        assert self._range is not None
        with self._range.context:
            wait_for_copies()

    def seal(self) -> CudaVmmArena:
        self.flush()
        assert self._range is not None
        with self._range.context:
            self._range.allow(0, self._range.mapped_bytes, _READ)
        info = ArenaInfo("cuda_vmm", tuple(self._block_sizes))
        self._sealed = CudaVmmArena(info, self._fds, self._range.device_index, self._range)
        self._range, self._fds = None, []
        return self._sealed

    def abort(self) -> None:
        if self._range is not None:
            self._range.close()
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._range, self._fds = None, []
