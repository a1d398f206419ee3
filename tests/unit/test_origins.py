"""Where a value came from decides whose it is: the engine's that built it, or the publication's that loaded it."""

from __future__ import annotations

import array
import collections
import contextlib
import ctypes
import dataclasses
import decimal
import fractions
import functools
import itertools
import pathlib
import random
import re
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.clocks import marked_times
from vllm_companion_plugin.errors import CompanionError, NotShareableError, ParityError
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree import constants, pack
from vllm_companion_plugin.tree.building import WithoutWeights, _Deferring, left_by_loading
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.classes import MUTABLE
from vllm_companion_plugin.tree.observe import Observation
from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy
from vllm_companion_plugin.tree.uses import Uses
from vllm_companion_plugin.tree.uses import check as check_uses
from vllm_companion_plugin.tree.values import class_name, text_of, value_of
from vllm_companion_plugin.wire.manifest import manifest_from_bytes, manifest_to_bytes

pytestmark = pytest.mark.core

CPU = torch.device("cpu")
LARGE = 1 << 19
"""Elements of a float32 tensor that is large enough to be shared, were it a weight."""

Change = Callable[["Model"], object]


def checkpoint(value: float) -> torch.Tensor:
    """Memory that no operator of PyTorch filled, as of a file."""
    return torch.from_numpy(np.full(LARGE, value, dtype=np.float32))


def nothing(model: Model) -> None:
    """Changes nothing."""


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Listed(list[Any]):
    """Has attributes beside its items."""


class Keyed(dict[Any, Any]):
    """Has attributes beside its items."""


class Named(str):
    """Has attributes beside its text."""


def with_attribute(held: Any, value: Any) -> Any:
    held.value = value
    return held


class SlotModule(nn.Module):
    __slots__ = ("value",)


class Plain(nn.Module):
    """Has nothing yet."""


class Becomes(Plain):
    """Of another class than it was built."""


class Subclass(nn.Parameter):
    """A parameter with a class of its own, as vLLM's are."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


Pair = collections.namedtuple("Pair", "first second")


class Model(nn.Module):
    """What `build` makes depends on the engine's flags, here `flag`."""

    def __init__(self, build: Callable[[Model, float], object], flag: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(8, 6)
        build(self, flag)


def keep(model: Model, value: Any) -> Any:
    model.kept = value
    return value


def _seed() -> None:
    """As vLLM does before it loads a model."""
    torch.manual_seed(0)
    np.random.seed(0)


@dataclasses.dataclass
class Published:
    model: Model
    manifest: Manifest
    arena: arenas.Arena


def publish(
    build: Callable[[Model, float], object],
    load: Change = nothing,
    process: Change = nothing,
    flag: float = 1.0,
    of: type[Model] = Model,
) -> Published:
    """Build, load and process under observation, and pack what came of it."""
    _seed()
    uses = Uses(of)
    model = of(build, flag)
    observation = Observation(model, uses)
    with observation.watching(), marked_times():
        noted = (
            patches.READS_OF_VALUES.on(nn.Module, uses.noting),
            patches.READS_OF_TENSORS.on(torch.Tensor, uses.noting),
        )
        with torch.no_grad(), noted[0], noted[1]:
            for parameter in (*model.first.parameters(), *model.second.parameters()):
                parameter.data.copy_(checkpoint(0.25)[: parameter.numel()].view_as(parameter))
            load(model)
        observation.end_loading(model)
        with observation.processing(model):
            process(model)
    packed = pack.prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU, observation)
    arena = pack.copy(packed, arenas.MEMFD, CPU, rebind=True, release=lambda: None)
    return Published(model, manifest_from_bytes(manifest_to_bytes(packed.manifest)), arena)


def attach(
    published: Published,
    build: Callable[[Model, float], object],
    process: Change = nothing,
    flag: float = 1.0,
    of: type[Model] = Model,
) -> Model:
    """Build with this engine's flag, and bind to what was published."""
    _seed()
    built = WithoutWeights(CPU, left_by_loading(published.manifest))
    with built.building():
        model = of(build, flag)
    check_uses(published.manifest, model)
    source = Source(
        published.manifest, ArenaViews(published.arena, published.arena.info.size_bytes, CPU), CPU, copy=False
    )
    strategy = Strategy.HIDE if process is nothing else Strategy.REPLAY
    with constants.as_loaded(published.manifest.common_values, class_name(type(model))):
        restorer = Restorer(model, source, CPU, built=built)
        restorer.bind_early(lambda module: strategy if module is model else Strategy.HIDE)
        if process is not nothing:
            with restorer.replaying(model):
                process(model)
        restorer.finish()
    return model


def in_arena(tensor: torch.Tensor, published: Published) -> bool:
    start = published.arena.address
    return start <= tensor.data_ptr() < start + published.arena.info.size_bytes


# Values of a kind, made of a number.
KINDS: dict[str, Callable[[float], Any]] = {
    "float": lambda x: x,
    "int": lambda x: int(x * 8),
    "bool": lambda x: x > 0.5,
    "str": str,
    "str like a reference": lambda x: f"Box @first:{x}",
    "bytes": lambda x: str(x).encode(),
    "None": lambda x: None if x == 1.0 else x,
    "nan": lambda x: x if x == 1.0 else float("nan"),
    "complex": lambda x: complex(x, -0.0),
    "tuple": lambda x: (x, (int(x * 8),)),
    "list": lambda x: [x, "a"],
    "dict": lambda x: {"b": x, "a": [x]},
    "order of a dict": lambda x: dict.fromkeys("ab" if x == 1.0 else "ba"),
    "dict by number": lambda x: {x: 1},
    "set": lambda x: {x, 2.0},
    "frozenset": lambda x: frozenset((x,)),
    "deque": lambda x: collections.deque([x], maxlen=3),
    "OrderedDict": lambda x: collections.OrderedDict(a=x),
    "named tuple": lambda x: Pair(x, 2),
    "bytearray": lambda x: bytearray([int(x * 8)]),
    "Decimal": lambda x: decimal.Decimal(str(x)),
    "Fraction": fractions.Fraction,
    "range": lambda x: range(int(x * 8)),
    "slice": lambda x: slice(int(x * 8)),
    "numpy float32": np.float32,
    "numpy float64": np.float64,
    "numpy int": lambda x: np.int16(x * 8),
    "numpy array": lambda x: np.full((2, 3), x),
    "numpy records": lambda x: np.full(2, x, dtype=[("a", "f4"), ("b", "i8")]),
    "array": lambda x: array.array("d", [x]),
    "count": lambda x: itertools.count(int(x * 8)),
    "dtype": lambda x: torch.float16 if x == 1.0 else torch.int8,
    "Size": lambda x: torch.Size([int(x * 8)]),
    "flags": lambda x: re.I if x == 1.0 else re.I | re.M,
    "enum": lambda x: Stage.PROCESSED if x == 1.0 else Stage.UNPROCESSED,
    "torch generator": lambda x: torch.Generator().manual_seed(int(x * 8)),
    "random generator": lambda x: random.Random(int(x * 8)),
    "numpy generator": lambda x: np.random.default_rng(int(x * 8)),
    "numpy random state": lambda x: np.random.RandomState(int(x * 8)),
    "defaultdict": lambda x: collections.defaultdict(int, a=x),
    "namespace": lambda x: types.SimpleNamespace(a=x),
    "Counter": lambda x: collections.Counter({"a": int(x * 8)}),
    "Path": lambda x: pathlib.Path(f"/{x}"),
    "Pattern": lambda x: re.compile(f"a{x}", re.I),
    "numpy dtype": lambda x: np.dtype("f4" if x == 1.0 else "i2"),
}


def deep(value: Any, depth: int = 12) -> Any:
    return Box(deep(value, depth - 1)) if depth else value


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


# How a model holds a value: put it there, and read it.
PLACES: dict[str, tuple[Callable[[Model, Any], object], Callable[[Model], Any]]] = {
    "attribute": (lambda m, v: setattr(m, "x", v), lambda m: m.x),
    "of a child": (lambda m, v: setattr(m.first, "x", v), lambda m: m.first.x),
    "in a list with objects": (lambda m, v: setattr(m, "x", [Box(0), v]), lambda m: m.x[1]),
    "in a tuple with objects": (lambda m, v: setattr(m, "x", (Box(0), v)), lambda m: m.x[1]),
    "in a named tuple with objects": (lambda m, v: setattr(m, "x", Pair(Box(0), v)), lambda m: m.x.second),
    "in a dict with objects": (lambda m, v: setattr(m, "x", {"a": Box(0), "b": v}), lambda m: m.x["b"]),
    "in a deque with objects": (lambda m, v: setattr(m, "x", collections.deque([Box(0), v])), lambda m: m.x[1]),
    "of an object": (lambda m, v: setattr(m, "x", Box(v)), lambda m: m.x.value),
    "of a frozen object": (lambda m, v: setattr(m, "x", Frozen(v)), lambda m: m.x.value),
    "in a slot": (lambda m, v: setattr(m, "x", Slots(v)), lambda m: m.x.value),
    "of a list": (lambda m, v: setattr(m, "x", with_attribute(Listed([1]), v)), lambda m: m.x.value),
    "of a dict": (lambda m, v: setattr(m, "x", with_attribute(Keyed(a=1), v)), lambda m: m.x.value),
    "of a string": (lambda m, v: setattr(m, "x", with_attribute(Named("a"), v)), lambda m: m.x.value),
    "in a slot of a module": (
        lambda m, v: setattr(m, "x", {"a": with_attribute(SlotModule(), v)}),
        lambda m: m.x["a"].value,
    ),
    "of an object as key": (lambda m, v: setattr(m, "x", {Box(1): v, Box(2): 2}), lambda m: next(iter(m.x.values()))),
    "deep": (
        lambda m, v: setattr(m, "x", deep(v)),
        lambda m: functools.reduce(lambda held, _: held.value, range(12), m.x),
    ),
    "argument of a partial": (lambda m, v: setattr(m, "x", functools.partial(max, v)), lambda m: m.x.args[0]),
    "keyword of a partial": (lambda m, v: setattr(m, "x", functools.partial(max, k=v)), lambda m: m.x.keywords["k"]),
    "captured": (lambda m, v: setattr(m, "x", closure(v)), lambda m: m.x()),
    "of a method's object": (lambda m, v: setattr(m, "x", Box(v).__init__), lambda m: m.x.__self__.value),
    "on a parameter": (lambda m, v: setattr(m.first.weight, "x", v), lambda m: m.first.weight.x),
    "of an object on a parameter": (
        lambda m, v: setattr(m.first.weight, "x", Box(v)),
        lambda m: m.first.weight.x.value,
    ),
    "of a module in a dict": (lambda m, v: setattr(m, "x", {"a": in_module(v)}), lambda m: m.x["a"].x),
    "of a module in an object": (lambda m, v: setattr(m, "x", Box([in_module(v)])), lambda m: m.x.value[0].x),
}


def in_module(value: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.x = value
    return module


def same(one: Any, other: Any) -> bool:
    return text_of(one) == text_of(other) and type(one) is type(other)


CASES = [(kind, "attribute") for kind in KINDS] + [
    (kind, place) for place in PLACES for kind in ("float", "tuple", "numpy float32")
]


@pytest.mark.parametrize(("kind", "place"), CASES)
class TestValue:
    def test_loaded_is_the_publications(self, kind: str, place: str) -> None:
        """What loading set is what the publisher has, whatever this engine's constructor made."""
        make, (put, get) = KINDS[kind], PLACES[place]
        published = publish(lambda m, flag: put(m, make(1.0)), load=lambda m: put(m, make(0.25)))
        assert same(get(attach(published, lambda m, flag: put(m, make(1.0)))), make(0.25))

    def test_built_is_the_engines(self, kind: str, place: str) -> None:
        """What the constructor made of a flag stays so, but for what says how bytes are understood: that is refused."""
        make, (put, get) = KINDS[kind], PLACES[place]
        published = publish(lambda m, flag: put(m, make(flag)), flag=1.0)
        if kind in ("dtype", "enum", "flags", "numpy dtype"):
            with pytest.raises(ParityError, match="x is"):
                attach(published, lambda m, flag: put(m, make(flag)), flag=0.25)
            return
        attached = attach(published, lambda m, flag: put(m, make(flag)), flag=0.25)
        assert same(get(attached), make(0.25))


class Ways:
    """An object with several ways to do the same."""

    def one(self) -> int:
        return 1

    def other(self) -> int:
        return 1

    @staticmethod
    def static() -> int:
        return 1


def other_function() -> int:
    return 1


class TestChoice:
    """What a constructor chose by a flag, and neither loading nor processing touched."""

    @pytest.mark.parametrize(
        ("chosen", "here"),
        [
            (Ways().one, Ways().other),
            (Ways().one, Ways.static),
            (Ways.static, Ways().other),
            (None, Ways()),
            (None, other_function),
        ],
    )
    def test_it_stays(self, chosen: Any, here: Any) -> None:
        """As engines have it that are compiled and others that are not: the bytes are the same."""

        def build(m: Model, flag: float) -> None:
            value = chosen if flag else here
            if value is not None:
                m.x = value

        published = publish(build, flag=1.0)
        assert attach(published, build, flag=0.0).x is here
        assert getattr(attach(publish(build, flag=0.0), build, flag=1.0), "x", None) is chosen

    @pytest.mark.parametrize(
        ("chosen", "here"),
        [
            *((torch.relu, torch.tanh), (Ways.static, other_function), (Ways(), Box(1)), (Ways().one, torch.relu)),
            *((None, Box), (None, torch.float16), (None, Stage.PROCESSED)),
        ],
    )
    def test_what_says_how_bytes_are_understood_must_be_equal(self, chosen: Any, here: Any) -> None:
        def build(m: Model, flag: float) -> None:
            if (value := chosen if flag else here) is not None:
                m.x = value

        with pytest.raises(ParityError, match="x is"):
            attach(publish(build, flag=1.0), build, flag=0.0)

    def test_a_choice_of_processing_must_be_equal(self) -> None:
        process = lambda way: lambda m: setattr(m, "x", way)  # noqa: E731
        published = publish(lambda m, flag: None, process=process(Ways().one))
        with pytest.raises(ParityError, match="x is"):
            attach(published, lambda m, flag: None, process=process(Ways().other))


class TestLoading:
    def test_what_it_adds_and_removes(self) -> None:
        """Values and tensors that only loading makes are there; what it deletes is gone."""

        def build(m: Model, flag: float) -> None:
            m.gone, m.table, m.unused = 1, {"a": Box(1)}, nn.Parameter(torch.ones(3))
            m.register_buffer("buffer", torch.zeros(3), persistent=False)

        def load(m: Model) -> None:
            del m.gone, m.unused, m.buffer
            m.note, m.listed, m.table["b"] = "loaded", [1, 2], 5
            m.added = nn.Parameter(torch.full((3, 40_000), 7.0), requires_grad=False)
            m.first.register_buffer("seen", torch.full((2,), 3.0), persistent=False)
            m.parts = [torch.full((2,), 4.0)]
            m.first.weight.scale = torch.full((2,), 6.0)

        attached = attach(publish(build, load), build)
        assert (attached.note, attached.listed, attached.table["b"]) == ("loaded", [1, 2], 5)
        assert not hasattr(attached, "gone")
        assert not hasattr(attached, "unused")
        assert attached._non_persistent_buffers_set == set()
        assert attached.added.unique().tolist() == [7.0]
        assert not attached.added.requires_grad
        assert "seen" in attached.first._non_persistent_buffers_set
        assert attached.first.seen.tolist() == [3.0, 3.0]
        assert attached.parts[0].tolist() == [4.0, 4.0]
        assert attached.first.weight.scale.tolist() == [6.0, 6.0]

    def test_methods_of_the_model(self) -> None:
        """A parameter that loading adds has its loader, as others have: that of the module here."""

        def load(m: Model) -> None:
            m.first.note = nn.Parameter(torch.full((2,), 5.0))
            m.first.note.loader = m.second.extra_repr
            m.second.call = m.first.extra_repr

        attached = attach(publish(lambda m, flag: None, load), lambda m, flag: None)
        assert attached.first.note.loader == attached.second.extra_repr
        assert attached.second.call == attached.first.extra_repr

    def test_what_it_ties(self) -> None:
        """Parameters and modules that loading ties are one object."""

        def build(m: Model, flag: float) -> None:
            m.third = nn.Linear(8, 6)

        def load(m: Model) -> None:
            m.second.weight = m.first.weight
            m.third = m.first

        attached = attach(publish(build, load), build)
        assert attached.second.weight is attached.first.weight
        assert attached.second.bias is not attached.first.bias
        assert attached.third is attached.first

    def test_what_it_unties(self) -> None:
        """A parameter that had another one's memory when it was built has its own."""

        def build(m: Model, flag: float) -> None:
            m.second.weight = m.first.weight

        def load(m: Model) -> None:
            m.second.weight = nn.Parameter(torch.full((6, 8), 9.0))

        attached = attach(publish(build, load), build)
        assert attached.second.weight.unique().tolist() == [9.0]
        assert attached.first.weight.unique().tolist() == [0.25]

    def test_modules_that_it_adds(self) -> None:
        """A module that loading makes is made again, with what is in it, and no constructor is called."""

        def load(m: Model) -> None:
            m.extra = nn.Sequential(nn.Linear(2, 3, bias=False), nn.LayerNorm(3))
            m.extra[0].weight = nn.Parameter(torch.full((3, 2), 5.0), requires_grad=False)
            m.extra[1].note = "new"
            m.again = m.extra[0]

        attached = attach(publish(lambda m, flag: None, load), lambda m, flag: None)
        assert attached.extra(torch.ones(1, 2)).shape == (1, 3)
        assert attached.extra[0].weight.unique().tolist() == [5.0]
        assert not attached.extra[0].weight.requires_grad
        assert attached.extra[1].note == "new"
        assert attached.again is attached.extra[0]
        assert attached.extra[0]._parameters["bias"] is None
        assert attached.extra[0].state_dict().keys() == {"weight"}

    @pytest.mark.parametrize("kind", ["reversed", "cut", "head", "first", "collected", "swapped"])
    def test_the_order_of_modules(self, kind: str) -> None:
        """Layers run in the order that loading gave them."""

        def build(m: Model, flag: float) -> None:
            m.layers = nn.ModuleList([nn.Linear(number + 1, 1) for number in range(12)])

        def load(m: Model) -> None:
            for layer in m.layers:
                for parameter in layer.parameters():
                    parameter.data.fill_(layer.in_features)
            layers = list(m.layers)
            if kind == "reversed":
                m.layers = nn.ModuleList(reversed(layers))
            elif kind == "cut":
                del m.layers[1]
            elif kind == "head":
                m.layers = m.layers[:3]
            elif kind == "first":
                m._modules["first"] = m._modules.pop("first")
            elif kind == "collected":
                m.some = nn.ModuleList(layers[number] for number in (7, 1, 11, 3))
            else:
                m.layers[2], m.layers[5] = m.layers[5], m.layers[2]

        published = publish(build, load)
        attached = attach(published, build)
        for one, other in (
            (published.model, attached),
            *zip(published.model.children(), attached.children(), strict=True),
        ):
            assert [name for name, _ in one.named_children()] == [name for name, _ in other.named_children()]
        for one, other in zip(published.model.modules(), attached.modules(), strict=True):
            assert getattr(one, "in_features", None) == getattr(other, "in_features", None)
            assert [p.tolist() for p in one.parameters()] == [p.tolist() for p in other.parameters()]

    def test_modules_that_it_removes(self) -> None:
        """A part that loading takes out is not there."""

        def build(m: Model, flag: float) -> None:
            m.tower = nn.Sequential(nn.Linear(2, 2))

        attached = attach(publish(build, lambda m: delattr(m, "tower")), build)
        assert not hasattr(attached, "tower")

    def test_a_form_that_it_changes(self) -> None:
        """A parameter of another shape and dtype than it was built with is the published one."""

        def load(m: Model) -> None:
            m.first.weight.data = torch.full((3, 50_000), 2.0, dtype=torch.float16)

        attached = attach(publish(lambda m, flag: None, load), lambda m, flag: None)
        assert attached.first.weight.shape == (3, 50_000)
        assert attached.first.weight.dtype is torch.float16

    def test_flags_of_tensors(self) -> None:
        """Whether gradients are wanted, and lazily conjugated or negated elements, are restored."""

        def load(m: Model) -> None:
            m.first.weight.requires_grad_(False)
            values = torch.complex(torch.full((3,), 1.0), torch.full((3,), 2.0))
            m.register_buffer("conjugated", values.conj(), persistent=False)
            m.register_buffer("negated", values.conj().imag, persistent=False)

        published = publish(lambda m, flag: None, load)
        attached = attach(published, lambda m, flag: None)
        assert not attached.first.weight.requires_grad
        for name in ("conjugated", "negated"):
            assert torch.equal(getattr(attached, name), getattr(published.model, name))

    @pytest.mark.parametrize(
        "load",
        [
            lambda m: m.first.register_forward_hook(lambda module, args, output: output * 2),
            lambda m: m.first.register_forward_hook(nothing),
            lambda m: m.table.update({Box: 1}),
            lambda m: setattr(m, "not a name", 1),
            lambda m: setattr(m, "function", lambda: 1),
            lambda m: setattr(m, "helper", Box(1)),
            lambda m: m.add_module("third", type("Local", (nn.Linear,), {})(2, 2)),
            lambda m: setattr(m, "opaque", object()),
            lambda m: setattr(m, "weak", weakref.ref(m.second)),
            lambda m: next(m.iterator),
            lambda m: m.memory.__setitem__(0, 9),
            lambda m: m.matrix.fill(9),
            lambda m: setattr(type(m.shared), "common", 2),
            lambda m: type(m.shared).objects.update(a=Box(1)),
            lambda m: setattr(type(m.mapping), "common", 2),
        ],
        ids=[
            *("hook", "known hook", "key", "name", "function", "object", "module", "opaque"),
            *("weak", "iterator", "memory", "matrix", "class", "dict", "class of a dict"),
        ],
    )
    def test_what_cannot_be_described_is_refused_by_name(self, load: Change) -> None:
        """The publisher says what it is, and nobody gets a guess."""
        shared = type("Shared", (), {"common": 1, "objects": {}})
        mapping = type("Mapping", (dict,), {"common": 1})

        def build(m: Model, flag: float) -> None:
            m.opaque, m.shared, m.mapping, m.table = object(), shared(), mapping(a=1), {"a": Box(1)}
            m.weak, m.iterator, m.memory = weakref.ref(m.first), iter([1, 2]), memoryview(bytearray(2))
            m.matrix = np.zeros(2).view(np.recarray)

        publish(build)
        named = r"_forward_hooks|table\[|not a name|function|helper|third|opaque|weak|iterator|memory|matrix"
        named += r"|Shared\.(common|objects)|Mapping\.common"
        with pytest.raises(NotShareableError, match=named):
            publish(build, load)

    @pytest.mark.parametrize("number", [False, True])
    @pytest.mark.parametrize("when", ["build", "load", "process"])
    def test_addresses_of_weights_are_refused_by_name(self, when: str, number: bool) -> None:
        """A kernel that has a table of them would read what is elsewhere by then."""

        def put(m: Model) -> None:
            address = m.first.weight[2].data_ptr()
            m.pointers = [address] if number else torch.tensor([3, address])

        steps: dict[str, Change] = {when: put}
        with pytest.raises(NotShareableError, match="pointers holds the address of a weight"):
            publish(
                lambda m, flag: steps.get("build", nothing)(m),
                steps.get("load", nothing),
                steps.get("process", nothing),
            )

    @pytest.mark.parametrize("make", [lambda x: [x], lambda x: {"a": x}, lambda x: np.full(2, x)])
    def test_replaced_is_not_changed_in_place(self, make: Callable[[float], Any]) -> None:
        """Whoever else has the object that building put there keeps it: a module, a configuration, a constant."""

        def build(m: Model, flag: float) -> None:
            m.common = m.x = make(1.0)

        attached = attach(publish(build, lambda m: setattr(m, "x", make(0.25))), build)
        assert same(attached.x, make(0.25))
        assert same(attached.common, make(1.0))

    def test_changed_in_place_is_the_same_object(self) -> None:
        """Whoever else has it sees what loading changed."""
        constant = [1]
        published = publish(lambda m, flag: setattr(m, "x", [1]), lambda m: m.x.append(2))
        attached = attach(published, lambda m, flag: setattr(m, "x", constant))
        assert attached.x is constant
        assert constant == [1, 2]

    @pytest.mark.parametrize("make", [make for name, make in KINDS.items() if isinstance(make(1.0), tuple(MUTABLE))])
    def test_who_has_one_object_has_one(self, make: Callable[[float], Any]) -> None:
        """A value that can be changed is one object for all who held it, or for whom loading tied it."""

        def build(m: Model, flag: float) -> None:
            m.one, m.same, m.tied, m.untied, m.kept = make(1.0), None, make(1.0), None, make(1.0)
            m.same = m.one
            m.untied = m.kept
            m.boxes = [Box(m.one), make(1.0)]

        def load(m: Model) -> None:
            m.tied, m.untied, m.boxes[1] = m.kept, make(1.0), m.kept
            with contextlib.suppress(StopIteration):
                change(m.one)

        def change(value: Any) -> None:
            if isinstance(value, itertools.count):
                next(value)
            elif isinstance(value, torch.Generator):
                value.manual_seed(99)
            elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)):
                value.random()
            elif isinstance(value, types.SimpleNamespace):
                value.more = 1
            elif isinstance(value, (dict, set)):
                value.clear()
            elif isinstance(value, np.ndarray):
                value[...] = 0
            else:
                value.extend(type(value)(value) if not isinstance(value, array.array) else value)

        published = publish(build, load)
        attached = attach(published, build)
        for m in (published.model, attached):
            assert m.one is m.same is m.boxes[0].value
            assert m.tied is m.kept is m.boxes[1]
            assert m.untied is not m.kept
        assert same(attached.one, published.model.one)
        assert not same(attached.one, attached.kept) or isinstance(make(1.0), np.ndarray)

    @pytest.mark.parametrize("value", [1, None, "a", (1,), Stage.PROCESSED], ids=repr)
    def test_equal_values_that_it_sets_apart(self, value: object) -> None:
        """Python has one object for equal constants. It ties nothing, because no constant changes."""

        def build(m: Model, flag: float) -> None:
            m.x, m.y, m.box = value, value, Box(value)

        def load(m: Model) -> None:
            m.x, m.y, m.box.value = 2, 3, 4

        attached = attach(publish(build, load), build)
        assert (attached.x, attached.y, attached.box.value) == (2, 3, 4)

    @pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
    def test_the_order_of_objects(self, kind: Callable[..., Any]) -> None:
        """Items of a dict are in the order that loading gave them, whatever they are."""

        def build(m: Model, flag: float) -> None:
            m.x = kind(a=Box(1), b=torch.ones(2), c=3)

        def load(m: Model) -> None:
            m.x["d"] = 4
            m.x["a"] = m.x.pop("a")
            del m.x["c"]

        attached = attach(publish(build, load), build)
        assert list(attached.x) == ["b", "d", "a"]
        assert attached.x["a"].value == 1

    def test_the_order_of_parameters(self) -> None:
        """Loading may put one anew."""

        def load(m: Model) -> None:
            weight = m.first.weight
            del m.first.weight
            m.first.weight = weight

        attached = attach(publish(lambda m, flag: None, load), lambda m, flag: None)
        assert [name for name, _ in attached.first.named_parameters()] == ["bias", "weight"]

    def test_what_it_takes_out_of_a_list(self) -> None:
        """A list of objects is as short as loading left it."""

        def build(m: Model, flag: float) -> None:
            m.x = [Box(number) for number in range(12)]

        def load(m: Model) -> None:
            del m.x[2:]
            m.x.append(5)

        attached = attach(publish(build, load), build)
        assert [getattr(held, "value", held) for held in attached.x] == [0, 1, 5]

    @pytest.mark.parametrize("kind", ["buffer", "parameter", "list", "module"])
    def test_what_it_swaps(self, kind: str) -> None:
        """Tensors that only building made are where loading put them."""

        def build(m: Model, flag: float) -> None:
            one, other = torch.full((4,), flag), torch.full((4,), 2 * flag)
            if kind == "list":
                m.x = [one, other]
            elif kind == "module":
                m.a, m.b = nn.Linear(1, 1), nn.Linear(1, 1)
                m.a.register_buffer("table", one)
                m.b.register_buffer("table", other)
            else:
                m.a, m.b = (nn.Parameter(one), nn.Parameter(other)) if kind == "parameter" else (one, other)

        def load(m: Model) -> None:
            if kind == "list":
                m.x.reverse()
            else:
                m.a, m.b = m.b, m.a

        def values(m: Model) -> list[float]:
            tensors = m.x if kind == "list" else [m.a.table, m.b.table] if kind == "module" else [m.a, m.b]
            return [float(tensor[0].detach()) for tensor in tensors]

        published = publish(build, load)
        assert values(published.model) == [2.0, 1.0]
        assert values(attach(published, build, flag=0.25)) == [0.5, 0.25]

    @pytest.mark.parametrize("kind", ["part", "replaced"])
    def test_moves_that_cannot_be_described_are_refused(self, kind: str) -> None:
        """Another part of what building made, or one that is moved away from where another one is now."""

        def build(m: Model, flag: float) -> None:
            m.a, m.b = torch.arange(8.0), torch.arange(8.0) * 2
            m.part = m.a[:4]

        def load(m: Model) -> None:
            if kind == "part":
                m.part = m.a[4:]
            else:
                m.b, m.a = m.a, checkpoint(3.0)[:8].clone()

        with pytest.raises(NotShareableError, match=r"loading (set part to a part|moved :a to b)"):
            publish(build, load)

    @pytest.mark.parametrize("before", ["parameter", "buffer", "attribute"])
    @pytest.mark.parametrize("after", ["parameter", "buffer", "attribute"])
    def test_another_kind(self, before: str, after: str) -> None:
        """A parameter becomes a buffer, and whatever else."""

        def put(m: Model, kind: str, tensor: torch.Tensor) -> None:
            if hasattr(m, "x"):
                del m.x
            if kind == "buffer":
                m.register_buffer("x", tensor)
            else:
                m.x = nn.Parameter(tensor) if kind == "parameter" else tensor

        published = publish(
            lambda m, flag: put(m, before, torch.zeros(4)), lambda m: put(m, after, checkpoint(3.0)[:4].clone())
        )
        attached = attach(published, lambda m, flag: put(m, before, torch.zeros(4)))
        assert attached.x.tolist() == [3.0] * 4
        assert ("x" in attached._parameters, "x" in attached._buffers) == (after == "parameter", after == "buffer")

    def test_parts_of_a_list_of_parameters(self) -> None:
        """Their names are numbers."""

        def build(m: Model, flag: float) -> None:
            m.x = nn.ParameterList([nn.Parameter(torch.zeros(2))])

        def load(m: Model) -> None:
            m.x.append(nn.Parameter(checkpoint(3.0)[:2].clone()))

        assert attach(publish(build, load), build).x[1].tolist() == [3.0, 3.0]

    def test_functions_that_one_function_makes(self) -> None:
        """They have one name, and are told apart by their code."""

        def choose(twice: bool) -> Callable[[int], int]:
            return (lambda number: 2 * number) if twice else (lambda number: number)

        with pytest.raises(NotShareableError, match=r"loading set function to function .*<lambda>"):
            publish(
                lambda m, flag: setattr(m, "function", choose(True)),
                lambda m: setattr(m, "function", choose(False)),
            )

    def test_parts_of_sets(self) -> None:
        """The object that loading changed is the one that is changed here."""

        def load(m: Model) -> None:
            next(box for box in m.x if box.value == 1).value = 9

        def build(m: Model, flag: float) -> None:
            m.x = {Box(number) for number in range(1, 5)}

        for _ in range(8):  # their order follows from addresses
            assert sorted(box.value for box in attach(publish(build, load), build).x) == [2, 3, 4, 9]

    def test_a_container_that_holds_itself_twice(self) -> None:
        """Walking it ends."""

        def build(m: Model, flag: float) -> None:
            m.x = []
            m.x.extend([m.x, m.x])

        assert len(attach(publish(build), build).x) == 2


class Filled(nn.Module):
    def __init__(self, value: float, fill: Callable[[nn.Parameter, float], object] = nn.init.constant_) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(LARGE))
        fill(self.weight, value)


class Given(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((LARGE,), value))


def renamed(m: Model, value: float) -> nn.Parameter:
    m.before = nn.Parameter(torch.empty(LARGE))
    nn.init.constant_(m.before, value)
    kept = m.before
    del m.before
    return kept


MADE_ELSEWHERE: dict[str, Callable[[Model, float], nn.Parameter]] = {
    "filled": lambda m, value: Filled(value).weight,
    "drawn": lambda m, value: nn.Embedding(LARGE // 8, 8).weight,
    "drawn between bounds": lambda m, value: Filled(value, nn.init.trunc_normal_).weight,
    "made of values": lambda m, value: Given(value).weight,
    "renamed": renamed,
}


def fill_its_data(weight: nn.Parameter, value: float) -> None:
    weight.data.fill_(value)


@torch.no_grad()
def fill_in_a_list(weight: nn.Parameter, value: float) -> None:
    torch._foreach_zero_([weight])


@torch.no_grad()
def fill_a_view(weight: nn.Parameter, value: float) -> None:
    nn.init.orthogonal_(weight.view(128, -1), value)


def fill_in_a_thread(weight: nn.Parameter, value: float) -> None:
    thread = threading.Thread(target=nn.init.constant_, args=(weight, value))
    thread.start()
    thread.join()


def forget(m: Model) -> None:
    del m.kept


LOST: dict[str, tuple[Callable[[float], nn.Parameter], Change]] = {
    "removed by processing": (lambda value: Filled(value).weight, forget),
    "filled by its data": (lambda value: Filled(value, fill_its_data).weight, nothing),
    "filled in a list": (lambda value: Filled(value, fill_in_a_list).weight, nothing),
    "filled by a view": (lambda value: Filled(value, fill_a_view).weight, nothing),
    "filled in a thread": (lambda value: Filled(value, fill_in_a_thread).weight, nothing),
    "computed": (lambda value: nn.Parameter(Filled(value, fill_its_data).weight.data * 2), nothing),
}
"""Nothing says that they are what loading will leave alone, when they are given values."""


class TestTensor:
    def test_work_space_is_private_and_the_engines(self) -> None:
        """A large buffer that nothing fills is never mapped, and has the shape of this engine's limits."""

        def build(m: Model, flag: float) -> None:
            rows = int(flag * 8)
            m.zeros = torch.zeros(rows, LARGE // 8)
            m.uninitialized = torch.empty(rows, LARGE // 8)
            m.parameter = nn.Parameter(torch.zeros(rows, LARGE // 8), requires_grad=False)
            m.listed = [torch.zeros(rows, LARGE // 8)]

        published = publish(build, flag=1.0)
        for model, rows in ((published.model, 8), (attach(published, build, flag=1.0), 8)):
            for tensor in (model.zeros, model.uninitialized, model.parameter, model.listed[0]):
                assert tensor.shape == (rows, LARGE // 8)
                assert not in_arena(tensor, published)
                tensor.fill_(1.0)  # a write to shared memory would end this process

        def others(m: Model, flag: float) -> None:
            build(m, flag)
            del m.parameter

        published = publish(others, flag=1.0)
        attached = attach(published, others, flag=0.25)
        for tensor in (attached.zeros, attached.uninitialized, attached.listed[0]):
            assert tensor.shape == (2, LARGE // 8)
            tensor.fill_(1.0)
        assert published.arena.info.size_bytes < 1 << 20

    def test_a_table_of_the_constructor_is_the_engines(self) -> None:
        """A rope table is as long as this engine's limit, with this engine's values."""

        def build(m: Model, flag: float) -> None:
            m.register_buffer("table", torch.arange(int(flag * 400_000), dtype=torch.float32) * flag, persistent=False)

        attached = attach(publish(build, flag=1.0), build, flag=0.25)
        assert torch.equal(attached.table, torch.arange(100_000) * 0.25)

    @pytest.mark.parametrize(
        "fill",
        [
            lambda held, flag: held.fill_(flag),
            lambda held, flag: held.__setitem__(slice(None), flag),
            lambda held, flag: (
                held[: LARGE // 2].fill_(flag) is held[LARGE // 2 :].view(2, -1).copy_(torch.tensor(flag))
            ),
            lambda held, flag: held.data.fill_(flag),
            lambda held, flag: torch.full((LARGE,), flag, out=held),
            lambda held, flag: nn.init.constant_(held, flag),
            lambda held, flag: held.numpy().fill(flag),
            lambda held, flag: torch.ops.aten.fill_(held, flag),
        ],
        ids=["method", "item", "views", "data", "out", "init", "numpy", "operator"],
    )
    def test_what_the_constructor_fills_by_hand_is_the_engines(self, fill: Callable[[Any, float], object]) -> None:
        """Memory of any size that a constructor asks for empty, and then writes to."""

        def build(m: Model, flag: float) -> None:
            m.register_buffer("table", torch.empty(LARGE), persistent=False)
            m.view = m.table[5:7]
            fill(m.table, flag)
            m.largest = m.table.max().item()

        attached = attach(publish(build), build, flag=0.25)
        assert attached.table.unique().tolist() == attached.view.unique().tolist() == [attached.largest] == [0.25]
        attached.table[5] = 9.0
        assert attached.view[0] == 9.0

    @pytest.mark.parametrize(
        "draw",
        [
            lambda: nn.Linear(512, 512),
            lambda: nn.init.xavier_uniform_(nn.Parameter(torch.empty(512, 512))),
            lambda: nn.Parameter(torch.empty(512, 512).normal_()),
            lambda: nn.Parameter(torch.randn(512, 512)),
        ],
        ids=["Linear", "xavier", "before", "randn"],
    )
    def test_numbers_are_drawn_as_in_a_normal_load(self, draw: Callable[[], Any]) -> None:
        """Those for a weight are never used, but the next ones follow from them."""

        def build(m: Model, flag: float) -> None:
            torch.manual_seed(int(flag * 8))
            m.weight = draw()
            m.register_buffer("noise", torch.randn(4), persistent=False)

        def load(m: Model) -> None:
            for parameter in m.parameters():
                parameter.data.fill_(3.0)

        attached = attach(publish(build, load), build, flag=0.25)
        assert attached.noise.tolist() == Model(build, 0.25).noise.tolist()
        assert next(attached.parameters()).unique().tolist() == [3.0]

    @pytest.mark.parametrize(
        "make",
        [
            lambda weight, flag: torch.full((8,), flag, device=weight.device),
            lambda weight, flag: torch.tensor([flag] * 8, device=weight.device),
            lambda weight, flag: torch.empty(LARGE, device=weight.device).fill_(flag),
            lambda weight, flag: torch.full((8,), flag).to(weight.device),
            lambda weight, flag: torch.full((8,), flag).to(weight),
            lambda weight, flag: torch.full((8,), flag).type_as(weight),
            lambda weight, flag: torch.full((8,), flag, device=(weight.detach() * 2).device),
            lambda weight, flag: weight.new_full((8,), flag),
            lambda weight, flag: weight.new_tensor([flag] * 8),
            lambda weight, flag: torch.full_like(weight, flag),
            lambda weight, flag: torch.zeros_like(weight) + flag,
            lambda weight, flag: weight.new_empty(8).fill_(flag),
            lambda weight, flag: torch.empty_like(weight).fill_(flag),
            lambda weight, flag: torch.empty_like(weight[:3]).fill_(flag),
        ],
    )
    def test_what_the_constructor_makes_where_a_weight_is(self, make: Callable[[torch.Tensor, float], Any]) -> None:
        """A weight says where it will be, though it is not there yet."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            m.table = make(m.large, flag)

        def load(m: Model) -> None:
            m.large.data.copy_(checkpoint(5.0))

        published = publish(build, load)
        attached = attach(published, build, flag=0.25)
        assert attached.table.unique().tolist() == [0.25]
        assert attached.table.shape == published.model.table.shape
        assert in_arena(attached.large, published)

    def test_a_weight_says_where_it_is(self) -> None:
        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            m.note = (
                *(str(torch.cat((m.large, m.large)).device), str(m.large.max(0).values.device)),
                *(m.large.get_device(), m.large.is_cpu, m.large.is_cuda),
            )
            m.table = (
                torch.full((LARGE,), flag).view_as(m.large),
                torch.broadcast_tensors(torch.tensor(flag), m.large)[0],
            )

        published = publish(build, lambda m: m.large.data.copy_(checkpoint(5.0)))
        attached = attach(published, build, flag=0.25)
        assert attached.note == published.model.note == ("cpu", "cpu", -1, True, False)
        assert [table.unique().tolist() for table in attached.table] == [[0.25], [0.25]]

    @pytest.mark.parametrize(
        "compute",
        [
            *(lambda w, t: t.copy_(w), lambda w, t: torch.add(w, 1, out=t), lambda w, t: t.fill_(w.max())),
            *(lambda w, t: t.__iadd__(w), lambda w, t: t[:4].add_(w[:4]), lambda w, t: t.mul_(0.5).add_(w, alpha=0.5)),
            *(lambda w, t: t.masked_fill_(w > 0, 7), lambda w, t: t.__setitem__(w > 0, 7.0)),
            *(lambda w, t: torch._foreach_add_([t], [w]), lambda w, t: torch.ops.aten.add_(t, w)),
            *(lambda w, t: setattr(t, "data", w), lambda w, t: setattr(w, "data", t)),
            *(lambda w, t: t[w.long()], lambda w, t: t.take(w.long()), lambda w, t: t.index_select(0, w[:8].long())),
            *(lambda w, t: nn.functional.embedding(w[:8].long(), t.view(-1, 2)), lambda w, t: torch.isin(t, w)),
            *(lambda w, t: torch.bucketize(t, w), lambda w, t: w * torch.ones_like(w), lambda w, t: w @ t[:3]),
            *(lambda w, t: torch.cat([w, t]), lambda w, t: torch.stack((w, t)), lambda w, t: torch.where(t > 0, w, t)),
            *(
                lambda w, t: nn.functional.dropout(w),
                lambda w, t: torch.bernoulli(w),
                lambda w, t: w[:8].multinomial(2),
            ),
            *(lambda w, t: torch.normal(w, 1.0), lambda w, t: nn.functional.gumbel_softmax(w, dim=0)),
            *(
                lambda w, t: nn.BatchNorm1d(64)(w.view(-1, 64)),
                lambda w, t: w.sum().item(),
                lambda w, t: bool(w.sum() > 0),
            ),
        ],
    )
    def test_what_is_computed_of_a_weight_that_is_not_there(self, compute: Callable[[Any, Any], Any]) -> None:
        """Would be lost, or be anything: it fails, so the model is not shared."""
        with WithoutWeights(CPU).building():
            weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)
            with pytest.raises(RuntimeError):
                compute(weight, torch.ones(LARGE))

    def test_storage(self) -> None:
        """What is written by way of it is there."""
        with WithoutWeights(CPU).building():
            tables = [torch.empty(LARGE) for _ in range(2)]
            tables[0].untyped_storage().copy_(torch.ones(LARGE).untyped_storage())
            tables[1].untyped_storage().fill_(0)
        assert [table.unique().tolist() for table in tables] == [[1.0], [0.0]]

    @pytest.mark.parametrize(
        "move",
        [
            lambda m: m.to(m.large.device),
            lambda m: m.to("cpu", torch.float32),
            lambda m: m.large.to(m.large.device, torch.float32, False),
            lambda m: m.cpu(),
            lambda m: m.large.cpu(),
            lambda m: m.large.type_as(torch.zeros(1)),
            lambda m: m.large.to(torch.zeros(1)),
            lambda m: m.large.to(device="cpu", non_blocking=True),
        ],
    )
    def test_a_weight_that_the_constructor_moves(self, move: Callable[[Model], Any]) -> None:
        """It is there already."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            moved = move(m)
            assert moved is m or moved is m.large

        published = publish(build, lambda m: m.large.data.copy_(checkpoint(5.0)))
        assert in_arena(attach(published, build).large, published)

    def test_a_weight_that_the_constructor_copies(self) -> None:
        """Or has in another dtype: that is another tensor; on meta, it says so."""
        with WithoutWeights(CPU).building():
            weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)
            copies = [
                weight.to("cpu", torch.float32, False, True),
                weight.to(torch.float32, False, True),
                weight.to("cpu", copy=True),
                weight.to(torch.float16),
                weight.to(torch.zeros(1, dtype=torch.float16)),
            ]
            assert all(copy is not weight and copy.device.type == "cpu" and copy.is_meta for copy in copies)
            assert [copy.dtype for copy in copies] == [torch.float32] * 3 + [torch.float16] * 2
            others = [weight.to("meta"), weight.to("meta", torch.float16), weight.to(torch.empty(1, device="meta"))]
            assert {str(other.device) for other in others} == {"meta"}
            assert weight.device.type == "cpu"

    def test_other_devices(self) -> None:
        """As of a GPU, which need not be there: only what is moved to it fails, as it does in a normal load."""
        gpu = torch.device("cuda", 0)
        model = WithoutWeights(gpu)
        with _Deferring(model):  # the default device is this CPU
            weight = nn.Parameter(torch.empty(LARGE, device="cpu"), requires_grad=False)
            assert not weight.is_meta
            deferred = torch.empty(LARGE, device=gpu)
            assert (deferred.device, deferred.is_cuda, deferred.is_cpu, deferred.get_device()) == (gpu, True, False, 0)
            assert deferred.cuda() is deferred
            assert deferred.cuda(0, True) is deferred
            assert deferred.to(gpu) is deferred
            assert weight.cpu() is weight
            with pytest.raises(NotImplementedError, match="meta"):
                deferred.cpu()
            with pytest.raises(AssertionError, match="CUDA"):
                weight.cuda(None)

    def test_what_the_constructor_makes_on_meta(self) -> None:
        """On purpose: that stays there."""

        def build(m: Model, flag: float) -> None:
            m.shape = torch.empty(LARGE, device="meta")
            m.other = torch.zeros(LARGE, device="meta") + 1
            m.where = {str(each.device) for each in (m.shape, m.shape[1:], m.other, m.other.to(torch.float16))}

        built = WithoutWeights(CPU)
        with built.building():
            model = Model(build, 1.0)
        assert model.where == {"meta"}

    @pytest.mark.parametrize("elements", [4, 1 << 15, LARGE], ids=["small", "deferred", "sampled"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda m, n, flag: keep(m, nn.Parameter(torch.full((n,), flag))),
            lambda m, n, flag: keep(m, nn.Parameter(torch.zeros(n))).data.fill_(flag),
            lambda m, n, flag: nn.init.constant_(keep(m, nn.Parameter(torch.empty(n))), flag),
            lambda m, n, flag: keep(m, nn.init.constant_(nn.Parameter(torch.empty(n)), flag)),
            lambda m, n, flag: keep(m, nn.Parameter(torch.empty(n).fill_(flag))),
            lambda m, n, flag: keep(m, nn.Parameter(torch.full((n + int(flag * 4),), flag))),
            lambda m, n, flag: keep(m, nn.init.constant_(nn.Parameter(torch.empty(n + int(flag * 4))), flag)),
            lambda m, n, flag: keep(m, Subclass(torch.full((n,), flag), requires_grad=False)),
            lambda m, n, flag: keep(m, Subclass(torch.empty(n), requires_grad=False)).fill_(flag),
        ],
    )
    def test_a_parameter_that_loading_does_not_touch(
        self, make: Callable[[Model, int, float], Any], elements: int
    ) -> None:
        """A parameter that the checkpoint lacks has the value that its constructor gave it, whatever its size."""

        @torch.no_grad()
        def build(m: Model, flag: float) -> None:
            make(m, elements, flag)

        published = publish(build, flag=1.0)
        attached = attach(published, build, flag=0.25)
        assert attached.kept.unique().tolist() == [0.25]
        assert len(attached.kept) == len(Model(build, 0.25).kept)
        assert type(attached.kept) is type(published.model.kept)
        assert attached.kept.requires_grad == published.model.kept.requires_grad
        assert not in_arena(attached.kept, published)

    def test_numbers_drawn_for_a_parameter_that_loading_does_not_touch(self) -> None:
        """They are those of a normal load, between others that are drawn for weights and lost."""

        def build(m: Model, flag: float) -> None:
            torch.manual_seed(int(flag * 4))
            m.before = nn.Linear(512, 512)
            m.kept = nn.Parameter(torch.empty(LARGE))
            m.after = nn.Linear(512, 512)
            nn.init.normal_(m.kept)

        def load(m: Model) -> None:
            for parameter in (*m.before.parameters(), *m.after.parameters()):
                parameter.data.copy_(checkpoint(2.0)[: parameter.numel()].view_as(parameter))

        published = publish(build, load)
        attached = attach(published, build, flag=0.25)
        assert torch.equal(attached.kept, Model(build, 0.25).kept)
        assert in_arena(attached.before.weight, published)
        assert in_arena(attached.after.weight, published)

    def test_parameters_that_loading_does_not_touch_among_others(self) -> None:
        """Modules of one class, of which loading fills some; one of them is moved, and one of another class then."""

        def build(m: Model, flag: float) -> None:
            m.layers = nn.ModuleList(nn.Linear(512, 512 + 2 * (number == 2), bias=False) for number in range(4))
            for layer in m.layers:
                layer.weight.data.fill_(flag)
            m.other = Plain()
            m.other.weight = nn.Parameter(torch.full((LARGE,), flag))

        def load(m: Model) -> None:
            for number in (0, 2):
                weight = m.layers[number].weight
                weight.data.copy_(checkpoint(2.0)[: weight.numel()].view_as(weight))
            m.layers[1].moved = m.layers[1].weight
            del m.layers[1].weight
            m.other.__class__ = Becomes

        published = publish(build, load)
        attached = attach(published, build, flag=0.25)
        assert [in_arena(attached.layers[number].weight, published) for number in (0, 2, 3)] == [True, True, False]
        for kept in (attached.layers[1].moved, attached.layers[3].weight, attached.other.weight):
            assert kept.unique().tolist() == [0.25]

    @pytest.mark.parametrize("made", MADE_ELSEWHERE.values(), ids=MADE_ELSEWHERE)
    def test_a_parameter_that_another_module_had_and_loading_does_not_touch(
        self, made: Callable[[Model, float], nn.Parameter]
    ) -> None:
        """The constructor that gave it values did not know where it will be."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            torch.manual_seed(int(flag * 4))
            m.kept = made(m, flag)

        published = publish(build, lambda m: m.large.data.copy_(checkpoint(2.0)))
        attached = attach(published, build, flag=0.25)
        assert torch.equal(attached.kept, Model(build, 0.25).kept)
        assert in_arena(attached.large, published)

    @pytest.mark.parametrize("rows", [4, 512], ids=["small", "large"])
    @pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse", "to_mkldnn"])
    def test_a_parameter_without_a_storage_is_built(self, layout: str, rows: int) -> None:
        built = WithoutWeights(CPU)
        with built.building():
            model = Model(lambda m, flag: setattr(m, "odd", nn.Parameter(getattr(torch.eye(rows), layout)())), 1.0)
        assert torch.equal(model.odd.detach().to_dense(), torch.eye(rows))

    @pytest.mark.parametrize(("made", "process"), LOST.values(), ids=LOST)
    def test_values_of_a_parameter_that_are_lost_are_told(
        self, made: Callable[[float], nn.Parameter], process: Change
    ) -> None:
        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            m.kept = made(flag)

        published = publish(build, lambda m: m.large.data.copy_(checkpoint(2.0)), process)
        with pytest.raises(RuntimeError, match=r"Model\.kept was given values elsewhere"):
            attach(published, build, process)

    def test_processing_a_parameter_that_loading_does_not_touch(self) -> None:
        """The engine's post-processing sees the engine's value of it."""
        seen: list[list[float]] = []

        def build(m: Model, flag: float) -> None:
            m.kept = nn.Parameter(torch.full((LARGE,), flag))

        def process(m: Model) -> None:
            seen.append(m.kept.unique().tolist())

        attached = attach(publish(build, process=process), build, process, flag=0.25)
        assert attached.kept.unique().tolist() == [0.25]
        assert seen == [[1.0], [0.25]]

    def test_a_part_that_is_written_unseen(self) -> None:
        """A large parameter whose memory NumPy got is published, and not shared."""

        def build(m: Model, flag: float) -> None:
            m.kept = nn.Parameter(torch.zeros(LARGE), requires_grad=False)

        def load(m: Model) -> None:
            m.kept.numpy()[5] = 7.0

        published = publish(build, load)
        attached = attach(published, build)
        assert attached.kept[5] == 7.0
        assert not in_arena(attached.kept, published)

    def test_a_parameter_that_is_written_unseen(self) -> None:
        """A sample of its bytes shows that."""

        def build(m: Model, flag: float) -> None:
            m.kept = nn.Parameter(torch.zeros(LARGE), requires_grad=False)

        def load(m: Model) -> None:
            with torch._C.DisableTorchFunction():
                ctypes.memset(m.kept.data_ptr(), 1, m.kept.nbytes)

        published = publish(build, load)
        assert attach(published, build).kept.unique().tolist() == published.model.kept.unique().tolist() != [0.0]

    def test_what_loading_writes_is_shared(self) -> None:
        """Weights are mapped, also those that were zeros and stay zeros."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.zeros(LARGE))

        def load(m: Model) -> None:
            m.large.data.copy_(checkpoint(0.0))

        published = publish(build, load)
        assert in_arena(published.model.large, published)
        attached = attach(published, build)
        assert in_arena(attached.large, published)
        assert in_arena(attached.first.weight, published)

    def test_a_buffer_that_a_foreign_write_changes_is_published(self) -> None:
        """A write that no operator makes is found by the bytes."""

        def build(m: Model, flag: float) -> None:
            m.register_buffer("table", torch.zeros(LARGE))
            m.small = torch.zeros(4)

        def load(m: Model) -> None:
            m.table.numpy()[5] = 7.0
            m.small.numpy()[1] = 8.0

        attached = attach(publish(build, load), build)
        assert attached.table[5] == 7.0
        assert attached.small.tolist() == [0.0, 8.0, 0.0, 0.0]

    def test_derived_is_shared_and_new_work_space_is_not(self) -> None:
        """Of large attributes that post-processing makes, those computed from weights are mapped."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))

        def load(m: Model) -> None:
            m.large.data.copy_(checkpoint(5.0))

        def process(m: Model) -> None:
            m.derived = (m.large * 2).detach()
            m.workspace = torch.zeros(LARGE)

        published = publish(build, load, process)
        attached = attach(published, build, process)
        assert in_arena(attached.derived, published)
        assert attached.derived.unique().tolist() == [10.0]
        assert not in_arena(attached.workspace, published)
        attached.workspace.fill_(1.0)

    def test_left_on_meta_is_refused(self) -> None:
        """A tensor that was computed from weights that were not there yet, where no walk leads, is refused."""

        def build(m: Model, flag: float) -> None:
            m.large = nn.Parameter(torch.empty(LARGE))
            m.hidden = iter([m.large.detach() * 2])

        published = publish(build, lambda m: m.large.data.copy_(torch.ones(LARGE)))
        with pytest.raises(NotShareableError, match=r"1 tensors are left without data.*list_iterator"):
            attach(published, build)


class TestProcessing:
    def test_while_loading_is_processing(self) -> None:
        """What online quantization makes of a layer as soon as it is loaded, each engine makes for itself."""

        def build(m: Model, flag: float) -> None:
            m.weight = nn.Parameter(torch.empty(LARGE))
            m.limit = int(flag * 8)

        def process(m: Model) -> None:
            m.scale = nn.Parameter(m.weight.max().detach())
            m.kernel = Box(m.limit)

        model = Model(build, 1.0)
        observation = Observation(model)
        with observation.watching():
            model.weight.data.copy_(checkpoint(5.0))
            with observation.processing(model):
                process(model)
            observation.end_loading(model)
        packed = pack.prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU, observation)
        arena = pack.copy(packed, arenas.MEMFD, CPU, rebind=True, release=lambda: None)
        assert packed.manifest.modules[0].observed.added == ()
        attached = attach(Published(model, packed.manifest, arena), build, process, flag=0.25)
        assert attached.scale.item() == 5.0
        assert attached.kernel.value == 2

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_parameter_that_it_removes_is_built_as_it_was(self, value: float) -> None:
        """As a bias that no checkpoint has, which some quantizations then drop: what is made of it is the same."""

        def build(m: Model, flag: float) -> None:
            m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)
            m.bias = nn.Parameter(torch.full((LARGE,), value), requires_grad=False)

        def load(m: Model) -> None:
            m.weight.data.copy_(checkpoint(5.0))

        def process(m: Model) -> None:
            m.has_bias = bool(m.bias.any())
            m.register_parameter("bias", None)

        attached = attach(publish(build, load, process), build, process)
        assert attached.has_bias == bool(value)
        assert attached.bias is None

    def test_other_parameters_get_no_memory_for_one_that_it_removes(self) -> None:
        """Nothing says what form that one had, so whatever its class has under its name is built for real, no more."""

        def build(m: Model, flag: float) -> None:
            m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)
            nn.init.ones_(m.weight)
            m.bias = nn.Parameter(torch.zeros(LARGE), requires_grad=False)

        def load(m: Model) -> None:
            m.weight.data.copy_(checkpoint(5.0))

        def process(m: Model) -> None:
            m.register_parameter("bias", None)

        published = publish(build, load, process)
        built = WithoutWeights(CPU, left_by_loading(published.manifest))
        with built.building():
            model = Model(build, 1.0)
        assert model.weight.is_meta
        assert not model.bias.is_meta
        assert attach(published, build, process).weight.unique().tolist() == [5.0]

    def test_numbers_that_follow_from_flags_are_the_engines(self) -> None:
        """What post-processing makes of a limit is this engine's limit."""

        def build(m: Model, flag: float) -> None:
            m.limit = int(flag * 8)

        def process(m: Model) -> None:
            m.kernel = Box(m.limit * 2)

        attached = attach(publish(build, nothing, process, flag=1.0), build, process, flag=0.25)
        assert attached.kernel.value == 4

    def test_measured_floats_are_the_publications(self) -> None:
        """A float that was read from a weight is the published weight's, not a placeholder's."""

        def process(m: Model) -> None:
            m.scale = m.extra.max().item()

        def build(m: Model, flag: float) -> None:
            m.extra = nn.Parameter(torch.empty(3))

        def load(m: Model) -> None:
            m.extra.data.copy_(torch.full((3,), 0.75))

        assert attach(publish(build, load, process), build, process).scale == 0.75

    @pytest.mark.parametrize(
        "make", [lambda x: bool(x > 0.8), lambda x: str(x), lambda x: Stage.PROCESSED if x > 0.8 else 0]
    )
    def test_anything_else_measured_must_be_equal(self, make: Callable[[float], Any]) -> None:
        """Whether it follows from a weight or from a flag cannot be known."""

        def process(m: Model) -> None:
            m.note = make(m.extra.max().item())

        def build(m: Model, flag: float) -> None:
            m.extra = nn.Parameter(torch.empty(3))

        def load(m: Model) -> None:
            m.extra.data.copy_(torch.full((3,), 0.75))

        with pytest.raises(ParityError, match="note") as caught:
            attach(publish(build, load, process), build, process)
        assert caught.value.where == "note"

    def test_another_kernel_is_refused(self) -> None:
        """Objects of other classes understand bytes in another way."""
        published = publish(lambda m, flag: None, process=lambda m: setattr(m, "kernel", Box(1)))
        with pytest.raises(ParityError, match=r"kernel is tests\.unit\.test_origins\.Slots here"):
            attach(published, lambda m, flag: None, process=lambda m: setattr(m, "kernel", Slots(1)))


class TestTexts:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_value_survives(self, kind: str) -> None:
        """The text of a value makes an equal one."""
        for number in (1.0, 0.25):
            value = KINDS[kind](number)
            text = text_of(value)
            assert text is not None
            assert same(value_of(text), value)

    @pytest.mark.parametrize(
        "text",
        ["", "__import__('os')", "x.y", "torch.nn", "bytearray(1 << 40)", "bytearray(99999999999)", "(" * 300, "1 + 1",
         "collections.deque([], -1)", "numpy.random.Generator({'bit_generator': 'seed'})", "f'{1}'", "[*x]", "{**x}",
         "fractions.Fraction('1e999999999')", "torch.Generator('cuda', b'')", "range(1, 2, 0)", "os.system('true')"],
    )  # fmt: skip
    def test_other_text_makes_nothing(self, text: str) -> None:
        """Only the constructors of plain values are known, and none of them is given a chance to do harm."""
        with pytest.raises(ValueError, match=r"."):
            value_of(text)


def test_all_errors_are_typed() -> None:
    """A refusal is an error of ours, so that an engine can load by itself."""
    assert issubclass(ParityError, CompanionError)
