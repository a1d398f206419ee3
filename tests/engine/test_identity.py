"""What is the same model and what is not: vLLM's real configuration, a real companion, real files."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import publishing
from tests.support.checkpoints import models
from tests.support.configs import config
from tests.support.place import Place
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine import decide, decisions, session
from vllm_companion_plugin.engine.identity import checkpoint, code, configuration, digest, key
from vllm_companion_plugin.engine.vllm import deployment, devices, drafts, flags, sharing
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, NotShareableError
from vllm_companion_plugin.host import files
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.host.runtime_dir import digests_directory
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.settings import Settings

WEIGHTS = "model.safetensors"


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def first(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "first"))


def key_of(model: Path, **options: Any) -> EntryKey:
    return key_of_config(config(model, **options), model)


def key_of_config(made: Any, model: Path) -> EntryKey:
    files = checkpoint.identity(model)
    return key.compute(made, made.model_config, devices.engine_device(), "auto", model, files)


# ---- what is part of the key


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


class TestCode:
    """Code decides bytes, too."""

    @pytest.fixture
    def plugin(self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A model of a package outside vLLM, its checkpoint in `first`."""
        package = tmp_path / "path" / "oot_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "model.py").write_text(
            "import oot_helper\nfrom vllm.model_executor.models.llama import LlamaForCausalLM\n\n\n"
            "class MyLlamaForCausalLM(LlamaForCausalLM):\n    pass\n"
        )
        (package / "factors.py").write_text("FACTOR = 1.0\n")
        (package.parent / "oot_helper.py").write_text("SIGN = 1\n")
        monkeypatch.syspath_prepend(package.parent)
        inherited = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{inherited}")  # vLLM inspects it in a child
        from vllm import ModelRegistry
        from vllm.model_executor.model_loader import utils
        from vllm.model_executor.models import registry

        registry._try_load_model_cls.cache_clear()
        ModelRegistry.register_model("MyLlamaForCausalLM", "oot_model.model:MyLlamaForCausalLM")
        made = json.loads((first / "config.json").read_text())
        (first / "config.json").write_text(json.dumps(made | {"architectures": ["MyLlamaForCausalLM"]}))
        yield package
        for name in ("oot_model", "oot_model.model", "oot_helper"):
            sys.modules.pop(name, None)
        utils._MODEL_ARCH_BY_HASH.clear()

    def test_a_changed_plugin_is_another_key(self, plugin: Path, first: Path) -> None:
        """Every file of its package counts, and what it uses beside it; the file is named."""
        plain = key_of(first)
        assert plain.fields["class"] == "oot_model.model.MyLlamaForCausalLM"
        (plugin / "factors.py").write_text("FACTOR = 3.0\n")
        assert [line.split(" is ")[0] for line in key_of(first).differences(plain)] == ["code.oot_model/factors.py"]
        (plugin.parent / "oot_helper.py").write_text("SIGN = -1\n")
        changed = [line.split(" is ")[0] for line in key_of(first).differences(plain)]
        assert changed == ["code.oot_helper.py", "code.oot_model/factors.py"]

    def test_variables_that_a_plugin_names_are_compared(
        self, plugin: Path, first: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its code may read them while it loads; who the process is and its secrets are no part of a model."""
        (plugin / "factors.py").write_text(
            "import os\nFACTOR = os.environ.get('FACTOR', os.environ.get('LOCAL_RANK'))\n"
        )
        for name in ("FACTOR", "LOCAL_RANK"):
            monkeypatch.setenv(name, "1")
        plain = key_of(first)
        assert plain.fields["env.FACTOR"] == "1"
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert key_of(first) == plain
        monkeypatch.delenv("FACTOR")
        assert key_of(first).differences(plain) == ["env.FACTOR is '1' there and 'absent' here"]

    @pytest.mark.parametrize(
        ("name", "is_compared"),
        [
            *((name, True) for name in ("FACTOR", "down_scale", "MODEL_KEY_SCALE", "MAX_TOKENS_FACTOR", "KEYS")),
            *((name, False) for name in ("HF_TOKEN", "API_KEY", "MY_API_KEY_2", "AWS_SECRET_ACCESS_KEY", "KEY")),
            *((name, False) for name in ("DB_PASSWORD", "CREDENTIALS_FILE", "http_proxy", "LOCAL_RANK", "home")),
        ],
    )
    def test_whatever_a_variable_is_called(
        self, plugin: Path, first: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_compared: bool
    ) -> None:
        """But for secrets, which a key would show, and what says who a process is."""
        (plugin / "factors.py").write_text(f"import os\nFACTOR = float(os.environ.get('{name}', '1'))\n")
        plain = key_of(first)
        monkeypatch.setenv(name, "2")
        assert (key_of(first) != plain) == is_compared

    def test_vllm_as_released_is_said(self, tiny: Path) -> None:
        assert key_of(tiny).fields["code.vllm"] == "as released"

    def test_a_patched_vllm_of_the_same_version_is_another_key(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file that is not its wheel's is named, with a digest."""
        read = code.sha256_of
        monkeypatch.setattr(
            code, "sha256_of", lambda path: b"patched" if path.endswith("layers/linear.py") else read(path)
        )
        code._vllm_state.cache_clear()
        found = key_of(tiny).fields["code.vllm"]
        code._vllm_state.cache_clear()
        assert found == f"vllm/model_executor/layers/linear.py {code._base64(b'patched')}"

    def test_of_an_editable_vllm_each_folder_is_named(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no list of what was released."""
        read, patched = code.sha256_of, b""
        monkeypatch.setattr(code, "_released", lambda place: {})
        monkeypatch.setattr(
            code, "sha256_of", lambda path: patched if patched and path.endswith("layers/linear.py") else read(path)
        )
        code._vllm_state.cache_clear()
        plain = key_of(tiny)
        patched = b"patched"
        code._vllm_state.cache_clear()
        other = key_of(tiny)
        code._vllm_state.cache_clear()
        changed = [line.split(" is ")[0] for line in other.differences(plain)]
        assert changed == ["code.vllm/model_executor/layers"]

    def test_a_function_put_into_a_class_counts(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a sitecustomize or a plugin does that replaces `load_weights`."""
        from vllm.model_executor.models.llama import LlamaForCausalLM

        plain = key_of(tiny)
        (tmp_path / "patches.py").write_text("def load_weights(self, weights):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(LlamaForCausalLM, "load_weights", importlib.import_module("patches").load_weights)
        assert [line.split(" is ")[0] for line in key_of(tiny).differences(plain)] == ["code.patches.py"]

    def test_code_of_another_repository_counts(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a checkpoint whose `auto_map` names one; without --trust-remote-code nobody runs it."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "code").mkdir(parents=True)
        (tmp_path / "org" / "code" / "modeling.py").write_text("A = 1")
        made = json.loads((first / "config.json").read_text())
        (first / "config.json").write_text(json.dumps(made | {"auto_map": {"AutoModel": "org/code--modeling.A"}}))
        for trusted, changed in ((False, []), (True, ["code.org/code/modeling.py"])):
            plain = key_of(first, trust_remote_code=trusted)
            (tmp_path / "org" / "code" / "modeling.py").write_text(f"A = {trusted}")
            other = key_of(first, trust_remote_code=trusted)
            assert [line.split(" is ")[0] for line in other.differences(plain)] == changed

    def test_packages_that_lay_out_weights_are_named(self, tiny: Path) -> None:
        import transformers

        fields = key_of(tiny).fields
        assert fields["version.transformers"] == transformers.__version__
        assert "version.compressed-tensors" in fields

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


def test_a_link_is_what_it_points_to(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").symlink_to(tiny)
    files = tmp_path / "files"
    files.mkdir()
    for file in tiny.iterdir():
        (files / file.name).symlink_to(file)
    assert key_of(tmp_path / "directory").id == key_of(files).id == key_of(tiny).id


# ---- what engines decide


class Engines:
    """Decisions of engines on one device, and what the loading ones publish."""

    def __init__(self, place: Place) -> None:
        self.settings: Settings = place.settings
        self._decisions: list[Any] = []

    def decide(self, model: Path, **options: Any) -> decisions.Attach | decisions.Load:
        made = config(model, **options)
        decision = decide._decide(made, made.model_config, self.settings)
        assert not isinstance(decision, decisions.Alone)
        self._decisions.append(decision)
        return decision

    def load(self, model: Path, **options: Any) -> decisions.Load:
        """Decide, expect to be elected, and publish something under the key."""
        decision = self.decide(model, **options)
        assert isinstance(decision, decisions.Load)
        publish(decision)
        return decision

    def attaches(self, model: Path, **options: Any) -> bool:
        decision = self.decide(model, **options)
        decision.close()
        return isinstance(decision, decisions.Attach)

    def close(self) -> None:
        for decision in self._decisions:
            decision.close()


def publish(decision: decisions.Load) -> None:
    publishing.publish(decision.granted.publication, nn.Linear(2, 2))
    decision.election.release()


@pytest.fixture
def engines(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    place.companion()
    monkeypatch.setattr(session.current(), "_connections", {})
    monkeypatch.setattr(session.current(), "_drafts", {})
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)  # files of a test are always new
    made = Engines(place)
    yield made
    made.close()
    for connection in session.current()._connections.values():
        connection.close()


def kept(engines: Engines) -> int:
    directory = Path(engines.settings.runtime_dir, "digests")
    return len([path for path in directory.iterdir() if path.name != "lock"]) if directory.exists() else 0


def flip(path: Path, offsets: Iterable[int]) -> None:
    """Change the bytes at `offsets`."""
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def copy_of(model: Path, name: str = "copied") -> Path:
    return Path(shutil.copytree(model, model.with_name(name)))


def fine_tune_of(model: Path, offsets: Iterable[int]) -> Path:
    """A copy of the same shape: its weights differ at `offsets` of the file, and the header does not."""
    tuned = copy_of(model, "tuned")
    flip(tuned / WEIGHTS, offsets)
    return tuned


def test_a_copy_is_the_same_model_and_is_read_once(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.load(first)
    copied = copy_of(first)
    assert engines.attaches(copied)
    assert kept(engines) == 2, "one digest of each file"
    monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read again"))
    assert engines.attaches(copied)
    assert engines.attaches(first)


def test_a_hub_snapshot_and_a_copy_are_the_same_model(engines: Engines, first: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("a" * 40)
    shutil.copytree(first, blobs)
    (blobs / WEIGHTS).rename(blobs / ("b" * 64))
    shutil.copytree(first, snapshot, ignore=shutil.ignore_patterns(WEIGHTS))
    (snapshot / WEIGHTS).symlink_to(blobs / ("b" * 64))
    engines.load(snapshot)
    assert engines.attaches(first)


def test_a_blob_of_the_hub_that_was_written_to_is_another_model(engines: Engines, first: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("b" * 64)
    blob.parent.mkdir()
    (first / WEIGHTS).rename(blob)
    (first / WEIGHTS).symlink_to(blob)
    engines.load(first)
    flip(blob, [-1])
    assert not engines.attaches(first)


def test_two_fine_tunes_of_one_shape_are_told_apart_without_reading_them(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.load(first)
    size = (first / WEIGHTS).stat().st_size
    tuned = fine_tune_of(first, range(size // 2, size))
    monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read"))
    assert not engines.attaches(tuned)


def test_one_byte_between_the_samples_is_enough(engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SAMPLE_BYTES", 16)
    engines.load(first)
    size = (first / WEIGHTS).stat().st_size
    tuned = fine_tune_of(first, [size * 9 // 16 + 16])
    assert not engines.attaches(tuned)
    assert kept(engines) == 2, "it took reading both"


def test_edited_in_place_it_is_another_model(engines: Engines, first: Path) -> None:
    engines.load(first)
    flip(first / WEIGHTS, [-1])
    assert not engines.attaches(first)


def test_a_new_time_alone_is_not_a_new_model_where_the_content_is_known(engines: Engines, first: Path) -> None:
    engines.load(first)
    assert engines.attaches(copy_of(first))  # now it is
    (first / WEIGHTS).touch()
    assert engines.attaches(first)


def test_what_was_removed_cannot_be_compared(engines: Engines, first: Path) -> None:
    copied = copy_of(first)
    engines.load(first)
    shutil.rmtree(first)
    assert not engines.attaches(copied)


def test_another_set_of_files_is_another_model(engines: Engines, first: Path) -> None:
    engines.load(first)
    more = copy_of(first, "more")
    (more / "model-2.safetensors").write_bytes(b"x")
    assert not engines.attaches(more)


def test_a_digest_of_a_file_that_was_just_written_is_not_kept(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again within the same tick of the clock."""
    monkeypatch.setattr(digest, "_SETTLED_S", 2.0)
    engines.load(first)
    assert engines.attaches(copy_of(first))
    assert kept(engines) == 0


def test_copies_that_start_together_load_once(engines: Engines, first: Path) -> None:
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, decisions.Load)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits"
    publish(loader)
    other.join(10)
    assert isinstance(found[0], decisions.Attach)


def test_whoever_was_elected_looks_again(engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both asked before either was known, so each has an election of its own; the device's lock orders them."""
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, decisions.Load)
    held = decide._held
    asked: list[Any] = []

    def blind_at_first(status: Any, wanted: EntryKey, *rest: Any) -> EntryKey:
        asked.append(rest)
        return wanted if len(asked) == 1 else held(status, wanted, *rest)

    monkeypatch.setattr(decide, "_held", blind_at_first)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits for the lock"
    publish(loader)
    other.join(10)
    assert isinstance(found[0], decisions.Attach)
    assert len(asked) == 2


def test_a_variant_that_was_refused_at_the_same_place_is_the_last(tiny: Path) -> None:
    """What loading made there cannot be restored, and no further copy would change that."""
    first = key.variant(key_of(tiny), "model.table", "[1]; [2]")
    other = key.variant(first, "model.kind", "absent")
    assert other.variant == "model.table is [1], [2]; model.kind is absent"
    for where, here in (("model.table", "[1]; [2]"), ("model.kind", "absent")):
        with pytest.raises(NotShareableError, match=f"what loading makes of {where} cannot be restored"):
            key.variant(other, where, here)


def test_a_mismatch_names_the_fields_and_both_values(
    engines: Engines, first: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines.load(first)
    assert not engines.attaches(first, hf_overrides={"rms_norm_eps": 0.5})
    said = [record.getMessage() for record in caplog.records if "loaded differently" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("so it is loaded once more: hf.rms_norm_eps is '1e-05' there and '0.5' here.")


def test_a_mismatch_names_the_files_and_both_values(
    engines: Engines, first: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the digest of all of them."""
    engines.load(first)
    before = files.file_identity(first / WEIGHTS)
    flip(first / WEIGHTS, [-1])
    assert not engines.attaches(first)
    said = [record.getMessage() for record in caplog.records if "loaded differently" in record.getMessage()]
    named = f"{WEIGHTS} is {before!r} there and {files.file_identity(first / WEIGHTS)!r} here."
    assert [line.partition("once more: ")[2] for line in said] == [named]


def test_a_pipe_where_another_client_says_that_its_checkpoint_is_does_not_hang_an_engine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert digest._sample(tmp_path / "pipe") == (-1, b"")
    began = time.monotonic()
    digest.whole_digest_of(tmp_path / "pipe")
    assert time.monotonic() - began < 1


def test_a_damaged_digest_is_not_believed(engines: Engines, first: Path) -> None:
    tuned = fine_tune_of(first, [-1])
    engines.load(first)
    directory = Path(digests_directory(engines.settings))
    for file in (*first.iterdir(), *tuned.iterdir()):
        name = hashlib.sha256(checkpoint.file_identity(file).encode()).hexdigest()
        (directory / name).write_bytes(bytes(64))  # as a crash leaves it
    assert not engines.attaches(tuned)


def test_who_was_elected_for_a_copy_takes_its_own_if_that_is_there_by_then(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_of(first)
    engines.load(first)
    held, answers = decide._held, [key_of(copied)]
    monkeypatch.setattr(decide, "_held", lambda *rest: answers.pop() if answers else held(*rest))
    assert engines.attaches(first)


def test_an_engine_that_writes_to_its_weights_copies_what_is_held_and_publishes_nothing(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "must_own_reason", lambda config: "EPLB moves expert weights in place")
    with pytest.raises(NotShareableError, match=r"EPLB .* nobody holds them to be copied"):
        engines.decide(first)
    assert session.current()._connections["cpu"].status().entries == ()
    asked_for = replace(engines.settings, share="copy")
    made = config(first)
    loader = decide._decide(made, made.model_config, asked_for)
    assert isinstance(loader, decisions.Load)
    publish(loader)
    assert engines.attaches(first)
    loader.close()


ODD = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}模\u202e\n\x1b[2J\udcff\udcfe"
"""What a path may have: spaces of other kinds, marks, control characters, and bytes that are no UTF-8."""


def test_paths_with_any_characters(engines: Engines, first: Path, tmp_path: Path) -> None:
    """What has such a path is published and attached to, also from a copy, and is shown in a printable way."""
    odd = Path(shutil.move(first, tmp_path / ODD))
    (odd / f"{ODD}.safetensors").write_bytes(b"x")
    engines.load(odd)
    assert engines.attaches(odd)
    assert engines.attaches(copy_of(odd, f"{ODD}2"))
    (entry,) = session.current().connection("cpu", engines.settings).status().entries
    assert entry.key.source == str(odd)
    assert f"{ODD}.safetensors" in entry.key.files
    assert entry.key.model.isprintable()
    assert entry.key.model.endswith("\\xa0\\u3000模\\u202e\\n\\x1b[2J\\udcff\\udcfe")
    assert model_name(entry.key.model) == entry.key.model


class TestFilesOfACheckpoint:
    """What the loader reads is the model; what else lies there is not."""

    def test_quantization_files_count(self, first: Path) -> None:
        """vLLM reads them beside config.json; the difference is told by name, and copies need no comparing."""
        plain = key_of(first)
        (first / "hf_quant_config.json").write_text("{}")
        assert "file.hf_quant_config.json" in {line.split(" is ")[0] for line in key_of(first).differences(plain)}

    @pytest.mark.parametrize(
        "name",
        ["checkpoint-100/optimizer.pt", "lora/adapter_model.safetensors", "logs/loss.npy", "optimizer.pt", "notes.txt"],
    )
    def test_what_is_below_or_beside_is_not_the_models(self, first: Path, name: str) -> None:
        """A training goes on, or an adapter is put where the model is."""
        plain = key_of(first)
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(b"x")
        assert key_of(first).id == plain.id

    def test_code_names_few_folders(self, tmp_path: Path) -> None:
        """Of all that may lie below a model, only what its own code mentions."""
        from vllm.model_executor.models import jina, llama, qwen3_moe

        for name in ("adapters", "checkpoint-100", "lora", "logs", "original", "onnx", "onnx/adapters", "1_Pooling"):
            (tmp_path / name).mkdir()
        assert code.folders(llama.LlamaForCausalLM, tmp_path) == []
        assert code.folders(qwen3_moe.Qwen3MoeForCausalLM, tmp_path) == []
        assert code.folders(jina.JinaEmbeddingsV5Model, tmp_path) == ["adapters"]

    def test_a_link_to_a_large_directory_is_not_followed(self, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (first / "data").symlink_to("/")
        monkeypatch.setattr(os, "walk", lambda *args, **kwargs: pytest.fail("it was"))
        checkpoint.identity(first)

    def test_weights_that_are_only_below_are_found(self, first: Path) -> None:
        (first / "inner").mkdir()
        (first / WEIGHTS).rename(first / "inner" / WEIGHTS)
        assert list(checkpoint.identity(first)) == [f"inner/{WEIGHTS}"]

    def test_modules_of_sentence_transformers_count(self, first: Path) -> None:
        """Linked or not; each of its files is told by its name."""
        paths = ("", "1_Pooling", "2_Dense", "/etc", "../first")
        listed = [{"path": path, "type": "sentence_transformers.models.Other"} for path in paths]
        (first / "modules.json").write_text(json.dumps(listed))
        elsewhere = first.parent / "elsewhere"
        elsewhere.mkdir()
        (first / "2_Dense").symlink_to(elsewhere)
        for name, content in (("config.json", "{}"), (WEIGHTS, "x")):
            (elsewhere / name).write_text(content)
        plain = key_of(first)
        assert {"modules.json", "2_Dense/config.json", f"2_Dense/{WEIGHTS}"} <= plain.files.keys()
        (elsewhere / "config.json").write_text('{"bias": 1}')
        (first / "modules.json").write_text(json.dumps(listed[:4]))
        changed = [line.split(" is ")[0] for line in key_of(first).differences(plain)]
        assert changed == ["file.2_Dense/config.json", "file.modules.json"]

    def test_folders_that_the_models_code_names_count(self, engines: Engines, first: Path) -> None:
        """jina v5 merges an adapter while it loads; what another model finds in such a folder is not its own."""
        adapter = first / "adapters" / "retrieval"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
        (adapter / "adapter_model.safetensors").write_bytes(b"x")
        assert not any(name.startswith("adapters") for name in engines.load(first).found.content)
        made = json.loads((first / "config.json").read_text())
        jina = made | {"architectures": ["JinaEmbeddingsV5Model"], "model_type": "qwen3", "head_dim": 32}
        (first / "config.json").write_text(json.dumps(jina))
        loaded = engines.load(first, runner="pooling")
        assert {
            "adapters/retrieval/adapter_config.json",
            f"adapters/retrieval/adapter_{WEIGHTS}",
        } <= loaded.found.content.keys()
        (adapter / "adapter_config.json").write_text('{"lora_alpha": 64}')
        other = engines.decide(first, runner="pooling")
        assert [line.split(" is ")[0] for line in other.key.differences(loaded.key)] == [
            "file.adapters/retrieval/adapter_config.json"
        ]


class TestLooks:
    """Times of files are believed where a kernel sets them."""

    def test_a_file_on_a_disk_is_known_by_a_look(self, first: Path) -> None:
        assert checkpoint.identity(first)[WEIGHTS].startswith("stat ")

    @pytest.mark.skipif(shutil.which("mksquashfs") is None or os.geteuid() != 0, reason="needs mksquashfs and root")
    def test_another_image_at_the_same_place_is_another_model(
        self, engines: Engines, first: Path, tmp_path: Path
    ) -> None:
        """Device, inode, size and times are equal; so is an image that is mounted again."""
        tuned = fine_tune_of(first, [-1])
        images = [tmp_path / f"{name}.img" for name in ("first", "tuned")]
        for model, image in zip((first, tuned), images, strict=True):
            options = ("-mkfs-time", "0", "-all-time", "0", "-quiet", "-no-progress")
            subprocess.run(["mksquashfs", model, image, *options], check=True, stdout=subprocess.DEVNULL)
        place = tmp_path / "mounted"
        place.mkdir()
        with mounted(images[0], place):
            before = os.stat(place / WEIGHTS)
            engines.load(place)
            assert engines.attaches(place)
        with mounted(images[1], place):
            after = os.stat(place / WEIGHTS)
            same = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
            assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
            assert not engines.attaches(place)
            assert not engines.attaches(tuned), "nobody has published it"
        with mounted(images[0], place):
            assert engines.attaches(place)
        assert engines.attaches(first), "what it was made of has the same content"

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_what_is_read_is_read_once_a_mount(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Later engines in one container attach as fast as on a disk."""
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        (tmp_path / "digests").mkdir()
        with overlay(first, tmp_path) as place:
            read = checkpoint.identity(place, digest.Digests(str(tmp_path / "digests"), 1))
            assert read[WEIGHTS].startswith("blake3 ")
            monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read again"))
            assert checkpoint.identity(place, digest.Digests(str(tmp_path / "digests"), 1)) == read

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_containers_of_one_image_share(self, engines: Engines, first: Path, tmp_path: Path) -> None:
        """Each has an overlay of its own over one lower directory, that no other one sees."""
        with overlay(first, tmp_path) as place:
            seen = os.stat(place / WEIGHTS).st_dev
            engines.load(place)
        with overlay(fine_tune_of(first, [-1]), tmp_path) as place:
            assert not engines.attaches(place)
        with overlay(first, tmp_path, "busy"), overlay(first, tmp_path) as place:
            assert os.stat(place / WEIGHTS).st_dev != seen
            assert engines.attaches(place)

    def test_times_that_nobody_had_prove_nothing(self, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image that was made with one time for all may be of any file system."""
        seen = os.stat

        def fixed(path: Any, **options: Any) -> Any:
            status = seen(path, **options)
            times = {"st_mtime_ns": 1_700_000_000 * 10**9, "st_ctime_ns": 1_700_000_000 * 10**9}
            return SimpleNamespace(**{n: getattr(status, n) for n in dir(status) if n.startswith("st_")} | times)

        monkeypatch.setattr(files.os, "stat", fixed)
        assert files.look(first / WEIGHTS).lasts is files.Lasts.NOT

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_where_mounts_have_no_numbers_a_look_lasts_for_a_load(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Linux before 6.8: each engine reads its files once, and not again when it has loaded them."""
        monkeypatch.setattr(files, "_mount", lambda path: None)
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        (tmp_path / "digests").mkdir()
        nobody: Any = None
        with overlay(first, tmp_path) as place:
            mine = digest.Digests(str(tmp_path / "digests"), 1)
            content = checkpoint.identity(place, mine)
            assert os.listdir(tmp_path / "digests") in ([], ["lock"])
            monkeypatch.setattr(files, "_engine", lambda: "1-2")
            assert files.look(place / WEIGHTS).lasts is files.Lasts.ENGINE, "its other ranks need not read, too"
            monkeypatch.setattr(files, "_engine", lambda: None)
            load = decisions.Load(nobody, nobody, nobody, nobody, nobody, decisions.Found(place, content, (), mine))
            reads = []
            read = digest.whole_digest_of
            monkeypatch.setattr(digest, "whole_digest_of", lambda path: reads.append(path.name) or read(path))
            load.check_unchanged()
            assert reads == []
            flip(place / WEIGHTS, [-1])
            with pytest.raises(NotShareableError, match=rf"{WEIGHTS} .* changed while it was loaded"):
                load.check_unchanged()
            assert reads == [WEIGHTS]

    def test_digests_do_not_grow_without_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest go."""
        monkeypatch.setattr(digest, "_MOST_KEPT", 4)
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        kept = tmp_path / "digests"
        kept.mkdir()
        digests = digest.Digests(str(kept), 1)
        for number in range(20):
            (tmp_path / f"{number}").write_text(str(number))
            path = tmp_path / f"{number}"
            digests.of(digest.File(path, files.file_identity(path)))
            assert len(os.listdir(kept)) <= 4
        again = digest.Digests(str(kept), 1)
        assert again.known(files.file_identity(tmp_path / "19"))
        assert not again.known(files.file_identity(tmp_path / "0"))


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop,ro", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def overlay(lower: Path, beside: Path, name: str = "root") -> Iterator[Path]:
    """The directory `lower` as a container has it."""
    upper, work, place = (beside / f"{name}-{part}" for part in ("upper", "work", "place"))
    for path in (upper, work, place):
        path.mkdir(exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


# ---- drafts of speculative decoding


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama-eagle", path, tiny=True)
    return path


def eagle(model: Path, **options: Any) -> Any:
    speculative = {"method": "eagle", "model": f"{model}-draft", "num_speculative_tokens": 2}
    return config(model, speculative_config=speculative, **options)


def test_a_draft_is_an_entry_of_its_own_that_counts_as_soon_as_somebody_has_it(engines: Engines, drafted: Path) -> None:
    first, second, third = (eagle(drafted) for _ in range(3))
    target = decide.decide(first, first.model_config, engines.settings)
    assert isinstance(target, decisions.Load)
    publish(target)
    status = session.current()._connections["cpu"].status
    size = status().entries[0].size_bytes
    assert decide.external_bytes(second, engines.settings) == size, "nobody has the draft, and nobody is elected for it"
    assert [entry.key.role for entry in status().entries] == ["target"]

    loader = decide.decide(first, drafts.draft_config(first), engines.settings)
    assert isinstance(loader, decisions.Load)
    assert (loader.key.role, loader.key.rank, loader.key.model) == ("draft", "single", f"{drafted}-draft")
    assert loader.key.is_draft_of(target.key)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(decide.external_bytes(third, engines.settings)))
    asking.start()  # and waits for the loader
    publish(loader)
    asking.join(20)
    assert found == [2 * size]
    for engine, announced in ((second, False), (third, True)):
        bound = decide.decide(engine, drafts.draft_config(engine), engines.settings)
        assert isinstance(bound, decisions.Attach)
        assert bound.announced is announced
        assert abs(bound.attachment.held.published.ready_unix_s - time.time()) < 60
        bound.close()
        decide.decide(engine, engine.model_config, engines.settings).close()  # type: ignore[union-attr]
    loader.close()
    target.close()


def test_what_is_held_takes_one_question(engines: Engines, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status, which lists every entry with its files, is asked for only if the entry is not there."""
    engines.load(tiny)
    asked: list[str] = []

    def counted(name: str) -> None:
        inner = getattr(CompanionConnection, name)
        monkeypatch.setattr(CompanionConnection, name, lambda *a, **k: (asked.append(name), inner(*a, **k))[1])

    for name in ("status", "attach", "check_protocol"):
        counted(name)
    bound = engines.decide(tiny, kv_cache_memory_bytes=1 << 20)  # or the room for it would be asked about
    assert isinstance(bound, decisions.Attach)
    assert asked == ["attach"]


@pytest.mark.parametrize("how", ["killed", "stopped", "told to end"])
def test_a_companion_that_goes_away_is_followed_by_one_that_answers(
    engines: Engines, place: Place, tiny: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """For a moment the system accepts connections to the one that is gone, or going."""
    ask, gone = decide._Question.ask, []

    def end_first(self: Any, *args: Any, **options: Any) -> Any:
        if not gone:
            gone.append(place.companion_pid())
            if how == "stopped":
                self.connection.shutdown()
            else:
                os.kill(gone[0], signal.SIGKILL if how == "killed" else signal.SIGTERM)
            raise CompanionUnavailableError("it is gone")
        return ask(self, *args, **options)

    monkeypatch.setattr(decide._Question, "ask", end_first)
    engines.load(tiny)
    assert place.companion_pid() != gone[0]


def draft_key_of(model: Path, **options: Any) -> EntryKey:
    made = eagle(model, **options)
    draft = drafts.draft_config(made)
    fields = key.draft_fields(made, draft)
    return key.compute_draft(fields, draft, key_of(model, **options), "auto", Path(f"{model}-draft"), {})


@pytest.mark.parametrize(
    ("field", "options"),
    [("target.hf.rms_norm_eps", {"hf_overrides": {"rms_norm_eps": 0.5}}), ("model.dtype", {"dtype": "bfloat16"})],
)
def test_what_changes_the_target_or_the_draft_changes_the_drafts_key(
    drafted: Path, field: str, options: dict[str, Any]
) -> None:
    plain, other = draft_key_of(drafted), draft_key_of(drafted, **options)
    assert plain.id == draft_key_of(drafted, max_num_seqs=2).id
    assert field in {line.split(" is ")[0] for line in other.differences(plain)}
    assert not other.is_draft_of(key_of(drafted))
    assert plain.is_draft_of(key_of(drafted))


def test_a_draft_is_shared_with_its_target_or_not_at_all(engines: Engines, drafted: Path) -> None:
    made = eagle(drafted)
    draft = drafts.draft_config(made)
    alone = decide.decide(made, draft, engines.settings)
    session.current().forget(draft)
    assert isinstance(alone, decisions.Alone)
    assert "together with its target" in alone.reason
    with pytest.raises(NotShareableError, match="together with its target"):
        decide.decide(made, draft, replace(engines.settings, fallback=False))
    draft_alike = replace_parallel(made)
    assert decide.settings_for(draft_alike, engines.settings).share == "copy"


def replace_parallel(made: Any) -> Any:
    """As vLLM configures a draft with parallel settings of its own, in an engine with EPLB."""
    made.parallel_config.enable_eplb = True
    assert made.speculative_config.target_parallel_config is made.parallel_config
    made.parallel_config = made.speculative_config.draft_parallel_config
    assert not made.parallel_config.enable_eplb
    return made


def test_an_engine_that_guesses_by_ngrams_has_no_draft(tiny: Path, engines: Engines) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    made = config(tiny, speculative_config=ngram)
    assert made.speculative_config.draft_model_config is made.model_config
    assert drafts.draft_config(made) is None
    assert isinstance(engines.decide(tiny, speculative_config=ngram), decisions.Load)


def test_a_model_that_is_its_own_draft_is_found_by_its_role(engines: Engines, tmp_path: Path) -> None:
    model = tmp_path / "mtp"
    models.make("deepseek-v3-mtp", model, tiny=True)
    made = config(model, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    for model_config in (made.model_config, drafts.draft_config(made)):
        loader = decide.decide(made, model_config, engines.settings)
        assert isinstance(loader, decisions.Load)
        publish(loader)
    connection = session.current()._connections["cpu"]
    found = {role: connection.wait_ready(str(model), role=role, timeout_s=5).key for role in ("draft", "target")}
    assert found["draft"].is_draft_of(found["target"])
    assert found["draft"].model == found["target"].model
    assert connection.wait_ready(str(model), timeout_s=5).key == found["target"]
    for model_config in (made.model_config, drafts.draft_config(made)):
        session.current()._decisions[id(model_config)].close()  # type: ignore[union-attr]


def test_who_knew_a_companion_that_was_killed_and_followed_asks_the_next_one(
    engines: Engines, place: Place, first: Path
) -> None:
    engines.load(first)
    place.processes[-1].kill()
    place.processes[-1].wait(5)
    following = threading.Thread(target=place.companion)
    following.start()
    while not is_listening(place.paths):  # a channel that has failed waits before it connects again
        with contextlib.suppress(CompanionError):
            session.current()._connections["cpu"].status()
    following.join(20)
    assert isinstance(engines.decide(first), decisions.Load)


def test_what_a_failed_engine_was_to_load_is_left_to_the_next_in_the_same_process(
    engines: Engines, first: Path
) -> None:
    """An engine may end between its decision and its load: its share of the memory may be too small."""
    made = config(first)
    assert isinstance(decide.decide(made, made.model_config, engines.settings), decisions.Load)
    again = config(first)
    del made
    gc.collect()
    decision = decide.decide(again, again.model_config, replace(engines.settings, wait_timeout_s=5))
    assert isinstance(decision, decisions.Load)
    session.current().forget(again.model_config)
    decision.close()


def test_speculation_changes_the_key_of_a_hybrid(tiny: Path, tmp_path: Path) -> None:
    """Gated delta nets keep the number of tokens as an attribute, which parity compares."""
    models.make("hybrid", tmp_path / "hybrid", tiny=True)
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    assert key_of(tiny).id == key_of(tiny, speculative_config=guess).id
    changed = key_of(tmp_path / "hybrid", speculative_config=guess).differences(key_of(tmp_path / "hybrid"))
    assert changed == ["speculative.num_speculative_tokens is 'absent' there and '3' here"]
