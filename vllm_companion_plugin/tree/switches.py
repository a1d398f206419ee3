"""Switches of torch, which say for all models of a process how kernels compute."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_SWITCHES: Mapping[str, Callable[[], Any]] = {
    "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "torch.backends.cuda.flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled,
    "torch.backends.cuda.mem_efficient_sdp_enabled": torch.backends.cuda.mem_efficient_sdp_enabled,
    "torch.backends.cuda.math_sdp_enabled": torch.backends.cuda.math_sdp_enabled,
    "torch.backends.cuda.cudnn_sdp_enabled": torch.backends.cuda.cudnn_sdp_enabled,
}
_OF_BACKENDS = (
    *("enabled", "benchmark", "deterministic", "allow_tf32", "fp32_precision", "allow_fp16_accumulation"),
    *("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
)


def switches() -> dict[str, Any]:
    """Return what each is set to, as far as this build of torch has it."""
    found = {}
    for name, read in _SWITCHES.items():
        with contextlib.suppress(RuntimeError):  # it was set by the other of two ways
            found[name] = read()
    for place in ("cudnn", "cuda.matmul", "mkldnn", "mkldnn.matmul"):
        holder = operator.attrgetter(place)(torch.backends)
        for name in _OF_BACKENDS:
            with contextlib.suppress(AttributeError, RuntimeError, AssertionError):  # this build has none of it
                found[f"torch.backends.{place}.{name}"] = getattr(holder, name)
    return found
