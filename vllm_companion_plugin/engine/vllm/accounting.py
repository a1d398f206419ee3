"""Memory budget of attached engines on vLLM before 0.32, which has no hook for it.

Those versions check and keep `requested_memory` before any loader exists. The one patch of
this project replaces `request_memory` so that weights held by the companion are treated as
0.32 treats them: resident before the snapshot, and part of the engine's share.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

from vllm_companion_plugin.engine.vllm import compat


def install_request_memory(utils: ModuleType) -> None:
    """Patch `vllm.v1.worker.utils.request_memory`, unless this vLLM needs no patch."""
    original = utils.request_memory
    if compat.has_external_memory_hook(original):
        return

    def request_memory(init_snapshot: Any, cache_config: Any) -> int:
        external = _external_bytes()
        if external is None:
            return int(original(init_snapshot, cache_config))
        # Deciding may have waited for another engine's load: measure what is there now.
        init_snapshot.measure()
        if external == 0:
            return int(original(init_snapshot, cache_config))
        return engine_budget(
            init_snapshot.total_memory, init_snapshot.free_memory, cache_config.gpu_memory_utilization, external
        )

    utils.request_memory = request_memory  # type: ignore[attr-defined]
    worker = sys.modules.get("vllm.v1.worker.gpu_worker")
    if worker is not None and getattr(worker, "request_memory", None) is original:
        worker.request_memory = request_memory  # type: ignore[attr-defined]


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


def _external_bytes() -> int | None:
    """Bytes held by the companion for the engine being started; None if it does not use one."""
    from vllm.config import get_current_vllm_config

    from vllm_companion_plugin.engine.decide import external_bytes
    from vllm_companion_plugin.engine.vllm.naming import LOAD_FORMAT
    from vllm_companion_plugin.settings import resolve_extra_config

    vllm_config = get_current_vllm_config()
    load_config = vllm_config.load_config
    if load_config is None or load_config.load_format != LOAD_FORMAT:
        return None
    return external_bytes(vllm_config, resolve_extra_config(load_config.model_loader_extra_config))
