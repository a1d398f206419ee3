"""What a trainer writes: each byte once, all others as they were, and nothing that does not fit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from tests.support.publishing import CPU, Small
from vllm_companion_plugin import memory
from vllm_companion_plugin.client import filling as module
from vllm_companion_plugin.client.filling import Filling
from vllm_companion_plugin.client.fitting import checked
from vllm_companion_plugin.core.intervals import Intervals
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare

NAN, INF = float("nan"), float("inf")


class Watched:
    """A writer that remembers what it was asked for."""

    def __init__(self, size_bytes: int) -> None:
        self._writer = memory.create(memory.MEMFD, size_bytes)
        self.writes: list[tuple[int, int, int]] = []
        """Offset, bytes, address of the source."""
        self.flushes: list[int] = []
        """How many writes there had been."""
        self.add_block, self.seal, self.abort = self._writer.add_block, self._writer.seal, self._writer.abort
        self.add_block(size_bytes)

    @property
    def address(self) -> int:
        return self._writer.address

    def write(self, offset_bytes: int, source_address: int, size_bytes: int) -> None:
        self.writes.append((offset_bytes, size_bytes, source_address))
        self._writer.write(offset_bytes, source_address, size_bytes)

    def flush(self) -> None:
        self.flushes.append(len(self.writes))
        self._writer.flush()


def bytes_of(arena: memory.Arena | memory.ArenaWriter, size_bytes: int) -> torch.Tensor:
    return ArenaViews(arena, size_bytes, CPU).bytes_at(0, size_bytes)


class World:
    """The layout of `Small`, a generation of which every byte is random, padding included, and the next one."""

    def __init__(self, *, check_finite: bool = False) -> None:
        packed = prepare(capture(Small()), Stage.UNPROCESSED, memory.MEMFD, CPU)
        self.manifest: Manifest = packed.manifest
        arena = copy(packed, memory.MEMFD, CPU, rebind=False, release=lambda: None)
        self.size_bytes = arena.info.size_bytes
        self.before = torch.randint(0, 256, (self.size_bytes,), dtype=torch.uint8)
        self.writer = Watched(self.size_bytes)
        self.filling = Filling(
            *(self.writer, self.size_bytes, self.manifest, CPU, "m (single) on cpu"), check_finite=check_finite
        )

    def part(self, name: str) -> slice:
        info = self.filling.infos[name]
        storage = self.manifest.storages[info.storage]
        return slice(storage.offset_bytes, storage.offset_bytes + storage.size_bytes)

    def complete(self) -> torch.Tensor:
        self.filling.complete(self.before.data_ptr())
        return bytes_of(self.writer.seal(), self.size_bytes)


def values() -> dict[str, torch.Tensor]:
    model = Small()
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """As it lies in memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def as_laid_out(turned: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided((3, 6), (1, 3)).copy_(turned)


class Wrapped(torch.Tensor):
    """As libraries have whose parameters are computed when they are read: without memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        args, kwargs = tree_map(lambda each: each.inner if isinstance(each, cls) else each, (args, kwargs or {}))
        return func(*args, **kwargs)


class TestIntervals:
    """What was marked, and what was not."""

    @pytest.mark.parametrize(
        ("parts", "gaps"),
        [
            ([], [(0, 10)]),
            ([(0, 10)], []),
            ([(5, 7), (0, 2)], [(2, 5), (7, 10)]),
            ([(0, 2), (2, 4), (4, 6)], [(6, 10)]),
            ([(0, 8), (1, 2)], [(8, 10)]),
            ([(3, 6), (5, 10)], [(0, 3)]),
            ([(4, 4)], [(0, 4), (4, 10)]),
        ],
    )
    def test_gaps(self, parts: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> None:
        """In order, whatever the order of the parts, and though they overlap."""
        intervals = Intervals()
        for part in parts:
            intervals.add(*part)
        assert intervals.gaps(10) == gaps


class TestBytes:
    """An update is what was written, and what was there before."""

    def test_are_moved_once(self) -> None:
        """Of a full update and of its padding, which comes from the generation before."""
        world, new = World(), values()
        assert world.filling.load(new) == 4
        found = world.complete()
        moved = sorted((offset, offset + size) for offset, size, _ in world.writer.writes)
        assert [start for start, _ in moved[1:]] == [stop for _, stop in moved[:-1]]
        assert (moved[0][0], moved[-1][1]) == (0, world.size_bytes)
        expected = world.before.clone()
        for name, tensor in new.items():
            expected[world.part(name)] = raw(tensor)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("name", ["head.weight", "turned", "quantized", "steps"])
    def test_that_nobody_writes_stay(self, name: str) -> None:
        """All but one tensor, and what lies between tensors."""
        world = World()
        tensor = values()["embed.weight" if name == "head.weight" else name]
        world.filling.load([(name, tensor)])
        expected = world.before.clone()
        expected[world.part(name)] = raw(tensor)
        assert torch.equal(world.complete(), expected)

    def test_of_nothing(self) -> None:
        world = World()
        assert world.filling.load({}) == 0
        assert torch.equal(world.complete(), world.before)

    def test_are_those_of_the_last_writing(self) -> None:
        """A tensor may be written again by another call."""
        world, first, second = World(), values(), values()
        world.filling.load(first)
        world.filling.load(second)
        assert torch.equal(world.complete()[world.part("turned")], raw(second["turned"]))

    def test_come_from_the_source_itself(self) -> None:
        """Unless it lies in memory in another way."""
        world, new = World(), values()
        world.filling.load({**new, "turned": new["turned"].contiguous()})
        sources = {address for _, _, address in world.writer.writes}
        assert {new[name].data_ptr() for name in ("embed.weight", "quantized", "steps")} <= sources
        assert torch.equal(world.complete()[world.part("turned")], raw(new["turned"]))

    @pytest.mark.parametrize("given", [dict, iter])
    def test_are_the_values(self, given: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Of a tensor whose memory has others, or none: one that PyTorch negates when it is read, a wrapper."""
        negated = torch.complex(torch.zeros(3), torch.randn(3)).conj().imag.expand(6, 3).t()
        wrapped = Wrapped(torch.randn(5).long())
        assert negated.is_neg()
        world, tensors = World(), {"turned": negated, "steps": wrapped}
        world.filling.load(tensors if given is dict else iter(tensors.items()))
        found = world.complete()
        assert torch.equal(
            found[world.part("turned")].view(torch.float32), raw(as_laid_out(negated)).view(torch.float32)
        )
        assert torch.equal(found[world.part("steps")], raw(wrapped.inner))


class TestTies:
    """Several names of one place get one value."""

    def test_same(self) -> None:
        """As a trainer's state has them."""
        world, new = World(), values()
        assert world.filling.load({"head.weight": new["embed.weight"].clone(), **new}) == 5
        assert torch.equal(world.complete()[world.part("embed.weight")], raw(new["embed.weight"]))

    @pytest.mark.parametrize("calls", [1, 2])
    def test_different(self, calls: int) -> None:
        """Of a trainer that has no tie: engines would have one of both."""
        world, new = World(), {"embed.weight": values()["embed.weight"], "head.weight": values()["embed.weight"]}
        for some in [new.items()] if calls == 1 else [[each] for each in new.items()]:
            world.filling.load(iter(some))
        with pytest.raises(BadRequestError, match=r"embed\.weight and head\.weight in one place, .* different values"):
            world.complete()

    def test_different_once(self) -> None:
        """What is written again counts no more."""
        world, new = World(), values()
        world.filling.load({"head.weight": values()["embed.weight"]})
        world.filling.load({"embed.weight": new["embed.weight"]})
        world.filling.load({"head.weight": new["embed.weight"]})
        assert torch.equal(world.complete()[world.part("embed.weight")], raw(new["embed.weight"]))


class TestBatches:
    """Nobody waits for each copy, and no source goes before its copy has landed."""

    def test_end_with_the_call(self) -> None:
        """What was given may be changed after it."""
        world = World()
        world.filling.load(values())
        assert world.writer.flushes == [4]

    def test_are_bounded_by_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What an iterator gathers is kept until then, and no longer."""
        monkeypatch.setattr(module, "BATCH_BYTES", 2048)
        world, kept, alive = World(), [], []

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for name in ("steps", "quantized", "embed.weight", "turned"):
                tensor = values()[name]
                kept.append(weakref.ref(tensor.untyped_storage()))
                yield name, tensor
                del tensor
                gc.collect()
                alive.append(len(world.filling._sources))

        world.filling.load(gathered())
        assert world.writer.flushes == [3, 4]
        assert alive == [1, 2, 0, 1]
        assert world.filling._sources == []

    def test_are_not_for_what_the_caller_keeps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a mapping, only what had to be laid out anew."""
        monkeypatch.setattr(module, "BATCH_BYTES", 1)
        world, new = World(), values()
        world.filling.load({**new, "turned": new["turned"].contiguous()})
        assert len(world.writer.flushes) == 2
        assert torch.equal(world.complete()[world.part("turned")], raw(new["turned"]))

    def test_are_for_what_is_made_as_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody else keeps what such a mapping gives."""

        class Lazy(dict[str, torch.Tensor]):
            def items(self) -> Any:
                return ((name, tensor.clone()) for name, tensor in super().items())

        monkeypatch.setattr(module, "BATCH_BYTES", 1)
        world = World()
        world.filling.load(Lazy(values()))
        assert len(world.writer.flushes) == len(values()) + 1

    def test_end_with_an_error(self) -> None:
        """Of an iterator that fails midway."""
        world, new = World(), values()

        def fails() -> Iterator[tuple[str, torch.Tensor]]:
            yield "turned", new["turned"]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            world.filling.load(fails())
        assert (world.writer.flushes, world.filling._sources) == ([1], [])


class TestBadInput:
    """What cannot be right is refused by name."""

    def test_twice(self) -> None:
        """An iterator gives a name again; the second value is not written."""
        world, new = World(), values()
        with pytest.raises(BadRequestError, match=r"m \(single\) on cpu was given turned twice"):
            world.filling.load([("turned", new["turned"]), ("steps", new["steps"]), ("turned", new["turned"] + 1)])
        assert torch.equal(world.complete()[world.part("turned")], raw(new["turned"]))

    @pytest.mark.parametrize(
        ("name", "bad"),
        [("turned", NAN), ("turned", -INF), ("embed.weight", INF), ("embed.weight", NAN), ("quantized", NAN)],
    )
    def test_not_finite(self, name: str, bad: float) -> None:
        """On request, all of them, before anything is written; whole numbers are always finite."""
        world, new = World(check_finite=True), values()
        tensor = new[name].float()
        tensor[(-1,) * tensor.dim()] = bad
        new[name] = tensor.to(new[name].dtype)
        with pytest.raises(BadRequestError, match=f"cannot take {name}, which has values that are not finite"):
            world.filling.load(new)
        assert world.writer.writes == []
        with pytest.raises(BadRequestError, match="not finite"):
            world.filling.load([("steps", new["steps"]), (name, new[name])])
        assert len(world.writer.writes) == 1
        World().filling.load(new)

    @pytest.mark.parametrize(
        ("name", "bad", "what"),
        [
            ("turned", None, "NoneType and no tensor"),
            ("turned", np.zeros((3, 6), dtype=np.float32), "ndarray and no tensor"),
            ("turned", torch.zeros(3, 6, device="meta"), "no values of its own"),
            ("turned", torch.zeros(3, 6).to_sparse(), "no values of its own"),
        ],
    )
    def test_without_values(self, name: str, bad: Any, what: str) -> None:
        """Is named with all else, before anything is written."""
        world, new = World(), values()
        with pytest.raises(BadRequestError, match=f"cannot take other, which .*; {name}, which .*{what}"):
            world.filling.load({"other": new["turned"], **new, name: bad})
        assert world.writer.writes == []
        with pytest.raises(BadRequestError, match=f"{name}, which .*{what}"):
            world.filling.load(iter([(name, bad)]))

    def test_says_which_names_there_are(self) -> None:
        """As of a model that a wrapper has put into itself."""
        with pytest.raises(BadRequestError, match=r"cannot take module.turned, .*\. .*`checkpoint_names` and `names`"):
            World().filling.load({"module.turned": values()["turned"]})

    def test_finite(self) -> None:
        """The largest values are."""
        world, new = World(check_finite=True), values()
        new["turned"][0, 0] = torch.finfo(torch.float32).max
        new["quantized"][0] = 448
        assert world.filling.load(new) == 4


def test_one_parameter_under_two_names_is_given_for_each_that_is_known() -> None:
    """The entry possibly does not tie them: then one of them would stay as it was."""
    model = torch.nn.Module()
    model.first, model.second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight

    def names(*known: str) -> list[str]:
        return [name for name, _ in checked(model, known, lambda *_: "", "it")]

    assert names("first.weight", "second.weight") == ["first.weight", "second.weight"]
    assert names("first.weight") == ["first.weight"]
    assert names() == ["first.weight"]
