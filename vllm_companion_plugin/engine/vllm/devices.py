"""The device of a worker: its companion, what is shared there, and its memory as vLLM finds it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.errors import NotShareableError


@dataclasses.dataclass(frozen=True)
class EngineDevice:
    """Where this worker runs.

    Attributes:
        id: GPU UUID, or "cpu": the name of its companion.
        arena_kind: what its companion holds.
        stage: which state of the tensors is shared there.
    """

    id: str
    torch_device: torch.device
    arena_kind: str
    stage: Stage


def engine_device(arena: str = "auto") -> EngineDevice:
    """The device of this worker.

    Args:
        arena: the setting: how memory of a GPU is shared, or "auto".

    Raises:
        NotShareableError: a platform that has no arenas here.
    """
    if current_platform.is_cpu():
        return EngineDevice("cpu", torch.device("cpu"), arenas.best_kind("cpu"), Stage.UNPROCESSED)
    if current_platform.is_cuda():
        index = torch.cuda.current_device()
        kind = arenas.best_kind("cuda", index) if arena == "auto" else arena
        # Not vLLM's `get_device_uuid`: it takes the number of a local rank, and knows no MIG instances.
        return EngineDevice(arenas.cuda_device(index), torch.device("cuda", index), kind, Stage.PROCESSED)
    raise NotShareableError(f"platform {current_platform.device_name} is not supported; CUDA and CPU are.")


def requested_bytes(device: EngineDevice) -> int:
    """What this process has asked PyTorch for on `device`, and not returned; 0 on a CPU."""
    if device.torch_device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device.torch_device).get("requested_bytes.all.current", 0))


@contextmanager
def own_pool(device: EngineDevice) -> Iterator[None]:
    """While open, what this thread allocates is none of vLLM's memory that sleeps.

    That gives nothing back before a whole pool is free, so a model that gives up its memory piece by piece while it is
    packed would need it twice. Nothing can be done within a pool but to leave it for a while.
    """
    allocator = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    instance = getattr(allocator, "instance", None)
    tag = getattr(instance, "current_tag", None)
    pools = getattr(instance, "allocator_and_pools", {}).get(tag)
    if device.torch_device.type != "cuda" or tag != "weights" or not pools:  # no pool is open
        yield
        return
    pool = pools[-1][0] if isinstance(pools, list) else pools[0]
    index, torch_c = device.torch_device.index, torch._C
    torch_c._cuda_endAllocateToPool(index, pool.id)
    try:
        yield
    finally:
        torch_c._cuda_beginAllocateCurrentThreadToPool(index, pool.id)
        torch_c._cuda_releasePool(index, pool.id)  # to begin counts as one more user


def memory(device: EngineDevice) -> tuple[int, int]:
    """Bytes of `device` that are free, and all that it has, as vLLM is about to find them."""
    if device.torch_device.type == "cuda" and not _has_host_memory(device):
        free, total = torch.cuda.mem_get_info(device.torch_device)
        return free, total
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(rows[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    if device.torch_device.type == "cuda":
        return free, torch.cuda.mem_get_info(device.torch_device)[1]
    # vLLM before 0.32 does not look at the limit of a container.
    cgroup: Any = sys.modules.get("vllm.utils.cpu_resource_utils")
    limit = getattr(cgroup, "get_cgroup_memory_limit", lambda: None)()
    if limit is not None and limit < total:
        return max(0, min(free, limit - (cgroup.get_cgroup_memory_usage() or 0))), limit
    return free, total


def _has_host_memory(device: EngineDevice) -> bool:
    """Whether this is a GPU without memory of its own, of which CUDA knows less than the host does."""
    is_integrated = getattr(current_platform, "is_integrated_gpu", lambda index: False)
    return bool(is_integrated(device.torch_device.index))


def resident_bytes() -> int:
    """Host memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
