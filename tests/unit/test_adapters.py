"""What an adapter is called, how it is made canonical, and the file that it travels in."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.support.lora import tiny_peft
from vllm_companion_plugin.client import peft
from vllm_companion_plugin.client.adapter_leases import AdapterFile
from vllm_companion_plugin.client.adapters import file_of
from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.core.adapters import Asked, Bound
from vllm_companion_plugin.core.arena import PIECE_BYTES, ArenaInfo, Checksums
from vllm_companion_plugin.core.entry_kinds import ADAPTER
from vllm_companion_plugin.engine.vllm.adapters.staging import LOCKED_BYTES, Staging
from vllm_companion_plugin.errors import BadRequestError, IntegrityError, ManifestError
from vllm_companion_plugin.wire.adapter_file import PAGE_BYTES, Part, config_in, header_of

NAMES = ("my-adapter", "org/model:v1?x=1&y", "Ünïcode 名前", "a" * 512, "generation=3")
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def stage(file: AdapterFile, names: Collection[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    with closing(Staging(file, torch.device("cpu"), "it")) as staging:
        return staging.tensors(names, dtype, "full")


class TestNames:
    """What a request asks for, and what it is bound to."""

    @pytest.mark.parametrize("name", NAMES)
    def test_paths(self, name: str) -> None:
        """What a path names is what made it, whatever the name."""
        bound = Bound(name, 17, "0123456789abcdef")
        assert adapters.asked_by(f"companion:{name}") == Asked(name)
        assert adapters.asked_by(f"companion:{name}?generation=17") == Asked(name, 17)
        assert adapters.asked_by(bound.path) == bound
        assert isinstance(adapters.asked_by(bound.path), Bound)

    @pytest.mark.parametrize("name", ["", "a" * 513, "new\nline", "a\0", "\ud800", "x?generation=2"])
    def test_bad_names(self, name: str) -> None:
        for check in (adapters.key_of, lambda name: adapters.asked_by(f"companion:{name}?generation=1")):
            with pytest.raises(BadRequestError, match="no name of an adapter"):
                check(name)

    def test_keys(self) -> None:
        """Equal names have equal keys, others others; a companion takes each."""
        keys = [adapters.key_of(name) for name in NAMES]
        assert len({key.id for key in keys}) == len(NAMES)
        assert [key.problem() for key in keys] == [None] * len(NAMES)
        for kind in ([], None, "cache"):
            assert "'kind' is" in str(replace(keys[0], kind=kind).problem())
        assert {key.kind for key in keys} == {ADAPTER}
        assert adapters.key_of("my-adapter") == keys[0]
        assert keys[0].title == "my-adapter (adapter)"

    def test_numbers(self) -> None:
        """They fit 32 bits with a sign, are above a server's, and differ with generation, content and attempt."""
        bounds = [Bound("a", generation, f"{content:016x}") for generation in range(1, 60) for content in range(60)]
        numbers = {bound.number(attempt) for bound in bounds for attempt in range(2)}
        assert len(numbers) == 2 * len(bounds)
        assert min(numbers) >= 1 << 24
        assert max(numbers) < (1 << 31) - 1
        assert len({bound.label for bound in bounds}) == len(bounds)

    def test_content(self) -> None:
        """It differs with checksums and sizes."""
        infos = [
            ArenaInfo("memfd", (size,), Checksums("rows-columns-64", values))
            for size in (4096, 8192)
            for values in ((1,), (2,))
        ]
        assert len({adapters.content_of(info) for info in infos}) == 4


class TestCanonical:
    """What PEFT has, and what every version of vLLM computes from it."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"v_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
            {"target_modules": ["q_proj", "embed_tokens"]},
        ],
        ids=["plain", "rslora", "patterns", "embedding"],
    )
    def test_same_changes(self, options: dict[str, Any]) -> None:
        """B times A with no scaling at all is what PEFT adds to each weight; what was given is unchanged."""
        model = tiny_peft(**options)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapter = peft.canonical(model)
        changes = 0
        for name, module in model.named_modules():
            if isinstance(getattr(module, "scaling", None), dict):
                mark = "lora_embedding_" if f"{name}.lora_embedding_A" in adapter.tensors else "lora_"
                end = ".weight" if mark == "lora_" else ""
                b, a = (adapter.tensors[f"{name}.{mark}{side}{end}"] for side in "BA")
                change = b @ a if mark == "lora_" else (b @ a).T
                torch.testing.assert_close(change, module.get_delta_weight("default"))
                changes += 1
        assert 2 * changes == len(adapter.tensors) > 2
        assert (
            adapter.config["r"]
            == adapter.config["lora_alpha"]
            == max(t.shape[1] for n, t in adapter.tensors.items() if "_B" in n)
        )
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize(
        ("pattern", "alpha"), [("q_proj", 8), ("q_proj.weight", 32), ("0.self_attn.q_proj.weight", 32)]
    )
    def test_patterns_of_parameters_that_are_named(self, pattern: str, alpha: int) -> None:
        """PEFT matches them with the parameter's own name."""
        options = {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"], "lora_alpha": 8}
        model = tiny_peft(**options, alpha_pattern={pattern: alpha})
        module = next(each for name, each in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
        assert module.scaling["default"] == alpha / module.r["default"]
        expected = peft.canonical(model)
        made = peft.canonical(get_peft_model_state_dict(model), model.peft_config["default"])
        assert made.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(made.tensors[name], tensor) for name, tensor in expected.tensors.items())

    def test_state_dicts(self) -> None:
        """With and without the adapter's name in the tensors' names, and with a configuration or its fields."""
        model = tiny_peft(rank_pattern={"v_proj": 8})
        expected = peft.canonical(model)
        config = model.peft_config["default"]
        named = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
        for weights in (get_peft_model_state_dict(model), named):
            for fields in (config, config.to_dict()):
                made = peft.canonical(weights, fields)
                assert made.config == expected.config
                assert made.tensors.keys() == expected.tensors.keys()
                assert all(torch.equal(made.tensors[name], tensor) for name, tensor in expected.tensors.items())

    def test_active(self) -> None:
        """Of several adapters the active one is taken."""
        model = tiny_peft(1)
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
        model.set_adapter("other")
        adapter = peft.canonical(model)
        assert adapter.config["r"] == 2
        assert f"{Q_PROJ}.lora_A.weight" in adapter.tensors
        assert len(adapter.tensors) == 4

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"use_dora": True}, "DoRA"),
            ({"lora_bias": True}, "lora_bias"),
            ({"bias": "all"}, "bias='all'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
            ({"init_lora_weights": ["pissa"]}, r"init_lora_weights=\['pissa'\]"),
            ({"layer_replication": [(0, 2)]}, "layer_replication"),
            ({"alora_invocation_tokens": [1]}, "activated LoRA"),
            ({"use_qalora": True}, "QALoRA"),
        ],
    )
    def test_refused(self, options: dict[str, Any], text: str) -> None:
        """What vLLM's LoRA cannot compute is named, with all else."""
        model = tiny_peft()
        fields = model.peft_config["default"].to_dict() | options
        weights = get_peft_model_state_dict(model) | {"extra.weight": torch.zeros(1)}
        with pytest.raises(BadRequestError, match=text) as caught:
            peft.canonical(weights, fields)
        assert "extra.weight, which is no tensor of LoRA" in str(caught.value)

    def test_wrapped(self) -> None:
        """A layer that is wrapped has the scaling that it had."""
        model = tiny_peft()
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        attention.q_proj.set_scale("default", 3.0)
        before = peft.canonical(model)
        attention.q_proj = checkpoint_wrapper(attention.q_proj)
        after = peft.canonical(model)
        assert after.tensors.keys() == before.tensors.keys()
        assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())

    def test_hooks(self) -> None:
        """Where a module says what its tensors are, as FSDP's do, that counts."""
        model = tiny_peft()
        before = peft.canonical(model)

        def doubled(module: nn.Module, state: dict[str, torch.Tensor], *_: object) -> None:
            for name in state:
                if "lora_A" in name:
                    state[name] = state[name] * 2

        model.register_state_dict_post_hook(doubled)
        after = peft.canonical(model)
        assert after.tensors.keys() == before.tensors.keys()
        for name, tensor in after.tensors.items():
            assert torch.equal(tensor, before.tensors[name] * (2 if "lora_A" in name else 1))

    def test_trained_models_are_refused(self) -> None:
        """Tensors that PEFT has beside LoRA's own are found in a model, too."""
        for options, text in (
            ({"use_dora": True}, "layers.1.mlp.down_proj computes it in PEFT's way of DoraLinearVariant"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"lora_bias": True}, "lora_B"),
            ({"trainable_token_indices": [1, 2]}, "trainable_tokens"),
        ):
            model = tiny_peft(**options)
            fields = tiny_peft().peft_config["default"]
            with pytest.raises(BadRequestError, match=text):
                peft.canonical(model, fields)

    def test_misfits(self) -> None:
        """All tensors that do not fit are named in one error."""
        weights = get_peft_model_state_dict(tiny_peft())
        first = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        del weights[first.format(0, "B")]
        weights[first.format(1, "A")] = torch.zeros(2, 32)
        weights["base_model.model.conv.lora_A.weight"] = torch.zeros(4, 3, 2, 2)
        weights["base_model.model.conv.lora_B.weight"] = torch.zeros(3, 4, 1, 1)
        weights["base_model.model.steps.lora_A.weight"] = torch.zeros(4, 3, dtype=torch.int64)
        weights["base_model.model.steps.lora_B.weight"] = torch.zeros(3, 4, dtype=torch.int64)
        down = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
        weights[down.format("A")] = torch.zeros(4, 64, device="meta")
        up = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
        weights[up.format("A")], weights[up.format("B")] = torch.zeros(4, 32), torch.zeros(0, 4)
        with pytest.raises(BadRequestError) as caught:
            peft.canonical(weights, {"r": 4, "lora_alpha": 4})
        for text in (
            "layers.0.self_attn.q_proj has lora_A alone",
            "layers.1.self_attn.q_proj has A of rank 2 and B of rank 4",
            "conv has tensors of 4 and 4 dimensions",
            "steps has tensors of torch.int64",
            "layers.0.mlp.down_proj has tensors without values of their own, on the meta device or sparse",
            "layers.0.mlp.up_proj has tensors of [4, 32] and [0, 4], without any values",
        ):
            assert text in str(caught.value)

    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is scaled is in float32 by parts; each value is that of a product in float32."""
        monkeypatch.setattr(peft, "AT_ONCE_BYTES", 4 * 1000)
        sizes: list[int] = []
        right = torch._foreach_mul_

        def multiply(copies: list[torch.Tensor], factors: list[float]) -> None:
            sizes.append(sum(copy.nbytes for copy in copies))
            right(copies, factors)

        monkeypatch.setattr(torch, "_foreach_mul_", multiply)
        tensors: dict[str, torch.Tensor] = {}
        for number, rows in enumerate((100, 150, 40, 600, 10)):
            dtype = torch.float32 if number == 2 else torch.bfloat16
            tensors[f"layers.{number}.q_proj.lora_A.weight"] = torch.randn(4, 8, dtype=dtype)
            tensors[f"layers.{number}.q_proj.lora_B.weight"] = torch.randn(rows, 4, dtype=dtype)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        scaled = peft.canonical(tensors, {"r": 4, "lora_alpha": 5}).tensors
        assert sorted(sizes) == [160, 640, 4000, 9600]
        for name, tensor in before.items():
            assert torch.equal(tensors[name], tensor)
            expected = tensor if "lora_A" in name else (tensor.float() * 1.25).to(tensor.dtype)
            assert torch.equal(scaled[name], expected)

    @pytest.mark.parametrize("given", [nn.Linear(2, 2), {}, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 32)}])
    def test_nothing_to_go_by(self, given: Any) -> None:
        with pytest.raises(BadRequestError, match=r"no PEFT model|configuration"):
            peft.canonical(given)

    def test_empty(self) -> None:
        with pytest.raises(BadRequestError, match="no tensors of LoRA"):
            peft.canonical({}, {"r": 4, "lora_alpha": 4})


class TestAsked:
    """What is published is what the trainer's model computes with, whatever it is wrapped in."""

    def test_compiled_and_wrapped(self) -> None:
        model = tiny_peft()
        plain = peft.canonical(model)
        state, config = get_peft_model_state_dict(model), model.peft_config["default"]
        compiled = torch.compile(model)
        assert isinstance(compiled, nn.Module)
        part = tiny_peft()
        part.base_model.model.model.layers[0] = torch.compile(part.base_model.model.model.layers[0])  # type: ignore
        for given, its in (
            (compiled, None),
            (part, None),
            ({f"module.{name}": each for name, each in state.items()}, config),
            ({f"_orig_mod.{name}": each for name, each in state.items()}, config),
            ({f"module._orig_mod.{name}": each for name, each in state.items()}, config),
        ):
            found = peft.canonical(given, its)
            assert {*found.tensors} == {*plain.tensors}
            assert all(torch.equal(found.tensors[name], each) for name, each in plain.tensors.items())

    def test_layers_that_compute_with_another_adapter(self) -> None:
        """PEFT's tuner says which, and its model says what it was told last."""
        model = tiny_peft()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        peft.canonical(model)
        for active in ("other", ["default", "other"]):
            model.base_model.set_adapter(active)
            assert model.active_adapter == "default"
            with pytest.raises(BadRequestError, match=r"_proj computes with the adapters \[.*other.*\], and the model"):
                peft.canonical(model)

    def test_several_adapters_in_one(self) -> None:
        model = tiny_peft()
        state = {
            name.replace(".weight", ".default.weight" if "q_proj" in name else ".other.weight"): each
            for name, each in get_peft_model_state_dict(model).items()
        }
        with pytest.raises(BadRequestError, match="tensors of 2 adapters: default, other"):
            peft.canonical(state, model.peft_config["default"])

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_a_scaling_that_is_no_number(self, scale: float) -> None:
        model = tiny_peft()
        model.get_submodule(Q_PROJ).set_scale("default", scale)
        with pytest.raises(BadRequestError, match=r"0\.self_attn\.q_proj has a scaling of (nan|inf)"):
            peft.canonical(model)

    def test_a_model_around_another(self) -> None:
        """PEFT puts its prefix before the names once more, and vLLM drops both: they are one module."""
        model = tiny_peft()
        state, config = get_peft_model_state_dict(model), model.peft_config["default"]
        plain = peft.canonical(state, config)
        nested = {f"base_model.model.{name}": each for name, each in state.items()}
        assert {*peft.canonical(nested, config).tensors} == {*plain.tensors}
        with pytest.raises(BadRequestError, match="which is there twice"):
            peft.canonical(state | nested, config)

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"r": "8"}, "r is '8', and not a positive integer"),
            ({"r": 0}, "r is 0"),
            ({"r": -1}, "r is -1"),
            ({"r": True}, "r is True"),
            ({"r": 4.0}, r"r is 4\.0"),
            ({"r": 10**400}, "r is 1000"),
            ({"lora_alpha": None}, "lora_alpha is None, and not a finite number"),
            ({"lora_alpha": "16"}, "lora_alpha is '16'"),
            ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
            ({"lora_alpha": float("-inf")}, "lora_alpha is -inf"),
            ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
            ({"use_rslora": "false"}, "use_rslora is 'false', and neither true nor false"),
            ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], and not an object"),
            ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern has '4' for 'q_proj', and not a positive integer"),
            ({"rank_pattern": {"q_proj": None}}, "rank_pattern has None"),
            ({"alpha_pattern": {"q_proj": [1]}}, r"alpha_pattern has \[1\] for 'q_proj', and not a finite number"),
            ({"alpha_pattern": {"q_(proj": 1}}, r"alpha_pattern has 'q_\(proj', which is no regular expression"),
            ({"peft_type": "LOHA"}, "it is no LoRA but 'LOHA'"),
            ({"peft_type": 3, "r": "x"}, "it is no LoRA but 3"),
        ],
    )
    def test_a_configuration_that_says_nothing(self, fields: dict[str, Any], text: str) -> None:
        """It is named with what is wrong, and with whose it is."""
        model = tiny_peft()
        config = model.peft_config["default"].to_dict() | fields
        with pytest.raises(BadRequestError, match=f"^Adapter mine has a configuration from which .*{text}") as caught:
            peft.canonical(get_peft_model_state_dict(model), config, label="Adapter mine")
        assert caught.value.remedy

    @pytest.mark.parametrize("config", [[], "r", 8, LoraConfig, IA3Config(), {"lora_alpha": 4}], ids=str)
    def test_no_configuration(self, config: Any) -> None:
        with pytest.raises(BadRequestError, match="configuration from which no scaling of LoRA follows"):
            peft.canonical(get_peft_model_state_dict(tiny_peft()), config)

    @pytest.mark.parametrize("weights", [None, [], "mine", torch.zeros(2)], ids=["none", "list", "text", "tensor"])
    def test_no_weights(self, weights: Any) -> None:
        with pytest.raises(BadRequestError, match=r"^Adapter mine is given as "):
            peft.canonical(weights, {"r": 4}, label="Adapter mine")

    def test_names_that_are_none(self) -> None:
        with pytest.raises(BadRequestError, match="3, which is no tensor of LoRA"):
            peft.canonical({3: torch.zeros(2)}, {"r": 4})  # type: ignore[dict-item]

    def test_one_of_two_fused_experts(self) -> None:
        """PEFT saves the one that is there under the name that both have; vLLM takes both or none."""
        prefix = "base_model.model.model.layers.0.mlp.experts"
        sides = {"lora_A": torch.ones(8, 4), "lora_B": torch.ones(4, 8)}
        config = {"r": 2, "lora_alpha": 2}
        both = {f"{prefix}{end}.{side}.weight": each for end in ("", ".base_layer") for side, each in sides.items()}
        peft.canonical(both, config)
        for end in ("", ".base_layer"):
            one = {f"{prefix}{end}.{side}.weight": each for side, each in sides.items()}
            with pytest.raises(BadRequestError, match="vLLM takes both projections of experts, or none"):
                peft.canonical(one, config)

    def test_an_embeddings_own_weight_is_left_alone(self) -> None:
        """PEFT saves it beside the adapter."""
        model = tiny_peft(target_modules=["q_proj", "embed_tokens"])
        state, config = get_peft_model_state_dict(model), model.peft_config["default"]
        assert any(name.endswith("embed_tokens.base_layer.weight") for name in state)
        assert {*peft.canonical(state, config).tensors} == {*peft.canonical(model).tensors}
        for wrapped in ("module.", "_orig_mod."):
            peft.canonical({f"{wrapped}{name}": each for name, each in state.items()}, config)
        model = tiny_peft(target_modules=["q_proj", "lm_head"])
        state, config = get_peft_model_state_dict(model), model.peft_config["default"]
        assert any(name.endswith("lm_head.base_layer.weight") for name in state)
        assert {*peft.canonical(state, config).tensors} == {*peft.canonical(model).tensors}
        with pytest.raises(BadRequestError, match="no tensor of LoRA"):
            peft.canonical(state | {f"{Q_PROJ}.base_layer.weight": torch.ones(2)}, config)

    def test_a_start_that_changed_the_base(self) -> None:
        model = tiny_peft()
        config = model.peft_config["default"].to_dict() | {"init_lora_weights": "lora_ga"}
        with pytest.raises(BadRequestError, match="has changed the base model's weights"):
            peft.canonical(get_peft_model_state_dict(model), config)

    def test_strided_tensors(self) -> None:
        """Parts of larger tensors, repeated ones and negated ones are written as what they show."""
        whole = torch.randn(64, 8)
        given = {
            f"{Q_PROJ}.lora_A.weight": whole[::2, :1].T,
            f"{Q_PROJ}.lora_B.weight": torch.ones(1).expand(48, 1),
        }
        adapter = peft.canonical(given, {"r": 1, "lora_alpha": 1})
        with closing(AdapterFile(*file_of(adapter))) as file:
            found = stage(file, [*given], None)
        assert all(torch.equal(found[name], each) for name, each in given.items())


class TestFile:
    """The bytes between processes."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_readers(self, dtype: torch.dtype) -> None:
        """Readers of safetensors find every tensor, and the file fills whole pages."""
        tensors = {
            f"m{number}.lora_A.weight": torch.randn(1 + number, 3).to(dtype if number else torch.float32)
            for number in range(5)
        }
        info, fds = file_of(peft.Adapter(tensors, {"r": 4, "target_modules": ["q_proj"]}))
        assert info.size_bytes % PAGE_BYTES == 0
        with fds, safe_open(f"/proc/self/fd/{fds[0]}", framework="pt") as file:
            assert {*file.keys()} == tensors.keys()
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
            assert config_in(fds[0], "it") == {"r": 4, "target_modules": ["q_proj"]}

    @pytest.mark.parametrize("published", [None, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32])
    def test_staged(self, published: torch.dtype | None, wanted: torch.dtype | None) -> None:
        """What an engine takes has the values that casting each tensor gives, and its shape; in pieces or not."""
        tensors = {
            "b.lora_A.weight": torch.randn(300, 4096),
            "a.lora_B.weight": torch.randn(3000, 1500).to(torch.bfloat16),
            "c.lora_A.weight": torch.randn(3, 5),
            "d.lora_B.weight": torch.randn(2000, 4096),
        }
        info, fds = file_of(peft.Adapter(tensors, {"r": 4}), published)
        with fds:
            assert info.size_bytes > 2 * PIECE_BYTES or published is torch.bfloat16
            staged = stage(AdapterFile(info, fds), tensors, wanted)
        assert staged.keys() == tensors.keys()
        for name, tensor in tensors.items():
            as_published = tensor.to(published or tensor.dtype)
            assert torch.equal(staged[name], as_published.to(wanted or as_published.dtype)), name
        assert all(
            each.untyped_storage().nbytes() <= LOCKED_BYTES or each.nbytes > LOCKED_BYTES for each in staged.values()
        )

    def test_staged_in_part(self) -> None:
        """Of tensors that nobody asks for, nothing is kept."""
        tensors = {f"{name}.lora_A.weight": torch.randn(30, 4096) for name in "abcd"}
        info, fds = file_of(peft.Adapter(tensors, {"r": 4}))
        wanted = ["b.lora_A.weight", "d.lora_A.weight"]
        with fds:
            staged = stage(AdapterFile(info, fds), wanted, None)
        assert sorted(staged) == wanted
        assert all(torch.equal(staged[name], tensors[name]) for name in wanted)
        (size,) = {each.untyped_storage().nbytes() for each in staged.values()}
        assert size == sum(tensors[name].nbytes for name in wanted)

    def test_staged_as_they_are(self) -> None:
        """Some of a file with several types, of which one has an odd number of elements."""
        tensors = {f"{name}.lora_B.weight": torch.randn(5, 7).to(torch.bfloat16) for name in "bc"}
        tensors["a.lora_A.weight"] = torch.randn(5, 7)
        info, fds = file_of(peft.Adapter(tensors, {"r": 4}))
        names = ["a.lora_A.weight", "b.lora_B.weight"]
        with fds:
            staged = stage(AdapterFile(info, fds), names, None)
        assert all(torch.equal(staged[name], tensors[name]) for name in names)

    def test_odd(self) -> None:
        """Whatever the counts of elements, readers of safetensors find every tensor."""
        tensors = {"a.lora_A.weight": torch.randn(1, 5), "a.lora_B.weight": torch.randn(3, 1).to(torch.bfloat16)}
        for dtype in (None, torch.float16, torch.float64):
            info, fds = file_of(peft.Adapter(tensors, {"r": 4}), dtype)
            assert info.size_bytes % PAGE_BYTES == 0
            with fds, safe_open(f"/proc/self/fd/{fds[0]}", framework="pt") as file:
                for name, tensor in tensors.items():
                    assert torch.equal(file.get_tensor(name), tensor.to(dtype or tensor.dtype))

    def test_finite_in_its_dtype(self) -> None:
        tensors = {"a.lora_A.weight": torch.full((1, 5), 1e5), "a.lora_B.weight": torch.ones(3, 1)}
        adapter = peft.Adapter(tensors, {"r": 4})
        file_of(adapter, torch.bfloat16)[1].close()
        with pytest.raises(
            BadRequestError, match=r"^The adapter has values .* finite: a\.lora_A\.weight in torch\.float16"
        ):
            file_of(adapter, torch.float16)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("rows", [3, 4])
    def test_finite(self, value: float, rows: int) -> None:
        """Wherever it is, of whatever type, and where a type begins between two of its places."""
        tensors = {
            "a.lora_A.weight": torch.randn(1, 5),
            "b.lora_A.weight": torch.randn(2, 4, dtype=torch.float64),
            "c.lora_B.weight": torch.randn(rows, 1).to(torch.bfloat16),
            "d.lora_B.weight": torch.full((4, 4), -65504.0, dtype=torch.float16),
        }
        file_of(peft.Adapter(tensors, {"r": 4}))[1].close()
        for name, tensor in tensors.items():
            right, tensor[-1, -1] = tensor[-1, -1].clone(), value
            with pytest.raises(BadRequestError, match=rf"^Adapter mine has .* not finite: {name} in {tensor.dtype}\."):
                file_of(peft.Adapter(tensors, {"r": 4}), label="Adapter mine")
            file_of(peft.Adapter(tensors, {"r": 4}), check_finite=False)[1].close()
            tensor[-1, -1] = right

    def test_staged_and_damaged(self) -> None:
        info, fds = file_of(peft.Adapter({"a.lora_A.weight": torch.zeros(3000, 4096)}, {"r": 4}))
        sums = info.checksums.values
        damaged = replace(info, checksums=replace(info.checksums, values=(*sums[:-1], sums[-1] + 1)))
        with fds, pytest.raises(IntegrityError, match="1 of 3 pieces of it"):
            stage(AdapterFile(damaged, fds), ["a.lora_A.weight"], torch.float32)

    @pytest.mark.parametrize("extra", range(0, 9000, 1001))
    def test_pages(self, extra: int) -> None:
        """However long the header is, the file ends with a page."""
        header = header_of([Part("x" * (extra + 1), "F32", (2,), 8)], {})
        assert (len(header) + 8) % PAGE_BYTES == 0

    @pytest.mark.parametrize(
        "content",
        [b"", b"\xff" * 64, (4).to_bytes(8, "little") + b"null", (2).to_bytes(8, "little") + b"{}"],
        ids=["empty", "noise", "null", "other"],
    )
    def test_damaged(self, content: bytes) -> None:
        fd = os.memfd_create("file")
        os.write(fd, content)
        with pytest.raises(ManifestError, match="it "):
            config_in(fd, "it")
        os.close(fd)
