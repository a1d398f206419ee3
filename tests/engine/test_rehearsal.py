"""What vLLM's reload would lose of a model is known before anything is loaded, and costs no memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from tests.support.checkpoints import models
from tests.support.configs import config
from tests.support.loading import packed_by_vllm
from tests.support.place import KEY
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.status import Published
from vllm_companion_plugin.engine.reloading import why_anew
from vllm_companion_plugin.engine.vllm import rehearsal
from vllm_companion_plugin.tree.live import full_name, named_modules

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]

CPU = torch.device("cpu")
Weights = Iterable[tuple[str, torch.Tensor]]


def shapes(path: Path) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to("meta")) for name, tensor in load_file(path / "model.safetensors").items()]


def rehearse(path: Path, **options: Any) -> tuple[rehearsal.Rehearsed, Any]:
    made = config(path, **options)
    return rehearsal.rehearse(made, shapes(path), CPU), made


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-tied", {}),
        ("qwen3-moe", {}),
        ("hybrid", {}),
        ("deepseek-v3", {}),
        ("bert", {"runner": "pooling"}),
        ("fp8-online", {"quantization": "fp8_per_tensor", "dtype": "bfloat16"}),
    ],
)
def test_what_loaders_load_is_reloaded(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is left of the second model, which was on meta, and no parameter of it was left out."""
    models.make(family, tmp_path, tiny=True)
    found, made = rehearse(tmp_path, **options)
    assert found.by_hand == []
    left = {name for names in found.left.values() for name in names}
    assert not left & {"weight", "bias", "w13_weight", "w2_weight", "A", "D"}
    assert all(tensor.is_meta for tensor in (*found.model.parameters(), *found.model.buffers()))
    assert not made.compilation_config.static_forward_context
    assert made.load_config.load_format == "companion"
    ropes = getattr(sys.modules.get("vllm.model_executor.layers.rotary_embedding"), "_ROPE_DICT", {})
    assert not {id(module) for module in found.model.modules()} & {*map(id, ropes.values())}


def test_sinks_and_experts_of_gpt_oss_are_copied_by_hand(tmp_path: Path) -> None:
    models.make("gpt-oss", tmp_path, tiny=True)
    found, _ = rehearse(tmp_path)
    experts = [f"mlp.experts.routed_experts.{name}_{kind}" for name in ("w13", "w2") for kind in ("weight", "bias")]
    wanted = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("attn.sinks", *experts)}
    assert {*found.by_hand} == wanted


def test_a_decoder_that_is_copied_from_the_embedding_is_by_hand(tmp_path: Path) -> None:
    """It is read of what has no values when vLLM reloads."""
    models.make("bert", tmp_path, tiny=True)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    hidden = weights["bert.embeddings.LayerNorm.bias"].shape[0]
    head = "cls.predictions"
    weights[f"{head}.transform.dense.weight"] = torch.ones(hidden, hidden)
    for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        weights[f"{head}.transform.{name}"] = torch.ones(hidden)
    weights[f"{head}.bias"] = torch.ones(len(weights["bert.embeddings.word_embeddings.weight"]))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"architectures": ["BertForMaskedLM"]}))
    found, _ = rehearse(tmp_path, runner="pooling")
    assert {*found.by_hand} == {"bert.embeddings.word_embeddings.weight", "mlm_head.decoder.weight"}


class Model(nn.Module):
    """Two layers, a tensor that is no parameter, and one way to load it."""

    def __init__(self, load: Callable[[Model, torch.Tensor], object]) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.first.register_buffer("table", torch.ones(4))
        self.aside = torch.ones(4, 4)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._load = load

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            parameter = self.get_parameter(name)
            if name != "first.weight" or not self._load(self, weight):
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)


def loaded(load: Callable[[Model, torch.Tensor], object]) -> tuple[list[str], set[str]]:
    """Names of what is by hand, and of what nothing was loaded into."""
    weights = [(name, torch.empty(4, 4, device="meta")) for name in ("first.weight", "second.weight")]
    found = rehearsal.rehearsed(Model(load), weights)
    left = {full_name(path, name) for path, module in named_modules(found.model) for name in found.left.get(module, ())}
    return found.by_hand, left


def by_loader(model: Model, weight: torch.Tensor) -> bool:
    """With all that does no harm: looks at the parameter, and changes what comes."""
    parameter = model.first.weight
    assert (parameter.shape, parameter.data[:2].t().shape) == (weight.shape, (4, 2))
    parameter.weight_loader(parameter, weight * 2)
    return True


def by_copy(model: Model, weight: torch.Tensor) -> bool:
    model.first.weight.data[1:].copy_(weight[1:])
    return True


def by_assignment(model: Model, weight: torch.Tensor) -> bool:
    model.first.weight[:2] = weight[:2]
    return True


def partly(model: Model, weight: torch.Tensor) -> bool:
    """A loader loads all of it, and then a row is set."""
    model.first.weight.weight_loader(model.first.weight, weight)
    model.first.weight.data[0].zero_()
    return True


def past_its_loader(model: Model, weight: torch.Tensor) -> bool:
    """vLLM replaces the loaders of parameters, and no functions."""
    default_weight_loader(model.first.weight, weight)
    return True


def anew(model: Model, weight: torch.Tensor) -> bool:
    model.first.weight = nn.Parameter(weight, requires_grad=False)
    return True


def by_data(model: Model, weight: torch.Tensor) -> bool:
    model.first.weight.data = weight
    return True


def tied(model: Model, weight: torch.Tensor) -> bool:
    """It is loaded as the other one is."""
    model.first.weight = model.second.weight
    return True


def buffer(model: Model, weight: torch.Tensor) -> bool:
    model.first.table.copy_(weight[0])
    return False


def computed(model: Model, weight: torch.Tensor) -> bool:
    """What was loaded is used: there is nothing yet when vLLM reloads."""
    model.first.weight.weight_loader(model.first.weight, weight)
    model.second.scale = model.first.weight.abs().max()
    return True


def nothing(model: Model, weight: torch.Tensor) -> bool:
    return True


@pytest.mark.parametrize(
    ("load", "by_hand", "left"),
    [
        (by_loader, [], []),
        (by_copy, ["first.weight"], ["first.weight"]),
        (by_assignment, ["first.weight"], ["first.weight"]),
        (partly, ["first.weight"], []),
        (past_its_loader, ["first.weight"], ["first.weight"]),
        (anew, ["first.weight"], ["first.weight"]),
        (by_data, ["first.weight"], ["first.weight"]),
        (tied, [], []),
        (buffer, ["first.table"], []),
        (computed, ["first.weight"], []),
        (nothing, [], ["first.weight"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_goes_past_a_loader_is_by_hand(
    load: Callable[[Model, torch.Tensor], object], by_hand: list[str], left: list[str]
) -> None:
    found, others = loaded(load)
    assert (found, others - {"first.table"}) == (by_hand, {*left})


def test_a_load_that_needs_values_cannot_be_rehearsed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        loaded(lambda model, weight: float(weight.max()) > 0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loaded(lambda model, weight: model.aside.copy_(model.first.weight))


class TestWhy:
    """What a headless process says when it begins, of a model that was published."""

    def why(self, path: Path, stage: Stage = Stage.PROCESSED) -> str:
        manifest, arena = packed_by_vllm(path)
        manifest = replace(manifest, stage=stage)
        held = Held(KEY, 1, arena.info, arena.fds, b"", Published(len(manifest.tensors)))
        lease: Any = None  # nobody asks
        return why_anew(config(path), Attachment("cpu", CPU, lease, held, arena, manifest))

    @pytest.fixture
    def llama(self, tmp_path: Path) -> Path:
        models.make("llama", tmp_path, tiny=True)
        return tmp_path

    @pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe", "hybrid", "deepseek-v3"])
    def test_nothing(self, family: str, tmp_path: Path) -> None:
        models.make(family, tmp_path, tiny=True)
        assert self.why(tmp_path) == ""

    def test_by_hand(self, tmp_path: Path) -> None:
        """Weights that are shared unprocessed are just loaded once more, by the model's own code."""
        models.make("gpt-oss", tmp_path, tiny=True)
        assert self.why(tmp_path).startswith("code of the model itself writes or reads model.layers.0.attn.sinks, ")
        assert self.why(tmp_path, Stage.UNPROCESSED) == ""

    def loading_also(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], object]) -> None:
        from vllm.model_executor.models.llama import LlamaForCausalLM

        inner: Any = LlamaForCausalLM.load_weights

        def load_weights(self: Any, weights: Weights) -> set[str]:
            loaded: set[str] = inner(self, weights)
            act(self)
            return loaded

        monkeypatch.setattr(LlamaForCausalLM, "load_weights", load_weights)

    def test_added(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """vLLM notes for a reload what building makes."""
        self.loading_also(monkeypatch, lambda model: model.register_buffer("doubled", torch.ones(3)))
        assert self.why(llama) == "loading makes doubled"

    def test_values(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loading_also(monkeypatch, lambda model: setattr(model, "most", float(model.lm_head.weight.max())))
        assert self.why(llama).startswith("it cannot be rehearsed (")

    def test_left(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the publisher's loading did that the rehearsal did not see."""

        def fill(model: Any) -> None:
            if not model.lm_head.weight.is_meta:
                model.lm_head.bias.zero_()

        from vllm.model_executor.models.llama import LlamaForCausalLM

        built: Any = LlamaForCausalLM.__init__

        def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
            built(self, vllm_config=vllm_config, prefix=prefix)
            self.lm_head.bias = nn.Parameter(torch.ones(512), requires_grad=False)

        monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
        self.loading_also(monkeypatch, fill)
        assert self.why(llama) == "nothing is loaded into lm_head.bias"
