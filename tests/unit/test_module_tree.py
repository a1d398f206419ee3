"""Capture, pack, restore: a model built on meta becomes the published one, or is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.left import none_left_open
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.process import collector_paused
from vllm_companion_plugin.errors import ArenaError, CompanionError, ManifestError, NotShareableError, ParityError
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of, without_storage
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.hidden import Known, hidden_tensors, storage_bytes
from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy, meta_parameters
from vllm_companion_plugin.wire.manifest import manifest_from_bytes, manifest_to_bytes

pytestmark = pytest.mark.core

CPU = torch.device("cpu")


class Kernel:
    """A helper object that holds a reference to a parameter, as kernels do."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.tile = 16


class Slotted:
    """What vLLM's methods make: something behind a slot."""

    __slots__ = ("__weakref__", "run")

    def __init__(self, run: Any) -> None:
        self.run = run


def in_c(tensor: torch.Tensor) -> Any:
    """An object written in C that holds a tensor: nothing in Python leads to it."""
    return itertools.repeat(tensor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.tied = nn.Linear(8, 6)
        self.tied.weight = self.first.weight
        self.integers = nn.Parameter(torch.arange(6), requires_grad=False)
        self.integers.output_dim = 0
        self.register_buffer("cache", torch.linspace(0, 1, 5), persistent=False)
        self.parts = [torch.ones(3), {"x": torch.zeros(2)}]
        self.kernel = Kernel(self.first.weight)
        self.transposed = nn.Parameter(torch.randn(4, 3).t(), requires_grad=False)
        self.scale = 0.5
        self.mode = "fast"


def published(
    *, rebind: bool = True, change: Callable[[Model], object] = lambda m: None
) -> tuple[Model, Manifest, arenas.Arena]:
    torch.manual_seed(0)
    model = Model()
    change(model)
    packed = pack.prepare(capture(model), Stage.UNPROCESSED, arenas.MEMFD, CPU)
    arena = pack.copy(packed, arenas.MEMFD, CPU, rebind=rebind, release=lambda: None)
    return model, manifest_from_bytes(manifest_to_bytes(packed.manifest)), arena


def restored(
    manifest: Manifest, arena: arenas.Arena, *, copy: bool = False, change: Callable[[Model], object] = lambda m: None
) -> Model:
    with torch.device("meta"):
        model = Model()
    change(model)
    restorer = Restorer(model, Source(manifest, ArenaViews(arena, arena.info.size_bytes, CPU), CPU, copy=copy), CPU)
    restorer.bind_early(lambda module: Strategy.HIDE)
    restorer.finish()
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    tree = capture(model)
    return {tree.describe(slot): slot.tensor.detach().clone() for slot in tree.slots()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_arena(tensor: torch.Tensor, arena: arenas.Arena) -> bool:
    return arena.address <= tensor.data_ptr() < arena.address + arena.info.size_bytes


def test_packing_changes_no_value_and_rebinds_parameters() -> None:
    torch.manual_seed(0)
    before = values(Model())
    model, _, arena = published()
    assert equal(values(model), before)
    assert all(in_arena(parameter, arena) for parameter in model.parameters())
    assert not in_arena(model.cache, arena)


def test_a_restored_model_equals_the_published_one_and_shares_its_memory() -> None:
    model, manifest, arena = published()
    other = restored(manifest, arena)
    pairs = zip(capture(model).slots(), capture(other).slots(), strict=True)
    for here, there in pairs:
        assert (here.name, here.kind) == (there.name, there.kind)
        assert torch.equal(here.tensor, there.tensor)
        assert here.tensor.stride() == there.tensor.stride()
    assert other.tied.weight is other.first.weight is other.kernel.weight
    assert other.first.weight.data_ptr() == model.first.weight.data_ptr()
    assert other.cache.data_ptr() != model.cache.data_ptr()
    assert other.integers.output_dim == 0
    other.cache.fill_(7)  # private: may be written
    assert model.cache[0] == 0


def test_a_tensor_at_an_odd_address_is_not_shared() -> None:
    odd = torch.frombuffer(bytearray(64), dtype=torch.float32, count=4, offset=1)
    with pytest.raises(NotShareableError, match="float32 begins at an odd address"):
        published(change=lambda model: model.register_parameter("odd", nn.Parameter(odd)))


@pytest.mark.parametrize("name", ["float3", "nn"])
def test_a_name_that_is_no_dtype_of_this_torch_is_said(name: str) -> None:
    with pytest.raises(ManifestError, match=f"has no dtype '{name}'"):
        dtype_of(name)


def test_the_largest_tensors_are_packed_first() -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in (3, 5000, 1, 90000, 700))
    packed = pack.prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU)
    sizes = [storage.size_bytes for storage in packed.manifest.storages]
    assert sizes == sorted(sizes, reverse=True)
    offsets = [storage.offset_bytes for storage in packed.manifest.storages]
    assert offsets == sorted(offsets)


def test_a_copy_shares_nothing() -> None:
    _, manifest, arena = published()
    other = restored(manifest, arena, copy=True)
    assert not any(in_arena(slot.tensor, arena) for slot in capture(other).slots())
    assert other.tied.weight is other.first.weight


def test_measured_floats_are_restored_by_value() -> None:
    _, manifest, arena = published()
    assert restored(manifest, arena, change=lambda m: setattr(m, "scale", 0.9)).scale == 0.5


@pytest.mark.parametrize("value", [{}, [], True, None, 7, "seven", 0.25], ids=repr)
def test_plain_values_that_loading_leaves_behind_are_set(value: object) -> None:
    _, manifest, arena = published(change=lambda m: setattr(m, "loaded", value))
    other = restored(manifest, arena)
    assert other.loaded == value
    assert type(other.loaded) is type(value)


@pytest.mark.parametrize("value", [Kernel(torch.ones(1)), lambda: 0, threading.Lock()])
def test_what_cannot_be_described_and_is_missing_is_refused(value: object) -> None:
    _, manifest, arena = published(change=lambda m: setattr(m, "loaded", value))
    with pytest.raises(ParityError, match="loaded"):
        restored(manifest, arena)


class Deep:
    """A tensor behind slots and partials, deeper than attributes are noted."""

    __slots__ = ("inner",)

    def __init__(self, value: float, depth: int = 6) -> None:
        leaf = torch.full((3,), value)
        self.inner = Deep(value, depth - 1) if depth else functools.partial(torch.add, leaf, other=[leaf])


def test_tensors_are_found_however_deep_they_are() -> None:
    _, manifest, arena = published(change=lambda m: setattr(m, "deep", [{"x": Deep(5.0)}]))
    other = restored(manifest, arena, change=lambda m: setattr(m, "deep", [{"x": Deep(0.0)}]))
    inner = other.deep[0]["x"]
    while isinstance(inner, Deep):
        inner = inner.inner
    assert inner.args[0].tolist() == [5.0, 5.0, 5.0]
    assert inner.keywords["other"][0] is inner.args[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "kernel", Slotted(m.first.weight)), "kernel"),
        (lambda m: setattr(m, "mode", Kernel), "mode"),
        (lambda m: setattr(m, "extra", [torch.zeros(1)]), "extra"),
        (lambda m: setattr(m, "first", nn.Linear(8, 7)), "first"),
        (lambda m: setattr(m.tied, "weight", nn.Parameter(torch.empty(6, 8, device="meta"))), "tied"),
        (lambda m: setattr(m, "integers", nn.Parameter(torch.arange(7), requires_grad=False)), "integers"),
        (lambda m: m.add_module("more", nn.Linear(1, 1)), "more|modules"),
    ],
)
def test_a_difference_that_matters_is_refused_and_named(change: Callable[[Model], object], named: str) -> None:
    _, manifest, arena = published()
    manifest = dataclasses.replace(manifest, is_observed=True)  # loading changed nothing
    with pytest.raises(ParityError, match=named):
        restored(manifest, arena, change=change)


def test_hidden_parameters_are_meta_and_come_back() -> None:
    model, _, _ = published()
    weight = model.first.weight
    with meta_parameters(model.first):
        assert model.first.weight.is_meta
    assert model.first.weight is weight


def test_a_replayed_module_is_processed_on_benign_values_and_then_bound() -> None:
    model, manifest, arena = published()
    with torch.device("meta"):
        other = Model()
    restorer = Restorer(other, Source(manifest, ArenaViews(arena, arena.info.size_bytes, CPU), CPU, copy=False), CPU)
    restorer.bind_early(lambda m: Strategy.REPLAY if m is other.first else Strategy.HIDE)
    with restorer.replaying(other.first):
        assert torch.equal(other.first.bias, torch.ones(6))
    restorer.finish()
    assert other.first.bias.data_ptr() == model.first.bias.data_ptr()


def test_a_model_on_meta_cannot_be_packed() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(NotShareableError, match="no data"):
        pack.prepare(capture(model), Stage.UNPROCESSED, arenas.MEMFD, CPU)


def test_a_failure_in_the_middle_gives_the_model_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model()
    before = values(model)
    packed = pack.prepare(capture(model), Stage.UNPROCESSED, arenas.MEMFD, CPU)

    def no_memory(self: object) -> None:
        raise ArenaError("no memory")

    monkeypatch.setattr("vllm_companion_plugin.memory.kinds.memfd.MemfdWriter.seal", no_memory)
    with pytest.raises(CompanionError):
        pack.copy(packed, arenas.MEMFD, CPU, rebind=True, release=lambda: None)
    assert equal(values(model), before)


def test_a_tensor_that_capture_cannot_see_is_named_with_what_holds_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert hidden_tensors(model, Known.of(capture(model)), "cpu") == []
    secret = torch.ones(3, dtype=torch.float64)
    model[1].kernel = Slotted(in_c(secret))
    assert hidden_tensors(model, Known.of(capture(model)), "meta") == []
    (line,) = hidden_tensors(model, Known.of(capture(model)), "cpu")
    assert line.startswith("(3,) float64 in ")
    assert "itertools.repeat of tests.unit.test_module_tree.Slotted of torch.nn.modules.linear.Linear" in line


def test_what_capture_sees_is_not_hidden() -> None:
    model = nn.Linear(2, 2)
    model.kernel = Slotted(functools.partial(torch.add, torch.ones(3)))
    model.part = model.weight[0]
    tree = capture(model)
    assert hidden_tensors(model, Known.of(tree), "cpu") == []
    assert storage_bytes(tree, "cpu") == 16 + 8 + 12


def test_what_is_reached_in_another_model_of_the_engine_is_not_hidden() -> None:
    target, model = nn.Linear(2, 2), nn.Linear(2, 2)
    model.config = Slotted(in_c(target))  # type: ignore[arg-type]
    assert len(hidden_tensors(model, Known.of(capture(model)), "cpu")) == 2
    assert hidden_tensors(model, Known.of(capture(model), capture(target)), "cpu") == []


def test_what_is_bound_to_other_memory_during_the_search_is_not_hidden() -> None:
    model = nn.Linear(2, 2)
    view = model.weight[0]
    model.kernel = Slotted(in_c(view))
    known = Known.of(capture(model))
    model.weight.data = model.weight.data.clone()
    assert hidden_tensors(model, known, "cpu") == []
    assert len(hidden_tensors(model, Known.of(capture(model)), "cpu")) == 1


def test_an_attribute_of_an_empty_dictionary_is_searched() -> None:
    model = nn.Linear(2, 2)
    model.nothing = OrderedDict()
    known = Known.of(capture(model))
    model.hooks = OrderedDict()
    model.hooks.secret = torch.ones(3)
    assert len(hidden_tensors(model, known, "cpu")) == 1


def test_what_refuses_before_rebinding_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    before = [parameter.data_ptr() for parameter in model.parameters()]

    def refuse() -> None:
        raise NotShareableError("hidden")

    packed = pack.prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU)
    with none_left_open(), pytest.raises(NotShareableError, match="hidden"):
        pack.copy(packed, arenas.MEMFD, CPU, rebind=True, release=lambda: None, before_rebinding=refuse)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize(("offset", "size"), [(-10, 5), (90, 20), (200, 1)])
def test_a_view_beyond_its_arena_is_refused(offset: int, size: int) -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    arena: Any = types.SimpleNamespace(address=memory.data_ptr())
    with pytest.raises(ManifestError, match="of 100"):
        ArenaViews(arena, 100, CPU).bytes_at(offset, size)


GLOBAL = torch.ones(7)


def test_the_globals_of_a_program_are_no_part_of_a_model() -> None:
    model = nn.Linear(2, 2)
    model.function = lambda: GLOBAL
    assert hidden_tensors(model, Known.of(capture(model)), "cpu") == []


class Processed(nn.Module):
    """A layer whose processing leaves `run`, made from its weight, where `capture` does not look."""

    def __init__(self, run: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), 5.0), requires_grad=False)
        self.make = run

    def process(self) -> None:
        self.weight = nn.Parameter(self.weight * 2, requires_grad=False)
        self.run = self.make(self.weight)


def replayed(make: Callable[[nn.Parameter], Any]) -> Processed:
    model = Processed(make)
    model.process()
    packed = pack.prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU)
    arena = pack.copy(packed, arenas.MEMFD, CPU, rebind=True, release=lambda: None)
    with torch.device("meta"):
        other = Processed(make)
    restorer = Restorer(
        other, Source(packed.manifest, ArenaViews(arena, arena.info.size_bytes, CPU), CPU, copy=False), CPU
    )
    restorer.bind_early(lambda m: Strategy.REPLAY)
    with restorer.replaying(other):
        other.process()
    restorer.finish()
    return other


def over_a_view(weight: nn.Parameter) -> Any:
    view = weight.data.t()
    return lambda x: x @ view


@pytest.mark.parametrize("make", [lambda weight: in_c(weight.data.t()), lambda weight: Slotted(in_c(weight.data.t()))])
def test_a_view_of_a_weight_that_nothing_in_python_leads_to_is_refused_and_named(
    make: Callable[[nn.Parameter], Any],
) -> None:
    """It would be a view of what the replay computed: neither the account of memory nor parity tells."""
    with pytest.raises(NotShareableError, match=r"1 views of weights .* \(3, 2\) float32 in .*repeat.*Processed"):
        replayed(make)


CACHE: dict[str, Any] = {}


def in_a_cycle(weight: nn.Parameter) -> None:
    cycle = [weight.data.t()]
    cycle.append(cycle)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: lambda x: x @ weight.t(),
        over_a_view,
        lambda weight: functools.partial(torch.mul, weight.data.t()),
        in_a_cycle,
        lambda weight: CACHE.update(last=weight.data.t()),
    ],
    ids=["the weight itself", "captured", "found", "garbage", "elsewhere"],
)
def test_views_that_are_restored_or_not_the_models_are_no_reason_to_refuse(
    make: Callable[[nn.Parameter], Any],
) -> None:
    with collector_paused():
        model = replayed(make)
    assert model.weight.tolist() == [[10.0] * 3] * 2
    if isinstance(model.run, functools.partial):
        assert model.run.args[0].tolist() == [[10.0] * 2] * 3
    elif model.run:
        assert model.run(torch.eye(3)).tolist() == [[10.0] * 2] * 3


def overwritten(manifest: Manifest, arena: arenas.Arena, write: Callable[[Model], object], copy: bool = False) -> Model:
    """A model restored although its processing wrote to what was bound before."""
    with torch.device("meta"):
        other = Model()
    restorer = Restorer(other, Source(manifest, ArenaViews(arena, arena.info.size_bytes, CPU), CPU, copy=copy), CPU)
    restorer.bind_early(lambda m: Strategy.REPLAY if m is other.first else Strategy.HIDE)
    with restorer.replaying(other.first):
        write(other)
    restorer.finish()
    return other


def in_place(model: Model) -> None:
    model.cache.fill_(7)


def behind_the_back_of_autograd(model: Model) -> None:
    model.cache.data.fill_(7)
    ctypes.memset(model.cache.data_ptr(), 0, 4)


def by_new_memory(model: Model) -> None:
    model.cache.data = torch.full((5,), 7.0)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("write", [in_place, behind_the_back_of_autograd, by_new_memory])
def test_what_processing_writes_on_a_guess_is_undone(write: Callable[[Model], object], copy: bool) -> None:
    """KV cache scales are written so: into a buffer, from a scale that is 1.0 in a replay."""
    model, manifest, arena = published()
    other = overwritten(manifest, arena, write, copy)
    assert torch.equal(other.cache, model.cache)
    assert other.cache.data_ptr() != model.cache.data_ptr()
    assert equal(values(other), values(model))


def test_objects_that_cannot_be_looked_into_do_not_stop_the_search() -> None:
    model = nn.Linear(2, 2)
    gone = Slotted(None)
    proxy = weakref.proxy(gone)
    sparse = torch.eye(3).to_sparse()
    model.function = itertools.cycle([proxy, sparse])
    del gone
    (line,) = hidden_tensors(model, Known.of(capture(model)), "cpu")
    assert line.startswith("(3, 3) float32 in ")


def test_a_tensor_without_elements_is_on_the_device_of_the_model() -> None:
    def change(model: Model) -> None:
        model.indices = nn.Parameter(torch.empty((8, 0), dtype=torch.int32), requires_grad=False)

    _, manifest, arena = published(change=change)
    (info,) = [info for info in manifest.tensors if info.shape == (8, 0)]
    assert without_storage(info, torch.device("meta")).is_meta  # which stands for another device
    assert not without_storage(dataclasses.replace(info, inline=b""), torch.device("meta")).is_meta
    assert restored(manifest, arena, change=change).indices.shape == (8, 0)
