"""What is noted of a model for a later reload: as vLLM notes it, of a model with weights and of one without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from vllm_companion_plugin.engine.vllm import reload_notes
from vllm_companion_plugin.tree.building import WithoutWeights

CPU = torch.device("cpu")


class Layer(nn.Module):
    """Every kind of tensor of a layer, large enough to be deferred, and small."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, 256), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load, "input_dim": 1})
        self.strided = nn.Parameter(torch.empty(256, rows, dtype=torch.float16).t(), requires_grad=False)
        set_weight_attrs(self.strided, {"weight_loader": default_weight_loader})
        self.register_parameter("bias", None)
        self.register_buffer("table", torch.empty(rows, 256))
        self.register_buffer("space", torch.empty(rows, 256), persistent=False)
        self.register_buffer("nothing", None, persistent=False)
        self.register_buffer("tied", self.weight.data, persistent=False)
        self.register_buffer("below", torch.empty(0), persistent=False)

    def load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data.copy_(loaded)


class HadamardTransform(nn.Linear):
    """vLLM skips modules of this name."""


class Model(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(rows) for _ in range(2))
        self.register_buffer("of_a_layer", self.layers[0].weight.data, persistent=False)
        self.head = nn.Linear(256, rows)
        self.turned = HadamardTransform(256, rows)


def notes(model: nn.Module) -> dict[str, Any]:
    """What is noted of each module: of each tensor its class, layout, dtype and attributes."""

    def described(tensor: torch.Tensor) -> tuple[Any, ...]:
        assert tensor.is_meta
        attributes = {name: str(value) for name, value in vars(tensor).items()}
        return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, attributes

    found = {}
    for name, module in model.named_modules():
        info = layerwise.LAYERWISE_INFO[module]
        kinds = [{each: described(tensor) for each, tensor in tensors.items()} for tensors in info.restore_metadata]
        found[name] = (*kinds, info.restore_device)
    return found


@pytest.mark.parametrize("rows", [2, 1024], ids=["small", "deferred"])
def test_a_model_is_noted_as_vllm_notes_it_with_weights_and_without(rows: int) -> None:
    with CPU:
        model = Model(rows)
        layerwise.record_metadata_for_reloading(model)
    wanted = notes(model)
    assert {*wanted["layers.0"][1]} == {"table", "space", "below"}  # what views a parameter is not noted
    assert not wanted[""][1]
    assert not wanted["turned"][0]

    with CPU:
        reload_notes.note(model)  # over what was noted
    assert notes(model) == wanted
    with CPU:
        reload_notes.note(other := Model(rows))
    assert notes(other) == wanted

    built = WithoutWeights(CPU)
    with built.building():
        reload_notes.note(without := Model(rows))
    assert without.layers[0].weight.is_meta == (rows == 1024)
    assert notes(without) == wanted


def test_all_that_is_noted_is_found() -> None:
    reload_notes.note(model := Model(2))
    every = [len(parameters) + len(buffers) for parameters, buffers, _ in notes(model).values()]
    assert len([*reload_notes.noted(model)]) == sum(every) > 10
