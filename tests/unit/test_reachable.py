"""The walk that compares engines: it sees every kind of value, wherever it lives, and names it."""

from __future__ import annotations

import collections
import decimal
import enum
import functools
import itertools
import operator
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

from vllm_companion_plugin.cli.verify import Difference, differences
from vllm_companion_plugin.engine.run.reachable import Reached, walk

WAYS_DEEP = 30


class Slots:
    __slots__ = ("_hidden", "part")

    def __init__(self, part: Any) -> None:
        self.part, self._hidden = part, None


class Private:
    __slots__ = ("__part",)

    def __init__(self, part: Any) -> None:
        self.__part = part


class Box:
    def __init__(self, part: Any) -> None:
        self.part = part

    def method(self) -> Any:
        return self.part


class Deaf(Box):
    """An object that shows nothing of itself to those who ask it."""

    def __getattribute__(self, name: str) -> Any:
        if name != "__class__":  # nn.Module asks for it
            raise RuntimeError(name)
        return super().__getattribute__(name)


class Words(dict[str, Any]):
    """A dictionary with attributes."""


class Scale(float):
    """A number with attributes."""


def closure(part: Any) -> Callable[[], Any]:
    return lambda: part


def default(part: Any) -> Callable[[], Any]:
    return lambda here=part: here


def keyword(part: Any) -> Callable[[], Any]:
    return lambda *, here=part: here


def function_with(part: Any) -> Callable[[], Any]:
    function = closure(None)
    function.part = part  # type: ignore[attr-defined]
    return function


def words_with(part: Any) -> Words:
    words = Words()
    words.part = part
    return words


def scale_with(part: Any) -> Scale:
    scale = Scale(1.0)
    scale.part = part  # type: ignore[attr-defined]
    return scale


def objects(part: Any) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = part
    return array


def started(part: Any) -> Any:
    generator = (inner for inner in [part, None])
    next(generator)
    return generator


def deep(part: Any) -> Any:
    return functools.reduce(lambda inner, _: Box(inner), range(WAYS_DEEP), part)


def hung_on_a_parameter(part: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.part = part  # type: ignore[attr-defined]
    return parameter


COMMON = (Box(1), Box(2))


def weakly(first: bool) -> Any:
    return weakref.ref(COMMON[0 if first else 1])


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda part: part,
    "list": lambda part: [part],
    "tuple": lambda part: (0, (part,)),
    "dict": lambda part: {"key": part},
    "ordered dict": lambda part: collections.OrderedDict(key=part),
    "defaultdict": lambda part: collections.defaultdict(list, key=part),
    "subclass of dict": words_with,
    "subclass of float": scale_with,
    "deque": lambda part: collections.deque([part]),
    "set": lambda part: {closure(part)},
    "key": lambda part: {Box(part): 1},
    "object": Box,
    "object that raises": Deaf,
    "slots": Slots,
    "private slot": Private,
    "deep": deep,
    "partial argument": lambda part: functools.partial(max, part),
    "partial keyword": lambda part: functools.partial(max, key=part),
    "closure": closure,
    "default": default,
    "keyword default": keyword,
    "attribute of a function": function_with,
    "bound method": lambda part: Box(part).method,
    "builtin method": lambda part: [part].append,
    "mapping proxy": lambda part: types.MappingProxyType({"key": part}),
    "namespace": lambda part: types.SimpleNamespace(part=part),
    "iterator": lambda part: iter([part]),
    "chain": lambda part: itertools.chain([part], []),
    "running generator": started,
    "array of objects": objects,
    "on a parameter": hung_on_a_parameter,
}

PARTS: dict[str, Callable[[float], Any]] = {
    "float": lambda x: x,
    "int": lambda x: int(x * 8),
    "bool": lambda x: x < 1,
    "complex": lambda x: complex(0, x),
    "str": str,
    "long str": lambda x: "a" * 5000 + str(x),
    "bytearray": lambda x: bytearray([int(x * 8)]),
    "range": lambda x: range(int(x * 8)),
    "slice": lambda x: slice(int(x * 8)),
    "decimal": lambda x: decimal.Decimal(x),
    "numpy scalar": np.float32,
    "array": lambda x: np.array([x, 1.0]),
    "dtype": lambda x: torch.float16 if x < 1 else torch.float32,
    "tensor": lambda x: torch.full((3,), x),
    "noncontiguous tensor": lambda x: torch.full((3, 2), x).t(),
    "conjugated tensor": lambda x: torch.ones(2, dtype=torch.complex64).conj() if x < 1 else torch.ones(2) + 0j,
    "sparse tensor": lambda x: torch.eye(2).to_sparse() if x < 1 else torch.eye(2),
    "values of a sparse tensor": lambda x: (torch.eye(2) * x).to_sparse(),
    "rows of a sparse tensor": lambda x: (torch.eye(2) * x).to_sparse_csr(),
    "nested tensor": lambda x: torch.nested.nested_tensor([torch.full((2,), x), torch.ones(3)]),
    "long pattern": lambda x: re.compile("a" * 5000 + str(x)),
    "storage": lambda x: torch.full((3,), x).untyped_storage(),
    "module": lambda x: nn.Dropout(x / 2),
    "type": lambda x: Box if x < 1 else Slots,
    "class of one name": lambda x: type("Local", (), {"part": x}),
    "method of a class of one name": lambda x: type("Local", (), {"part": eval(f"lambda self: {x}")}),
    "enum of one name": lambda x: enum.Enum("Local", "A B", start=int(x * 8)).A,  # type: ignore[misc]
    "order of a dict": lambda x: dict(sorted({"a": 1, "b": 2}.items(), reverse=x < 1)),
    "set": lambda x: {x, 0.0},
    "frozenset": lambda x: frozenset((x, 0.0)),
    "bound of a deque": lambda x: collections.deque(maxlen=int(x * 8)),
    "factory of a dict": lambda x: collections.defaultdict(list if x < 1 else dict),
    "memory": lambda x: memoryview(bytearray([int(x * 8)])),
    "weak reference": lambda x: weakly(x < 1),
    "weak dictionary": lambda x: weakref.WeakValueDictionary(a=weakly(x < 1)()),
    "attribute of a class": lambda x: type("Local", (), {"part": [x]})(),
    "code of a class": lambda x: type("Local", (), {"part": (lambda self: x) if x < 1 else (lambda self: -x)})(),
    "what a method captured": lambda x: type("Local", (), {"part": property(lambda self: x)})(),
    "code of one line": lambda x: eval(f"lambda: {x}"),
    "getter": lambda x: operator.itemgetter(int(x * 8)),
    "count": lambda x: itertools.count(int(x * 8)),
    "seed": lambda x: torch.Generator().manual_seed(int(x * 8)),
    "seed of Python": lambda x: random.Random(int(x * 8)),
    "seed of numpy": lambda x: np.random.default_rng(int(x * 8)),
    "function": lambda x: closure if x < 1 else default,
    "subclass of float": Scale,
}


def model(part: Any) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.5)
    made.x = part
    made.common = COMMON
    return made


def found(here: nn.Module, there: nn.Module) -> list[Difference]:
    return differences(vars(walk(here)), vars(walk(there)))


@pytest.mark.parametrize("holder", HOLDERS)
def test_everywhere(holder: str) -> None:
    """A number is compared wherever it lives, and two equal ones are equal."""
    hold = HOLDERS[holder]
    assert found(model(hold(1.5)), model(hold(1.5))) == []
    assert any("1.5" in line.here and "0.5" in line.there for line in found(model(hold(1.5)), model(hold(0.5))))


@pytest.mark.parametrize("holder", HOLDERS)
def test_tensors_everywhere(holder: str) -> None:
    """The bytes of a tensor are compared wherever it lives, and one on meta is told."""
    hold = HOLDERS[holder]
    one, other = (model(hold(torch.full((2,), number))) for number in (1.0, 2.0))
    assert [line.of_bytes for line in found(one, other)] == [True]
    assert [line.there for line in found(one, model(hold(torch.ones(2, device="meta"))))] == ["meta", "meta"]


@pytest.mark.filterwarnings("ignore:(The PyTorch API of nested|Sparse CSR)")
@pytest.mark.parametrize("part", PARTS)
def test_every_kind(part: str) -> None:
    """Every kind of value is compared."""
    make = PARTS[part]
    assert found(model(Box(make(1.0))), model(Box(make(1.0)))) == []
    differing = found(model(Box(make(1.0))), model(Box(make(0.25))))
    assert differing
    assert all(line.path.startswith(("x.part", "class tests.unit.test_reachable.Local.part")) for line in differing)


class TestModules:
    """The paths of modules, parameters and buffers are those of PyTorch."""

    def test_paths(self) -> None:
        """A parameter has its name also where a list that comes first holds it."""
        one = model(None)
        one.a = [one[0].weight]
        assert set(walk(one).tensors) == {"0.weight", "0.bias"}
        assert walk(one).values["a[0]"] == "is 0.weight"

    def test_hooks(self) -> None:
        """A hook is seen, and its number is not."""
        one, other, without = model(None), model(None), model(None)
        for hooked in (one, other):
            hooked[0].register_forward_hook(closure(None))
        assert found(one, other) == []
        assert found(one, without)

    def test_flags(self) -> None:
        """What a tensor is to autograd is compared, and the mode of a module."""
        one = model(None)
        one[0].weight.requires_grad_(False)
        one[0].eval()
        assert [str(line) for line in found(model(None), one)] == [
            "0.weight requires_grad: True normally, False here",
            "0.training: True normally, False here",
        ]

    def test_cycle(self) -> None:
        """A model that leads to itself ends."""
        one = model(None)
        one.x = [one, (one, {"self": Box(one)})]
        assert walk(one).values["x[0]"] == "is the model"

    def test_hooks_of_tensors(self) -> None:
        """The process counts their numbers."""

        def hooked() -> nn.Module:
            made = nn.Linear(2, 2)
            made.handle = made.weight.register_hook(torch.neg)
            return made

        one, other = hooked(), hooked()
        other.load_state_dict(one.state_dict())
        assert found(one, other) == []


class TestSharing:
    """Two names of one thing are told from two equal things."""

    def test_objects(self) -> None:
        box = Box(1)
        assert [line.path for line in found(model([box, box]), model([Box(1), Box(1)]))] == ["x[1]", "x[1].part"]

    def test_memory(self) -> None:
        """A view is told from a copy."""
        base = torch.arange(4.0)
        (line,) = found(model([base, base[1:3]]), model([base, base[1:3].clone()]))
        assert str(line) == "x[1] memory: x[0] normally, absent here"

    def test_memory_of_arrays(self) -> None:
        """So is that of an array, which has a base."""
        base = np.arange(4.0)
        (line,) = found(model([base, base[1:3]]), model([base, base[1:3].copy()]))
        assert line.path == "x[1].memory"
        assert found(model([base[:2], base[2:]]), model([base[:2].copy(), base[2:].copy()])) == []

    def test_neighbours(self) -> None:
        """Parts of one storage that do not overlap have no memory in common."""
        base = torch.arange(4.0)
        assert found(model([base[:2], base[2:]]), model([base[:2].clone(), base[2:].clone()])) == []


class TestCompilers:
    """What a compiler notes is not the model's."""

    def test_dynamo(self) -> None:
        """torch.compile marks parameters that it takes as constants."""
        marked = model(None)
        for parameter in marked.parameters():
            torch._dynamo.mark_static_address(parameter, guard=False)
            torch._dynamo.mark_static(parameter)
        assert vars(marked[0].weight)
        assert found(model(None), marked) == []

    def test_torch_compile(self) -> None:
        compiled = model(None)
        compiled.compile(backend="eager")
        compiled(torch.ones(1, 2))
        assert found(model(None), compiled) == []

    def test_others(self) -> None:
        """An attribute that only looks like one is compared."""
        one = model(None)
        one[0].weight.static_input_type = "guarded"
        assert len(found(model(None), one)) == 1


def test_program() -> None:
    """The program, its threads and its files are no part of a model."""
    reached = walk(model([torch, threading.Lock(), threading.current_thread(), open, type(None)]))
    assert len(reached.values) < 40


def test_no_code_of_the_model_runs() -> None:
    """Properties are not asked."""

    class Asked(nn.Linear):
        @property
        def expensive(self) -> None:
            raise AssertionError

    reached: Reached = walk(Asked(2, 2))
    assert set(reached.tensors) == {"weight", "bias"}
