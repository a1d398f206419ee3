"""The parts of a model that vLLM only copies from its checkpoint, whatever it makes of the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.checkpoints import models
from tests.support.loading import packed_by_vllm
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.core.placements import Placed, Source, View, lies_whole
from vllm_companion_plugin.engine.reloading import _Placing
from vllm_companion_plugin.engine.vllm import reload_notes
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.tree.copied import NOTHING, Copied, copied
from vllm_companion_plugin.wire.manifest import sources_from_bytes

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]

Sources = dict[str, Source]
ROWS = View((6, 4), (4, 1), 0)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Sources]:
    """Attention, and Mamba, whose A is computed."""
    path = tmp_path_factory.mktemp("hybrid")
    models.make("hybrid", path, tiny=True)
    manifest, arena = packed_by_vllm(path)
    arena.close()
    return manifest, dict(sources_from_bytes(manifest.sources))


def placed(*, offset: int = 0, dtype: str = "float32", view: View = ROWS, steps: tuple[View, ...] = (ROWS,)) -> Placed:
    return Placed(steps, offset, view.shape, view.stride, dtype)


@pytest.mark.parametrize(
    ("copies", "whole"),
    [
        ((placed(),), True),
        ((placed(offset=512),), True),
        ((placed(steps=(ROWS, View((24,), (1,), 0)), view=View((24,), (1,), 0)),), True),
        ((placed(view=View((1, 6, 4), (0, 4, 1), 0)),), True),
        ((), False),
        ((placed(), placed(offset=512)), False),
        ((placed(dtype="bfloat16"),), False),
        ((placed(steps=(View((4, 6), (1, 4), 0),), view=View((4, 6), (6, 1), 0)),), False),
        ((placed(view=View((6, 4), (1, 6), 0)),), False),
        ((placed(view=View((6, 4), (8, 1), 0)),), False),
        ((placed(steps=(View((3, 4), (4, 1), 0),), view=View((3, 4), (4, 1), 0)),), False),
        ((placed(steps=(View((3, 4), (4, 1), 12),), view=View((3, 4), (4, 1), 0)),), False),
    ],
    ids=[
        *("as it is", "elsewhere", "flat", "with an index of one", "computed", "twice", "cast", "turned"),
        *("turned where it is", "with gaps", "a half", "the other half"),
    ],
)
def test_lies_whole(copies: tuple[Placed, ...], whole: bool) -> None:
    """The bytes of a contiguous tensor one after the other, in one place."""
    assert lies_whole(Source((6, 4), "float32", copies)) is whole


def test_what_is_computed_goes_through_vllm_with_its_module(hybrid: tuple[Manifest, Sources]) -> None:
    """All of a Mamba layer's mixer does, as vLLM loads modules as a whole; embeddings, norms and attention do not."""
    manifest, sources = hybrid
    found = copied(manifest, sources)
    computed = {name for name, source in sources.items() if not source.copies}
    assert computed
    assert not computed & found.places.keys()
    assert all(lies_whole(sources[name]) for name in found.places)
    mixers = {name.rpartition(".")[0] for name in computed}
    direct = {name for mixer in mixers for name in sources if name.rpartition(".")[0] == mixer}
    assert direct > computed
    assert not direct & found.places.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= found.places.keys()
    assert {"model.embed_tokens", "model.norm"} <= found.modules


def test_where_all_could_be_copied_vllm_was_asked_for(hybrid: tuple[Manifest, Sources]) -> None:
    manifest, sources = hybrid
    assert copied(manifest, {name: source for name, source in sources.items() if source.copies}) == NOTHING
    assert copied(manifest, {}) == NOTHING


def changed(manifest: Manifest, name: str, **fields: object) -> Manifest:
    """The same with other fields of the tensor that the module and slot `name` have."""
    path, _, slot_name = name.rpartition(".")
    module = next(each for each in manifest.modules if each.path == path)
    index = next(slot.tensor for slot in module.slots if slot.name == slot_name)
    tensors = [*manifest.tensors]
    tensors[index] = replace(tensors[index], **fields)  # type: ignore[arg-type]
    return replace(manifest, tensors=tuple(tensors))


@pytest.mark.parametrize(
    "fields",
    [{"private": True}, {"storage": -1, "inline": b""}, {"stride": (1 << 20, 1)}],
    ids=["engines have copies of it", "it is in the manifest", "it has gaps"],
)
def test_a_tensor_that_is_nowhere_as_a_whole_goes_through_vllm(
    fields: Mapping[str, object], hybrid: tuple[Manifest, Sources]
) -> None:
    manifest, sources = hybrid
    name = "model.embed_tokens.weight"
    assert name in copied(manifest, sources).places
    found = copied(changed(manifest, name, **fields), sources)
    assert name not in found.places
    assert "model.embed_tokens" not in found.modules
    assert "model.norm.weight" in found.places


def test_two_tensors_of_one_place_go_through_vllm(hybrid: tuple[Manifest, Sources]) -> None:
    """The one that was copied last counts, and only vLLM knows which one that is."""
    manifest, sources = hybrid
    name = "model.norm.weight"
    found = copied(manifest, {**sources, "another": sources[name]})
    assert not {name, "another"} & found.places.keys()
    assert "model.norm" not in found.modules


def test_a_module_with_anything_else_goes_through_vllm(hybrid: tuple[Manifest, Sources]) -> None:
    """Also what it shares with others does, and all of these."""
    manifest, sources = hybrid
    norm = next(module for module in manifest.modules if module.path == "model.norm")
    computed = next(name for name, source in sources.items() if not source.copies)
    mixer = next(module for module in manifest.modules if module.path == computed.rpartition(".")[0])
    tied = replace(norm, path="other", aliases=(), slots=(*norm.slots, *mixer.slots))
    found = copied(replace(manifest, modules=(*manifest.modules, tied)), sources)
    assert "model.norm.weight" not in found.places
    assert not {"model.norm", "other"} & found.modules


class TestPlacing:
    """What the headless process does with such tensors."""

    def placing(self) -> tuple[_Placing, list[tuple[int, bytes]]]:
        written: list[tuple[int, bytes]] = []

        class Writes:
            def write_bytes(self, offset_bytes: int, data: torch.Tensor) -> None:
                written.append((offset_bytes, data.numpy().tobytes()))

        update: Any = Writes()
        return _Placing(update, Copied({"a": (256, 264), "nothing": (0, 0)}, frozenset({"part"}))), written

    def test_puts_pieces_where_they_belong(self) -> None:
        placing, written = self.placing()
        assert not placing.put("b", 0, torch.zeros(8, dtype=torch.uint8))
        assert placing.put("a", 0, torch.ones(3, dtype=torch.uint8))
        assert placing.put("a", 3, torch.zeros(5, dtype=torch.uint8))
        assert placing.put("nothing", 0, torch.empty(0, dtype=torch.uint8))
        placing.check("a model")
        assert written == [(256, b"\1\1\1"), (259, b"\0" * 5)]

    def test_refuses_more_than_there_is_place_for(self) -> None:
        placing, written = self.placing()
        with pytest.raises(BadRequestError, match="a has 8 bytes, and at least 9 came"):
            placing.put("a", 4, torch.ones(5, dtype=torch.uint8))
        assert written == []

    def test_tells_what_did_not_come(self) -> None:
        placing, _ = self.placing()
        placing.put("a", 0, torch.ones(3, dtype=torch.uint8))
        with pytest.raises(BadRequestError, match="Of a of a model not all bytes came"):
            placing.check("a model")


def test_warnings_of_what_no_loader_loaded_are_left_out() -> None:
    """Who reloads knows what is copied, and looks at the rest."""
    from vllm.model_executor.model_loader.reload import layerwise

    records: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    keeping = Keeping()
    layerwise.logger.addHandler(keeping)
    try:
        with reload_notes.seeing_what_is_left():
            layerwise.logger.warning("%s: Failed to load weights", "RMSNorm")
            layerwise.logger.warning("Allocating %.1f MB", 2.0)
        layerwise.logger.warning("%s: Failed to load weights", "RMSNorm")
    finally:
        layerwise.logger.removeHandler(keeping)
    assert records == ["Allocating 2.0 MB", "RMSNorm: Failed to load weights"]
