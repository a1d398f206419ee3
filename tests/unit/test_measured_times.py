"""What loading measures by a clock and leaves in a model is none of the model's values."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.test_origins import Model, attach, nothing, publish
from vllm_companion_plugin.engine.vllm.clocks import marked_times
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.parity import compare_published
from vllm_companion_plugin.tree.times import Seconds, Ticks


class Config:
    """What a layer refers to, as quantization's."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.count = 0


def build(model: Model, flag: float) -> None:
    model.config = Config()
    model.flag = flag


def spends(model: Model) -> None:
    started = time.perf_counter()
    model.config.spent += time.perf_counter() - started + 1e-9


def counts(model: Model) -> None:
    model.config.count = time.time_ns() // 1000


def stamps(model: Model) -> None:
    model.config.loaded_at = round(time.time(), 3)


CHANGES: list[Callable[[Model], None]] = [spends, counts, stamps]


@pytest.mark.parametrize("phase", ["load", "process"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_is_each_engines_own(change: Callable[[Model], None], phase: str) -> None:
    """An attached model keeps what building gave it, and so a model that was loaded again is the one of before."""
    first, second = publish(build, **{phase: change}), publish(build, **{phase: change})
    assert vars(first.model.config) != vars(second.model.config)
    compare_published(first.manifest, second.manifest)
    compare_published(second.manifest, first.manifest)
    attached = attach(first, build, **({"process": change} if phase == "process" else {}))
    if phase == "load":
        assert vars(attached.config) == vars(Config())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_is_a_plain_number_once_it_is_published(change: Callable[[Model], None]) -> None:
    config = publish(build, load=change).model.config
    assert {type(value) for value in vars(config).values()} <= {int, float}
    assert vars(config) != vars(Config())


def test_what_loading_sets_otherwise_is_the_models() -> None:
    def sets(value: float) -> Callable[[Model], None]:
        def change(model: Model) -> None:
            spends(model)
            model.config.scale = value

        return change

    first, second = publish(build, load=sets(0.5)), publish(build, load=sets(0.25))
    with pytest.raises(ParityError, match=r"loading made config\.scale 0\.5 here and 0\.25 in the published model"):
        compare_published(first.manifest, second.manifest)
    assert attach(first, build).config.scale == 0.5


@pytest.mark.parametrize("kind", [list, tuple, lambda times: dict(enumerate(times))], ids=["list", "tuple", "dict"])
def test_in_a_container_is_a_number_like_the_others(kind: Callable[[list[float]], object]) -> None:
    """What is with it may follow from the weights: engines get all of it, and a model loaded again has to have it."""

    def keeps(model: Model) -> None:
        model.config.kept = kind([0.5, time.time()])

    first, second = publish(build, load=keeps), publish(build, load=keeps)
    assert attach(first, build).config.kept == first.model.config.kept
    with pytest.raises(ParityError, match=r"loading made config\.kept"):
        compare_published(first.manifest, second.manifest)


@pytest.mark.parametrize("name", ["storages", "stage", "files", "modules", "tensors"], ids=lambda name: f"other {name}")
def test_only_the_same_model_takes_the_place_of_another(name: str) -> None:
    manifest = publish(build).manifest
    other: dict[str, Any] = {
        "storages": manifest.storages[:-1],
        "stage": None,
        "files": {"config.json": "0"},
        "modules": manifest.modules[:-1],
        "tensors": (replace(manifest.tensors[0], dtype="float64"), *manifest.tensors[1:]),
    }
    with pytest.raises(ParityError):
        compare_published(manifest, replace(manifest, **{name: other[name]}))


def test_values_of_a_flag_are_each_engines_own() -> None:
    """Engines with other limits have loaded the same model."""
    compare_published(publish(build, flag=1.0).manifest, publish(build, flag=2.0).manifest)


def test_values_of_a_model_that_nobody_watched_are_all_the_models() -> None:
    """Nothing tells whose they are."""
    one, two = (replace(publish(build, flag=flag).manifest, is_observed=False) for flag in (1.0, 2.0))
    compare_published(one, one)
    with pytest.raises(ParityError, match=r"flag is 1\.0 here and another"):
        compare_published(one, two)


def test_arithmetic_of_times_gives_times() -> None:
    with marked_times():
        now, ticks = time.perf_counter(), time.perf_counter_ns()
        found = [now - 1, 1 - now, now * 2, 2.0 + now, now / 3, -now, abs(now), round(now, 2), 0.0 + now, now % 1]
        whole = [ticks - 1, ticks // 1000, 5 + ticks, -ticks, round(now)]
        fractions = [ticks / 1e9, ticks * 0.5]
    assert {type(value) for value in (*found, *fractions)} == {Seconds}
    assert {type(value) for value in whole} == {Ticks}
    assert type(time.perf_counter()) is float
    assert torch.equal(torch.ones(2) * Seconds(2.0), torch.full((2,), 2.0))


def test_other_threads_read_their_clocks_as_ever() -> None:
    types: list[type] = []
    with marked_times():
        thread = threading.Thread(target=lambda: types.append(type(time.time())))
        thread.start()
        thread.join()
    assert types == [float]


def test_a_clock_that_somebody_keeps_gives_plain_numbers_afterwards() -> None:
    """As a module does that is imported while a model is loaded."""
    with marked_times():
        kept = time.time
        assert type(kept()) is Seconds
    assert type(kept()) is float


@pytest.mark.parametrize("reads_weights", [False, True])
def test_a_module_of_several_models_has_been_processed_with_the_first_one(*, reads_weights: bool) -> None:
    """As vLLM's activation functions: one object for each name and process."""
    shared = nn.GELU()

    def with_shared(model: Model, flag: float) -> None:
        model.act = shared

    def as_loaders_do(model: Model) -> None:
        if reads_weights:
            float(model.first.weight.sum())  # so whatever processing changed may follow from it
        model.eval()

    first, second = (publish(with_shared, process=as_loaders_do).manifest for _ in range(2))
    seen = [next(module for module in each.modules if module.path == "act").observed for each in (first, second)]
    assert [each.processed for each in seen] == [("training",), ()]
    compare_published(first, second)
    compare_published(second, first)


@pytest.mark.parametrize(
    ("value", "may"),
    [(0.5, True), (3, True), ([0.5], True), ({"a": (1,)}, True), (b"1", True), (True, False), ("sym", False)],
    ids=repr,
)
def test_what_may_have_been_measured_on_such_a_module_has_to_be_known(*, value: object, may: bool) -> None:
    """An engine that attached to the second one would keep what it measured on weights that it does not have."""
    shared = nn.GELU()

    def with_shared(model: Model, flag: float) -> None:
        model.act = shared

    def sets(model: Model) -> None:
        model.act.scale = value

    first, second = (publish(with_shared, process=sets).manifest for _ in range(2))
    compare_published(first, second)
    measured = tuple(
        replace(each, observed=replace(each.observed, measured=each.path == "act")) for each in first.modules
    )
    refused = pytest.raises(ParityError, match=r"changed other things \(processed\) in act")
    with refused if may else contextlib.nullcontext():
        compare_published(replace(first, modules=measured), second)


def test_what_processing_left_otherwise_is_another_model() -> None:
    def sets(value: object) -> Callable[[Model], None]:
        def change(model: Model) -> None:
            model.kernel = value

        return change

    first, second = publish(build, process=sets(torch.float16)), publish(build, process=nothing)
    with pytest.raises(ParityError, match=r"changed other things \(processed\) in the model"):
        compare_published(first.manifest, second.manifest)
