"""Models that vLLM builds: without memory for their weights, or beside one that it has already."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_companion_plugin.engine.vllm import patches, reload_notes
from vllm_companion_plugin.engine.vllm.drafts import has_draft_weights, is_draft
from vllm_companion_plugin.tree.building import WithoutWeights


class _Registered:
    """What modules register in the compilation config when they are built, as it was."""

    def __init__(self, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        self._layers: dict[str, Any] = compilation.static_forward_context
        self._moe_layers: list[Any] = getattr(compilation, "static_all_moe_layers", [])
        self._kept = dict(self._layers), list(self._moe_layers)

    def clear(self) -> None:
        self._layers.clear()
        self._moe_layers.clear()

    def restore(self) -> None:
        self.clear()
        self._layers.update(self._kept[0])
        self._moe_layers.extend(self._kept[1])


@contextmanager
def model_without_weights(
    vllm_config: Any, model_config: Any, prefix: str, built: WithoutWeights
) -> Iterator[nn.Module]:
    """Build the model without memory for its weights, and undo every trace of it if the body fails.

    A build leaves traces: modules register themselves in the compilation config, and rope modules in a cache of
    the process.
    """
    registered = _Registered(vllm_config)
    ropes = set(_rope_cache())
    noting = partial(reload_notes.noting, built)
    try:
        with set_default_torch_dtype(model_config.dtype):
            with built.building(), patches.NOTES_FOR_RELOADS.on(loader_utils, noting):
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            yield model
    except BaseException:
        registered.restore()
        for key in set(_rope_cache()) - ropes:
            del _rope_cache()[key]
        raise


def without_layers(vllm_config: Any) -> Any:
    """A copy of a configuration that refers to no module of the model that was built with it."""
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    if hasattr(config.compilation_config, "static_all_moe_layers"):
        config.compilation_config.static_all_moe_layers = []
    return config


@contextmanager
def beside(vllm_config: Any, *, is_draft: bool) -> Iterator[Any]:
    """A configuration with which a model can be built once more while the first one lives; it knows nothing of that.

    A draft shares rope modules with its target, as it did when it was built first.
    """
    config = without_layers(vllm_config)
    config.load_config = copy.copy(vllm_config.load_config)
    known = dict(_rope_cache())
    if not is_draft:
        _rope_cache().clear()
    try:
        yield config
    finally:  # by now it may be another one: the model imports it
        _rope_cache().clear()
        _rope_cache().update(known)


@contextmanager
def second_model(vllm_config: Any, model_config: Any, prefix: str, device: torch.device) -> Iterator[nn.Module]:
    """Another, empty model of an engine that has one already and keeps it."""
    registered = _Registered(vllm_config)
    registered.clear()
    try:
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(model_config.dtype):
            with device:
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            yield model
    finally:
        registered.restore()


def model_class(vllm_config: Any, model_config: Any) -> type[nn.Module] | None:
    """The class that is built for `model_config`; None for what looks like a draft and has no weights.

    It is imported as in a normal load: what its module makes on import is on the engine's device.
    """
    if is_draft(vllm_config, model_config) and not has_draft_weights(vllm_config):
        return None
    with torch.device(vllm_config.device_config.device_type):
        found: type[nn.Module] = get_model_architecture(model_config)[0]
        return found


def quantization_classes(vllm_config: Any) -> tuple[type, ...]:
    """Classes that say how this engine's weights are quantized."""
    config = getattr(vllm_config, "quant_config", None)
    return (type(config),) if config is not None else ()


def loading_classes(vllm_config: Any, source_format: str) -> tuple[type, ...]:
    """Classes that flags name, whose code runs while weights are loaded: of the worker, and of what reads a checkpoint.

    A worker's extension is none: it adds methods to a worker, which somebody calls later.
    """
    worker = getattr(vllm_config.parallel_config, "worker_cls", None)
    if isinstance(worker, str):
        module, _, name = worker.rpartition(".")
        worker = getattr(sys.modules.get(module), name, None)
    found = (worker, getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(source_format))
    return tuple(kind for kind in found if isinstance(kind, type))


def _rope_cache() -> dict[Any, nn.Module]:
    """vLLM's cache of rope modules; empty until a model imports it, which is not ours to time."""
    module = sys.modules.get("vllm.model_executor.layers.rotary_embedding")
    return module._ROPE_DICT if module is not None else {}
