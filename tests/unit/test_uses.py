"""Values that building made of flags, and that the model's own code loads by: here this file is such code."""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import io
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.model_executor.models.utils import AutoWeightsLoader

from tests.unit.test_origins import Box, Model, Published, SlotModule, Slots, attach, nothing, publish
from vllm_companion_plugin.cli.verify import differences
from vllm_companion_plugin.core.identity import VARIANT, EntryKey
from vllm_companion_plugin.engine.identity.key import variant
from vllm_companion_plugin.engine.run.reachable import walk
from vllm_companion_plugin.errors import ParityError

pytestmark = pytest.mark.core

SCALE = 1.0
TABLE: dict[str, float] = {}
BOX = Box(1.0)
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
HELD: dict[str, Any] = {}


class Own(nn.Module):
    """Has values of all kinds."""

    scale: ClassVar[float] = 1.0

    def __init__(self, flag: float) -> None:
        super().__init__()
        self.alpha, self.box, self.slots = flag, Box(Box(flag)), Slots(flag)
        self.table, self.listed = {"a": {"b": flag}}, [1.0, (flag,)]
        self.method, self.function = Box(flag).__init__, lambda: flag  # type: ignore[misc]
        self.partial = types.MethodType(operator.itemgetter("x"), {"x": flag})

    @property
    def doubled(self) -> float:
        return 2 * self.alpha

    def __getattr__(self, name: str) -> Any:
        if name == "computed":
            return 3 * self.alpha
        return super().__getattr__(name)


def build(m: Model, flag: float) -> None:
    m.alpha = m.unused = flag
    m.own = Own(flag)
    m.second.alpha, m.second.weight.alpha, m.second.weight.box = flag, flag, Box(flag)  # type: ignore[assignment]
    m.config = PretrainedConfig(name_or_path=f"/models/{flag}", alpha=flag)
    m.held = {"module": nn.Identity()}
    m.held["module"].alpha = flag  # type: ignore[assignment]
    m.slotted = SlotModule()
    m.slotted.value = flag
    m.weight_loader = loader(flag)
    m.second.bias.weight_loader = loader(flag)  # type: ignore[attr-defined]


def loader(flag: float) -> Callable[[nn.Parameter], float]:
    return lambda parameter: flag


READS: dict[str, Callable[[Any], float]] = {
    "of the model": lambda m: m.alpha,
    "of a module": lambda m: m.second.alpha,
    "of an object": lambda m: m.own.box.value.value,
    "in a slot": lambda m: m.own.slots.value,
    "in a slot of a module": lambda m: m.slotted.value,
    "in a dict": lambda m: m.own.table["a"]["b"],
    "in a list": lambda m: m.own.listed[1][0],
    "of a module in a dict": lambda m: m.held["module"].alpha,
    "by a property": lambda m: m.own.doubled,
    "by __getattr__": lambda m: m.own.computed,
    "by name": lambda m: getattr(m, "alpha"),  # noqa: B009
    "by the names": operator.attrgetter("own.box.value.value"),
    "by all of it": lambda m: vars(m)["alpha"],
    "by its dictionary": lambda m: m.__dict__["alpha"],
    "of a copy": lambda m: copy.copy(m).alpha,
    "of a method's object": lambda m: m.own.method.__self__.value,
    "captured": lambda m: m.own.function(),
    "on a parameter": lambda m: m.second.weight.alpha,
    "of an object on a parameter": lambda m: m.second.weight.box.value,
    "by all on a parameter": lambda m: vars(m.second.weight)["alpha"],
    "of a configuration": lambda m: m.config.alpha,
    "captured by a loader": lambda m: m.weight_loader(m.second.weight),
    "captured by a parameter's loader": lambda m: m.second.bias.weight_loader(m.second.bias),
}


def scaled(read: Callable[[Any], float]) -> Callable[[Model], None]:
    def load(m: Model) -> None:
        m.first.weight.data.mul_(read(m))

    return load


@pytest.mark.parametrize("way", READS)
def test_loading_computes_in_python_of_what_building_kept(way: str) -> None:
    published = publish(build, scaled(READS[way]), flag=1.0)
    attached = attach(published, build, flag=1.0)
    assert not differences(vars(walk(published.model)), vars(walk(attached)))
    with pytest.raises(ParityError, match=r"is built as .* here and as .* in the published model, and loading uses it"):
        attach(published, build, flag=0.25)


class Loader:
    """Loads by what it holds."""

    def __init__(self, flag: float) -> None:
        self.flag = flag

    def load(self, parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data.copy_(self.flag * weight)

    __call__ = load


def times(flag: float, parameter: nn.Parameter, weight: torch.Tensor) -> None:
    parameter.data.copy_(flag * weight)


def by_vllm(m: Any) -> float:
    """vLLM reads what the model's code has hung on the parameter, and calls it."""
    AutoWeightsLoader(m).load_weights([("second.weight", torch.ones_like(m.second.weight))])
    return 1.0


def by_vllm_to_buffer(m: Any) -> float:
    AutoWeightsLoader(m).load_weights([("table", torch.ones_like(m.table))])
    return 1.0


def tensor_with(**held: Any) -> torch.Tensor:
    made = torch.ones(3)
    vars(made).update(held)
    return made


def buffer(m: Any, flag: float, **held: Any) -> None:
    m.register_buffer("table", torch.ones(int(4 * flag)))
    vars(m.table).update(held)


def only_if(flag: float, held: Any, value: Any = 3.0) -> None:
    if flag != 1.0:
        held.extra = value


def hooked(m: Any, flag: float) -> None:
    m.second.register_load_state_dict_pre_hook(lambda _, state, *rest: state.update(weight=flag * state["weight"]))


def hook_runs(m: Any) -> float:
    m.second.load_state_dict({"weight": torch.ones_like(m.second.weight), "bias": torch.ones_like(m.second.bias)})
    return 1.0


class Looks(nn.Module):
    """Looks up attributes by itself."""

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)


class Default(nn.Module):
    extra = 1.0


WAYS: dict[str, tuple[Callable[[Any, float], object], Callable[[Any], float]]] = {
    "absent, with a default": (lambda m, flag: only_if(flag, m), lambda m: getattr(m, "extra", 1.0)),
    "absent, and asked for": (lambda m, flag: only_if(flag, m), lambda m: 1.0 + hasattr(m, "extra")),
    "absent among all": (lambda m, flag: only_if(flag, m), lambda m: len(vars(m))),
    "absent on a parameter": (lambda m, flag: only_if(flag, m.second.bias), lambda m: hasattr(m.second.bias, "extra")),
    "absent in an object": (
        lambda m, flag: (setattr(m, "box", Box(1.0)), only_if(flag, m.box)),
        lambda m: getattr(m.box, "extra", 1.0),
    ),
    "of the class alone": (
        lambda m, flag: (setattr(m, "part", Default()), only_if(flag, m.part)),
        lambda m: m.part.extra,
    ),
    "of a class that looks up by itself": (
        lambda m, flag: (setattr(m, "part", Looks()), setattr(m.part, "flag", flag)),
        lambda m: m.part.flag,
    ),
    "size of a buffer": (buffer, lambda m: m.table.shape[0]),
    "size of a parameter": (
        lambda m, flag: setattr(m, "table", nn.Parameter(torch.ones(int(4 * flag)))),
        lambda m: len(m.table),
    ),
    "on a buffer": (lambda m, flag: buffer(m, 1.0, held=flag), lambda m: m.table.held),
    "on a buffer among others": (
        lambda m, flag: buffer(m, 1.0, held=flag),
        lambda m: [table.held for table in m.buffers()][0],  # noqa: RUF015
    ),
    "all on a buffer among others": (
        lambda m, flag: buffer(m, 1.0, held=flag),
        lambda m: sum(sum(vars(table).values()) for table in m.buffers()),
    ),
    "on a tensor in a list": (
        lambda m, flag: setattr(m, "tables", [tensor_with(held=flag)]),
        lambda m: next(iter(vars(m)["tables"])).held,
    ),
    "of an object that vLLM calls for a buffer": (
        lambda m, flag: buffer(m, 1.0, weight_loader=Loader(flag).load),
        by_vllm_to_buffer,
    ),
    "of an object on a buffer": (lambda m, flag: buffer(m, 1.0, box=Box(flag)), lambda m: m.table.box.value),
    "of an object met elsewhere": (
        lambda m, flag: (setattr(m, "box", Box(flag)), setattr(m, "boxes", [m.box])),
        lambda m: m.boxes[0].value,
    ),
    "of a weak reference": (
        lambda m, flag: (setattr(m, "box", Box(flag)), setattr(m, "weak", weakref.ref(m.box))),
        lambda m: m.weak().value,
    ),
    "of an object of C": (lambda m, flag: setattr(m, "file", io.StringIO(str(flag))), lambda m: len(m.file.getvalue())),
    "behind a proxy": (
        lambda m, flag: setattr(m, "proxy", types.MappingProxyType({"a": flag})),
        lambda m: m.proxy["a"],
    ),
    "captured by what vLLM calls": (
        lambda m, flag: setattr(m.second.weight, "weight_loader", lambda p, w: p.data.copy_(flag * w)),
        by_vllm,
    ),
    "of a method that vLLM calls": (
        lambda m, flag: setattr(m.second.weight, "weight_loader", Loader(flag).load),
        by_vllm,
    ),
    "of an object that vLLM calls": (lambda m, flag: setattr(m.second.weight, "weight_loader", Loader(flag)), by_vllm),
    "of a partial that vLLM calls": (
        lambda m, flag: setattr(m.second.weight, "weight_loader", functools.partial(times, flag)),
        by_vllm,
    ),
    "of a hook": (hooked, hook_runs),
    "random numbers of torch": (lambda m, flag: torch.manual_seed(int(4 * flag)), lambda m: float(torch.rand(()))),
    "random numbers of numpy": (lambda m, flag: np.random.seed(int(4 * flag)), lambda m: float(np.random.rand())),
}


@pytest.mark.parametrize("way", WAYS)
def test_loading_sees_what_building_kept(way: str) -> None:
    builds, read = WAYS[way]
    published = publish(builds, scaled(read), flag=1.0)
    attach(published, builds, flag=1.0)
    with pytest.raises(ParityError, match=r"is built as .* here and as .* in the published model, and loading uses it"):
        attach(published, builds, flag=1.5)


@pytest.fixture
def unseen() -> Iterator[types.ModuleType]:
    """A module of the model's code that reads what nobody sees it read."""
    made = types.ModuleType("code_that_reads_unseen")
    made.__file__ = __file__
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


UNSEEN: dict[str, tuple[Callable[[Any, float], object], str]] = {
    "of an object": (lambda m, flag: setattr(m, "alpha", flag), "object.__getattribute__(m, 'alpha')"),
    "by a text": (lambda m, flag: setattr(m, "alpha", flag), "getattr(object, '__getattribute__')(m, 'alpha')"),
    "statically": (lambda m, flag: setattr(m, "alpha", flag), "inspect.getattr_static(m, 'alpha')"),
    "of another module": (
        lambda m, flag: setattr(m.second, "alpha", flag),
        "object.__getattribute__(m.second, '__dict__')['alpha']",
    ),
    "on a tensor": (
        lambda m, flag: buffer(m, 1.0, alpha=flag),
        "inspect.getattr_static(m._buffers['table'], 'alpha')",
    ),
    "the seed": (lambda m, flag: torch.manual_seed(int(4 * flag)), "torch.initial_seed()"),
    "the state": (lambda m, flag: torch.manual_seed(int(4 * flag)), "float(torch.get_rng_state()[0])"),
    "the state of numpy": (
        lambda m, flag: np.random.seed(int(4 * flag)),
        "float(numpy.random.get_state()[1][0] % 7 + 1)",
    ),
}
FORMS = {
    "a function": "def read(m): return {}",
    "captured": "def outer(inner):\n  def read(m): return inner(m)\n  return read\nread = outer(lambda m: {})",
    "a method": "class Reader:\n  def __getattr__(self, name): return lambda m: {}\nread = Reader().method",
    "a partial": "read = functools.partial(lambda m: {})",
    "in a table": "table = dict(a=lambda m: {})\ndef read(m): return table['a'](m)",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", UNSEEN)
def test_reading_that_nobody_sees(unseen: types.ModuleType, way: str, form: str) -> None:
    """Code that mentions such a way to read may have read all."""
    builds, expression = UNSEEN[way]
    exec("import functools, inspect, numpy, torch\n" + FORMS[form].format(expression), vars(unseen))

    def uses(m: Any, flag: float) -> None:
        builds(m, flag)
        m.read = unseen.read

    published = publish(uses, scaled(lambda m: unseen.read(m)), flag=1.0)
    attach(published, uses, flag=1.0)
    with pytest.raises(ParityError, match=r"is built as .* here and as .* in the published model, and loading uses it"):
        attach(published, uses, flag=1.5)


OF_PARAMETERS: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.kept.data.add_(1.0),
    "one number": lambda m: m.first.weight.data.mul_(m.kept.data[0]),
    "in Python": lambda m: m.first.weight.data.mul_(float(m.kept.data[0])),
    "in NumPy": lambda m: m.first.weight.data.mul_(float(m.kept.numpy()[0])),
    "into itself": lambda m: m.kept.data.copy_(m.kept.data * 2),
    "beside what is put in": lambda m: m.kept.data.index_put_((torch.tensor([1]),), torch.tensor([5.0])),
}


@pytest.mark.parametrize("elements", [8, 1 << 15, 1 << 19], ids=["small", "deferred", "sampled"])
@pytest.mark.parametrize("way", OF_PARAMETERS)
def test_what_building_put_into_a_parameter(way: str, elements: int) -> None:
    """It counts if loading reads it before it writes there."""

    def kept(m: Any, flag: float) -> None:
        m.kept = nn.Parameter(torch.empty(elements), requires_grad=False)
        m.kept.fill_(flag)

    def load(m: Any) -> None:
        OF_PARAMETERS[way](m)

    published = publish(kept, load, flag=1.0)
    attached = attach(published, kept, flag=1.0)
    assert torch.equal(attached.kept, published.model.kept)
    with pytest.raises(
        ParityError, match=r"kept is built as .* here and as .* in the published model, and loading used"
    ):
        attach(published, kept, flag=1.5)


@pytest.mark.parametrize("elements", [8, 1 << 19])
def test_parameters_that_say_nothing(elements: int) -> None:
    """One that loading fills before it reads there, one that is empty, and one of which only the form is read."""

    def kept(m: Any, flag: float) -> None:
        m.kept = nn.Parameter(torch.full((elements,), flag), requires_grad=False)
        m.empty = nn.Parameter(torch.empty(elements), requires_grad=False)
        m.formed = nn.Parameter(torch.full((elements,), flag), requires_grad=False)

    def load(m: Any) -> None:
        m.kept.data.copy_(torch.ones(len(m.kept)))
        m.kept.data.add_(m.kept.data)
        m.empty.data.add_(1.0)
        assert m.formed.view(-1, 2).t().shape[0] == 2
        m.formed.data.narrow(0, 0, elements // 2).copy_(torch.zeros(elements // 2))
        m.formed.data[elements // 2 :].fill_(3.0)

    attached = attach(publish(kept, load, flag=1.0), kept, flag=1.5)
    assert attached.kept.unique().tolist() == [2.0]
    assert attached.formed.unique().tolist() == [0.0, 3.0]


def test_random_numbers_after_which_the_state_is_put_back() -> None:
    def seeded(m: Model, flag: float) -> None:
        torch.manual_seed(int(flag * 4))

    def forked(m: Any) -> float:
        with torch.random.fork_rng():
            return float(torch.rand(()))

    def own_generator(m: Any) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(3)))

    published = publish(seeded, scaled(forked), flag=1.0)
    attach(published, seeded, flag=1.0)
    with pytest.raises(ParityError, match=r"random numbers of torch is built as"):
        attach(published, seeded, flag=1.5)
    attach(publish(seeded, scaled(own_generator), flag=1.0), seeded, flag=1.5)


def test_random_numbers_that_loading_does_not_draw_are_the_engines() -> None:
    def seeded(m: Model, flag: float) -> None:
        torch.manual_seed(int(flag * 4))

    attach(publish(seeded, nothing, flag=1.0), seeded, flag=1.5)


def test_methods_that_an_object_has_of_its_own_say_nothing() -> None:
    """As the one by which vLLM's layers are compiled, or not. What they hold counts if loading asks for them."""

    def chosen(m: Model, flag: float) -> None:
        if flag != 1.0:
            m.forward = m.train  # type: ignore[method-assign]

    attach(publish(chosen, lambda m: callable(m.forward), flag=1.0), chosen, flag=1.5)


def test_another_value_is_another_variant() -> None:
    published = publish(build, scaled(READS["of the model"]), flag=1.0)
    with pytest.raises(ParityError) as raised:
        attach(published, build, flag=0.25)
    assert (raised.value.where, raised.value.here) == ("alpha", "0.25")


def test_long_values_that_differ_at_their_end_are_two_variants() -> None:
    wanted = EntryKey("id", "model", "target", "single", {}, "", {})
    first, second = (variant(wanted, "alpha", repr([0.0] * 400 + [last])) for last in (1.0, 2.0))
    assert first.id != second.id
    assert len(first.fields[VARIANT]) < 400


def test_what_loading_does_not_use_is_the_engines() -> None:
    def load(m: Model) -> None:
        """It looks at much else, and lets others look."""
        m.first.weight.data.mul_(len([*m.named_parameters(), *m.modules()]) / m.first.in_features)
        m.requires_grad_(False).eval()
        m.own.unused = 5.0

    attached = attach(publish(build, load, flag=1.0), build, flag=0.25)
    assert (attached.alpha, attached.own.alpha, attached.config.alpha, attached.own.unused) == (0.25, 0.25, 0.25, 5.0)


def test_where_a_configuration_was_read_is_each_engines_own() -> None:
    """Its fields are in the key, unless building sets one."""

    def located(m: Model, flag: float) -> None:
        m.config = PretrainedConfig(name_or_path=f"/models/{flag}", alpha=1.0)

    attached = attach(publish(located, scaled(READS["of a configuration"]), flag=1.0), located, flag=0.25)
    assert attached.config.name_or_path == "/models/0.25"


def test_a_module_that_loading_takes_out() -> None:
    """What was used of it counts all the same."""

    def load(m: Model) -> None:
        scaled(READS["of an object"])(m)
        del m.own

    published = publish(build, load, flag=1.0)
    assert not hasattr(attach(published, build, flag=1.0), "own")
    with pytest.raises(ParityError, match=r"own\.box\.value\.value is built as 0\.25"):
        attach(published, build, flag=0.25)


def test_a_value_that_loading_uses_and_changes() -> None:
    def load(m: Model) -> None:
        m.alpha += 1

    published = publish(build, load, flag=1.0)
    assert attach(published, build, flag=1.0).alpha == 2.0
    with pytest.raises(ParityError, match=r"alpha is built as 0\.25 here and as 1\.0 in the published model"):
        attach(published, build, flag=0.25)


@pytest.fixture
def module() -> Iterator[None]:
    """What building sets in this module goes with the test."""
    before = SCALE, Own.scale
    CONTEXT.set(1.0)
    vars(LOCAL).clear()
    yield
    _set(*before)
    vars(sys.modules[__name__]).pop("NEW", None)


def _set(scale: float, of_class: float) -> None:
    vars(sys.modules[__name__])["SCALE"], Own.scale = scale, of_class


class Here(Model):
    """The code of this one is in this module."""


BESIDE: dict[str, tuple[str, Callable[[float], object], Callable[[], float]]] = {
    "a global": (r"test_uses\.SCALE", lambda flag: _set(flag, 1.0), lambda: SCALE),
    "of a class": (r"Own\.scale", lambda flag: _set(1.0, flag), lambda: Own.scale),
    "a new global": (
        r"test_uses\.NEW",
        lambda flag: vars(sys.modules[__name__]).update(NEW=flag),
        lambda: vars(sys.modules[__name__])["NEW"],
    ),
    "in an object": (r"test_uses\.BOX\.value", lambda flag: setattr(BOX, "value", flag), lambda: BOX.value),
    "a table": (r"test_uses\.TABLE", lambda flag: TABLE.update(a=flag), lambda: TABLE["a"]),
    "a tensor": (
        r"test_uses\.NEW",
        lambda flag: vars(sys.modules[__name__]).update(NEW=torch.full((2,), flag)),
        lambda: float(vars(sys.modules[__name__])["NEW"][0]),
    ),
    "of a context": (r"test_uses\.CONTEXT", lambda flag: CONTEXT.set(flag), CONTEXT.get),
    "of a thread": (r"test_uses\.LOCAL", lambda flag: setattr(LOCAL, "flag", flag), lambda: LOCAL.flag),
}


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("kind", BESIDE)
def test_what_building_sets_beside_the_model(kind: str) -> None:
    where, set_it, read = BESIDE[kind]

    def builds(m: Model, flag: float) -> None:
        set_it(flag)

    published = publish(builds, lambda m: m.first.weight.data.mul_(read()), flag=0.5, of=Here)
    attach(published, builds, flag=0.5, of=Here)
    with pytest.raises(
        ParityError, match=rf"{where} is .*(0\.25|tensor).* here after building and .*(0\.5|tensor).* there"
    ):
        attach(published, builds, flag=0.25, of=Here)


@pytest.mark.usefixtures("module")
def test_an_object_of_the_model_that_is_reached_from_beside_it() -> None:
    def builds(m: Any, flag: float) -> None:
        m.box = HELD["box"] = Box(flag)

    try:
        published = publish(builds, lambda m: m.first.weight.data.mul_(HELD["box"].value), flag=0.5, of=Here)
        attach(published, builds, flag=0.5, of=Here)
        with pytest.raises(ParityError, match=r"HELD\['box'\]\.value is 0\.25 here"):
            attach(published, builds, flag=0.25, of=Here)
    finally:
        HELD.clear()


def test_a_function_of_no_module() -> None:
    """As `exec` makes them where it is given a namespace without a name."""
    space: dict[str, Any] = {}
    exec("def scale(): return 1.0", space)

    def builds(m: Any, flag: float) -> None:
        m.scale = space["scale"]

    attach(publish(builds, lambda m: m.first.weight.data.mul_(m.scale())), builds)  # type: ignore[operator]


@pytest.mark.usefixtures("module")
def test_what_was_there_before_building_is_none_of_it() -> None:
    """As what another model of this process has set."""
    _set(7.0, 7.0)
    published = publish(nothing_built, of=Here)
    _set(1.0, 1.0)
    attach(published, nothing_built, of=Here)


def nothing_built(m: Model, flag: float) -> None:
    """Sets nothing."""


@pytest.mark.usefixtures("module")
def test_code_that_is_not_there() -> None:
    _set(1.0, 1.0)
    published: Published = publish(nothing_built, nothing, of=Here)
    manifest = dataclasses.replace(published.manifest, set_by_building={"nowhere.at_all#SCALE": "0.5"})
    with pytest.raises(ParityError, match=r"nowhere\.at_all\.SCALE is absent here"):
        attach(dataclasses.replace(published, manifest=manifest), nothing_built, of=Here)
