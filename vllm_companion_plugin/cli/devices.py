"""Finding the devices that a command means, and the companions that answer there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.errors import ArenaError, RuntimeDirError, SettingsError
from vllm_companion_plugin.host.runtime_dir import check_device, device_paths, list_devices
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.settings import Settings


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use, by index; none without a driver or cuda.bindings."""
    try:
        if find_spec("cuda.bindings") is None:
            return []
        from vllm_companion_plugin.memory import cuda_driver

        return cuda_driver.device_uuids()
    except (ImportError, ArenaError):
        return []


def devices_named(text: str | None) -> list[str]:
    """Return the devices that `--device` names: a UUID, "cpu", an index, "cuda:INDEX", or "all" (the default).

    "all" means all GPUs, or "cpu" if this process sees none.

    Raises:
        SettingsError: no GPU has that index, or the text is no device name.
    """
    if text is None or text == "all":
        return visible_gpus() or ["cpu"]
    index = text.removeprefix("cuda:")  # as torch names the GPUs that it sees
    if index.isdecimal() and len(index) < 10:
        gpus = visible_gpus()
        if int(index) >= len(gpus):
            raise SettingsError(
                f"--device {text}: this process sees {len(gpus)} GPUs.", remedy="Name an index below that, or cpu."
            )
        return [gpus[int(index)]]
    try:
        return [check_device(text)]
    except RuntimeDirError as error:
        raise SettingsError(f"--device: {error.what}", remedy=error.remedy) from error


@contextmanager
def running(settings: Settings, device: str | None) -> Iterator[list[CompanionConnection]]:
    """Yield connections to the companions that answer, of any protocol version; by default on all devices."""
    names = list_devices(settings)
    if device not in (None, "all"):
        names = [name for name in devices_named(device) if name in names]
    connections = []
    try:
        for name in names:
            paths = device_paths(name, settings)
            if is_listening(paths):
                connections.append(CompanionConnection(paths))
        yield connections
    finally:
        for connection in connections:
            connection.close()
