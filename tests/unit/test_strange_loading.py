"""What few constructors and few `load_weights` do: it is the same in an attached engine, or refused."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import dataclasses
import functools
import io
import itertools
import queue
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree
from vllm.config import CacheConfig

from tests.unit.test_origins import LARGE, Box, Change, Frozen, Model, attach, checkpoint, in_arena, nothing, publish
from vllm_companion_plugin.cli.verify import differences
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.engine.run.reachable import walk
from vllm_companion_plugin.errors import NotShareableError, ParityError
from vllm_companion_plugin.tree.values import text_of

ONES = torch.ones(2, 6)


def plain(m: Model, flag: float) -> None:
    """Two linear layers, and no more."""


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)  # type: ignore[no-any-return]


def wrap(m: Model) -> None:
    m.first = Around(m.first)  # type: ignore[assignment]


def wrap_twice(m: Model) -> None:
    wrap(m)
    wrap(m)


def wrap_and_swap(m: Model) -> None:
    m.first, m.second = Around(m.second), m.first  # type: ignore[assignment]


@pytest.mark.parametrize("load", [wrap, wrap_twice, wrap_and_swap])
def test_loading_wraps_a_module_under_its_own_name(load: Callable[[Model], None]) -> None:
    x = torch.ones(1, 8)
    published = publish(plain, load)
    attached = attach(published, plain)
    assert [*attached.state_dict()] == [*published.model.state_dict()]
    assert torch.equal(attached.first(x), published.model.first(x))
    assert torch.equal(attached.second(x), published.model.second(x))
    assert not torch.equal(attached.first(x), attached.second(x))


def test_loading_puts_none_in_the_place_of_a_module() -> None:
    def load(m: Model) -> None:
        m.first = None  # type: ignore[assignment]

    attached = attach(publish(plain, load), plain)
    assert [*attached._modules] == ["first", "second"]
    assert attached.first is None


LIKE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda w: torch.full_like(w, 2.0),
    "new_zeros": lambda w: w.new_zeros(LARGE),
    "new_full": lambda w: w.new_full((LARGE,), 2.0),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda w: torch.randint_like(w, 1, 3),
    "new_ones": lambda w: w.new_ones(LARGE),
    "empty_like": torch.empty_like,
    "new_empty": lambda w: w.new_empty(LARGE),
    "emptied": lambda w: torch.empty_like(w).zero_(),
    "filled": lambda w: w.clone().fill_(2.0),
    "copied": lambda w: w.clone().copy_(torch.zeros(LARGE)),
    "torch.tensor": lambda w: torch.tensor([0.0] * LARGE),
    "from_numpy": lambda w: torch.from_numpy(np.zeros(LARGE, np.float32)),
    "cast": lambda w: torch.tensor([0.0] * LARGE, dtype=torch.float64).float(),
    "scaled": lambda w: torch.from_numpy(np.zeros(LARGE, np.float32)) * 2,
    "set": lambda w: torch.empty(0).set_(torch.from_numpy(np.zeros(LARGE, np.float32))),
    "frombuffer": lambda w: torch.frombuffer(bytearray(4 * LARGE), dtype=torch.float32),
}


@pytest.mark.parametrize("when", ["load", "process"])
@pytest.mark.parametrize("kind", LIKE)
def test_work_space_of_the_shape_of_a_weight_is_private(kind: str, when: str) -> None:
    """Nothing of it is the checkpoint's, and engines write to it."""

    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)

    def fill(m: Model) -> None:
        m.weight.data.copy_(torch.from_numpy(torch.full((LARGE,), 3.0).numpy()))

    def make(m: Model) -> None:
        m.space = LIKE[kind](m.weight)

    def load(m: Model) -> None:
        fill(m)
        if when == "load":
            make(m)

    process = make if when == "process" else nothing
    published = publish(build, load, process)
    attached = attach(published, build, process)
    assert in_arena(attached.weight, published)
    assert not in_arena(attached.space, published)
    published.model.space.fill_(6)
    attached.space.fill_(7)
    assert published.model.space[0] == 6


COMPUTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": torch.clone,
    "product": lambda w: w * 2,
    "written": lambda w: torch.empty_like(w).copy_(w),
    "part of it": lambda w: torch.zeros_like(w).index_copy_(0, torch.tensor([1]), w[:1]),
    "half of it": lambda w: _first_half(w.clone()).fill_(0)._base,  # type: ignore[dict-item]
}


def _first_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: LARGE // 2]


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_was_computed_from_a_weight_is_shared(kind: str) -> None:
    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)

    def load(m: Model) -> None:
        m.weight.data.copy_(torch.from_numpy(torch.full((LARGE,), 3.0).numpy()))
        m.made = COMPUTED[kind](m.weight.data)

    published = publish(build, load)
    attached = attach(published, build)
    assert in_arena(attached.made, published)
    assert torch.equal(attached.made, published.model.made)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.view(2, -1).t()], ids=["whole", "transposed"])
def test_a_parameter_that_processing_makes_a_plain_tensor_is_shared(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Kernels have classes of their own for weights, which wrap the memory of the parameter in another layout."""

    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)

    def load(m: Model) -> None:
        m.weight.data.copy_(torch.from_numpy(torch.full((LARGE,), 3.0).numpy()))

    def process(m: Model) -> None:
        memory = m.weight.data
        del m.weight
        m.packed = Box(view(memory))

    published = publish(build, load, process)
    attached = attach(published, build, process)
    assert in_arena(attached.packed.value, published)
    assert torch.equal(attached.packed.value, published.model.packed.value)


def test_what_loading_uses_of_what_building_made_is_private() -> None:
    """It may be a weight, or work space, which engines write to."""

    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.empty(LARGE), requires_grad=False)
        m.space = torch.zeros(LARGE)

    def load(m: Model) -> None:
        m.space.copy_(torch.from_numpy(torch.full((LARGE,), 3.0).numpy()))
        m.weight.data.copy_(m.space)

    published = publish(build, load)
    attached = attach(published, build)
    assert in_arena(attached.weight, published)
    assert torch.equal(attached.space, published.model.space)
    attached.space.fill_(7)
    assert published.model.space[0] == 3


class Wrapper(torch.Tensor):
    """Has its values in another tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapper, lambda each: each.held, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return Wrapper(out) if func is torch.ops.aten.detach.default else out


ELSEWHERE: dict[str, Callable[[], Any]] = {
    "wrapper": lambda: Wrapper(torch.ones(3)),
    "parameter": lambda: nn.Parameter(Wrapper(torch.ones(3)), requires_grad=False),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked)")
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_tensor_whose_bytes_are_elsewhere_is_refused(kind: str) -> None:
    """By a publisher, which goes on with the model by itself."""
    with pytest.raises(NotShareableError, match=r"x"):
        publish(lambda m, flag: setattr(m, "x", ELSEWHERE[kind]()))


class Scaled(nn.Module):
    scale = 1.0

    def factor(self) -> float:
        return self.scale


PARTLY: dict[str, tuple[Callable[[float], Any], Callable[[Any], object]]] = {
    "list": (lambda flag: [flag], lambda held: held.append(5)),
    "dict": (lambda flag: {"limit": flag}, lambda held: held.update(scale=5)),
    "set": (lambda flag: {flag}, lambda held: held.add(5)),
    "defaultdict": (lambda flag: collections.defaultdict(int, limit=flag), lambda held: held.update(scale=5)),
    "bytearray": (lambda flag: bytearray([int(flag * 8)]), lambda held: held.append(5)),
    "array": (lambda flag: array.array("d", [flag]), lambda held: held.append(5)),
    "deque": (lambda flag: collections.deque([flag]), lambda held: held.append(5)),
    "namespace": (lambda flag: types.SimpleNamespace(limit=flag), lambda held: setattr(held, "scale", 5)),
    "array of numpy": (lambda flag: np.full(3, flag), lambda held: held.__setitem__(0, 5)),
    "count": (lambda flag: itertools.count(int(flag * 8)), next),
    "random numbers": (lambda flag: random.Random(int(flag * 8)), lambda held: held.random()),
    "random numbers of numpy": (lambda flag: np.random.default_rng(int(flag * 8)), lambda held: held.random()),
    "random numbers of torch": (
        lambda flag: torch.Generator().manual_seed(int(flag * 8)),
        lambda held: torch.rand(1, generator=held),
    ),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_loading_changes_a_part_of_what_an_engine_was_given(kind: str) -> None:
    """The other part is this engine's, and may be another one: that of the publisher must not take its place."""
    make, change = PARTLY[kind]

    def build(m: Model, flag: float) -> None:
        m.limits = make(flag)

    published = publish(build, lambda m: change(m.limits), flag=1.0)
    expected = make(1.0)
    change(expected)
    assert text_of(attach(published, build, flag=1.0).limits) == text_of(expected)
    with pytest.raises(ParityError, match=r"limits is built as .* here and as .* in the published model"):
        attach(published, build, flag=0.25)


KEPT: dict[str, tuple[Callable[[float], Any], Callable[[Any], Any]]] = {
    "list": (lambda flag: [flag], lambda held: [5, *held]),
    "dict": (lambda flag: {"limit": flag}, lambda held: {**held, "scale": 5}),
    "dict in it": (lambda flag: {"a": {"limit": flag}}, lambda held: {"a": {**held["a"], "scale": 5}}),
    "set": (lambda flag: {flag}, lambda held: held | {5}),
    "frozenset": (lambda flag: frozenset((flag,)), lambda held: held | {5}),
    "tuple": (lambda flag: (flag,), lambda held: (*held, 5)),
    "part of a tuple": (lambda flag: (flag, [1]), lambda held: (held[0], [2])),
    "named tuple": (lambda flag: Named(flag), lambda held: held._replace(second=5)),
    "size": (lambda flag: torch.Size([int(flag * 8)]), lambda held: torch.Size([*held, 5])),
    "bytearray": (lambda flag: bytearray([int(flag * 8)]), lambda held: held + b"x"),
    "namespace": (
        lambda flag: types.SimpleNamespace(limit=flag),
        lambda held: types.SimpleNamespace(**vars(held), scale=5),
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_loading_keeps_a_part_of_what_it_replaces(kind: str) -> None:
    """Whoever else has the one that building made keeps it, and the part may be another one in each engine."""
    make, change = KEPT[kind]

    def build(m: Model, flag: float) -> None:
        m.limits = make(flag)
        m.same = m.limits

    published = publish(build, lambda m: setattr(m, "limits", change(m.limits)), flag=1.0)
    attached = attach(published, build, flag=1.0)
    assert text_of(attached.limits) == text_of(change(make(1.0)))
    assert text_of(attached.same) == text_of(make(1.0))
    with pytest.raises(ParityError, match=r"limits is built as .* here and as .* in the published model"):
        attach(published, build, flag=0.25)


def test_what_loading_replaces_whole_may_be_another_one() -> None:
    def build(m: Model, flag: float) -> None:
        m.limits, m.sizes = {"limit": flag}, (flag, 2 * flag)

    def load(m: Model) -> None:
        m.limits, m.sizes = {"limit": 5.0}, (6.0, 7.0)

    published = publish(build, load, flag=1.0)
    attached = attach(published, build, flag=0.25)
    assert (attached.limits, attached.sizes) == ({"limit": 5.0}, (6.0, 7.0))


class Local(threading.local):
    """Its attributes are those of one thread."""


class Torchs(torch.utils.data.Dataset[Any]):
    """What is made from a class of torch has attributes of its own."""

    def __init__(self) -> None:
        self.held = [1.0]


class Key:
    """Can be a key of weak containers."""


KEY = Key()


WITHIN: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]] = {
    "weak dictionary": (
        lambda: weakref.WeakKeyDictionary({KEY: 1.0}),
        lambda held: held.update({KEY: 2.0}),
        lambda held: held[KEY],
    ),
    "weak set": (lambda: weakref.WeakSet([KEY]), lambda held: held.clear(), len),
    "of a thread": (threading.local, lambda held: setattr(held, "held", 2.0), lambda held: vars(held)),
    "made from that": (Local, lambda held: setattr(held, "held", 2.0), lambda held: vars(held)),
    "of a context": (
        lambda: contextvars.ContextVar("held", default=1.0),
        lambda held: held.set(2.0),
        lambda c: c.get(),
    ),
    "generator": (lambda: (each for each in (1, 2, 3)), next, next),
    "made from torch's": (Torchs, lambda held: held.held.append(2.0), lambda held: held.held),
    "iterator of iterators": (lambda: zip([1, 2], map(str, [3, 4]), strict=True), next, next),
    "factory": (
        lambda: collections.defaultdict(list, a=[Box(1.0)]),
        lambda held: setattr(held, "default_factory", None),
        lambda held: held.default_factory,
    ),
    "configuration": (CacheConfig, lambda held: setattr(held, "block_size", 77), lambda held: held.block_size),
    "object of torch": (
        lambda: torch.optim.SGD([torch.ones(1)], lr=1.0),
        lambda held: held.param_groups[0].update(lr=2.0),
        lambda held: held.param_groups[0]["lr"],
    ),
    "tensor in an object of torch": (
        lambda: torch.distributions.Normal(torch.zeros(2), 1.0),
        lambda held: held.loc.data.fill_(2.0),
        lambda held: held.loc.tolist(),
    ),
    "event": (threading.Event, lambda held: held.set(), lambda held: held.is_set()),
    "object in a weak dictionary": (
        lambda: weakref.WeakKeyDictionary({KEY: Box(1.0)}),
        lambda held: setattr(held[KEY], "value", 2.0),
        lambda held: held[KEY].value,
    ),
    "object of a context": (
        lambda: contextvars.ContextVar("held", default=Box(1.0)),  # noqa: B039
        lambda held: setattr(held.get(), "value", 2.0),
        lambda held: held.get().value,
    ),
    "list that cannot be replaced": (
        lambda: types.MappingProxyType({"a": [1.0]}),
        lambda held: held["a"].append(2.0),
        lambda held: held["a"],
    ),
    "tensor that cannot be replaced": (
        lambda: types.MappingProxyType({"a": torch.zeros(1)}),
        lambda held: held["a"].numpy().fill(2.0),
        lambda held: held["a"].item(),
    ),
    "values of a dictionary": (
        lambda: {"a": [1.0]}.values(),
        lambda held: next(iter(held)).append(2.0),
        lambda held: [*held],
    ),
    "simple queue": (queue.SimpleQueue, lambda held: held.put(1), lambda held: held.qsize()),
    "cell": (
        lambda: types.CellType(1.0),
        lambda held: setattr(held, "cell_contents", 2.0),
        lambda held: held.cell_contents,
    ),
    "bytes as a file": (io.BytesIO, lambda held: held.write(b"a"), lambda held: held.getvalue()),
    "text as a file": (io.StringIO, lambda held: held.write("a"), lambda held: held.getvalue()),
}


@pytest.mark.parametrize("kind", WITHIN)
def test_loading_changes_what_hardly_shows(kind: str) -> None:
    """An attached engine has it as it was published, or it is not shared."""
    make, change, look = WITHIN[kind]

    def build(m: Model, flag: float) -> None:
        m.held = make()

    attach(publish(build), build)
    try:
        published = publish(build, lambda m: change(m.held))
    except NotShareableError:
        return
    attached = attach(published, build)
    assert look(attached.held) == look(published.model.held)


def test_how_many_a_queue_holds() -> None:
    """A queue of tensors that loading makes forgets as many as it was made to."""

    def load(m: Model) -> None:
        m.queue = collections.deque([torch.ones(2)], maxlen=4)

    assert attach(publish(plain, load), plain).queue.maxlen == 4


def test_the_order_in_memory_of_an_array() -> None:
    """The last bits of what is computed from it follow from that."""

    def load(m: Model) -> None:
        m.columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))

    published = publish(plain, load)
    attached = attach(published, plain)
    assert attached.columns.strides == published.model.columns.strides
    assert np.array_equal(attached.columns, published.model.columns)


MEMORY: dict[str, Callable[[Model], object]] = {
    "array": lambda m: setattr(m, "view", m.table.numpy()),
    "part of an array": lambda m: setattr(m, "view", (1, [m.table.numpy()[2:4]])),
    "storage": lambda m: setattr(m, "view", m.table.untyped_storage()),
    "memoryview": lambda m: setattr(m, "view", Box(memoryview(m.table.numpy()))),
    "from an array": lambda m: _on(m, np.zeros(8, np.float32), torch.from_numpy),
    "from bytes": lambda m: _on(m, bytearray(32), lambda held: torch.frombuffer(held, dtype=torch.float32)),
}


def _on(m: Model, held: Any, tensor: Callable[[Any], torch.Tensor]) -> None:
    m.view, m.table = held, tensor(held)


@pytest.mark.parametrize("when", ["build", "load"])
@pytest.mark.parametrize("kind", MEMORY)
def test_a_view_of_a_tensor_that_is_none_is_refused_by_name(kind: str, when: str) -> None:
    """What takes the place of the tensor has other memory, and the view would be of what is freed."""

    def build(m: Model, flag: float) -> None:
        m.table = torch.zeros(8)
        if when == "build":
            MEMORY[kind](m)

    def load(m: Model) -> None:
        if when == "load":
            MEMORY[kind](m)
        m.table.copy_(torch.full((8,), 3.0))

    with pytest.raises(NotShareableError, match=r"view memory of tensors|a builtins.memoryview|set view"):
        publish(build, load)


def test_a_view_of_what_only_building_made() -> None:
    """As vLLM's buffers on the host have: they are the engine's own."""

    def build(m: Model, flag: float) -> None:
        m.table = torch.zeros(8)
        m.view = m.table.numpy()

    attached = attach(publish(build), build)
    attached.view[3] = 7.0
    assert attached.table[3] == 7.0


UNSEEN: dict[str, Callable[[torch.Tensor], float]] = {
    "tolist": lambda w: w.tolist()[1],  # type: ignore[no-any-return]
    "numpy": lambda w: float(w.numpy().max()),
    "asarray": lambda w: float(np.asarray(w).max()),
    "dlpack": lambda w: float(np.from_dlpack(w).max()),
    "storage": lambda w: float(bytes(w.untyped_storage())[2]),
    "address": lambda w: ctypes.c_float.from_address(w.data_ptr()).value,
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_processing_reads_a_weight_without_an_operator(kind: str) -> None:
    """The float that it makes of it is the published weight's, not a placeholder's."""

    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.zeros(3), requires_grad=False)

    def process(m: Model) -> None:
        m.scale = UNSEEN[kind](m.weight.data)

    published = publish(build, lambda m: m.weight.copy_(torch.full((3,), 0.75)), process)
    assert attach(published, build, process).scale == published.model.scale


@pytest.mark.parametrize("kind", ["parameters", "modules", "methods"])
def test_sets_of_what_looks_alike(kind: str) -> None:
    """Their order follows from addresses, and is told by where else the parts are."""

    def build(m: Model, flag: float) -> None:
        m.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
        parts: dict[str, Callable[[Any], Any]] = {
            "parameters": lambda layer: layer.weight,
            "modules": lambda layer: layer,
            "methods": lambda layer: layer.forward,
        }
        m.parts = {parts[kind](layer) for layer in reversed(m.layers)}

    def load(m: Model) -> None:
        for number, parameter in enumerate(m.layers.parameters()):
            parameter.data.fill_(number)

    published = publish(build, load)
    for _ in range(4):
        attached = attach(published, build)
        assert not differences(vars(walk(published.model)), vars(walk(attached)))


def test_a_constructor_makes_tensors_for_inference() -> None:
    """PyTorch counts no writes to them, so that only those that are seen tell whether they were filled."""

    @torch.inference_mode()
    def build(m: Model, flag: float) -> None:
        m.space, m.table, m.weight = torch.empty(LARGE), torch.full((LARGE,), flag), nn.Linear(512, 512)

    def load(m: Model) -> None:
        for parameter in m.weight.parameters():
            parameter.data.fill_(5.0)

    attached = attach(publish(build, load), build, flag=0.25)
    assert attached.space.shape == (LARGE,)
    assert attached.table.unique().tolist() == [0.25]
    assert attached.weight.weight.unique().tolist() == [5.0]


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _fill(m: Model) -> None:
    for parameter in m.parameters():
        parameter.data.copy_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))


def _without_norm(m: Model) -> None:
    _fill(m)
    parametrize.remove_parametrizations(m.x, "weight")  # type: ignore[arg-type]


def _materialized(m: Model) -> None:
    m.x(torch.ones(1, 8))  # type: ignore[operator]
    _fill(m)


BECOMES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "without its weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), _without_norm),
    "no longer lazy": (lambda: nn.LazyLinear(6), _materialized),
    "of its own class": (lambda: nn.Linear(8, 6), lambda m: (_fill(m), setattr(m.x, "__class__", Twice))),
    "without a hook": (lambda: Hooked(8, 6), lambda m: (_fill(m), m.x.hook.remove())),  # type: ignore[union-attr]
}


class Hooked(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.hook = self.register_forward_hook(self._negated)

    def _negated(self, module: nn.Module, x: Any, y: torch.Tensor) -> torch.Tensor:
        return -y


@pytest.mark.parametrize("kind", BECOMES)
def test_loading_makes_another_module_of_one(kind: str) -> None:
    """As vocoders lose their weight norm when their weights are there."""
    make, load = BECOMES[kind]

    def build(m: Model, flag: float) -> None:
        m.x = make()

    published = publish(build, load)
    attached = attach(published, build)
    assert type(attached.x) is type(published.model.x)
    for m in (published.model, attached):
        assert [*m.x.state_dict()] == [*published.model.x.state_dict()]
    assert torch.equal(attached.x(ONES.new_ones(1, 8)), published.model.x(ONES.new_ones(1, 8)))


@dataclasses.dataclass
class Fields:
    """Data of a model's author, with values and tensors."""

    first: Any
    second: Any = None


class Named(NamedTuple):
    first: Any
    second: Any = None


def relu_times(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return by * torch.relu(x)


def relu_of(module: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


TABLE_OF_FUNCTIONS = {"relu": torch.relu, "silu": functional.silu}


def ones(value: float) -> torch.Tensor:
    return torch.full((2,), value)


MADE: dict[str, Callable[[Model], Any]] = {
    "tuple": lambda m: (ones(1), 5, (ones(2), (ones(3), "a"))),
    "named tuple": lambda m: Named(ones(1), [Named(ones(2), 3)]),
    "tuple of the model's": lambda m: (m.first, m.second.weight, m.second.weight, nn.Linear),
    "dataclass": lambda m: Fields(ones(1), {"a": Fields(2.0, (ones(3), Fields(4)))}),
    "frozen dataclass": lambda m: Frozen(Frozen((1.0, ones(2)))),
    "list of many": lambda m: [Fields([number], (ones(number),)) for number in range(12)],
    "function": lambda m: [torch.relu, functional.silu, relu_times, Scaled.factor, torch.sigmoid],
    "function of a table": lambda m: TABLE_OF_FUNCTIONS["relu"],
    "partial": lambda m: functools.partial(relu_times, by=3.0),
    "partial of a partial": lambda m: functools.partial(functools.partial(functional.linear, ones(1)), bias=None),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_loading_makes_of_data_and_functions(kind: str) -> None:
    """Tuples and dataclasses are made without a constructor, and functions are found by their names."""
    published = publish(plain, lambda m: setattr(m, "made", MADE[kind](m)))
    attached = attach(published, plain)
    assert not differences(vars(walk(published.model)), vars(walk(attached)))


def test_a_function_that_loading_binds_to_a_module() -> None:
    def load(m: Model) -> None:
        m.first.forward = types.MethodType(relu_of, m.first)

    x = torch.tensor([-1.0, 2.0])
    assert attach(publish(plain, load), plain).first(x).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("how", [lambda f: f, functools.partial], ids=["function", "partial"])
def test_a_function_that_says_it_is_another_is_refused(how: Callable[[Any], Any]) -> None:
    """One that wraps it has its name, and does something else."""

    def load(m: Model) -> None:
        m.made = how(functools.wraps(relu_times)(lambda x: x))

    with pytest.raises(NotShareableError, match=r"loading set made to another .*function .*relu_times"):
        publish(plain, load)


@pytest.mark.parametrize("make", [Box, CacheConfig, threading.Lock, lambda: functools.partial(Box(1).__init__)])
def test_objects_that_are_more_than_data_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(NotShareableError, match=r"loading set made\S* to .*, which cannot be described"):
        publish(plain, lambda m: setattr(m, "made", make(1) if make is Box else make()))


def _split(m: Model, size: int) -> None:
    m.whole = nn.Parameter(torch.empty(size, 4), requires_grad=False)
    m.parts = m.whole.split(size // 2)


def _flat(m: Model, size: int) -> None:
    m.whole = torch.zeros(size, dtype=torch.uint8)
    m.parts = [m.whole[: size // 2].view(torch.float32), m.whole[size // 2 :]]


def _of_a_leaf(m: Model, size: int) -> None:
    m.whole = nn.Parameter(torch.empty(size, 4))
    with torch.no_grad():
        m.parts = [Box(m.whole.view(-1)[4:]), m.whole.t()]


@pytest.mark.parametrize("size", [8, LARGE])
@pytest.mark.parametrize("make", [_split, _flat, _of_a_leaf])
def test_a_constructor_keeps_parts_of_a_weight(make: Callable[[Model, int], None], size: int) -> None:
    """They are the same memory in an attached engine."""

    def load(m: Model) -> None:
        m.whole.data.copy_(torch.arange(m.whole.numel()).view_as(m.whole) % 100)

    published = publish(lambda m, flag: make(m, size), load)
    attached = attach(published, lambda m, flag: make(m, size))
    assert torch.equal(attached.whole, published.model.whole)
    for model in (published.model, attached):
        for part in (getattr(part, "value", part) for part in model.parts):
            assert part.untyped_storage().data_ptr() == model.whole.untyped_storage().data_ptr()


def test_a_weak_reference_to_a_weight() -> None:
    """It leads to the same object, whatever memory that has."""

    def build(m: Model, flag: float) -> None:
        m.weak = weakref.ref(m.first.weight)

    attached = attach(publish(build), build)
    assert attached.weak() is attached.first.weight


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_small_weight_whose_memory_is_work_space_is_private(kind: str) -> None:
    """As scales that engines measure anew: a write to what all map would end the engine."""

    def load(m: Model) -> None:
        m.scale = nn.Parameter(checkpoint(3.0)[:4].clone(), requires_grad=False)
        if kind == "buffer":
            m.register_buffer("measured", m.scale.data[1:], persistent=False)
        else:
            m.measured = m.scale.data[1:]

    published = publish(plain, load)
    attached = attach(published, plain)
    assert in_arena(attached.first.weight, published)
    for model in (published.model, attached):
        assert not in_arena(model.measured, published)
        model.measured.fill_(7.0)
        assert model.scale.tolist() == [3.0, 7.0, 7.0, 7.0]


def _swap(m: Model) -> None:
    m.one, m.other = m.other, m.one


def _same(m: Model) -> None:
    m.one = m.other


MOVED: dict[str, Change] = {
    "swapped": _swap,
    "at a second place": _same,
    "reversed": lambda m: m.several.reverse(),
    "taken from a list": lambda m: m.several.pop(0),
    "taken from a dict": lambda m: m.named.update(a=m.named.pop("b")),
    "another tuple": lambda m: setattr(m, "fixed", m.fixed[::-1]),
}


@pytest.mark.parametrize("kind", MOVED)
def test_loading_moves_objects_that_building_made(kind: str) -> None:
    """What is in them may follow from flags: those of the publisher must not take the place of this engine's."""

    def build(m: Model, flag: float) -> None:
        m.one, m.other, m.several = Box(flag), Box(2 * flag), [Box(number * flag) for number in range(4)]
        m.named, m.fixed = {"a": Box(flag), "b": Box(2 * flag)}, (Box(flag), Box(2 * flag))

    published = publish(build, MOVED[kind], flag=1.0)
    attached = attach(published, build, flag=1.0)
    assert not differences(vars(walk(published.model)), vars(walk(attached)))
    with pytest.raises(ParityError, match=r"value is built as .* here and as .* in the published model"):
        attach(published, build, flag=0.25)


OF_BUILT: dict[str, Change] = {
    "scaled": lambda m: m.table.mul_(2),
    "of another type": lambda m: m.part.half(),
    "computed": lambda m: m.register_buffer("new", m.table[1:] + 1),
    "in two steps": lambda m: m.register_buffer("new", torch.zeros(3).copy_(m.table).sqrt()),
    "with a weight": lambda m: setattr(m, "new", m.first.weight.data[:3, 0] * m.table),
    "by a list": lambda m: setattr(m, "new", m.table.tolist()),
    "by numpy": lambda m: setattr(m, "new", torch.from_numpy(m.table.numpy() * 2)),
    "by asarray": lambda m: setattr(m, "new", np.asarray(m.table) * 2),
    "by a number": lambda m: setattr(m, "new", m.table.max().item()),
    "by a number of what was computed": lambda m: setattr(m, "new", float((m.table * 2).sum())),
    "by a choice": lambda m: setattr(m, "new", "large" if m.table[0] > 0.5 else "small"),
    "a part is copied over": lambda m: m.table[:1].copy_(checkpoint(5.0)[:1]),
    "a part is set": lambda m: m.table.__setitem__(1, 5.0),
    "a part is filled": lambda m: m.table.data[1:].zero_(),
}


@pytest.mark.parametrize("kind", OF_BUILT)
def test_loading_computes_tensors_of_what_building_made(kind: str) -> None:
    """A rope table has the length of this engine's limit, also if loading gives it another type."""

    def build(m: Model, flag: float) -> None:
        m.register_buffer("table", torch.full((3,), flag))
        m.part = nn.Module()
        m.part.register_buffer("rope", torch.arange(8 * flag))

    published = publish(build, OF_BUILT[kind], flag=1.0)
    attached = attach(published, build, flag=1.0)
    assert not differences(vars(walk(published.model)), vars(walk(attached)))
    with pytest.raises(ParityError, match=r"(table|rope) is built as .* here and as .*, and loading used it"):
        attach(published, build, flag=0.25)


def test_what_loading_overwrites_in_parts() -> None:
    """If these are all, what was there means nothing."""

    def build(m: Model, flag: float) -> None:
        m.register_buffer("table", torch.full((4, 2), flag))
        m.register_buffer("columns", torch.full((4, 2), flag))

    def load(m: Model) -> None:
        for number in range(2):
            m.table[2 * number : 2 * number + 2].copy_(checkpoint(5.0)[:4].view(2, 2))
            m.columns[:, number].copy_(checkpoint(6.0)[:4])

    attached = attach(publish(build, load), build, flag=0.25)
    assert (attached.table.unique().tolist(), attached.columns.unique().tolist()) == ([5.0], [6.0])


def test_loading_fills_a_part_of_what_is_empty() -> None:
    """The other part holds whatever was in its memory, in each engine."""

    def build(m: Model, flag: float) -> None:
        m.register_buffer("table", torch.empty(4, 2))

    published = publish(build, lambda m: m.table[0].fill_(5.0))
    published = dataclasses.replace(published, manifest=_built_otherwise(published.manifest))
    assert attach(published, build).table[0].tolist() == [5.0, 5.0]
    for fill in (
        lambda table, flag: table.fill_(flag),
        lambda table, flag: table.data.fill_(flag),
        lambda table, flag: table.numpy().fill(flag),
        lambda table, flag: torch.from_dlpack(table).fill_(flag),
    ):

        def filled(m: Model, flag: float, fill: Callable[[Any, float], object] = fill) -> None:
            build(m, flag)
            fill(m.table, flag)

        with pytest.raises(ParityError, match=r"table is built as .* here and as .*, and loading used it"):
            attach(publish(filled, lambda m: m.table[0].fill_(5.0)), filled, flag=0.25)


def _built_otherwise(manifest: Manifest) -> Manifest:
    """As if other bytes had been in the memory of the publisher's table."""
    whole = manifest.modules[0]
    values = {
        name: ("as built: (4, 2) 0", text) if name == "table!" else (then, text)
        for name, (then, text) in whole.observed.values.items()
    }
    assert "table!" in values
    seen = dataclasses.replace(whole.observed, values=values)
    return dataclasses.replace(manifest, modules=(dataclasses.replace(whole, observed=seen), *manifest.modules[1:]))


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        lambda table: torch.empty_like(table).fill_(2.0),
        lambda table: table.new_full((3,), 2.0),
        lambda table: table.clone().copy_(torch.ones(3)),
    ],
)
def test_loading_takes_the_shape_of_what_building_made(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """And none of its values, so it may have others here."""

    def build(m: Model, flag: float) -> None:
        m.register_buffer("table", torch.full((3,), flag))

    published = publish(build, lambda m: setattr(m, "made", make(m.table)), flag=1.0)
    assert torch.equal(attach(published, build, flag=0.25).made, published.model.made)


@pytest.mark.parametrize("flag", [1.0, 0.25])
def test_what_is_in_parameters_before_they_are_loaded_counts_if_it_is_read(flag: float) -> None:
    """As a model does that gives itself its type before it is given its weights."""

    def build(m: Model, flag: float) -> None:
        m.weight = nn.Parameter(torch.full((3,), flag), requires_grad=False)

    def load(m: Model) -> None:
        m.half()
        for number in range(3):
            m.weight[number].copy_(checkpoint(float(number))[0])

    published = publish(build, load, flag=1.0)
    if flag == 1.0:
        assert attach(published, build, flag=flag).weight.tolist() == [0.0, 1.0, 2.0]
    else:
        with pytest.raises(ParityError, match="weight is built as"):
            attach(published, build, flag=flag)
