"""Driver calls that every kind of device memory needs.

Calls run in the current context of the calling thread, or in the device's primary one if there is none.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

from vllm_companion_plugin.errors import ArenaError


def call(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or `ArenaError` with the driver's own words."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        raise ArenaError(f"{what} failed: {name.decode() if isinstance(name, bytes) else name}.")
    return values[0] if values else None


def ensure_context(device_index: int) -> Any:
    """Make sure that this thread has a context; the device."""
    call("cuInit", driver.cuInit(0))
    device = call("cuDeviceGet", driver.cuDeviceGet(device_index))
    if int(call("cuCtxGetCurrent", driver.cuCtxGetCurrent())) == 0:
        context = call("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))
        call("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    return device


def device_uuids() -> list[str]:
    """UUIDs of the visible devices, by index, as NVML writes them. Creates no context."""
    call("cuInit", driver.cuInit(0))
    found = []
    for index in range(call("cuDeviceGetCount", driver.cuDeviceGetCount())):
        device = call("cuDeviceGet", driver.cuDeviceGet(index))
        raw = bytes(call("cuDeviceGetUuid", driver.cuDeviceGetUuid(device)).bytes).hex()
        found.append(f"GPU-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}")
    return found


def copy_to_device(target_address: int, source_address: int, size_bytes: int) -> None:
    """Start a copy within the device, ordered behind PyTorch's default stream."""
    call("Copying weights", driver.cuMemcpyDtoDAsync(target_address, source_address, size_bytes, 0))


def wait_for_copies() -> None:
    """Return once all copies so far have landed."""
    call("Copying weights", driver.cuStreamSynchronize(0))
