"""What the configuration of an engine says against sharing its weights."""

from __future__ import annotations

from typing import Any

TRANSFER_BACKEND = "companion"
"""Name of the weight-transfer backend that maps new weights and writes none."""


def unshareable_reason(vllm_config: Any) -> str | None:
    """Why weights of this configuration can neither be shared nor copied, or None."""
    offload = getattr(vllm_config, "offload_config", None)
    if offload is not None and offload != type(offload)():
        return "weight offloading moves weights between host and device"
    if getattr(vllm_config.load_config, "device", None) not in (None, vllm_config.device_config.device_type):
        return "weights are loaded on another device than the engine's"
    return None


def must_own_reason(vllm_config: Any) -> str | None:
    """Why an engine of this configuration needs weights that it may write to, or None."""
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    if transfer is not None and transfer.backend != TRANSFER_BACKEND:
        return "weight transfer writes new weights in place"
    # A draft may be loaded with a parallel config of its own, in the same engine.
    target = getattr(vllm_config.speculative_config, "target_parallel_config", None)
    for parallel in (vllm_config.parallel_config, target):
        if getattr(parallel, "enable_eplb", False):
            return "EPLB moves expert weights in place"
        if getattr(parallel, "enable_elastic_ep", False):
            return "elastic expert parallelism rewrites expert weights"
    return None
