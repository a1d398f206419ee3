"""vLLM's post-processing of loaded weights, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.tree.restore import Strategy

# Their post-processing changes no tensor on CUDA, and on CPU only packs a private copy of a matrix.
_LEAVES_TENSORS_ALONE = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def strategy(module: nn.Module) -> Strategy:
    """How to run this module's post-processing without its unprocessed weights."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and type(method).__name__ not in _LEAVES_TENSORS_ALONE:
        return Strategy.REPLAY
    if current_platform.is_cpu() and getattr(getattr(module, "weight", None), "ndim", 2) > 2:
        return Strategy.REPLAY  # a convolution: packed in place, for kernels that take no other weights
    return Strategy.HIDE


def ways(modules: Iterable[nn.Module]) -> dict[str, int]:
    """How many of `modules` will be processed in which way."""
    processed = (module for module in modules if isinstance(vars(module).get("quant_method"), QuantizeMethodBase))
    return dict(Counter(strategy(module).value for module in processed))


def post_process(model: nn.Module, model_config: Any, device: torch.device) -> None:
    """vLLM's own post-processing of all modules."""
    process_weights_after_loading(model, model_config, device)


@contextmanager
def around_post_processing(
    model: nn.Module, around: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[None]:
    """While open, each quantization method of `model` processes a module inside `around(module)`.

    Hooked on the method objects, so that vLLM's own loop, which differs between versions,
    drives it.
    """

    def surrounded(process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def process_weights_after_loading(layer: nn.Module) -> None:
            with around(layer):
                process(layer)

        return process_weights_after_loading

    methods = {id(method): method for module in model.modules() if (method := _method_of(module)) is not None}
    with ExitStack() as stack:
        for method in methods.values():
            stack.enter_context(patches.PROCESSING.on(method, surrounded))
        yield


def _method_of(module: nn.Module) -> QuantizeMethodBase | None:
    method = getattr(module, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def end_online_loading(module: nn.Module) -> None:
    """Leave a module of an online quantization method as loading would have left it.

    Such modules wrap their weight loaders to be processed as soon as they are loaded; a replay
    never loads, so the wrappers have to go.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.LAYERWISE_INFO.get(module)
    if info is None or not info.can_load():
        return
    for tensor in layerwise.get_layer_tensors(module).values():
        tensor.weight_loader = layerwise._get_original_loader(tensor)
    info.reset()
