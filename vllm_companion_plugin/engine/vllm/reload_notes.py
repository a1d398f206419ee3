"""vLLM's reloading of a model: what it notes when it has built one, and what it left as it was when it reloaded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise, meta, types, utils

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.tree.building import WithoutWeights
from vllm_companion_plugin.tree.live import named_modules


def noting(built: WithoutWeights, record: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """What takes the place of vLLM's `record` while a model is built that will be attached.

    It notes the same, in a tenth of the time of building instead of a third: vLLM asks for the default device at each
    module, and for the memory of all parameters below each one. Nor does it count as using the parameters.
    """

    def record_metadata_for_reloading(model: nn.Module) -> None:
        with built.paused():
            infos = map(layerwise.LAYERWISE_INFO.get, model.modules())
            if any(info is not None and info.can_load() for info in infos):
                record(model)  # online quantization has begun such notes, which its weight loaders refer to
            else:
                _note(model)

    return record_metadata_for_reloading


@contextmanager
def seeing_what_is_left() -> Iterator[dict[nn.Module, frozenset[str]]]:
    """While open, vLLM may reload a model. Gives the tensors of each module that it loaded nothing into, by name.

    vLLM warns of a module that it loaded nothing into at all, and gives it back what it had. Tensors in other modules
    have whatever was in new memory. Ask at the end.
    """
    left: dict[nn.Module, frozenset[str]] = {}

    def seeing(place: Callable[..., None]) -> Callable[..., None]:
        def _place_kernel_tensors(layer: nn.Module, info: types.LayerReloadingInfo) -> None:
            names = {name for tensors in info.restore_metadata for name in tensors}
            if names := names - {name for name, _ in info.loaded_weights}:
                left[layer] = frozenset(names)
            place(layer, info)

        return _place_kernel_tensors

    with patches.WHAT_IS_LEFT.on(layerwise, seeing):
        yield left


def _note(model: nn.Module) -> None:
    device = torch.get_default_device()
    with torch._C.DisableTorchFunction():  # modes would slow down each look at a tensor
        for module in model.modules():
            layerwise.LAYERWISE_INFO[module] = types.LayerReloadingInfo(_tensors(module), device)


def noted(model: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that were noted of `model`."""
    for _, module in named_modules(model):
        if (info := layerwise.LAYERWISE_INFO.get(module)) is not None:
            for tensors in info.restore_metadata:
                yield from tensors.values()


def _tensors(module: nn.Module) -> types.LayerTensors:
    """Parameters and buffers of `module` itself by name, on meta, with class and attributes.

    A buffer that is not saved and views a parameter's memory is not among them: processing makes it anew. vLLM tells
    that by addresses, and on meta all memory has the same one.
    """
    if type(module).__name__ in meta.SKIP_MODULES:
        return {}, {}
    parameters, buffers = utils.get_layer_params_buffers(module)
    if module._non_persistent_buffers_set & buffers.keys():
        memory = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        buffers = {
            name: buffer
            for name, buffer in buffers.items()
            if name not in module._non_persistent_buffers_set or buffer.untyped_storage()._cdata not in memory
        }
    made = (
        {
            name: meta.sanitize_layer_refs(meta.to_meta_tensor(tensor), module)
            for name, tensor in tensors.items()
            if name not in meta.SKIP_TENSORS
        }
        for tensors in (parameters, buffers)
    )
    return next(made), next(made)
