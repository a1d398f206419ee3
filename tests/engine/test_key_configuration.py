"""What of an engine's configuration and environment is in the key, and what is not: vLLM's real configuration."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.checkpoints import models
from tests.support.checkpoints.copies import flip
from tests.support.configs import config
from tests.support.keys import key_of, key_of_config
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine.identity import configuration
from vllm_companion_plugin.engine.vllm import deployment, flags
from vllm_companion_plugin.errors import NotShareableError

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("model.dtype", {"dtype": "bfloat16"}),
        ("lora", {"enable_lora": True}),
        ("hf.rms_norm_eps", {"hf_overrides": {"rms_norm_eps": 0.5}}),
        ("kernel.linear_backend", {"linear_backend": "triton"}),
        ("kernel.moe_backend", {"moe_backend": "triton"}),
        ("model.quantization", {"quantization": "fp8_per_tensor", "dtype": "bfloat16"}),
        ("cache.cache_dtype", {"kv_cache_dtype": "fp8"}),
        ("model.model_impl", {"model_impl": "vllm"}),
    ],
)
def test_what_changes_the_processed_weights_changes_the_key(tiny: Path, field: str, options: dict[str, Any]) -> None:
    plain, other = key_of(tiny), key_of(tiny, **options)
    assert plain.id != other.id
    assert field in {line.split(" is ")[0] for line in other.differences(plain)}


@pytest.mark.parametrize(
    ("flag", "value", "default"),
    [("fully_sharded_loras", True, False), ("enable_tower_connector_lora", True, False)],
)
def test_each_lora_flag_changes_the_key(tiny: Path, flag: str, value: Any, default: Any) -> None:
    """0.33 notes the second in mixtures of experts; multimodal models build other towers for the third."""
    changed = key_of(tiny, enable_lora=True, **{flag: value}).differences(key_of(tiny, enable_lora=True))
    assert changed == [f"lora.{flag} is {json.dumps(default)!r} there and {json.dumps(value)!r} here"]


def test_engines_with_room_for_other_adapters_share(tiny: Path) -> None:
    """What LoRA adds to a model comes after it is loaded."""
    more = key_of(tiny, enable_lora=True, max_lora_rank=64, max_loras=4, max_cpu_loras=8)
    assert more.id == key_of(tiny, enable_lora=True).id


def test_kernel_switches_and_versions_are_in_the_key(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key_of(tiny)
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    switched = key_of(tiny)
    assert switched.differences(plain) == ["env.VLLM_MARLIN_INPUT_DTYPE is 'absent' there and 'int8' here"]
    versions = deployment.versions() | {"vllm": "0.0.1"}
    monkeypatch.setattr(deployment, "versions", lambda: versions)
    assert f"version.vllm is {plain.fields['version.vllm']!r} there and '0.0.1' here" in key_of(tiny).differences(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 32},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 128},
        {"enforce_eager": True},
        {"seed": 7},
        {"served_model_name": "other"},
        {"block_size": 32},
        {"gpu_memory_utilization": 0.5},
        {"enable_prefix_caching": False},
        {"trust_remote_code": True},
        {"distributed_executor_backend": "mp"},
        {"override_generation_config": {"temperature": 0.5}},
        {"compilation_config": {"custom_ops": ["all"]}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_leaves_the_weights_alone_leaves_the_key(tiny: Path, options: dict[str, Any]) -> None:
    assert key_of(tiny, **options).differences(key_of(tiny)) == []


def test_speculation_changes_the_key_of_a_hybrid(tiny: Path, tmp_path: Path) -> None:
    """Gated delta nets keep the number of tokens as an attribute, which parity compares."""
    models.make("hybrid", tmp_path / "hybrid", tiny=True)
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    assert key_of(tiny).id == key_of(tiny, speculative_config=guess).id
    changed = key_of(tmp_path / "hybrid", speculative_config=guess).differences(key_of(tmp_path / "hybrid"))
    assert changed == ["speculative.num_speculative_tokens is 'absent' there and '3' here"]


class TestConfiguration:
    """Whatever vLLM's configuration says is compared, unless it is known to leave bytes alone."""

    def test_each_way_to_start_an_engine_has_the_same_key(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`LLM()`, `vllm serve` and `vllm-companion serve` have other limits by default."""
        from vllm import LLM
        from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        class Made(Exception):
            pass

        def note(engine_args: EngineArgs, usage_context: UsageContext, **_: Any) -> None:
            raise Made(engine_args.create_engine_config(usage_context))

        monkeypatch.setattr(LLMEngine, "from_engine_args", note)
        with pytest.raises(Made) as caught:
            LLM(str(tiny), load_format="companion")
        arguments = [str(tiny), "--load-format", "companion"]
        server = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", *arguments])
        warmed = flags.through_companion(flags.parse("serve", [str(tiny)]), fallback=False)
        made = {
            "LLM": caught.value.args[0],
            "vllm serve": AsyncEngineArgs.from_cli_args(server).create_engine_config(UsageContext.OPENAI_API_SERVER),
            "vllm-companion serve": warmed.create_engine_config(),
        }
        limits = {name: one.scheduler_config.max_num_batched_tokens for name, one in made.items()}
        assert len(set(limits.values())) > 1, "they do differ"
        first, *others = (key_of_config(one, tiny) for one in made.values())
        assert [first.differences(other) for other in others] == [[], []]

    def test_what_nobody_has_looked_at_is_compared(self, tiny: Path) -> None:
        """Whatever a newer vLLM or a platform's plugin sets."""
        made = config(tiny)
        plain = key_of_config(made, tiny)
        made.model_config.twist = 2
        made.cache_config.knot = {"b": 1, "a": 2}
        assert key_of_config(made, tiny).differences(plain) == [
            "cache.knot is 'absent' there and '{\"a\": 2, \"b\": 1}' here",
            "model.twist is 'absent' there and '2' here",
        ]

    def test_additional_config_is_compared(self, tiny: Path) -> None:
        """It is made for code that vLLM does not know."""
        plain = key_of(tiny, additional_config={"factor": 1.0})
        assert key_of(tiny, additional_config={"factor": 2.0}).differences(plain) == [
            "additional is '{\"factor\": 1.0}' there and '{\"factor\": 2.0}' here"
        ]

    def test_variables_of_the_environment_are_compared(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """But for addresses, secrets and what Kubernetes puts there for a service named vllm-router."""
        plain = key_of(tiny)
        for name in ("API_KEY", "HOST_IP", "PORT", "LOGGING_PREFIX", "ROUTER_SERVICE_HOST", "ROUTER_PORT_80_TCP_ADDR"):
            monkeypatch.setenv(f"VLLM_{name}", "80")
        assert key_of(tiny).differences(plain) == []
        monkeypatch.setenv("VLLM_OF_A_PLUGIN", "1")
        assert key_of(tiny).differences(plain) == ["env.VLLM_OF_A_PLUGIN is 'absent' there and '1' here"]

    def test_other_limits_of_pictures_are_the_same_model(self) -> None:
        """A limit of 0 builds no encoder; any other builds the same one. Pruning and processing are for requests."""
        from vllm.config.multimodal import MultiModalConfig

        def fields(**options: Any) -> dict[str, str]:
            return configuration.multimodal_fields(MultiModalConfig(**options))

        plain = fields()
        assert fields(limit_per_prompt={"image": 2}, video_pruning_rate=0.5, mm_processor_cache_gb=0) == plain
        assert fields(limit_per_prompt={"image": 0})["multimodal.limit_per_prompt"] == '{"image": 0}'
        assert fields(mm_encoder_tp_mode="data") != plain

    def test_files_that_flags_name_are_compared(self, tiny: Path, tmp_path: Path) -> None:
        scales = tmp_path / "scales.json"
        scales.write_text("1")
        named = {"hf_overrides": {"scales": str(scales)}}
        plain = key_of(tiny, **named)
        scales.write_text("2")
        assert [line.split(" is ")[0] for line in key_of(tiny, **named).differences(plain)] == ["named.hf.scales"]

    @pytest.mark.parametrize("how", ["in full", "below the checkpoint"])
    def test_weights_in_folders_that_flags_name_are_compared(self, tiny: Path, tmp_path: Path, how: str) -> None:
        """As of an adapter that a plugin merges: nothing sees what Rust reads."""
        model = tmp_path / "model"
        shutil.copytree(tiny, model)
        folder = tmp_path / "adapter" if how == "in full" else model / "of" / "adapter"
        folder.mkdir(parents=True)
        weights, other = folder / "adapter.safetensors", folder / "events.log"
        weights.write_text("1")
        named = {"hf_overrides": {"adapter": str(folder) if how == "in full" else "of/adapter"}}
        plain = key_of(model, **named)
        other.write_text("1")
        assert key_of(model, **named) == plain
        weights.write_text("2")
        found = [line.split(" is ")[0] for line in key_of(model, **named).differences(plain)]
        assert found == ["named.hf.adapter/adapter.safetensors"]

    def test_the_folder_around_the_checkpoint_counts_for_nothing(self, tiny: Path, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny, model)
        (tmp_path / "other.safetensors").write_text("1")
        for folder in (str(tmp_path), str(model), "./", "../"):
            fields = key_of(model, hf_overrides={"where": folder}).fields
            assert not any(name.startswith("named.") for name in fields)

    def test_large_files_that_flags_name_are_compared(self, tiny: Path, tmp_path: Path) -> None:
        """A projector that a plugin loads from elsewhere is no part of the checkpoint."""
        projector = tmp_path / "projector.safetensors"
        with projector.open("wb") as file:
            file.truncate(17 << 20)
        named = {"hf_overrides": {"projector": str(projector)}}
        plain = key_of(tiny, **named)
        assert key_of(tiny, **named) == plain
        flip(projector, [-1])
        assert [line.split(" is ")[0] for line in key_of(tiny, **named).differences(plain)] == ["named.hf.projector"]

    def test_a_tokenizer_counts_where_weights_follow_from_tokens(self, tiny: Path, tmp_path: Path) -> None:
        """A reranker's score row is made of the rows of "no" and "yes"."""
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text("{}")

        def keys(**options: Any) -> tuple[EntryKey, EntryKey]:
            (tokenizer / "tokenizer.json").write_text("{}")
            plain = key_of(tiny, tokenizer=str(tokenizer), **options)
            (tokenizer / "tokenizer.json").write_text('{"vocab": {}}')
            return plain, key_of(tiny, tokenizer=str(tokenizer), **options)

        plain, other = keys()
        assert plain.id == other.id
        scored = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
        plain, other = keys(hf_overrides=scored, runner="pooling")
        assert [line.split(" is ")[0] for line in other.differences(plain)] == ["tokenizer.tokenizer.json"]

    @pytest.mark.parametrize(
        ("one", "same"),
        [
            ({"b": 1, "a": {2, 1}}, {"a": {1, 2}, "b": 1}),
            (torch.float32, torch.float32),
            (functools.partial(print, end=""), functools.partial(print, end="")),
            (SimpleNamespace(x=Path("/a")), SimpleNamespace(x=Path("/a"))),
            ((1, 2), [1, 2]),
            (Stage.PROCESSED, Stage.PROCESSED),
        ],
    )
    def test_texts_are_canonical(self, one: Any, same: Any) -> None:
        """Equal values of two processes have equal texts: no addresses, no order of sets."""
        assert configuration.text(one) == configuration.text(same)
        assert "0x" not in configuration.text(one)

    def test_long_values_are_told_apart(self) -> None:
        """Texts of arrays and patterns are cut short by their libraries."""
        ones, others = torch.ones(5000), torch.ones(5000)
        others[2500] = 2
        pairs = [(ones, others), (ones.numpy(), others.numpy()), (re.compile("a" * 300), re.compile("a" * 301))]
        assert all(configuration.text(one) != configuration.text(other) for one, other in pairs)
        assert all(configuration.text(one) == configuration.text(copy.deepcopy(one)) for one, _ in pairs)
        assert configuration.text(ones.bfloat16()) != configuration.text(ones.half())

    def test_what_does_not_say_what_it_is_is_refused_by_name(self, tiny: Path) -> None:
        made = config(tiny)
        made.model_config.thing = object()
        with pytest.raises(NotShareableError, match=r"model\.thing cannot be compared: an object of builtins\.object"):
            key_of_config(made, tiny)
