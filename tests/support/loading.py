"""Models that vLLM loads in this process while they are watched, as a publisher has them watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.configs import config
from vllm_companion_plugin import memory
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.clocks import marked_times
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.live import plain_tensors
from vllm_companion_plugin.tree.observe import Observation
from vllm_companion_plugin.wire.manifest import sources_to_bytes

CPU = torch.device("cpu")


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


def packed_by_vllm(path: Path, dtype: str = "float32") -> tuple[Manifest, memory.Arena]:
    """The model at `path`, loaded by vLLM and packed as its publisher would."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    made = config(path, load_format="auto", dtype=dtype)
    with set_current_vllm_config(made), set_default_torch_dtype(made.model_config.dtype):
        model = initialize_model(vllm_config=made, model_config=made.model_config)
        observation = Observation(model)
        load_observed(model, made, observation)
        observation.end_loading(model)
    return packed(model, observation, Stage.UNPROCESSED)


def packed(model: nn.Module, observation: Observation, stage: Stage) -> tuple[Manifest, memory.Arena]:
    """A model that was loaded under observation, as its publisher packs it."""
    with plain_tensors(), observation.paused():
        made = pack.prepare(capture(model), stage, memory.MEMFD, CPU, observation)
        sources = sources_to_bytes(pack.sources_of(made, observation))
        arena = pack.copy(made, memory.MEMFD, CPU, rebind=True, release=lambda: None)
    return replace(made.manifest, sources=sources), arena
