"""Keys of entries, as an engine on CPU computes them for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.configs import config
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine.identity import checkpoint, key
from vllm_companion_plugin.engine.vllm import devices


def key_of(model: Path, **options: Any) -> EntryKey:
    """With vLLM's flags `options`."""
    return key_of_config(config(model, **options), model)


def key_of_config(made: Any, model: Path) -> EntryKey:
    """Of vLLM's configuration `made`, for the checkpoint at `model`."""
    files = checkpoint.identity(model)
    return key.compute(made, made.model_config, devices.engine_device(), "auto", model, files)
