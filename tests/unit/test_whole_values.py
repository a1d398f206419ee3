"""What loading changed in a value is the same in an attached engine, in all of its parts; or the model is refused."""

from __future__ import annotations

import array
import cmath
import contextlib
import ctypes
import dataclasses
import datetime
import enum
import functools
import io
import math
import os
import pathlib
import queue
import random
import re
import socket
import tempfile
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.unit.test_origins import Model, attach, nothing, publish
from vllm_companion_plugin.errors import NotShareableError


class Node:
    """A part of a chain."""

    def __init__(self, value: float, next: Any = None) -> None:
        self.value = value
        self.next = next


def _in_a_list(node: Any) -> Any:
    return [node]


def _in_a_function(node: Any) -> Any:
    def get() -> Any:
        return node

    return get


def _unpacked(held: Any) -> Any:
    return held if isinstance(held, Node) else held() if callable(held) else held[0]


@pytest.mark.parametrize("around", [lambda node: node, _in_a_list, _in_a_function], ids=["object", "list", "function"])
@pytest.mark.parametrize("length", [60, 200, 450])
def test_a_change_many_objects_deep(length: int, around: Callable[[Any], Any]) -> None:
    def build(m: Model, flag: float) -> None:
        node = None
        for number in range(length):
            node = around(Node(float(number), node))
        m.chain = node

    def last(held: Any) -> Any:
        while (inner := _unpacked(held)).next is not None:
            held = inner.next
        return inner

    def load(m: Model) -> None:
        last(m.chain).value = 77.0

    assert last(attach(publish(build, load), build).chain).value == 77.0


def test_what_is_too_deep_is_refused_by_name() -> None:
    def build(m: Model, flag: float) -> None:
        m.chain = None
        for number in range(2000):
            m.chain = Node(float(number), m.chain)

    with pytest.raises(NotShareableError, match=r"chain\.next\S* has objects inside of more than 960 others"):
        publish(build)


def nothing_more(m: Model, flag: float) -> None:
    """Two linear layers."""


def with_unit(value: Any, unit: Any = 1) -> Any:
    value.unit = unit
    return value


class Tagged(np.ndarray[Any, Any]):
    """With attributes beside its bytes, as those below."""


class Numbers(random.Random):
    pass


class States(np.random.RandomState):
    pass


class Data(bytearray):
    pass


class Doubles(array.array):  # type: ignore[type-arg]
    pass


class File(io.BytesIO):
    pass


class Complex(complex):
    pass


class Delta(datetime.timedelta):
    pass


class Generator(torch.Generator):
    pass


class Waiting(queue.SimpleQueue):  # type: ignore[type-arg]
    pass


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double),)


def relu(x: Any) -> Any:
    return max(x, 0)


Change = Callable[[Model], object]
Case = tuple[Callable[[], Any], Change, Callable[[Any], Any]]
"""What building makes as `m.x`, what loading does, and what is looked at."""


def setting(make: Callable[[], Any]) -> Change:
    return lambda m: setattr(m, "x", make())


def same_or_refused(case: Case) -> None:
    """Also: an engine that builds the same, and loads nothing there, shares."""
    make, change, look = case

    def build(m: Model, flag: float) -> None:
        m.x = make()

    attach(publish(build), build)
    try:
        published = publish(build, change)
    except NotShareableError as error:
        refusal = str(error)
    else:
        attached = attach(published, build)
        assert look(attached.x) == look(published.model.x)
        return
    assert re.match(r"loading (set|changed|replaced|left) x\b", refusal)


BESIDE: dict[str, Case] = {
    "array": (lambda: with_unit(np.ones(3).view(Tagged)), lambda m: m.x.__setitem__(0, 5.0), lambda x: [*x]),
    "array of objects": (
        lambda: with_unit(np.array([1, None], dtype=object).view(Tagged)),
        lambda m: m.x.__setitem__(0, 5.0),
        lambda x: [*x],
    ),
    "attribute of an array of objects": (
        lambda: with_unit(np.array([1, None], dtype=object).view(Tagged)),
        lambda m: setattr(m.x, "unit", 2),
        lambda x: x.unit,
    ),
    "random numbers": (lambda: with_unit(Numbers(1)), lambda m: m.x.seed(7), lambda x: x.getstate()),
    "random numbers of NumPy": (
        lambda: with_unit(States(1)),
        lambda m: m.x.seed(7),
        lambda x: x.get_state()[1].tolist(),
    ),
    "random numbers of torch": (
        lambda: with_unit(Generator().manual_seed(1)),
        lambda m: m.x.manual_seed(9),
        lambda x: x.get_state().tolist(),
    ),
    "bytes": (lambda: with_unit(Data(b"zzz")), lambda m: m.x.__setitem__(0, 65), bytes),
    "numbers": (lambda: with_unit(Doubles("d", [1.0])), lambda m: m.x.__setitem__(0, 5.0), lambda x: x.tolist()),
    "file": (lambda: with_unit(File()), lambda m: m.x.write(b"abc"), lambda x: x.getvalue()),
    "complex number": (
        lambda: with_unit(Complex(1, 1)),
        setting(lambda: with_unit(Complex(2, 3))),
        lambda x: (x.real, x.imag),
    ),
    "duration": (lambda: with_unit(Delta(1)), setting(lambda: with_unit(Delta(2))), lambda x: x.days),
    "error": (lambda: with_unit(ValueError("a")), setting(lambda: with_unit(ValueError("b"))), str),
    "argument of an error": (
        lambda: with_unit(ValueError("a")),
        lambda m: setattr(m.x, "args", ("b",)),
        lambda x: x.args,
    ),
    "queue": (lambda: with_unit(Waiting()), lambda m: m.x.put(1), lambda x: x.qsize()),
    "structure": (lambda: with_unit(Point(1.0)), lambda m: setattr(m.x, "x", 2.0), lambda x: x.x),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_an_object_of_c_holds_beside_its_attributes(kind: str) -> None:
    same_or_refused(BESIDE[kind])


OF_PARTIALS: dict[str, Case] = {
    "changed": (lambda: with_unit(functools.partial(relu)), lambda m: setattr(m.x, "unit", 2), lambda x: x.unit),
    "added": (lambda: functools.partial(relu), lambda m: setattr(m.x, "unit", 2), lambda x: x.unit),
    "removed": (lambda: with_unit(functools.partial(relu)), lambda m: delattr(m.x, "unit"), lambda x: vars(x)),
    "new": (lambda: None, setting(lambda: with_unit(functools.partial(relu))), lambda x: x.unit),
    "object": (
        lambda: with_unit(functools.partial(relu), Node(1.0)),
        lambda m: setattr(m.x.unit, "value", 2.0),
        lambda x: x.unit.value,
    ),
}


@pytest.mark.parametrize("kind", OF_PARTIALS)
def test_attributes_of_a_partial(kind: str) -> None:
    same_or_refused(OF_PARTIALS[kind])


@dataclasses.dataclass(frozen=True)
class ByValue:
    value: float


def _first(held: Any) -> Any:
    return next(iter(held))


IN_KEYS: dict[str, Case] = {
    "another key": (lambda: {ByValue(1.0): "a"}, setting(lambda: {ByValue(2.0): "a"}), lambda x: [k.value for k in x]),
    "another in place": (
        lambda: {ByValue(1.0): "a", "b": 1.0},
        lambda m: m.x.update({ByValue(2.0): m.x.pop(ByValue(1.0))}),
        lambda x: x.get(ByValue(2.0)),
    ),
    "attribute of a key": (
        lambda: {Node(1.0): "a"},
        lambda m: setattr(_first(m.x), "value", 2.0),
        lambda x: _first(x).value,
    ),
    "key in a tuple": (
        lambda: {("a", ByValue(1.0)): 5.0},
        setting(lambda: {("a", ByValue(2.0)): 5.0}),
        lambda x: x.get(("a", ByValue(2.0))),
    ),
    "closure of a key": (
        lambda: {_in_a_function(1.0): 1},
        setting(lambda: {_in_a_function(2.0): 1}),
        lambda x: _first(x)(),
    ),
    "exchanged keys": (
        lambda: {Node(1.0): 1, Node(2.0): 2},
        lambda m: setattr(m, "x", dict(zip(reversed([*m.x]), (1, 2), strict=True))),
        lambda x: {key.value: value for key, value in x.items()},
    ),
    "key that goes": (lambda: {ByValue(1.0): "a"}, lambda m: m.x.clear(), len),
    "member of a set": (lambda: {ByValue(1.0)}, setting(lambda: {ByValue(2.0)}), lambda x: ByValue(2.0) in x),
    "attribute of a member": (
        lambda: {Node(1.0)},
        lambda m: setattr(_first(m.x), "value", 2.0),
        lambda x: _first(x).value,
    ),
}


@pytest.mark.parametrize("kind", IN_KEYS)
def test_keys_and_members(kind: str) -> None:
    same_or_refused(IN_KEYS[kind])


@pytest.mark.parametrize("around", [lambda one: {one: "a"}, lambda one: {one}], ids=["key", "member"])
def test_modules_as_keys(around: Callable[[Any], Any]) -> None:
    def build(m: Model, flag: float) -> None:
        m.x = around(m.first)

    with pytest.raises(NotShareableError, match=r"loading changed x\S*, in whose place no other can be put"):
        publish(build, lambda m: setattr(m, "x", around(m.second)))


def scale_by(number: float) -> Any:
    return lambda x: x * number


class Getter:
    def __init__(self, value: float) -> None:
        self.value = value

    def get(self) -> float:
        return self.value


def _two_of_one(m: Model) -> None:
    m.y = m.x = scale_by(1.0)


PLACES: dict[str, tuple[Change, Change, Callable[[Any], Any]]] = {
    "item of an array": (
        lambda m: setattr(m, "x", np.array([1.0, "x", None], dtype=object)),
        lambda m: m.x.__setitem__(0, 5.0),
        lambda m: [*m.x],
    ),
    "method of another object": (
        lambda m: m.__dict__.update(a=(a := Getter(1.0)), b=Getter(2.0), x=a.get),
        lambda m: setattr(m, "x", m.b.get),
        lambda m: m.x(),
    ),
    "method of another module": (
        lambda m: setattr(m, "x", m.first.forward),
        lambda m: setattr(m, "x", m.second.forward),
        lambda m: m.x.__self__ is m.second,
    ),
    "one function of two": (_two_of_one, lambda m: setattr(m, "x", scale_by(2.0)), lambda m: (m.x(1.0), m.y(1.0))),
    "two functions of one": (
        lambda m: m.__dict__.update(x=scale_by(1.0), y=scale_by(1.0)),
        _two_of_one,
        lambda m: m.x is m.y,
    ),
    "shorter tuple": (
        lambda m: setattr(m, "x", (Node(1.0), Node(2.0), 3.0)),
        lambda m: setattr(m, "x", m.x[:2]),
        lambda m: len(m.x),
    ),
    "longer tuple": (
        lambda m: setattr(m, "x", (Node(1.0), 2.0)),
        lambda m: setattr(m, "x", (*m.x, 3.0)),
        lambda m: m.x[1:],
    ),
    "longer tuple of others": (
        lambda m: setattr(m, "x", (Node(1.0), 2.0)),
        lambda m: setattr(m, "x", (m.x[0], 5.0, 3.0)),
        lambda m: m.x[1:],
    ),
    "longer tuple in a tuple": (
        lambda m: setattr(m, "x", (1.0, (Node(1.0), 2.0))),
        lambda m: setattr(m, "x", (4.0, (m.x[1][0], 5.0, 3.0))),
        lambda m: (m.x[0], m.x[1][1:]),
    ),
    "shorter named arguments": (
        lambda m: setattr(m, "x", functools.partial(relu, by=Node(1.0), to=2.0)),
        lambda m: m.x.keywords.pop("to"),
        lambda m: [*m.x.keywords],
    ),
}


def check_equal_or_refused(
    build: Callable[[Model, float], object], change: Change, look: Callable[[Model], Any], refusal: str
) -> None:
    """What loading changed is the same in an engine that attaches, or is refused when it is published."""
    attach(publish(build), build)
    try:
        published = publish(build, change)
    except NotShareableError as error:
        said = str(error)
    else:
        assert look(attach(published, build)) == look(published.model)
        return
    assert re.match(refusal, said)


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_published_can_be_restored(kind: str) -> None:
    """Else the loading engine refuses it, and no copy waits for nobody."""
    make, change, look = PLACES[kind]

    def build(m: Model, flag: float) -> None:
        make(m)

    check_equal_or_refused(build, change, look, r"loading (set|changed|replaced|left) [xy]\b")


@functools.wraps(relu)
def twice(x: Any) -> Any:
    return 2 * x


del twice.__wrapped__


def class_with(factor: float) -> Any:
    class Held:
        by = factor

    return Held


def enum_of(first: int) -> Any:
    return enum.Enum("Mode", "A B", start=first)  # type: ignore[misc]


def tuple_of(factor: float) -> Any:
    class Pair(NamedTuple):
        first: float

        def scaled(self) -> float:
            return self.first * factor

    return Pair(1.0)


def text_with(factor: float) -> Any:
    class Text(str):
        __slots__ = ()
        by = factor

    return Text("a")


ALIKE: dict[str, Callable[[], tuple[Any, Any, Callable[[Any], Any]]]] = {
    "function": lambda: (relu, twice, lambda x: x(3.0)),
    "method": lambda: (types.MethodType(relu, 3.0), types.MethodType(twice, 3.0), lambda x: x()),
    "function of a partial": lambda: (functools.partial(relu), functools.partial(twice), lambda x: x(3.0)),
    "class": lambda: (class_with(1.0), class_with(2.0), lambda x: x.by),
    "member of an enum": lambda: (enum_of(1).A, enum_of(5).A, lambda x: x.value),
    "named tuple": lambda: (tuple_of(1.0), tuple_of(2.0), lambda x: x.scaled()),
    "text": lambda: (text_with(1.0), text_with(2.0), lambda x: x.by),
    "module": lambda: (math, cmath, lambda x: x.__name__),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    "a list": lambda x: [x],
    "a dict": lambda x: {"a": x, "b": 1},
    "a tuple": lambda x: (1, (x,)),
    "an object": Node,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", ALIKE)
def test_another_of_the_same_name(kind: str, around: str) -> None:
    """What looks the same may do something else."""
    before, after, look = ALIKE[kind]()
    put = AROUND[around]
    assert look(before) != look(after)
    same_or_refused((lambda: before, setting(lambda: after), look))
    same_or_refused((lambda: put(before), setting(lambda: put(after)), lambda x: look(_within(x, type(after)))))


def _within(held: Any, kind: type) -> Any:
    while type(held) is not kind:
        held = held.value if isinstance(held, Node) else held["a"] if isinstance(held, dict) else held[-1]
    return held


HUNG: dict[str, Callable[[], tuple[Any, ...]]] = {
    **{kind: ALIKE[kind] for kind in ("function", "class", "member of an enum", "method")},
    "closure": lambda: (scale_by(1.0), scale_by(2.0)),
    "method of another object": lambda: (Getter(1.0).get, Getter(2.0).get),
    "argument of a partial": lambda: (functools.partial(relu, 1.0), functools.partial(relu, 2.0)),
}


@pytest.mark.parametrize("kind", HUNG)
def test_another_of_the_same_name_on_a_weight(kind: str) -> None:
    before, after = HUNG[kind]()[:2]

    def build(m: Model, flag: float) -> None:
        m.first.weight.held = before

    attach(publish(build), build)
    with pytest.raises(NotShareableError, match=r"loading (set|changed|replaced) first\.weight\.held"):
        publish(build, lambda m: setattr(m.first.weight, "held", after))


def test_a_method_that_is_bound_again_is_the_same() -> None:
    def build(m: Model, flag: float) -> None:
        m.first.weight.held = m.first.forward
        m.x = m.first.forward

    def load(m: Model) -> None:
        m.first.weight.held = m.first.forward
        m.x = m.first.forward

    attach(publish(build, load), build)


def test_a_class_that_says_it_is_another_is_refused() -> None:
    liar = type("Node", (), {"__module__": __name__})
    with pytest.raises(NotShareableError, match=r"loading set x to another class .*Node"):
        publish(nothing_more, lambda m: setattr(m, "x", liar))


def _tie_containers(m: Model) -> None:
    m.a = [1.0, 2.0]
    m.x = {"x": m.a}


def _tie_on_a_weight(m: Model) -> None:
    m.x = m.first.weight.tags = [1.0]


def _views(m: Model) -> None:
    m.a = np.arange(4.0)
    m.x = m.a[:2]


IN_COMMON: dict[str, tuple[Change, Change, Callable[[Model], Any]]] = {
    "list in a dict": (nothing, _tie_containers, lambda m: (m.a.append(5.0), m.x)[1]),
    "list in a tuple": (
        nothing,
        lambda m: m.__dict__.update(a=(a := [1.0]), x=(a,)),
        lambda m: (m.a.append(5.0), m.x)[1],
    ),
    "tuple with a list": (
        nothing,
        lambda m: m.__dict__.update(a=(a := ([1.0], 2)), x=a),
        lambda m: (m.a[0].pop(), m.x)[1],
    ),
    "one list thrice": (nothing, lambda m: setattr(m, "x", [[1.0]] * 3), lambda m: (m.x[0].append(2.0), m.x)[1]),
    "list on a weight": (nothing, _tie_on_a_weight, lambda m: (m.x.append(2.0), m.first.weight.tags)[1]),
    "views of an array": (nothing, _views, lambda m: (m.a.fill(7.0), m.x.tolist())[1]),
    "no view any more": (_views, lambda m: setattr(m, "x", m.a[:2].copy()), lambda m: (m.a.fill(7.0), m.x.tolist())[1]),
    "tied without a change": (
        lambda m: m.__dict__.update(a=[1.0], x={"x": [1.0]}),
        lambda m: m.x.update(x=m.a),
        lambda m: (m.a.append(5.0), m.x)[1],
    ),
    "untied without a change": (_tie_containers, lambda m: m.x.update(x=[*m.a]), lambda m: (m.a.append(5.0), m.x)[1]),
    "change of both": (_tie_containers, lambda m: m.a.append(3.0), lambda m: (m.a.append(5.0), m.x)[1]),
    "one source of random numbers": (
        nothing,
        lambda m: m.__dict__.update(a=(a := np.random.default_rng(1)), x=np.random.Generator(a.bit_generator)),
        lambda m: (m.a.random(), m.x.random())[1],
    ),
}


@pytest.mark.parametrize("kind", IN_COMMON)
def test_parts_in_common(kind: str) -> None:
    make, change, look = IN_COMMON[kind]

    def build(m: Model, flag: float) -> None:
        make(m)

    check_equal_or_refused(build, change, look, r"loading changed (a|x|first\.weight\.tags), which has a part")


def test_parts_in_common_that_only_building_made() -> None:
    def build(m: Model, flag: float) -> None:
        _tie_containers(m)
        _tie_on_a_weight(m)

    attach(publish(build, lambda m: setattr(m, "more", [[3.0], [4.0]])), build)


def _graded(m: Model) -> None:
    m.first.weight.grad = torch.ones_like(m.first.weight)


def _hooked(m: Model) -> None:
    m.first.weight.requires_grad_(True).register_hook(lambda grad: grad)


@pytest.mark.parametrize("leave", [_graded, _hooked])
def test_what_autograd_keeps_on_a_weight(leave: Change) -> None:
    def build(m: Model, flag: float) -> None:
        leave(m)

    publish(build)
    with pytest.raises(NotShareableError, match=r"loading left a gradient, or a hook of gradients, on first\.weight"):
        publish(nothing_more, leave)


def test_a_compiled_module_is_refused_by_name() -> None:
    def build(m: Model, flag: float) -> None:
        m.inner = torch.jit.script(torch.nn.Linear(2, 2))

    with pytest.raises(NotShareableError, match=r"inner \(\S*\) is compiled by torch\.jit"):
        publish(build)


def _open(m: Model) -> None:
    m.x = os.open(__file__, os.O_RDONLY)


OF_PROCESS: dict[str, tuple[Change, str]] = {
    "ids": (lambda m: setattr(m, "x", {id(p): 2.0 for p in m.parameters()}), "the id of an object"),
    "ids as keys of objects": (lambda m: setattr(m, "x", {id(m.first): [m.second.weight]}), "the id of an object"),
    "id as text": (lambda m: setattr(m, "x", f"first at {id(m.first):#x}"), "the id of an object"),
    "descriptor": (_open, "a file descriptor"),
    "descriptor of a folder": (lambda m: setattr(m, "x", os.open("/", os.O_RDONLY)), "a file descriptor"),
    "folder": (lambda m: setattr(m, "x", tempfile.mkdtemp()), "the path of a file"),
    "file in a list": (lambda m: setattr(m, "x", [pathlib.Path(tempfile.mkstemp()[1])]), "the path of a file"),
}


@pytest.mark.parametrize("kind", OF_PROCESS)
def test_what_names_a_thing_of_the_process(kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where building put it, it is each engine's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load, what = OF_PROCESS[kind]
    with pytest.raises(NotShareableError, match=rf"loading set x\S* to {what}"):
        publish(nothing_more, load)

    def build(m: Model, flag: float) -> None:
        load(m)

    if "keys" not in kind:  # names in which there are such numbers are others in each process
        attach(publish(build), build)


def test_numbers_and_paths_that_name_no_thing_of_the_process() -> None:
    values = {"number": 1, "long": 10**12, "path": "/usr", "list": ["/usr", 3, 140000000000000]}
    attached = attach(publish(nothing_more, lambda m: m.__dict__.update(values)), nothing_more)
    assert {name: getattr(attached, name) for name in values} == values


def test_a_descriptor_with_a_number_that_was_open_before() -> None:
    refused = pytest.raises(NotShareableError, match="loading set x to a file descriptor")
    with open("/etc/hosts") as before, open(__file__) as other, refused:
        publish(nothing_more, lambda m: setattr(m, "x", os.dup2(other.fileno(), before.fileno())))


def test_numbers_that_are_those_of_new_sockets() -> None:
    """Connections come and go while a model is loaded, and many values are small numbers."""
    with contextlib.ExitStack() as opened:

        def load(m: Model) -> None:
            one, other = socket.socketpair()
            opened.enter_context(other)
            m.x = opened.enter_context(one).fileno()

        published = publish(nothing_more, load)
        assert attach(published, nothing_more).x == published.model.x


class Weight(torch.nn.Parameter):
    """With a slot, as those below."""

    __slots__ = ("held",)


class Partial(functools.partial):  # type: ignore[type-arg]
    __slots__ = ("held",)


class Table(dict[str, float]):
    __slots__ = ("held",)


def with_held(value: Any, held: Any = 1.0) -> Any:
    value.held = held
    return value


SLOTS: dict[str, Case] = {
    kind: (make, lambda m: setattr(m.x, "held", 2.0), lambda x: (type(x), x.held))
    for kind, make in {
        "weight": lambda: with_held(Weight(torch.ones(2), requires_grad=False)),
        "weight without": lambda: Weight(torch.ones(2), requires_grad=False),
        "partial": lambda: with_held(Partial(relu)),
        "dict": lambda: with_held(Table(a=1.0)),
        "dict with a tuple": lambda: with_held(Table(held=1.0), (1.0, Node(2.0))),
    }.items()
} | {
    "class of a partial": (lambda: functools.partial(relu), setting(lambda: with_held(Partial(relu))), type),
    "dict that loses it": (
        lambda: with_held(Table(held=1.0)),
        lambda m: delattr(m.x, "held"),
        lambda x: (dict(x), hasattr(x, "held")),
    ),
}


@pytest.mark.parametrize("kind", SLOTS)
def test_slots(kind: str) -> None:
    same_or_refused(SLOTS[kind])
