"""Processes of vLLM that a trainer starts for itself: what they are told."""

from __future__ import annotations

import os

import torch

from vllm_companion_plugin.settings import Settings, to_environment

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun tells a trainer its place among others. They say nothing about vLLM's process."""


def environment_of(device: torch.device, settings: Settings) -> dict[str, str]:
    """Of this process, but for what launchers say; the child sees one GPU, the one that is meant."""
    environment = {**os.environ, **to_environment(settings)}
    for name in list(environment):
        if name in _OF_LAUNCHERS or name.startswith("TORCHELASTIC_"):
            del environment[name]
    if device.type == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its worker is the process itself
    return environment
