"""Decisions of the engine's side that need no engine."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from tests.unit import test_mapping
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.lease import Ready
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.status import Published
from vllm_companion_plugin.engine import decide, decisions, draft, session
from vllm_companion_plugin.engine.attach import process_privately
from vllm_companion_plugin.engine.identity import checkpoint
from vllm_companion_plugin.engine.publish import _Publisher
from vllm_companion_plugin.engine.run import processed
from vllm_companion_plugin.engine.vllm import budget, building, devices, flags, processing, sharing, sources
from vllm_companion_plugin.errors import ManifestError, NotShareableError, UpdateError
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths, ensure_private_directory
from vllm_companion_plugin.memory.tensors.views import dtype_of
from vllm_companion_plugin.settings import resolve, resolve_extra_config
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.observe import Observation
from vllm_companion_plugin.tree.pack import prepare
from vllm_companion_plugin.wire.handover import Channel
from vllm_companion_plugin.wire.manifest import manifest_to_bytes

pytestmark = pytest.mark.core


def test_what_changed_on_disk_while_it_was_loaded_is_not_published(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_text("before")
    nobody: Any = None
    load = decisions.Load(
        nobody, nobody, nobody, nobody, nobody, decisions.Found(tmp_path, checkpoint.identity(tmp_path))
    )
    load.check_unchanged()
    weights.write_text("after!")
    with pytest.raises(NotShareableError, match=r"model.safetensors of .* changed while it was loaded"):
        load.check_unchanged()


@pytest.mark.parametrize("load_format", ["auto", "companion"])
@pytest.mark.parametrize("source", ["auto", "dummy"])
def test_the_reference_of_verify_reads_what_the_companion_would_without_its_settings(
    load_format: str, source: str, tmp_path: Path
) -> None:
    """Its model is a directory: a hub is asked for names."""
    extra = {"share": "copy", "source_format": source}
    args = EngineArgs(model=str(tmp_path), load_format=load_format, model_loader_extra_config=extra)
    reference = flags.without_companion(args)
    assert (reference.load_format, reference.model_loader_extra_config) == (source, {})


@pytest.mark.parametrize("moe_layers", [True, False])
def test_what_an_engine_has_registered_comes_back(moe_layers: bool) -> None:
    """Not every vLLM keeps a list of MoE layers."""
    compilation = SimpleNamespace(static_forward_context={"a": 1})
    if moe_layers:
        compilation.static_all_moe_layers = ["a"]
    held = compilation.static_forward_context
    registered = building._Registered(SimpleNamespace(compilation_config=compilation))
    registered.clear()
    assert held == {}
    held["b"] = 2
    registered.restore()
    assert compilation.static_forward_context is held
    assert held == {"a": 1}
    assert getattr(compilation, "static_all_moe_layers", ["a"]) == ["a"]


@pytest.mark.parametrize("switch", ["enable_eplb", "enable_elastic_ep"])
def test_an_engine_that_writes_to_its_weights_owns_them(switch: str) -> None:
    settings = resolve()
    plain = SimpleNamespace(
        parallel_config=SimpleNamespace(enable_eplb=False, enable_elastic_ep=False), speculative_config=None
    )
    assert decide.settings_for(plain, settings) is settings
    setattr(plain.parallel_config, switch, True)
    assert decide.settings_for(plain, settings) == replace(settings, share="copy")
    assert decide.external_bytes(plain, settings) == 0


def test_online_loading_is_ended_as_loading_would_have_ended_it() -> None:
    """Reaches into vLLM's reloading, which no engine on CPU does."""
    layer = nn.Linear(2, 2)
    loader = default_weight_loader
    layer.weight.weight_loader = loader  # type: ignore[assignment]
    layerwise.record_metadata_for_reloading(layer)
    layerwise.initialize_online_processing(layer)
    assert layer.weight.weight_loader is not loader
    processing.end_online_loading(layer)
    assert layer.weight.weight_loader is loader
    assert not layerwise.LAYERWISE_INFO[layer].can_load()
    processing.end_online_loading(nn.Linear(2, 2))  # one that vLLM never saw


@pytest.mark.skipif(not current_platform.is_cpu(), reason="what CPU kernels want")
def test_convolutions_are_processed_as_in_a_normal_load() -> None:
    """Their kernels take packed weights alone, on CPUs that have such kernels."""

    def convolution() -> nn.Module:
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layer.quant_method = UnquantizedLinearMethod()
        return layer

    weight = torch.randn(64, 1, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    normal, private = convolution(), convolution()
    shared = private.weight.data
    normal.quant_method.process_weights_after_loading(normal)
    with process_privately(private, resolve_extra_config({})):
        private.quant_method.process_weights_after_loading(private)
    assert torch.equal(private.weight, normal.weight)
    assert vars(private).keys() == vars(normal).keys()
    assert torch.equal(shared, weight)


class Doubled(QuantizeMethodBase):
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """It has them already."""

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data.mul_(2)


class Increased(nn.Module):
    """Processed by its method, and by code of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.quant_method = Doubled()
        self.rows = self.weight.data[:2]

    def process_weights_after_loading(self) -> None:
        self.weight.data.add_(1)


def test_what_is_processed_twice_is_made_private_once() -> None:
    """With all that views it."""
    shared = torch.ones(4, 3)
    model = Increased(shared)
    with process_privately(model, resolve_extra_config({})) as processed:
        model.quant_method.process_weights_after_loading(model)
        model.process_weights_after_loading()
    assert model.weight.tolist() == [[3.0] * 3] * 4
    assert model.rows.tolist() == [[3.0] * 3] * 2
    assert shared.tolist() == [[1.0] * 3] * 4
    assert processed.sizes == [shared.nbytes]


@pytest.mark.parametrize("is_tied", [True, False], ids=["parameter", "storage"])
def test_what_two_modules_share_is_made_private_once(is_tied: bool) -> None:
    """They go on sharing it."""
    shared = torch.ones(4, 3)
    model = nn.ModuleList([Increased(shared), Increased(shared)])
    if is_tied:
        model[1].weight = model[0].weight
    with process_privately(model, resolve_extra_config({})) as processed:
        for module in model:
            module.quant_method.process_weights_after_loading(module)
    assert [module.weight[0, 0].item() for module in model] == [4.0, 4.0]
    assert [module.rows[0, 0].item() for module in model] == [4.0, 4.0]
    assert shared.tolist() == [[1.0] * 3] * 4
    assert processed.sizes == [shared.nbytes]


class Adopting(Doubled):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = layer.part.weight


@pytest.mark.parametrize("is_known", [True, False])
def test_what_a_method_takes_from_another_module_is_made_private(is_known: bool) -> None:
    """Before the module's own code writes to it. What the method makes is the engine's own."""
    shared = torch.ones(4, 3)
    model = Increased(torch.zeros(4, 3))
    model.part = nn.Linear(3, 4, bias=False)
    model.part.weight = nn.Parameter(shared, requires_grad=False)
    model.quant_method = Adopting()
    published = [shared.untyped_storage().data_ptr()] if is_known else []
    with process_privately(model, resolve_extra_config({}), published):
        model.quant_method.process_weights_after_loading(model)
        model.process_weights_after_loading()
    assert model.weight.tolist() == [[2.0] * 3] * 4
    assert shared.tolist() == [[1.0] * 3] * 4


def test_the_cache_of_rope_modules_is_vllms_own() -> None:
    assert building._rope_cache() is rotary_embedding._ROPE_DICT


def test_what_the_disk_says_while_deciding_is_a_reason_to_load_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/models/m")

    monkeypatch.setattr(decide, "_decide", unreadable)
    model, config = nn.Module(), SimpleNamespace(speculative_config=None)
    decision = decide.decide(config, model, resolve())
    session.current().forget(model)
    assert isinstance(decision, decisions.Alone)
    assert "/models/m" in decision.reason
    with pytest.raises(PermissionError):
        decide.decide(config, model, replace(resolve(), fallback=False))


def test_what_this_engine_cannot_use_is_refused_before_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(stage=Stage.PROCESSED, id="cpu", torch_device=torch.device("cpu"))

    def open_(published: Manifest) -> None:
        # Asking for descriptors would fail otherwise: nobody listens there.
        data, arena = manifest_to_bytes(published), ArenaInfo("memfd", (384,))
        ready = Ready(test_mapping.KEY, 1, arena, data, Published(0), "/nonexistent", b"t" * 16)
        Attachment.open(device.id, device.torch_device, None, ready, stage=device.stage)  # type: ignore[arg-type]

    with pytest.raises(ManifestError, match="published unprocessed; cpu needs processed"):
        open_(replace(test_mapping.manifest(), stage=Stage.UNPROCESSED))
    monkeypatch.delattr(torch, "bfloat16")
    dtype_of.cache_clear()  # of a torch that has it
    with pytest.raises(ManifestError, match="has no dtype 'bfloat16'"):
        open_(test_mapping.manifest())


def test_an_engine_whose_weights_are_replaced_while_it_serves_owns_them() -> None:
    plain = SimpleNamespace(parallel_config=SimpleNamespace(), speculative_config=None)
    assert sharing.must_own_reason(plain) is None
    plain.weight_transfer_config = SimpleNamespace(backend="nccl")
    assert decide.settings_for(plain, resolve()).share == "copy"
    plain.weight_transfer_config.backend = "companion"  # which maps new weights
    assert decide.settings_for(plain, resolve()).share != "copy"


def test_formats_that_all_ranks_read_together_are_not_used_by_several() -> None:
    for ranks, used in ((1, "fastsafetensors"), (2, "auto")):
        config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=ranks))
        assert sources.source_format("fastsafetensors", config) == used
        assert sources.source_format("runai_streamer", config) == "runai_streamer"


def test_weights_of_another_checkpoint_are_named() -> None:
    def source(name: str) -> Any:
        return DefaultModelLoader.Source(name, None)

    config = SimpleNamespace(model="org/m", model_weights="")
    model = nn.Module()
    assert sources.other_checkpoints(model, config) == []
    model.secondary_weights = [source("org/m"), source("org/tower")]
    assert sources.other_checkpoints(model, config) == ["org/tower"]


@pytest.mark.parametrize(("resident_since", "left"), [(5.0, 70), (10.0, 70), (15.0, 100)])
def test_weights_count_once_in_the_memory_budget(resident_since: float, left: int) -> None:
    """Those that came after the worker had measured its memory are in what it measures next."""

    class Worker:
        requested_memory = 100
        model_runner = None
        init_snapshot = SimpleNamespace(timestamp=10.0)

        def load_model(self) -> None:
            budget.adjust_budget(-30, resident_since)

    worker = Worker()
    worker.load_model()
    assert worker.requested_memory == left
    budget.adjust_budget(-30)  # no worker is a caller


class Model(nn.Module):
    """A draft or a target, as far as vLLM replaces its parts."""

    def __init__(self, value: float, vocabulary: int = 4) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.fc = nn.Linear(2, 2)
        self.model.embed_tokens = nn.Embedding(vocabulary, 2)
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].shared_head = nn.Module()
        self.model.layers[0].shared_head.head = nn.Linear(2, vocabulary, bias=False)
        self.lm_head = nn.Linear(2, vocabulary, bias=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


HEADS = ["lm_head", "model.layers.0.shared_head.head"]


@pytest.mark.parametrize(
    ("method", "flags", "value", "left"),
    [
        ("mtp", {}, 2.0, ["model.embed_tokens", *HEADS]),
        ("eagle", {"has_own_embed_tokens": False, "has_own_lm_head": True}, 2.0, ["model.embed_tokens"]),
        ("eagle3", {"has_own_embed_tokens": True, "has_own_lm_head": True}, 2.0, []),
        ("eagle3", {"has_own_embed_tokens": True, "has_own_lm_head": True}, 1.0, ["model.embed_tokens", *HEADS]),
        ("draft_model", {}, 1.0, []),
    ],
)
def test_what_a_draft_has_from_its_target_is_not_published(
    method: str, flags: dict[str, bool], value: float, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method))
    target, loaded, built = Model(1.0), Model(value), Model(0.0)
    vars(loaded).update(flags)
    assert draft.left_to_target(config, loaded, target) == left
    with draft.taken_out(loaded, left):
        manifest = prepare(capture(loaded), Stage.PROCESSED, "memfd", torch.device("cpu")).manifest
    assert {path for path, _ in loaded.named_modules()} == {path for path, _ in built.named_modules()}
    taken = draft.taken_from_target(manifest, config, built, target)
    draft.set_flags(built, manifest)
    draft.put_in(built, taken)
    assert sorted(taken) == sorted(left)
    assert all(
        built.get_submodule(path) is (target.lm_head if path in HEADS else target.model.embed_tokens) for path in left
    )
    assert {name: vars(built)[name] for name in flags} == flags


def test_who_waits_for_the_device_tells_those_who_wait_for_its_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take it for silent and give up, though the load before it gets on."""
    monkeypatch.setenv("COMPANION_RUNTIME_DIR", str(tmp_path / "run"))
    settings = resolve()
    ensure_private_directory(settings.runtime_dir)
    before = LoaderElection(device_paths("cpu", settings)).acquire(1, "another model")
    heard: list[str] = []
    publication: Any = SimpleNamespace(report=lambda progress: heard.append(progress.phase))

    def work() -> None:
        for _ in range(3):
            time.sleep(1.0)
            before.sign_of_life()
        before.release()

    thread = threading.Thread(target=work)
    thread.start()
    wanted = test_mapping.KEY
    decide.elect("cpu", wanted, replace(settings, wait_timeout_s=20.0), publication).release()
    thread.join()
    assert len(set(heard)) >= 3
    assert heard[0] == "waiting for its turn (0 s)"


def test_constants_of_imported_modules_neither_need_a_search_nor_spare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = 0
    monkeypatch.setattr(devices, "requested_bytes", lambda device: asked_for)  # as a GPU's allocator counts
    device = devices.EngineDevice("cpu", torch.device("cpu"), arenas.MEMFD, Stage.PROCESSED)
    decision: Any = SimpleNamespace(device=device, granted=SimpleNamespace(publication=None), checkpoint_bytes=0)
    kept: list[Attachment] = []
    publisher = _Publisher(decision, resolve(), None, None, kept.append)
    module, old, model, secret = ModuleType("new"), torch.ones(1), nn.Linear(2, 2), torch.ones(1)
    with publisher.importing(module):
        module.USED, module.UNUSED = torch.ones(1), torch.ones(1)  # type: ignore[attr-defined]
        asked_for += 8
    with publisher.importing(other := ModuleType("other")):
        other.OLD = old  # type: ignore[attr-defined]
    module.LATER = torch.ones(1)  # type: ignore[attr-defined]
    model.scale, model.run = module.USED, itertools.repeat(secret)
    asked_for += 16 + 8
    assert publisher._search(model, capture(model), [])() == []
    asked_for += secret.nbytes
    (hidden,) = publisher._search(model, capture(model), [])()
    assert hidden.startswith("(1,) float32 in ")


def test_a_module_that_cannot_be_looked_at_is_imported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher notes why."""
    device = devices.EngineDevice("cpu", torch.device("cpu"), arenas.MEMFD, Stage.PROCESSED)
    decision: Any = SimpleNamespace(device=device, granted=SimpleNamespace(publication=None), checkpoint_bytes=0)
    kept: list[Attachment] = []
    publisher = _Publisher(decision, resolve(), None, None, kept.append)
    module = ModuleType("strange")
    with ExitStack() as until:
        publisher.begin(nn.Linear(2, 2), until)
        monkeypatch.setattr(Observation, "note_import", lambda self, module: vars(module)["absent"])
        with publisher.importing(module):
            module.NUMBER = 1  # type: ignore[attr-defined]
    assert str(publisher._reason) == "its loading cannot be watched: KeyError: 'absent'"


def test_a_model_that_cannot_be_watched_is_loaded_all_the_same() -> None:
    """The publisher notes why, and watches nothing."""
    device = devices.EngineDevice("cpu", torch.device("cpu"), arenas.MEMFD, Stage.PROCESSED)
    decision: Any = SimpleNamespace(device=device, granted=SimpleNamespace(publication=None), checkpoint_bytes=0)
    kept: list[Attachment] = []
    publisher = _Publisher(decision, resolve(), None, None, kept.append)
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].add_module("around", model)  # so that a walk would never end
    with ExitStack() as until:
        publisher.begin(model, until)
        publisher.loaded(model)
    publisher.publish(model)
    assert "cannot be watched" in str(publisher._reason)
    assert not kept


def test_code_that_cannot_be_looked_at_is_loaded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is built, what its code holds is noted."""
    device = devices.EngineDevice("cpu", torch.device("cpu"), arenas.MEMFD, Stage.PROCESSED)
    decision: Any = SimpleNamespace(device=device, granted=SimpleNamespace(publication=None), checkpoint_bytes=0)
    kept: list[Attachment] = []

    def values_of(one: Any) -> Any:
        raise KeyError("absent")

    monkeypatch.setattr("vllm_companion_plugin.tree.uses.values_of", values_of)
    monkeypatch.setattr("vllm_companion_plugin.engine.publish._class_of", lambda *_: Alone)
    publisher = _Publisher(decision, resolve(), None, None, kept.append)
    publisher.publish(nn.Linear(1, 1))
    assert "cannot be watched: KeyError: 'absent'" in str(publisher._reason)
    assert not kept


class Alone(nn.Module):
    """A model of this file's code."""


class TestHeadless:
    """A process that is there to write one entry."""

    KEY = EntryKey(
        "ab",
        "my/model",
        fields={"model.dtype": '"torch.bfloat16"', "model.quantization": '"fp8"', "cache.cache_dtype": "null"},
    )

    def test_has_the_flags_that_follow_from_the_key(self, tmp_path: Path) -> None:
        args = flags.parse("update", [str(tmp_path), *processed._flags_of(self.KEY), *processed._SMALL])
        assert (args.dtype, args.quantization, args.kv_cache_dtype) == ("bfloat16", "fp8", "auto")

    def test_tells_of_any_error(self) -> None:
        """However long it is, and whatever it is written in: else the trainer would hear of none."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        there, here = Channel(ours, "the child"), Channel(theirs, "the trainer")
        processed._say_error(there, UpdateError("\u6a21" * 50_000))
        message, _ = here.receive(5)
        assert message["error"] == UpdateError.code
        assert message["text"].startswith("\u6a21" * 5000)
        here.close()
        there.close()

    def test_loads_no_other_entry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says how that would be loaded differently."""
        monkeypatch.setattr(session.current(), "written", self.KEY)
        decide._check_written(self.KEY)
        other = replace(self.KEY, id="cd", fields={**self.KEY.fields, "model.quantization": "null"})
        with pytest.raises(NotShareableError, match=r"model\.quantization is '\"fp8\"' there and 'null' here.*flags"):
            decide._check_written(other)
