"""What becomes of a model that was packed for others, if they do not get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.place import KEY, Place
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.engine import decisions
from vllm_companion_plugin.engine.publish import _Publisher
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import devices
from vllm_companion_plugin.errors import TicketError
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths

pytestmark = pytest.mark.core

CPU = torch.device("cpu")
DEVICE = devices.EngineDevice("cpu", CPU, arenas.MEMFD, Stage.UNPROCESSED)


@pytest.fixture
def elected(place: Place) -> Iterator[tuple[decisions.Load, Place]]:
    """To load an entry that is unloaded before it is published."""
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        lease = connection.attach(KEY, may_load=True, client_name="loader")
        granted = lease.wait(30)
        assert isinstance(granted, Granted)
        election = LoaderElection(device_paths("cpu", place.settings))
        yield decisions.Load(DEVICE, KEY, lease, granted, election, decisions.Found()), place
        lease.release()


def loaded(publisher: _Publisher, model: nn.Module) -> None:
    with ExitStack() as until:
        publisher.begin(model, until)
        model.weight.data.copy_(torch.arange(model.weight.numel()).view_as(model.weight))
        publisher.loaded(model)
    publisher.publish(model)


def test_a_model_that_was_packed_in_vain_has_memory_of_its_own(elected: tuple[decisions.Load, Place]) -> None:
    """It views what was sealed for others: writing there would end the process, and nothing would put it to sleep."""
    load, place = elected
    kept: list[Attachment] = []
    publisher, model = _Publisher(load, place.settings, None, None, kept.append), nn.Linear(64, 64, bias=False)
    with connect("cpu", place.settings, spawn=False) as other:
        other.unload(force=True)
    loaded(publisher, model)
    assert publisher.is_bound
    publisher.finish()
    assert current().outcomes[-1].what == "alone"
    (attachment,) = kept
    assert attachment.is_private
    wanted = torch.arange(64 * 64).view(64, 64) + 1.0
    model.weight.data.add_(1)
    assert torch.equal(model.weight.data, wanted)
    assert attachment.fall_asleep(1, WhenAsleep.AUTO) == "host"
    attachment.let_go(place.settings, "test")
    with connect("cpu", place.settings, spawn=False) as connection:
        attachment.wake(connection, place.settings, "test", pytest.fail)
    assert torch.equal(model.weight.data, wanted)
    attachment.close()


FILLED = ("first", "second", "turned", "narrow", "attribute")


class Scaled(nn.Linear):
    """Small tensors that loading fills, of several kinds, and one that is the engine's own."""

    def __init__(self) -> None:
        super().__init__(64, 64, bias=False)
        whole = torch.zeros(8)
        self.register_buffer("first", whole[:4])
        self.register_buffer("second", whole[4:])
        self.register_buffer("turned", torch.zeros(3, 5).t())
        self.register_buffer("narrow", torch.zeros(7, dtype=torch.float16))
        self.attribute = torch.zeros(2)
        self.register_buffer("limit", torch.full((1,), 5.0))


def test_what_is_private_to_a_publisher_follows_its_generation(place: Place) -> None:
    """Its own copies of what is small are renewed, as those of an engine that attached."""
    place.companion()
    kept: list[Attachment] = []
    with connect("cpu", place.settings, spawn=False) as connection:
        lease = connection.attach(KEY, may_load=True, client_name="loader")
        granted = lease.wait(30)
        assert isinstance(granted, Granted)
        load = decisions.Load(
            DEVICE, KEY, lease, granted, LoaderElection(device_paths("cpu", place.settings)), decisions.Found()
        )
        publisher, model = _Publisher(load, place.settings, None, None, kept.append), Scaled()
        with ExitStack() as until:
            publisher.begin(model, until)
            model.weight.data.fill_(1)
            for value, name in enumerate(FILLED, 1):
                getattr(model, name).fill_(value)
            publisher.loaded(model)
        publisher.publish(model)
        publisher.finish()
        (attachment,) = kept
        for name in (*FILLED, "limit"):
            getattr(model, name).fill_(9)
        attachment.renew()
        assert [getattr(model, name).unique().tolist() for name in FILLED] == [[1], [2], [3], [4], [5]]
        assert model.limit.item() == 9
        attachment.close()


def test_without_fallback_it_is_an_error(elected: tuple[decisions.Load, Place]) -> None:
    load, place = elected
    kept: list[Attachment] = []
    publisher = _Publisher(load, replace(place.settings, fallback=False), None, None, kept.append)
    with connect("cpu", place.settings, spawn=False) as other:
        other.unload(force=True)
    loaded(publisher, nn.Linear(64, 64, bias=False))
    with pytest.raises(TicketError):
        publisher.finish()
    assert not kept
