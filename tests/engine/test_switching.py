"""Models of one engine get new weights together, or none of them does: real attachments to a real companion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.left import no_more_open, none_left_open, open_now, opened_since
from tests.support.place import Place
from tests.support.publishing import hold_zeros
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.client.mapped import tensors_by_name
from vllm_companion_plugin.client.update import begin_training
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.engine import live
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.engine.session import EngineSession
from vllm_companion_plugin.engine.switching import Switch
from vllm_companion_plugin.errors import ArenaError, EntryNotFoundError, LayoutError
from vllm_companion_plugin.memory.kinds import KINDS
from vllm_companion_plugin.memory.tensors.views import ArenaViews

MODEL = "test/model"
FIRST, SECOND = 1, 2


@pytest.fixture
def client(place: Place) -> Iterator[CompanionClient]:
    """Of a companion that holds two generations of `Small`: of zeros, and of ones."""
    companion = place.companion()
    client = hold_zeros(place)
    with client.update(MODEL, version="ones") as new:
        new.load({"embed.weight": torch.ones(64, 16, dtype=torch.bfloat16)})
    yield client
    assert companion.poll() is None


@pytest.fixture
def models(client: CompanionClient) -> Iterator[list[LiveModel]]:
    """A target and its draft, both on the first generation."""
    made = [LiveModel(client.attach(MODEL), client.settings, load=never) for _ in range(2)]
    Switch(made, {MODEL: FIRST}).carry_out()
    assert values(made) == [0, 0]
    yield made
    for model in made:
        model.attachment.close()


def never(*_: object) -> Attachment:
    raise AssertionError("somebody has it")


def values(models: list[LiveModel]) -> list[float]:
    return [model.attachment.tensors["embed.weight"].float().mean().item() for model in models]


def numbers(models: list[LiveModel]) -> list[int]:
    return [model.attachment.generation for model in models]


def test_nothing_changes_until_it_is_carried_out(models: list[LiveModel]) -> None:
    switch = Switch(models, {})
    assert (switch.targets, switch.versions) == ({f"{MODEL} (target)": SECOND}, {f"{MODEL} (target)": "ones"})
    assert (values(models), numbers(models)) == ([0, 0], [FIRST, FIRST])
    assert switch.carry_out() == {f"{MODEL} (target)": SECOND}
    assert (values(models), numbers(models)) == ([1, 1], [SECOND, SECOND])


def test_if_one_cannot_be_prepared_nothing_stays_open(models: list[LiveModel]) -> None:
    models[1].attachment.privatize(None)
    with none_left_open():
        with pytest.raises(ArenaError, match="is private, so it cannot advance"):
            Switch(models, {})
        with pytest.raises(EntryNotFoundError):
            Switch(models[:1], {MODEL: 7})
    assert values(models) == [0, 0]


@pytest.mark.parametrize("fault", ["private", "closed"])
def test_if_one_cannot_be_mapped_those_before_it_go_back(models: list[LiveModel], fault: str) -> None:
    with no_more_open():
        switch = Switch(models, {})
        if fault == "private":
            models[1].attachment.privatize(None)
        else:
            switch._steps[1][1].close()
        with pytest.raises(ArenaError):
            switch.carry_out()
    assert (values(models), numbers(models)) == ([0, 0], [FIRST, FIRST])
    if fault == "closed":
        Switch(models, {}).carry_out()
        assert (values(models), numbers(models)) == ([1, 1], [SECOND, SECOND])


def test_what_is_not_carried_out_is_let_go(models: list[LiveModel]) -> None:
    with none_left_open():
        before = open_now()
        switch = Switch(models, {})
        assert opened_since(before)
        switch.close()


def test_all_go_back_to_what_is_mapped_no_more(models: list[LiveModel], client: CompanionClient) -> None:
    """The memory of before is kept for that, even if the companion has let it go, and no longer than that."""
    with no_more_open():
        switch = Switch(models, {})
        switch.carry_out(keep_ways_back=True)
        with client.update(MODEL, version="twos") as new:
            new.load({"embed.weight": torch.full((64, 16), 2, dtype=torch.bfloat16)})
        assert values(models) == [1, 1]
        switch.go_back()
        assert (values(models), numbers(models)) == ([0, 0], [FIRST, FIRST])
        switch.go_back()
        assert values(models) == [0, 0]


def test_nothing_goes_back_that_was_not_switched(models: list[LiveModel]) -> None:
    with none_left_open():
        switch = Switch(models, {})
        switch.go_back()
    assert values(models) == [0, 0]


@pytest.mark.parametrize("name", [MODEL, "model", "/model"])
def test_a_model_is_found_by_its_name_or_the_end_of_it(models: list[LiveModel], name: str) -> None:
    assert set(Switch(models, {name: SECOND}).targets.values()) == {SECOND}


@pytest.mark.parametrize("name", ["odel", "other/model", ""])
def test_a_name_that_no_model_has_is_refused(models: list[LiveModel], name: str) -> None:
    with pytest.raises(EntryNotFoundError, match="Its models of a companion: test/model"):
        Switch(models, {name: SECOND})


def test_a_switch_is_its_callers(models: list[LiveModel]) -> None:
    """Who has prepared before somebody else did can neither carry that out nor close it."""
    session = EngineSession()
    session.keep_switch(Switch(models, {}, "first"))
    session.keep_switch(later := Switch(models, {}, "second"))
    assert session.take_switch("first") is None
    assert session.take_switch("second") is later
    assert session.take_switch("second") is None
    later.carry_out()
    assert values(models) == [1, 1]


def test_who_goes_back_follows_no_more_than_before(client: CompanionClient, place: Place) -> None:
    """An engine that has never taken a trainer's weights wakes with its own, also after a switch that failed."""
    client.make_current(MODEL, FIRST)
    models = [LiveModel(client.attach(MODEL), client.settings, load=never) for _ in range(2)]
    client.make_current(MODEL, SECOND)
    switch = Switch(models, {})
    switch._steps[1][1].close()
    with pytest.raises(ArenaError):
        switch.carry_out()
    one = models[0].attachment
    one.fall_asleep(1, WhenAsleep.STAY)
    one.let_go(client.settings, "engine")
    with connect("cpu", place.settings, spawn=False) as connection:
        one.wake(connection, client.settings, "engine", never)
        assert (values(models), numbers(models)) == ([0, 0], [FIRST, FIRST])
        for model in models:
            model.attachment.close()


def test_what_is_private_is_renewed_when_what_is_mapped_was_written_in_place(client: CompanionClient) -> None:
    """The generation is the same, and its bytes are others."""
    with client.attach(MODEL) as mine:
        owned = begin_training(mine, "run", client.settings)
        models = [LiveModel(client.attach(MODEL), client.settings, load=never) for _ in range(2)]
        clones = []
        for model in models:
            embedding = model.attachment.tensors["embed.weight"]
            offset = embedding.data_ptr() - model.attachment.arena.address
            clones.append(embedding.view(torch.uint8).flatten().clone())
            model.attachment.keep_private([(offset, clones[-1])])
        views = ArenaViews(owned.arena, mine.size_bytes, mine.device)
        with owned.arena.writing():
            tensors_by_name(mine.manifest, views)["embed.weight"].fill_(5)
        assert values(models) == [5, 5]
        assert [clone.view(torch.bfloat16)[0] for clone in clones] == [1, 1]
        switch = Switch(models, {})
        assert switch.carry_out(keep_ways_back=True) == {f"{MODEL} (target)": owned.generation}
        assert [clone.view(torch.bfloat16)[0] for clone in clones] == [5, 5]
        switch.go_back()
        assert numbers(models) == [owned.generation] * 2
        models[0].attachment.fix("its kernels use copies")
        with pytest.raises(LayoutError, match="its kernels use copies"):
            Switch(models, {})
        for model in models:
            model.attachment.close()
        owned.arena.close()


def test_what_is_private_is_not_lost_where_another_cannot_wake(
    models: list[LiveModel], client: CompanionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no room in host memory for a second copy of it: then it stays mapped."""
    one, other = models
    one.attachment.privatize(None)
    one.attachment.views().bytes_at(0, one.attachment.size_bytes).fill_(7)
    with live.falling_asleep(models, 1, "test"):
        pass

    def fails(*_: object, **__: object) -> object:
        raise ArenaError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(other.attachment, "wake", fails)
        patch.setattr(type(KINDS[one.attachment.held.arena.kind]), "to_host", fails)
        with pytest.raises(ArenaError, match="no room"):
            live.wake(models, lambda device, settings: connect(device, settings, spawn=False), "test")
    assert other.attachment.asleep
    live.wake(models, lambda device, settings: connect(device, settings, spawn=False), "test")
    assert set(one.attachment.views().bytes_at(0, one.attachment.size_bytes).tolist()) == {7}
    assert (values([other]), numbers([other])) == ([1], [SECOND])
