"""Models that vLLM loads in this process while they are watched, as a publisher has them watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.clocks import marked_times
from vllm_companion_plugin.tree.observe import Observation


def load_observed(model: nn.Module, config: Any, observation: Observation) -> None:
    """Load the checkpoint of vLLM's `config` into `model`, which was built and not yet loaded."""
    from vllm.model_executor.model_loader import get_model_loader

    def noting(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            observation.note_read(name, tensor)
            yield name, tensor

    noted = patches.MODELS_WEIGHTS.on(model, lambda inner: lambda weights: inner(noting(weights)))
    with noted, observation.watching(), marked_times():
        get_model_loader(config.load_config).load_weights(model, config.model_config)
