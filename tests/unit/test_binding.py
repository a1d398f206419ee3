"""Binding takes shortcuts for models of ten thousand tensors; none shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.placement import ALIGNMENT
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.live import named_modules
from vllm_companion_plugin.tree.restore import Source

pytestmark = pytest.mark.core

CPU = torch.device("cpu")


class Scales(nn.Module):
    """Many small buffers, which each engine clones, and weights of the same size between them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for number in range(count):
            self.register_buffer(f"scale_{number}", torch.full((3,), float(number)))
            self.register_parameter(f"weight_{number}", nn.Parameter(torch.full((3,), -float(number))))


@pytest.fixture
def source() -> Source:
    packed = pack.prepare(capture(Scales(20)), Stage.UNPROCESSED, arenas.MEMFD, CPU)
    arena = pack.copy(packed, arenas.MEMFD, CPU, rebind=False, release=lambda: None)
    return Source(packed.manifest, ArenaViews(arena, arena.info.size_bytes, CPU), CPU, copy=False)


def private(source: Source) -> list[torch.Tensor]:
    return [source.tensor(index) for index, info in enumerate(source.manifest.tensors) if info.private]


class TestClones:
    def test_apart(self, source: Source) -> None:
        """Each has a storage of its own size, with the published bytes, and writing to one changes no other."""
        clones = private(source)
        published = [clone.clone() for clone in clones]
        assert sorted(float(clone[0]) for clone in clones) == [float(number) for number in range(20)]
        assert all(clone.untyped_storage().nbytes() == clone.nbytes for clone in clones)
        for position, clone in enumerate(clones):
            clone.fill_(100.0)
            others = zip(clones[position + 1 :], published[position + 1 :], strict=True)
            assert all(torch.equal(other, before) for other, before in others)

    def test_renewed(self, source: Source) -> None:
        """All get their published bytes again."""
        clones = private(source)
        published = [clone.clone() for clone in clones]
        for clone in clones:
            clone.fill_(100.0)
        source.renew()
        assert all(torch.equal(clone, before) for clone, before in zip(clones, published, strict=True))

    def test_aligned(self, source: Source) -> None:
        """Relative to each other they lie as in the arena, where kernels chose by alignment."""
        places = [
            source.manifest.storages[info.storage].offset_bytes for info in source.manifest.tensors if info.private
        ]
        shifts = {(clone.data_ptr() - place) % ALIGNMENT for clone, place in zip(private(source), places, strict=True)}
        assert all(shift % 64 == 0 for shift in shifts)


class Named(nn.Module):
    """Has names of its own for its children, as wrappers have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        yield from self.inner.named_modules(memo, prefix, remove_duplicate)


class TestNamedModules:
    def test_as_torch(self) -> None:
        """The same names in the same order, those of twins and of modules with other names included."""
        twin = nn.Linear(2, 2)
        model = nn.Sequential(nn.ModuleList([twin, nn.ReLU()]), twin, Named(), nn.ModuleDict({"x": twin}))
        model.register_module("none", None)
        assert list(named_modules(model)) == list(model.named_modules(remove_duplicate=False))

    def test_inside_itself(self) -> None:
        """It ends."""
        model = nn.Sequential(nn.ReLU())
        model._modules["again"] = model
        with pytest.raises(RecursionError):
            list(named_modules(model))


class _Valued(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.helper = _Helper(value)
        self.weight = nn.Parameter(torch.zeros(1))
        self.weight.mark = value  # type: ignore[attr-defined]


class _Helper:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_values_that_are_equal_and_not_the_same_are_told_apart() -> None:
    values = [1, True, 1.0, 0, False, 0.0, -0.0, None, "1", 1, True, -0.0, 0.0, float("nan"), [1], [True], [1.0]]
    model = nn.ModuleList(_Valued(value) for value in values)
    tree = capture(model)
    texts = [repr(value) for value in values]
    assert [live.attributes["value"] for live in tree.modules[1:]] == texts
    assert [live.attributes["helper.value"] for live in tree.modules[1:]] == texts
    assert [tree.hung[id(slot.tensor)]["mark"] for slot in tree.slots()] == texts
