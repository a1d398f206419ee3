"""What a headless process does with a model after vLLM has loaded other weights into it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.place import KEY
from vllm_companion_plugin import memory
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.status import Published
from vllm_companion_plugin.engine.reloading import _begun, _collect
from vllm_companion_plugin.errors import LayoutError
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.capture import capture

pytestmark = pytest.mark.core

CPU = torch.device("cpu")


class Scaled(nn.Module):
    """A weight that is shared, a scale that is private to each engine, and helpers that refer to both."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 4), value), requires_grad=False)
        self.register_buffer("scale", torch.full((3,), value))
        self.kernel = {"scale": self.scale, "weight": self.weight}
        self.bits = 8


class World:
    """A published model, one that is bound to it, and an arena that is being written in its place."""

    def __init__(self) -> None:
        packed = pack.prepare(capture(Scaled(1.0)), Stage.UNPROCESSED, memory.MEMFD, CPU)
        arena = pack.copy(packed, memory.MEMFD, CPU, rebind=False, release=lambda: None)
        held = Held(KEY, 1, arena.info, arena.fds, b"", Published(len(packed.manifest.tensors)))
        lease: Any = None  # nobody asks
        self.attachment = Attachment("cpu", CPU, lease, held, arena, packed.manifest)
        self.size_bytes = arena.info.size_bytes
        self.writer = memory.create(memory.MEMFD, self.size_bytes)
        self.writer.add_block(self.size_bytes)
        self.writer.write(0, arena.address, self.size_bytes)
        self.model = Scaled(1.0)
        self.model.weight.data = self.attachment.tensors["weight"]

    def written(self, name: str) -> torch.Tensor:
        manifest = self.attachment.manifest
        views = ArenaViews(self.writer, self.size_bytes, CPU)
        slot = next(slot for slot in manifest.modules[0].slots if slot.name == name)
        info = manifest.tensors[slot.tensor]
        return views.tensor(info, manifest.storages[info.storage])


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    with made.attachment.written_through(made.writer):
        yield made
    made.writer.abort()


def test_what_is_private_or_made_anew_is_brought_to_its_place(world: World) -> None:
    """And what was loaded into the arena itself is there, too. A helper that still refers to before has no say."""
    world.model.scale.fill_(7)
    world.model.weight = nn.Parameter(torch.full((8, 4), 5.0), requires_grad=False)
    _collect(world.model, world.attachment)
    assert world.written("scale").tolist() == [7.0] * 3
    assert world.written("weight").unique().tolist() == [5.0]


def test_what_was_loaded_in_place_stays(world: World) -> None:
    with torch.no_grad():
        world.model.weight.fill_(3)
    _collect(world.model, world.attachment)
    assert world.written("weight").unique().tolist() == [3.0]
    assert world.written("scale").tolist() == [1.0] * 3


def test_of_the_tensors_that_come_none_is_kept() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            tensor = torch.ones(number)
            made.append(weakref.ref(tensor))
            yield str(number), tensor

    weights = _begun(tensors())
    assert len(made) == 1  # it has been asked for
    names = [next(weights)[0] for _ in range(3)]
    assert names == ["0", "1", "2"]
    assert [tensor() is None for tensor in made[:2]] == [True, True]  # the generator has the last one
    assert next(weights)[0] == "3"
    assert not [*_begun(iter(()))]


def test_another_model_is_copied_and_keeps_its_ties(world: World) -> None:
    """Two tensors that share a place would else have the bytes of whichever is copied last."""
    other = Scaled(6.0)
    _collect(other, world.attachment, anew=True)
    assert world.written("weight").unique().tolist() == [6.0]
    assert world.written("scale").tolist() == [6.0] * 3
    other.kernel["scale"] = torch.full((3,), 5.0)
    with pytest.raises(LayoutError, match=r"kernel\['scale'\] of .* does not share the memory of scale"):
        _collect(other, world.attachment, anew=True)


@pytest.mark.parametrize("what", ["shape", "value", "slot"])
def test_another_model_is_refused(world: World, what: str) -> None:
    if what == "shape":
        world.model.weight = nn.Parameter(torch.ones(8, 5), requires_grad=False)
    elif what == "value":
        world.model.bits = torch.int8  # kernels would read other bytes
    else:
        del world.model.scale
    with pytest.raises(LayoutError, match="With these weights"):
        _collect(world.model, world.attachment)
