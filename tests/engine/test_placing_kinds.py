"""What else than copies loaders do with a checkpoint's tensors: none of it is taken for a copy.

Each model is loaded from one checkpoint; then another one is written over its arena by the names of its tensors. Either
the arena has the bytes that loading that checkpoint gives, or the names of those that it has not were refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.loading import packed
from vllm_companion_plugin import memory
from vllm_companion_plugin.client.filling import Filling, is_placed
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree.observe import Observation
from vllm_companion_plugin.wire.manifest import sources_from_bytes

pytestmark = pytest.mark.core

CPU = torch.device("cpu")
SIDE = 32
Weights = Iterator[tuple[str, torch.Tensor]]


class Model(nn.Module):
    """A weight that is loaded somehow, between two that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.w, self.after = (nn.Parameter(torch.zeros(SIDE, SIDE), requires_grad=False) for _ in range(3))


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SIDE, SIDE, generator=random) for name in ("before", "w", "after")}


Load = Callable[[Model, torch.Tensor], object]
"""Loads the weight."""


def published(load: Load, weights: dict[str, torch.Tensor], process: Load) -> tuple[Manifest, memory.Arena]:
    model = Model()
    observation = Observation(model)
    with observation.watching(), torch.no_grad():
        for name, tensor in weights.items():
            given = tensor.clone()
            observation.note_read(name, given)
            if name == "w":
                load(model, given)
            else:
                getattr(model, name).copy_(given)
        observation.end_loading(model)
        with observation.processing(model):
            process(model, model.w)
    return packed(model, observation, Stage.PROCESSED)


def tensors(manifest: Manifest, arena: memory.Arena) -> dict[str, bytes]:
    views = ArenaViews(arena, arena.info.size_bytes, CPU)
    found = {}
    for module in manifest.modules:
        for slot in module.slots:
            info = manifest.tensors[slot.tensor]
            if info.storage >= 0:
                tensor = views.tensor(info, manifest.storages[info.storage])
                found[slot.name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def begun(manifest: Manifest, like: memory.Arena) -> tuple[Filling, memory.ArenaWriter]:
    """An update of that arena, and what it writes."""
    writer = memory.create(memory.MEMFD, like.info.size_bytes)
    writer.add_block(like.info.size_bytes)
    return Filling(writer, like.info.size_bytes, manifest, CPU, "it"), writer


def nothing(model: Model, w: torch.Tensor) -> None:
    """Changes nothing."""


def updated(load: Load, process: Load = nothing) -> tuple[bool, dict[str, bytes], dict[str, bytes], list[str]]:
    """Whether loading is copies alone, what an update wrote, what a load gives, and the names that were refused."""
    manifest, arena = published(load, checkpoint(1), process)
    want = tensors(*published(load, checkpoint(2), process))
    filling, writer = begun(manifest, arena)
    refused = []
    for name, tensor in checkpoint(2).items():
        try:
            filling.load({name: tensor})
        except BadRequestError:
            refused.append(name)
    filling.complete(arena.address)
    return is_placed(manifest), tensors(manifest, writer.seal()), want, refused


def whole(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(w)


def rows(model: Model, w: torch.Tensor) -> None:
    for index in range(SIDE):
        model.w.data[index] = w[:, index]


def turned(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(w.t().contiguous())


def with_an_empty_part(model: Model, w: torch.Tensor) -> None:
    """As a rank does whose part of a vocabulary is padding."""
    model.w.data[:SIDE].copy_(w)
    model.w.data[:0].copy_(w.narrow(0, SIDE, 0))


@pytest.mark.parametrize("load", [whole, rows, turned, with_an_empty_part], ids=lambda load: load.__name__)
def test_copies_are_copies(load: Load) -> None:
    placed, found, want, refused = updated(load)
    assert (placed, refused) == (True, [])
    assert found == want


def numpy_changes_it(model: Model, w: torch.Tensor) -> None:
    w.numpy()[...] *= 2
    model.w.copy_(w)


def numpy_changed_it_before(model: Model, w: torch.Tensor) -> None:
    array = model.w.numpy()
    model.w.copy_(w)
    array *= 3


def numpy_makes_another(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(torch.from_numpy(w.numpy().T.copy()))


def numpy_reads_it(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(torch.as_tensor(np.asarray(w) + 1))


def dlpack_changes_it(model: Model, w: torch.Tensor) -> None:
    torch.from_dlpack(w).mul_(2)
    model.w.copy_(w)


def python_reads_it(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(w)
    model.first = w.tolist()[0][0]


def becomes_the_parameter(model: Model, w: torch.Tensor) -> None:
    model.w = nn.Parameter(w.t(), requires_grad=False)


def becomes_its_memory(model: Model, w: torch.Tensor) -> None:
    model.w.data = w.t()


def a_copy_becomes_the_parameter(model: Model, w: torch.Tensor) -> None:
    model.w = nn.Parameter(w.t().contiguous(), requires_grad=False)


def is_changed_and_becomes_its_memory(model: Model, w: torch.Tensor) -> None:
    model.w.data = w.mul_(2)


def loses_rows(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(w)
    model.w.data = model.w.data[:20]


def loses_its_first_rows(model: Model, w: torch.Tensor) -> None:
    model.w.copy_(w)
    model.w.data = model.w.data[4:]


def part_of_it_is_copied_to_another(model: Model, w: torch.Tensor) -> None:
    model.w.data[:8].copy_(w[:8])
    model.w.data[8:16].copy_(model.w.data[:8])


def part_of_it_makes_another(model: Model, w: torch.Tensor) -> None:
    model.w.data[:8].copy_(w[:8])
    torch.mul(model.w.data[:8], 2, out=model.w.data[8:16])


@pytest.mark.parametrize(
    "load",
    [
        *(numpy_changes_it, numpy_changed_it_before, numpy_makes_another, numpy_reads_it, dlpack_changes_it),
        *(python_reads_it, becomes_the_parameter, becomes_its_memory, a_copy_becomes_the_parameter),
        *(is_changed_and_becomes_its_memory, loses_rows, loses_its_first_rows, part_of_it_is_copied_to_another),
        part_of_it_makes_another,
    ],
    ids=lambda load: load.__name__,
)
def test_what_is_more_than_a_copy_is_refused_and_leaves_all_else(load: Load) -> None:
    placed, found, want, refused = updated(load)
    assert (placed, refused) == (False, ["w"])
    assert [found[name] for name in ("before", "after")] == [want[name] for name in ("before", "after")]


def narrows(model: Model, w: torch.Tensor) -> None:
    model.w = nn.Parameter(w.data.narrow(0, 0, 20), requires_grad=False)


def triples_in_numpy(model: Model, w: torch.Tensor) -> None:
    array = w.numpy()
    array *= 3


def keeps_a_value(model: Model, w: torch.Tensor) -> None:
    model.first = w.tolist()[0][0]


def spreads(model: Model, w: torch.Tensor) -> None:
    w.data[8:].copy_(w.data[:1].expand(SIDE - 8, SIDE))


@pytest.mark.parametrize("process", [narrows, triples_in_numpy, keeps_a_value, spreads], ids=lambda each: each.__name__)
def test_what_processing_does_beside_copies_counts(process: Load) -> None:
    placed, found, want, refused = updated(whole, process)
    assert (placed, refused) == (False, ["w"])
    assert [found[name] for name in ("before", "after")] == [want[name] for name in ("before", "after")]


def test_a_final_form_of_another_type_is_written_as_it_is() -> None:
    """Processing may look at the bytes of a tensor as another type."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(SIDE, SIDE, dtype=torch.uint8), requires_grad=False)

    model = Scales()
    observation = Observation(model)
    given = torch.full((SIDE, SIDE), 7, dtype=torch.uint8)
    with observation.watching(), torch.no_grad():
        observation.note_read("w", given)
        model.w.copy_(given)
        observation.end_loading(model)
        with observation.processing(model):
            model.w = nn.Parameter(model.w.data.view(torch.float8_e4m3fn), requires_grad=False)
    manifest, arena = packed(model, observation, Stage.PROCESSED)
    for new in (torch.full((SIDE, SIDE), 56, dtype=torch.uint8), torch.ones(SIDE, SIDE).to(torch.float8_e4m3fn)):
        filling, writer = begun(manifest, arena)
        filling.load({"w": new})
        filling.complete(arena.address)
        assert tensors(manifest, writer.seal())["w"] == new.view(torch.uint8).numpy().tobytes()


def sources_of(model: nn.Module, load: Callable[[Callable[[str, torch.Tensor], None]], object]) -> dict[str, int]:
    """How many copies each tensor has that `load` used; it notes what it reads by what it is given."""
    observation = Observation(model)
    with observation.watching(), torch.no_grad():
        load(observation.note_read)
        observation.end_loading(model)
    manifest, arena = packed(model, observation, Stage.PROCESSED)
    arena.close()
    return {name: len(source.copies) for name, source in sources_from_bytes(manifest.sources).items()}


def halves() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2 * SIDE, SIDE), requires_grad=False)
    return model, model.w.data[:SIDE], model.w.data[SIDE:]


@pytest.mark.parametrize(("collects", "copies"), [(False, 1), (True, 0)], ids=["as they come", "collected"])
def test_tensors_of_one_storage_are_told_apart_when_each_is_loaded_as_it_comes(*, collects: bool, copies: int) -> None:
    """Tensors of a PyTorch file may share a storage. If all are read first, nobody can tell which one is meant."""
    model, first, second = halves()
    one = torch.randn(SIDE, SIDE)
    given = {"q": (one, first), "k": (one.view(SIDE, SIDE), second)}

    def load(note: Callable[[str, torch.Tensor], None]) -> None:
        for name, (tensor, half) in given.items():
            note(name, tensor)
            if not collects:
                half.copy_(tensor)
        for tensor, half in given.values() if collects else ():
            half.copy_(tensor)

    assert sources_of(model, load) == {"q": copies, "k": copies}


def test_what_was_computed_of_one_name_of_a_storage_counts_for_all_of_them() -> None:
    model, first, second = halves()
    one = torch.randn(SIDE, SIDE)

    def load(note: Callable[[str, torch.Tensor], None]) -> None:
        note("q", one)
        first.copy_(one)
        note("k", one.view(SIDE, SIDE))
        second.copy_(one)
        model.scale = one.max()

    assert sources_of(model, load) == {"q": 0, "k": 0}


def test_a_clone_tells_whose_it_is() -> None:
    model, first, second = halves()
    one = torch.randn(SIDE, SIDE)

    def load(note: Callable[[str, torch.Tensor], None]) -> None:
        note("q", one)
        clone = one.clone()
        note("k", one.view(SIDE, SIDE))
        second.copy_(one)
        first.copy_(clone)

    assert sources_of(model, load) == {"q": 1, "k": 1}


def test_memory_that_is_gone_costs_no_place() -> None:
    """What NumPy was given of another tensor says nothing of one that has its address later."""
    model = nn.Module()
    count = 60
    for number in range(count):
        model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(SIDE, SIDE), requires_grad=False))

    def load(note: Callable[[str, torch.Tensor], None]) -> None:
        for number in range(count):
            beside = torch.frombuffer(bytearray(SIDE), dtype=torch.uint8)
            beside.numpy()
            del beside
            given = torch.frombuffer(bytearray(4 * SIDE * SIDE), dtype=torch.float32).view(SIDE, SIDE)
            note(f"p{number}", given)
            model.get_parameter(f"p{number}").copy_(given)

    assert sources_of(model, load) == {f"p{number}": 1 for number in range(count)}


def test_what_nobody_loads_is_not_asked_for() -> None:
    model, first, _ = halves()
    unused, used = torch.randn(4), torch.randn(SIDE, SIDE)

    def load(note: Callable[[str, torch.Tensor], None]) -> None:
        note("unused", unused)
        unused.mul_(2)
        note("used", used)
        first.tolist()  # values, which are others afterwards
        first.copy_(used)

    assert sources_of(model, load) == {"used": 1}


class TestATrainersModule:
    """With one parameter under two names."""

    def load(self, model: nn.Module, names: dict[str, tuple[nn.Parameter, int]]) -> dict[str, bytes]:
        """Publish `model`, of which `names` are in the checkpoint with so many rows; what a trainer's module leaves."""
        observation = Observation(model)
        with observation.watching(), torch.no_grad():
            for name, (parameter, count) in names.items():
                given = torch.full((count, SIDE), 1.0)
                observation.note_read(name, given)
                parameter.data[:count].copy_(given)
            observation.end_loading(model)
        manifest, arena = packed(model, observation, Stage.PROCESSED)
        trainer = nn.Module()
        trainer.embed, trainer.head = nn.Module(), nn.Module()
        trainer.embed.weight = trainer.head.weight = nn.Parameter(torch.full((SIDE - 2, SIDE), 2.0))
        filling, writer = begun(manifest, arena)
        filling.load(trainer)
        filling.complete(arena.address)
        views = ArenaViews(writer.seal(), arena.info.size_bytes, CPU)
        return {
            f"{module.path}.{slot.name}": views.tensor(info, manifest.storages[info.storage]).numpy().tobytes()
            for module in manifest.modules
            for slot in module.slots
            for info in [manifest.tensors[slot.tensor]]
        }

    def model(self) -> nn.Module:
        made = nn.Module()
        made.embed, made.head = nn.Module(), nn.Module()
        for part in (made.embed, made.head):
            part.weight = nn.Parameter(torch.zeros(SIDE, SIDE), requires_grad=False)
        return made

    def test_is_written_to_both_places(self) -> None:
        model = self.model()
        parts = {name: (model.get_parameter(name), SIDE - 2) for name in ("embed.weight", "head.weight")}
        found = self.load(model, parts)
        assert found["embed.weight"] == found["head.weight"]
        assert np.frombuffer(found["head.weight"], dtype=np.float32).sum() == 2 * (SIDE - 2) * SIDE

    def test_fits_an_entry_that_ties_them_and_pads_the_vocabulary(self) -> None:
        """That knows the second name by a shape that no trainer has."""
        model = self.model()
        model.head.weight = model.embed.weight
        found = self.load(model, {"embed.weight": (model.embed.weight, SIDE - 2)})
        assert np.frombuffer(found["embed.weight"], dtype=np.float32).sum() == 2 * (SIDE - 2) * SIDE


def test_a_tensor_of_a_type_that_one_of_its_copies_has_is_written_to_all() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(SIDE, SIDE), requires_grad=False)
    model.low = nn.Parameter(torch.zeros(SIDE, SIDE, dtype=torch.bfloat16), requires_grad=False)
    observation = Observation(model)
    given = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    with observation.watching(), torch.no_grad():
        observation.note_read("w", given)
        model.w.copy_(given)
        model.low.copy_(given)
        observation.end_loading(model)
    manifest, arena = packed(model, observation, Stage.PROCESSED)
    filling, writer = begun(manifest, arena)
    filling.load({"w": torch.full((SIDE, SIDE), 3.0)})
    filling.complete(arena.address)
    found = tensors(manifest, writer.seal())
    assert found["w"] == torch.full((SIDE, SIDE), 3.0).numpy().tobytes()
    assert found["low"] == torch.full((SIDE, SIDE), 3.0).bfloat16().view(torch.uint8).numpy().tobytes()


def test_a_final_form_is_refused_where_loading_copied_to_other_places_too() -> None:
    """The others would stay as they were."""
    model = nn.Module()
    for name in ("w", "low"):
        model.register_parameter(name, nn.Parameter(torch.zeros(SIDE, SIDE, dtype=torch.uint8), requires_grad=False))
    observation = Observation(model)
    given = torch.full((SIDE, SIDE), 7, dtype=torch.uint8)
    with observation.watching(), torch.no_grad():
        observation.note_read("w", given)
        model.w.copy_(given)
        model.low.copy_(given)
        observation.end_loading(model)
        with observation.processing(model):
            model.w = nn.Parameter(model.w.data.view(torch.float8_e4m3fn), requires_grad=False)
    filling, _ = begun(*packed(model, observation, Stage.PROCESSED))
    with pytest.raises(
        BadRequestError, match="w in vLLM's form, because loading copied the checkpoint's tensor to other"
    ):
        filling.load({"w": torch.ones(SIDE, SIDE).to(torch.float8_e4m3fn)})
    assert filling.load({"w": given}) == 1
