"""vLLM's post-processing of loaded weights, module by module."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.tree.restore import Strategy

# Their post-processing changes no tensor on CUDA, and on CPU only packs a private copy of a matrix.
_LEAVING_TENSORS_ALONE = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
_KNOWN_FOLDERS = tuple(os.path.join(os.path.dirname(str(one.__file__)), "") for one in (vllm, torch))
_PROCESS = "process_weights_after_loading"


def strategy(module: nn.Module) -> Strategy:
    """How to run this module's post-processing without its unprocessed weights."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and not _leaves_tensors_alone(method):
        return Strategy.REPLAY
    if _processes_itself(module):
        return Strategy.REPLAY
    if current_platform.is_cpu() and getattr(getattr(module, "weight", None), "ndim", 2) > 2:
        return Strategy.REPLAY  # a convolution: packed in place, for kernels that take no other weights
    return Strategy.HIDE


def _leaves_tensors_alone(method: QuantizeMethodBase) -> bool:
    process = getattr(type(method), _PROCESS)
    return any(process is getattr(kind, _PROCESS) for kind in _LEAVING_TENSORS_ALONE) and _is_vllms(process)


def _processes_itself(module: nn.Module) -> bool:
    """Whether the module has post-processing of its own that is not vLLM's: vLLM calls that of attention layers."""
    process = getattr(type(module), _PROCESS, None)
    return process is not None and not _is_vllms(process)


@cache
def _is_vllms(function: Any) -> bool:
    """Whether a function is vLLM's own code, perhaps decorated by PyTorch."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_KNOWN_FOLDERS):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


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
    """While open, each quantization method of `model` processes a module inside `around(module)`, and each module that
    has code of its own for that does it so, too.

    Hooked on the objects, so that vLLM's own loop, which differs between versions, drives it.
    """

    def surrounded(process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def process_weights_after_loading(layer: nn.Module) -> None:
            with around(layer):
                process(layer)

        return process_weights_after_loading

    def surrounding(module: nn.Module, process: Callable[..., None]) -> Callable[..., None]:
        def process_weights_after_loading(*args: Any, **kwargs: Any) -> None:
            with around(module):
                process(*args, **kwargs)

        return process_weights_after_loading

    methods: dict[int, QuantizeMethodBase] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if (method := _method_of(module)) is not None:
                methods[id(method)] = method
            if _processes_itself(module):
                stack.enter_context(patches.MODULES_PROCESSING.on(module, partial(surrounding, module)))
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
