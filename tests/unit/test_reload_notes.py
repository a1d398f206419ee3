"""What is noted of a model for a later reload, as vLLM notes it, and what vLLM leaves as it was when it reloads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from vllm_companion_plugin import memory
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.engine.reloading import _reload
from vllm_companion_plugin.engine.vllm import processing, reload_notes
from vllm_companion_plugin.errors import UpdateError
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.building import WithoutWeights
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.observe import Observation

CPU = torch.device("cpu", 0)
"""Not the default, which has no index."""


class Layer(nn.Module):
    """Every kind of tensor of a layer, large enough to be deferred, and small."""

    def __init__(self, rows: int, is_online: bool = False) -> None:
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
        if is_online:
            layerwise.initialize_online_processing(self)

    def load(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(loaded_weight)


class HadamardTransform(nn.Linear):
    """vLLM skips modules of this name."""


class Model(nn.Module):
    """Its second layer may be one of online quantization, which begins to note when it is built."""

    def __init__(self, rows: int, is_online: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList((Layer(rows), Layer(rows, is_online)))
        self.register_buffer("of_a_layer", self.layers[0].weight.data, persistent=False)
        self.head = nn.Linear(256, rows)
        self.turned = HadamardTransform(256, rows)


def notes(model: nn.Module) -> dict[str, Any]:
    """What is noted of each module: of each tensor its class, layout, dtype and attributes."""

    def described(tensor: torch.Tensor) -> tuple[Any, ...]:
        assert tensor.is_meta
        attributes = {
            name: (getattr(value, "__qualname__", value), owner(value)) for name, value in vars(tensor).items()
        }
        return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, attributes

    def owner(value: Any) -> str:
        return type(getattr(value, "__self__", None)).__name__  # no module: it would keep itself alive

    found = {}
    for name, module in model.named_modules():
        info = layerwise.LAYERWISE_INFO[module]
        kinds = [{each: described(tensor) for each, tensor in tensors.items()} for tensors in info.restore_metadata]
        found[name] = (*kinds, info.restore_device)
    return found


def build(rows: int, is_online: bool) -> Model:
    """A model without weights, which is noted as one that will be attached."""
    built = WithoutWeights(CPU)
    with built.building():
        model = Model(rows, is_online)
        reload_notes.noting(built, layerwise.record_metadata_for_reloading)(model)
    return model


@pytest.mark.parametrize("is_online", [False, True], ids=["plain", "online"])
@pytest.mark.parametrize("rows", [2, 1024], ids=["small", "deferred"])
def test_a_model_is_noted_as_vllm_notes_it(rows: int, is_online: bool) -> None:
    with CPU:
        model = Model(rows, is_online)
        layerwise.record_metadata_for_reloading(model)
    wanted = notes(model)
    assert {*wanted["layers.0"][1]} == {"table", "space", "below"}  # what views a parameter is not noted
    assert not wanted[""][1]
    assert not wanted["turned"][0]

    without = build(rows, is_online)
    assert without.layers[0].weight.is_meta == (rows == 1024)
    if is_online and rows == 1024:  # vLLM notes it then, and takes what is on meta for a view of a parameter
        for layer in ("layers.0", "layers.1"):
            del wanted[layer][1]["space"], wanted[layer][1]["below"]
    assert notes(without) == wanted
    every = [len(parameters) + len(buffers) for parameters, buffers, _ in wanted.values()]
    assert len([*reload_notes.noted(without)]) == sum(every) > 0


@pytest.mark.parametrize("is_online", [False, True], ids=["plain", "online"])
def test_a_model_without_weights_is_reloaded_as_vllm_reloads_one(is_online: bool) -> None:
    """With vLLM's own reloading: into the memory that the model has got since, layer by layer."""
    model = build(1024, is_online)
    for layer in model.layers:
        processing.end_online_loading(layer)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            torch.utils.swap_tensors(tensor, _like(tensor))
    for layer in model.layers:
        layer.tied = layer.weight.data
    model.of_a_layer = model.layers[0].weight.data
    state = model.state_dict()
    held = {name: tensor.data_ptr() for name, tensor in state.items()}
    new = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}

    with CPU:
        layerwise.initialize_layerwise_reload(model)
        for name, parameter in list(model.named_parameters()):
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, new[name])
        layerwise.finalize_layerwise_reload(model, None)
    now = model.state_dict()
    for name in dict(model.named_parameters()):
        assert torch.equal(now[name], new[name]), name
        assert now[name].data_ptr() == held[name], name
    assert {tuple(layer.space.shape) for layer in model.layers} == {(1024, 256)}


def _like(tensor: torch.Tensor) -> torch.Tensor:
    data = torch.zeros_like(tensor, device=CPU)
    twin = (
        torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else data
    )
    twin.__dict__.update(tensor.__dict__)
    return twin


class Head(nn.Module):
    """A parameter that is loaded by vLLM's loaders, and one that the model's own code copies by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.sinks = (nn.Parameter(torch.zeros(4), requires_grad=False) for _ in range(2))


class Whole(nn.Module):
    """Two layers that are loaded, one tied to the first by its object and one by its memory, and one that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.tied, self.same, self.made = (nn.Linear(4, 4, bias=False) for _ in range(5))
        self.tied.weight = self.first.weight
        self.same.weight = nn.Parameter(self.first.weight.data)
        self.head = Head()
        self.kernel = nn.Module()
        self.kernel.tensors = [self.head.sinks, self.second.weight]  # who refers to a parameter does not load it
        reload_notes._note(self)


LOADED = ("first.weight", "second.weight", "head.weight", "head.sinks")


def published() -> tuple[Whole, Manifest]:
    model = Whole()
    observation = Observation(model)
    with observation.watching(), torch.no_grad():
        for name in LOADED:
            model.get_parameter(name).zero_()
    observation.end_loading(model)
    return model, pack.prepare(capture(model), Stage.PROCESSED, memory.MEMFD, CPU, observation).manifest


def reload(model: Whole, manifest: Manifest, *names: str) -> None:
    """As the headless process does it. vLLM loads ones into the parameters of these names."""

    class Worker:
        def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
            with CPU:
                layerwise.initialize_layerwise_reload(model)
                parameters = dict(model.named_parameters(remove_duplicate=False))
                for name, weight in weights_iterator:
                    parameters[name].weight_loader(parameters[name], weight)
                layerwise.finalize_layerwise_reload(model, None)

    weights = ((name, torch.ones(model.get_parameter(name).shape)) for name in names)
    _reload(Worker(), manifest, model, weights)


def test_what_was_loaded_is_loaded_again() -> None:
    model, manifest = published()
    reload(model, manifest, *LOADED)
    assert model.tied.weight is model.first.weight
    for layer in (model.first, model.tied, model.same, model.second, model.head):
        assert layer.weight.unique().tolist() == [1.0]
    reload(model, manifest, *LOADED)


@pytest.mark.parametrize("missing", LOADED)
def test_a_parameter_that_vllm_loads_nothing_into_is_an_error(missing: str) -> None:
    """Also in a layer that it loaded something else into."""
    model, manifest = published()
    with pytest.raises(UpdateError) as error:
        reload(model, manifest, *(name for name in LOADED if name != missing))
    names = f"{missing}, tied.weight, same.weight" if missing == "first.weight" else missing
    assert error.value.what == f"When vLLM reloads this model, it loads nothing into {names}."
