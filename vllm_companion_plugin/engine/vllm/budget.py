"""The memory budget of an engine whose weights a companion holds (adr/0005).

vLLM 0.32 asks the loader for the size of weights that were resident before its first measurement, and treats them as a
part of the engine's share. Versions before check and keep `requested_memory` before any loader exists, so their
`request_memory` is replaced by one that does the same.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.engine.vllm import patches

ExternalBytes = Callable[[], int | None]
"""How much the companion holds for the engine that starts; None if that does not use one."""


def has_external_memory_hook(request_memory: Callable[..., int]) -> bool:
    """Whether this vLLM asks loaders for weights held outside (0.32 and later)."""
    return "external_weight_memory" in inspect.signature(request_memory).parameters


def replace_request_memory(utils: types.ModuleType, external_bytes: ExternalBytes) -> None:
    """Let `vllm.v1.worker.utils` count weights that a companion holds, unless this vLLM does so by itself."""
    original = utils.request_memory
    if has_external_memory_hook(original):
        return

    def counting(original: Callable[..., int]) -> Callable[..., int]:
        return with_external(original, external_bytes)

    patches.REQUEST_MEMORY.apply(counting)
    worker = sys.modules.get("vllm.v1.worker.gpu_worker")
    if getattr(worker, "request_memory", None) is original:
        patches.REQUEST_MEMORY_OF_WORKER.apply(counting)


def with_external(original: Callable[..., int], external_bytes: ExternalBytes) -> Callable[..., int]:
    """vLLM's `request_memory`, which counts weights that a companion holds, too."""

    @functools.wraps(original)
    def request_memory(init_snapshot: Any, cache_config: Any) -> int:
        external = external_bytes()
        if external is None:
            return int(original(init_snapshot, cache_config))
        # Deciding may have waited for another engine's load: measure what is there now.
        init_snapshot.measure()
        if external == 0:
            return int(original(init_snapshot, cache_config))
        return engine_budget(
            init_snapshot.total_memory, init_snapshot.free_memory, cache_config.gpu_memory_utilization, external
        )

    return request_memory


def engine_budget(total_bytes: int, free_bytes: int, utilization: float, external_bytes: int) -> int:
    """What the engine may use besides the weights that it maps.

    Raises:
        ValueError: as vLLM does, if the budget is not there.
    """
    requested = math.ceil(total_bytes * utilization)
    engine = requested - external_bytes
    if engine <= 0:
        raise ValueError(
            f"Weights held by the companion ({external_bytes / 2**30:.2f} GiB) exceed the desired GPU memory "
            f"utilization ({utilization}, {requested / 2**30:.2f} GiB). Increase GPU memory utilization."
        )
    if free_bytes < engine:
        raise ValueError(
            f"Free memory ({free_bytes / 2**30:.2f} GiB) on startup is less than this engine's budget without the "
            f"weights that the companion holds ({utilization}, {engine / 2**30:.2f} GiB). Decrease GPU memory "
            "utilization or reduce GPU memory used by other processes."
        )
    return engine


def adjust_budget(by_bytes: int, resident_since: float = 0.0) -> None:
    """Change the worker's memory budget: what it may use besides the weights that it maps.

    For an engine that announced shared weights and then has to load its own, or maps weights that it
    did not announce.

    Args:
        by_bytes: more than zero to give back, less than zero to set aside.
        resident_since: Unix time; weights that came after the worker had measured its memory are
            seen by its next measurement, and must not count twice.
    """
    worker = _calling_worker()
    if worker is None:
        return
    snapshot = getattr(worker, "init_snapshot", None)
    if resident_since <= getattr(snapshot, "timestamp", resident_since):
        worker.requested_memory += by_bytes


def _calling_worker() -> Any:
    """The worker that loads a model: no hook hands it to a loader, but it is a caller of one. None if there is none."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if hasattr(caller, "requested_memory") and hasattr(caller, "model_runner"):
            return caller
        frame = frame.f_back
    return None
