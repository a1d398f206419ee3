"""Driver calls that every kind of device memory needs.

A thread has no context at first, or that of another GPU, so what depends on one runs inside of `primary_context`.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_companion_plugin.errors import ArenaError


class _Bindings:
    """`cuda.bindings.driver`, imported at the first use.

    So the companion, which never has CUDA, can read what kinds of memory there are.
    """

    def __getattr__(self, name: str) -> Any:
        from cuda.bindings import driver as bindings

        return getattr(bindings, name)


driver: Any = _Bindings()


def call(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or `ArenaError` with the driver's own words."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        raise ArenaError(f"{what} failed: {name.decode() if isinstance(name, bytes) else name}.")
    return values[0] if values else None


def _begin() -> None:
    """The first call of all: there may be no driver behind the bindings."""
    try:
        result = driver.cuInit(0)
    except RuntimeError as error:
        raise ArenaError(f"There is no CUDA driver: {error}") from error
    call("cuInit", result)


class PrimaryContext:
    """The context of a device that PyTorch uses, too: inside of `with` it is this thread's current one.

    It stays until the process ends, as PyTorch's does; who resets the device must end the process.

    Raises:
        ArenaError: no such device, or no memory for a context; at `with`, the context is of a process that forked.
    """

    def __init__(self, device_index: int) -> None:
        _begin()
        self.device = call("cuDeviceGet", driver.cuDeviceGet(device_index))
        what = f"Making a CUDA context on device {device_index} (it takes about 0.5 GiB of its memory)"
        self._context = call(what, driver.cuDevicePrimaryCtxRetain(self.device))

    def __enter__(self) -> None:
        call("Using this process's CUDA context", driver.cuCtxPushCurrent(self._context))

    def __exit__(self, *_: object) -> None:
        driver.cuCtxPopCurrent()


@functools.cache
def primary_context(device_index: int) -> PrimaryContext:
    """That of a visible device, made at the first call. Raises as `PrimaryContext`."""
    return PrimaryContext(device_index)


def device_uuid(device_index: int) -> str:
    """The name of a visible device, the same in every process that sees it; creates no context.

    The driver's documentation promises that `cuDeviceGetUuid_v2` gives a device in MIG mode the UUID of its compute
    instance, so instances have companions of their own, as they must: one's memory cannot be mapped in another.
    From CUDA 13 on that is `cuDeviceGetUuid`; before, that was an older function without the promise. NVML's UUID of
    an index is the whole GPU's. Not documented is that names of MIG devices have " MIG " in them; it only decides
    whether the UUID is written as nvidia-smi writes those.

    Raises:
        ArenaError: no such device.
    """
    _begin()
    device = call("cuDeviceGet", driver.cuDeviceGet(device_index))
    get_uuid = getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)
    raw = bytes(call("cuDeviceGetUuid", get_uuid(device)).bytes).hex()
    name = bytes(call("cuDeviceGetName", driver.cuDeviceGetName(256, device)))
    prefix = "MIG" if b" MIG " in name else "GPU"
    return f"{prefix}-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"


def device_uuids() -> list[str]:
    """`device_uuid` of the visible devices, by index. Raises `ArenaError` without a driver."""
    _begin()
    return [device_uuid(index) for index in range(call("cuDeviceGetCount", driver.cuDeviceGetCount()))]


def copy_to_device(target_address: int, source_address: int, size_bytes: int) -> None:
    """Start a copy within the current device, ordered behind PyTorch's default stream."""
    call("Copying weights", driver.cuMemcpyDtoDAsync(target_address, source_address, size_bytes, 0))


def wait_for_copies() -> None:
    """Return once all copies so far within the current device have landed."""
    call("Copying weights", driver.cuStreamSynchronize(0))
