"""vLLM's own loaders, one of which reads the checkpoint for a companion."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_companion_plugin.engine.vllm.naming import LOAD_FORMAT
from vllm_companion_plugin.errors import EngineVersionError, SettingsError
from vllm_companion_plugin.settings import Settings, resolve_extra_config

# All ranks of an engine read together, each a part for all.
_COLLECTIVE_FORMATS = ("fastsafetensors", "instanttensor")


def source_format(wanted: str, vllm_config: Any) -> str:
    """`wanted`, unless all ranks would have to read together: with a companion, some may attach."""
    return "auto" if wanted in _COLLECTIVE_FORMATS and vllm_config.parallel_config.world_size > 1 else wanted


def source_loader(load_config: Any, source_format: str) -> BaseModelLoader:
    """vLLM's own loader of `source_format`, with its options: `source_extra_config` if the load config is ours.

    Raises:
        SettingsError: that loader refuses its options, or there is no such format.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if source_format == LOAD_FORMAT:
        raise EngineVersionError("source_format is how the checkpoint is read; it cannot be 'companion' itself.")
    extra = load_config.model_loader_extra_config
    if load_config.load_format == LOAD_FORMAT:
        extra = resolve_extra_config(extra).source_extra_config
    config = dataclasses.replace(load_config, load_format=source_format, model_loader_extra_config=extra)
    try:
        return get_model_loader(config)
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"vLLM has no loader for source_format {source_format!r} with source_extra_config {extra}: {error}"
        ) from error


class GivenWeights(DefaultModelLoader):
    """vLLM's own loading, of tensors that somebody hands over instead of a checkpoint's.

    Args:
        weights: all that loading uses, as the checkpoint has them; the caller's to go on with if vLLM leaves the last.
    """

    def __init__(self, load_config: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._weights = weights

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
        self.counter_before_loading_weights = time.perf_counter()  # for vLLM's log
        return self._weights


# How fast a loader reads, and not what.
_PACE = frozenset(
    {"concurrency", "distributed", "enable_multithread_load", "enable_weights_track", "memory_limit", "num_threads"}
)


def source_text(settings: Settings) -> str:
    """The source format and those of its options that may decide what is read, for the key."""
    options = {name: value for name, value in settings.source_extra_config.items() if name not in _PACE}
    return settings.source_format + (f" {json.dumps(options, sort_keys=True)}" if options else "")


def elsewhere_reason(model_config: Any, settings: Settings) -> str | None:
    """Why what is read has no identity that is known here, or None."""
    name = getattr(model_config, "model_weights", "") or model_config.model
    if re.match(r"[a-z0-9]+://", name, re.IGNORECASE):
        return (
            f"the weights are read from {name}, an object store, where files cannot be told apart; copy them to a disk"
        )
    if uri := settings.source_extra_config.get("tensorizer_uri"):
        return f"the weights are read from {uri}, by an option of their loader, instead of from the model's directory"
    return None


def other_checkpoints(model: nn.Module, model_config: Any) -> list[str]:
    """Models whose weights vLLM loads into this one besides its own (Ultravox names two)."""
    names = (source.model_or_path for source in getattr(model, "secondary_weights", ()))
    return sorted({name for name in names if name not in (model_config.model, model_config.model_weights)})
