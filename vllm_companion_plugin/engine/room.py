"""Room on a device, made before vLLM measures its memory: what nobody uses there goes before its time.

Without a companion a model that nobody serves any more takes no memory; with one it may stay for its linger time.
vLLM's own check would refuse an engine that finds too little free, and could not say whose memory it is.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger

from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import CompanionStatus, EntryStatus
from vllm_companion_plugin.engine.vllm import devices
from vllm_companion_plugin.errors import CompanionError

logger = init_logger("vllm.companion")

FREE_TIMEOUT_S = 10.0
"""For the memory of what was dropped: the companion closes its descriptors at once, the driver takes a moment."""
POLL_S = 0.02


def make_room(
    connection: CompanionConnection,
    device: devices.EngineDevice,
    vllm_config: Any,
    keys: Sequence[EntryKey],
    *,
    load_bytes: int = 0,
    mapped_bytes: int = 0,
) -> None:
    """Have idle entries dropped if vLLM would find too little free; say what is in the way if that does not do.

    Never raises: vLLM decides whether it starts.

    Args:
        keys: of the entries that this engine will use, which are not in its way; of its model first.
        load_bytes: of the weights that this engine will load.
        mapped_bytes: of those that it maps, which vLLM takes off what it wants.
    """
    try:
        wanted = _wanted_bytes(device, vllm_config, load_bytes, mapped_bytes)
        missing = wanted - devices.memory(device)[0]
        if missing <= 0:
            return
        dropped = _drop(connection, missing, keys[0])
        free = _wait_for(wanted, device) if dropped else devices.memory(device)[0]
        if free < wanted and (text := in_the_way(connection.status(), keys, wanted, free)):
            logger.warning("%s", text)
    except CompanionError as error:
        logger.warning("What nobody uses on %s stays there: %s", device.id, error)
    except Exception as error:
        logger.warning("It cannot be told whether %s has enough memory: %s: %s", device.id, type(error).__name__, error)


def _wanted_bytes(device: devices.EngineDevice, vllm_config: Any, load_bytes: int, mapped_bytes: int) -> int:
    """What must be free for vLLM to start."""
    cache = vllm_config.cache_config
    budget: int = math.ceil(devices.memory(device)[1] * cache.gpu_memory_utilization)
    if device.torch_device.type != "cpu":
        return budget - mapped_bytes
    # Checked after loading: the KV cache of a given size, or what this process has not used of its budget.
    kv_bytes: int | None = cache.kv_cache_memory_bytes
    return load_bytes + kv_bytes if kv_bytes is not None else budget - devices.resident_bytes()


def _drop(connection: CompanionConnection, missing: int, key: EntryKey) -> Sequence[EntryStatus]:
    dropped = connection.make_room(missing)
    for entry in dropped:
        logger.info(
            "Dropped %s (%s), which nobody used, from %s: %.2f GiB for %s.",
            *(entry.key.short_title, entry.key.rank, connection.device, entry.device_bytes / 2**30, key.short_title),
        )
    return dropped


def _wait_for(wanted: int, device: devices.EngineDevice) -> int:
    """Free bytes, as soon as so many are wanted, or the time is over."""
    deadline = time.monotonic() + FREE_TIMEOUT_S
    while (free := devices.memory(device)[0]) < wanted and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return free


def in_the_way(status: CompanionStatus, keys: Sequence[EntryKey], wanted: int, free: int) -> str:
    """Which entries take the memory that an engine lacks, and what frees it; empty if no other one is there."""
    own = {key.id for key in keys}
    others = [entry for entry in status.entries if entry.device_bytes and entry.key.id not in own]
    if not others:
        return ""
    first = (
        f"{keys[0].title} needs {wanted / 2**30:.2f} GiB free on {status.device}, and {free / 2**30:.2f} GiB are. "
        f"The companion there (pid {status.pid}) holds:"
    )
    return "\n".join([first, *(f"  {_describe(entry, status)}" for entry in others)])


def _describe(entry: EntryStatus, status: CompanionStatus) -> str:
    what = f"{entry.key.title} ({entry.key.rank}), {entry.device_bytes / 2**30:.2f} GiB"
    if len(entry.generations) > 1:
        what += f" in {len(entry.generations)} generations"
    if entry.leases:
        users = ", ".join(f"{lease.client} (pid {lease.pid})" for lease in entry.leases)
        return f"{what}, used by {users}: free when they have ended."
    owner = f"which `vllm-companion serve` (pid {status.owner_pid}) keeps" if status.owner_pid else "which nobody uses"
    namesakes = [other.key.id for other in status.entries if other.key.model == entry.key.model]
    # Several loads of a model may be here, of which others are used: their name would mean them, too.
    word = shlex.quote(entry.key.model) if len(namesakes) == 1 else _short(entry.key.id, namesakes)
    command = f"vllm-companion unload {word} --device {status.device}"
    return f"{what}, {owner}: {command}"


def _short(key_id: str, others: Sequence[str]) -> str:
    """Return the first digits of an id: eight, as `status` shows, or all if others begin like it."""
    digits = key_id[:8]
    return digits if sum(other.startswith(digits) for other in others) == 1 else key_id
