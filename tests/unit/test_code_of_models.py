"""What loading changes beside a model: in its code, wherever that keeps it, and in switches of torch.

Attached engines have it, or it is refused.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import enum
import functools
import importlib
import importlib.util
import operator
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import einops
import numpy as np
import pytest
import torch
from einops.layers import torch as einops_torch
from torch import nn

from tests.unit.test_origins import Box, Model, attach, nothing, publish
from tests.unit.test_strange_loading import KEY, Key, Local, Scaled, Torchs, plain
from vllm_companion_plugin import memory
from vllm_companion_plugin.core.module_tree import CommonValue, Stage
from vllm_companion_plugin.errors import NotShareableError, ParityError
from vllm_companion_plugin.tree import constants, observe, pack
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.observe import Observation


def test_loading_changes_the_code_of_a_class() -> None:
    class Own(Scaled):
        def factor(self) -> float:
            return 2.0

    def build(m: Model, flag: float) -> None:
        m.own = Own()

    published = publish(build)
    assert attach(published, build).own.factor() == 2.0
    for change in (
        lambda m: setattr(type(m.own), "factor", lambda self: 3.0),
        lambda m: setattr(type(m.own), "new", property(lambda self: 4.0)),
        lambda m: delattr(type(m.own), "factor"),
    ):
        constants.set_here.clear()
        with pytest.raises(NotShareableError, match=r"loading changed .*Own\.(factor|new), which its objects share"):
            publish(build, change)


class Colour(enum.Enum):
    """Members may have attributes."""

    RED = "red"


SCALE = 1.0
MODE: Any = None
TABLE = {"a": [1.0]}
BOX = Box([1.0])
WEAK: weakref.WeakKeyDictionary[Key, float] = weakref.WeakKeyDictionary({KEY: 1.0})
THREAD = threading.local()
THREAD.held = 1.0
LOCAL = Local()
LOCAL.held = 1.0
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
FACTORS = torch.ones(3)
__TABLE = {"a": 1.0}
WEAK_BOX: weakref.WeakKeyDictionary[Key, Box] = weakref.WeakKeyDictionary({KEY: Box(1.0)})
THREAD.box = Box(1.0)
CONTEXT_BOX = contextvars.ContextVar("CONTEXT_BOX", default=Box(1.0))  # noqa: B039
FIXED = types.MappingProxyType({"a": [1.0]})


def times(x: float, by: float = 1.0) -> float:
    return x * by


def counter() -> Callable[[], float]:
    count = 1.0

    def next_one() -> float:
        nonlocal count
        count += 1
        return count

    return next_one


COUNT = counter()


class Using(nn.Module):
    """A module of this file, whose globals belong to the model's code for that."""

    factor = 1.0
    box = Box([1.0])
    table: ClassVar[dict[str, Any]] = {"a": Box(1.0)}
    torchs = Torchs()

    class Options:
        """A class in a class."""

        mode: Any = 1.0
        modes: ClassVar[list[float]] = [1.0]

    def __call__(self, by: float = 1.0) -> float:
        return by

    def scale(self, by: float = 1.0) -> float:
        return by


def _set_global(name: str, value: Any) -> Callable[[], object]:
    return lambda: globals().__setitem__(name, value)


def _another_process() -> None:
    constants.set_here.clear()
    globals().update(SCALE=1.0, MODE=None)
    globals().pop("NEW", None)
    Using.factor = 1.0


@pytest.fixture
def process() -> Iterator[None]:
    """One in which nothing was loaded before, and another one afterwards."""
    _another_process()
    yield
    _another_process()


def using(m: Model, flag: float) -> None:
    m.own = Using()


CONSTANT: dict[str, tuple[Callable[[], object], Callable[[], object], object]] = {
    "number": (_set_global("SCALE", 2.0), lambda: SCALE, 2.0),
    "text": (_set_global("MODE", "fast"), lambda: MODE, "fast"),
    "sizes": (_set_global("MODE", (1, (2, None))), lambda: MODE, (1, (2, None))),
    "dtype": (_set_global("MODE", torch.float16), lambda: MODE, torch.float16),
    "member of an enum": (_set_global("MODE", Colour.RED), lambda: MODE, Colour.RED),
    "new": (_set_global("NEW", 1), lambda: globals().get("NEW"), 1),
    "of a class": (lambda: setattr(Using, "factor", 2.0), lambda: Using.factor, 2.0),
}


@pytest.mark.usefixtures("process")
class TestConstants:
    """Flags, such as that somebody was warned, which loading sets beside the model."""

    @pytest.mark.parametrize("kind", CONSTANT)
    def test_an_attached_engine_has_them(self, kind: str) -> None:
        change, look, wanted = CONSTANT[kind]
        published = publish(using, lambda m: change())
        _another_process()
        assert look() != wanted
        attach(published, using)
        assert look() == wanted

    @pytest.mark.parametrize("kind", CONSTANT)
    def test_an_engine_that_cannot_attach_loads_as_if_it_had_not_tried(self, kind: str) -> None:
        change, look, _ = CONSTANT[kind]
        published = publish(using, lambda m: change())
        _another_process()
        before, names = look(), set(globals())
        with pytest.raises(ParityError):
            attach(published, lambda m, flag: setattr(m, "own", torch.nn.Identity()))
        assert look() == before
        assert set(globals()) == names

    def test_they_must_be_the_same_before(self) -> None:
        """What loading would make of another value is not known."""
        published = publish(using, lambda m: globals().update(SCALE=SCALE + 1))
        with pytest.raises(ParityError, match=r"SCALE, which all models of this code share, is 2\.0 here .* was 1\.0"):
            attach(published, using)

    def test_a_second_model_of_a_process_says_what_the_first_one_set(self) -> None:
        """Of another class: whether it would set that, too, where nothing else was loaded is not known."""
        publish(using, _set_mode)
        here = constants.set_here[sys.modules[__name__]]
        here["MODE"] = (here["MODE"][0], "another.Model", here["MODE"][2])
        second = publish(using, _set_mode)
        attach(second, using)
        _another_process()
        with pytest.raises(ParityError, match="MODE, which all models of this code share, is None here"):
            attach(second, using)

    def test_a_model_that_is_loaded_again_says_what_it_had_set_at_first(self) -> None:
        """As when all engines had dropped it: a new one finds what the first load found."""
        publish(using, _set_mode)
        again = publish(using, _set_mode)
        _another_process()
        attach(again, using)
        assert MODE == "fast"

    def test_what_another_model_set_since_is_not_what_this_one_set(self) -> None:
        """A new process would have neither."""
        publish(using, _set_mode)
        _set_global("MODE", "slow")()
        constants.set_here[sys.modules[__name__]]["MODE"] = ("'fast'", "another.Model", "'slow'")
        again = publish(using, _set_mode)
        assert [one.before for one in again.manifest.common_values] == ["'slow'"]
        _another_process()
        with pytest.raises(ParityError, match="MODE, which all models of this code share, is None here"):
            attach(again, using)

    def test_of_a_model_that_was_processed_meanwhile(self) -> None:
        """As online quantization does it: what loading set beside it is in the publication all the same."""
        model = Model(using, 1.0)
        observation = Observation(model)
        with observation.watching():
            with observation.processing(model.first):
                pass
            _set_mode(model)
            observation.end_loading(model)
        packed = pack.prepare(capture(model), Stage.PROCESSED, memory.MEMFD, torch.device("cpu"), observation)
        assert [(one.name, one.before, one.after) for one in packed.manifest.common_values] == [
            ("MODE", "None", "'fast'")
        ]

    def test_what_cannot_be_made_here_leaves_nothing(self) -> None:
        """Of values that only loading knows how to make."""
        published = publish(using, lambda m: globals().update(SCALE=2.0, MODE="fast"))
        _another_process()
        values = tuple(
            dataclasses.replace(one, after="a_late_module.Mode.A") if one.name == "SCALE" else one
            for one in published.manifest.common_values
        )
        manifest = dataclasses.replace(published.manifest, common_values=values)
        with pytest.raises(ParityError, match=r"SCALE is a_late_module\.Mode\.A there, and cannot be here"):
            attach(dataclasses.replace(published, manifest=manifest), using)
        assert (SCALE, MODE) == (1.0, None)

    def test_what_cannot_be_said_of_the_first_one_cannot_be_said_of_the_second(self) -> None:
        def load(m: Model) -> None:
            TABLE.setdefault("b", [2.0])

        for who in ("loading", "loading another model in this process"):
            with pytest.raises(NotShareableError, match=rf"^{who} changed .*TABLE.*, which all models"):
                publish(using, load)
        del TABLE["b"]

    def test_a_publication_sets_nothing_in_packages_of_all(self) -> None:
        published = publish(using)
        for holder in ("os", "torch", "torch.nn.modules.linear:Linear", "a_module_that_is_not_there"):
            value = CommonValue(holder, "new", None, "1")
            manifest = dataclasses.replace(published.manifest, common_values=(value,))
            with pytest.raises(ParityError, match="is no part of the model here"):
                attach(dataclasses.replace(published, manifest=manifest), using)


def _set_mode(m: Model) -> None:
    global MODE
    MODE = MODE or "fast"


BESIDE: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "part of a global": (lambda: TABLE["a"].append(2.0), lambda: TABLE["a"].pop()),
    "object of a global": (lambda: setattr(BOX, "value", 2.0), lambda: setattr(BOX, "value", [1.0])),
    "list in it": (lambda: BOX.value.append(2.0), lambda: BOX.value.pop()),
    "weak dictionary": (lambda: WEAK.update({KEY: 2.0}), lambda: WEAK.update({KEY: 1.0})),
    "of a thread": (lambda: setattr(THREAD, "held", 2.0), lambda: setattr(THREAD, "held", 1.0)),
    "made from that": (lambda: setattr(LOCAL, "held", 2.0), lambda: setattr(LOCAL, "held", 1.0)),
    "of a context": (lambda: CONTEXT.set(2.0), lambda: CONTEXT.set(1.0)),
    "tensor": (lambda: FACTORS.mul_(2), lambda: FACTORS.div_(2)),
    "default of a function": (
        lambda: setattr(times, "__defaults__", (2.0,)),
        lambda: setattr(times, "__defaults__", (1.0,)),
    ),
    "of a function": (lambda: setattr(times, "held", 2.0), lambda: delattr(times, "held")),
    "nonlocal": (COUNT, lambda: None),
    "object of a class": (lambda: Using.box.value.append(2.0), lambda: Using.box.value.pop()),
    "object in a dict of a class": (
        lambda: setattr(Using.table["a"], "value", 2.0),
        lambda: setattr(Using.table["a"], "value", 1.0),
    ),
    "made from torch's": (lambda: Using.torchs.held.append(2.0), lambda: Using.torchs.held.pop()),
    "default of a method": (
        lambda: setattr(Using.scale, "__defaults__", (2.0,)),
        lambda: setattr(Using.scale, "__defaults__", (1.0,)),
    ),
    "member of an enum": (lambda: setattr(Colour.RED, "held", 2.0), lambda: delattr(Colour.RED, "held")),
    "name that begins like Python's": (
        lambda: globals()["__TABLE"].update(a=2.0),
        lambda: globals()["__TABLE"].update(a=1.0),
    ),
    "class in a class": (lambda: Using.Options.modes.append(2.0), lambda: Using.Options.modes.pop()),
    "object in a weak dictionary": (
        lambda: setattr(WEAK_BOX[KEY], "value", 2.0),
        lambda: setattr(WEAK_BOX[KEY], "value", 1.0),
    ),
    "object of a thread": (lambda: setattr(THREAD.box, "value", 2.0), lambda: setattr(THREAD.box, "value", 1.0)),
    "object of a context": (
        lambda: setattr(CONTEXT_BOX.get(), "value", 2.0),
        lambda: setattr(CONTEXT_BOX.get(), "value", 1.0),
    ),
    "list that cannot be replaced": (lambda: FIXED["a"].append(2.0), lambda: FIXED["a"].pop()),
    "method of Python": (
        lambda: setattr(Using, "__call__", lambda self: 2.0),
        lambda: setattr(Using, "__call__", CALL),
    ),
    "default of a method of Python": (
        lambda: setattr(CALL, "__defaults__", (2.0,)),
        lambda: setattr(CALL, "__defaults__", (1.0,)),
    ),
    "code of a function": (
        lambda: setattr(times, "__code__", (lambda x, by: 2.0).__code__),
        lambda: setattr(times, "__code__", TIMES),
    ),
}
CALL, TIMES = Using.__call__, times.__code__
UNCOUNTED: dict[str, Callable[[torch.Tensor], object]] = {
    "data": lambda t: t.data.fill_(2),
    "numpy": lambda t: t.numpy().fill(2),
    "dlpack": lambda t: torch.from_dlpack(t).fill_(2),
    "storage": lambda t: t.untyped_storage().copy_(torch.full((3,), 2.0).untyped_storage()),
    "other data": lambda t: setattr(t, "data", torch.full((3,), 2.0)),
    "another tensor in it": lambda t: torch.utils.swap_tensors(t, torch.full((3,), 2.0)),  # type: ignore[no-untyped-call]
    "a part of it": lambda t: setattr(t, "data", t.data[:2]),
    "hung on it": lambda t: setattr(t, "scale", 2.0),
    "object hung on it": lambda t: t.box.value.append(2.0),  # type: ignore[attr-defined]
}


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("how", UNCOUNTED)
@pytest.mark.parametrize("where", ["global", "in a container", "of a class", "in a weak dictionary"])
def test_loading_changes_a_tensor_uncounted(how: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_version` says nothing of it."""
    held = torch.ones(3)
    held.box = Box([1.0])  # type: ignore[attr-defined]
    made: Any = {
        "in a container": [Box(held)],
        "in a weak dictionary": weakref.WeakKeyDictionary({KEY: (1, held)}),
    }.get(where, held)
    if where == "of a class":
        monkeypatch.setattr(Using, "kept", made, raising=False)
    else:
        monkeypatch.setitem(globals(), "GLOBAL", made)
    publish(using)
    with pytest.raises(NotShareableError, match=r"loading changed .*(GLOBAL|kept).*, which (all models|its objects)"):
        publish(using, lambda m: UNCOUNTED[how](held))


@pytest.mark.usefixtures("process")
def test_a_global_has_tensors_that_the_model_has_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading fills them, as those of whoever attaches are the published ones."""
    held: list[Any] = []
    monkeypatch.setitem(globals(), "GLOBAL", held)

    def build(m: Model, flag: float) -> None:
        m.own = Using()
        m.register_buffer("table", torch.zeros(3))
        held[:] = [m.first.weight, m.table, {"a": m.second.bias}]

    def load(m: Model) -> None:
        m.table.copy_(torch.ones(3))

    attached = attach(publish(build, load), build)
    assert held[0] is attached.first.weight
    assert held[1].tolist() == [1.0] * 3
    with pytest.raises(NotShareableError, match=r"loading changed .*GLOBAL"):
        publish(build, lambda m: held.reverse())


@pytest.mark.usefixtures("process")
def test_loading_replaces_a_tensor_beside_the_model_by_another_one_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(m: Model, flag: float) -> None:
        m.own = Using()
        monkeypatch.setitem(globals(), "GLOBAL", m.first.weight)

    publish(build)
    with pytest.raises(NotShareableError, match=r"loading changed .*GLOBAL"):
        publish(build, lambda m: monkeypatch.setitem(globals(), "GLOBAL", m.second.weight))


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("where", BESIDE)
def test_loading_changes_what_is_no_part_of_the_model(where: str) -> None:
    """No publication carries it, and an attached engine would have it as it was built."""
    change, undo = BESIDE[where]

    def build(m: Model, flag: float) -> None:
        m.own = Using()

    attach(publish(build), build)
    try:
        with pytest.raises(NotShareableError, match=r"loading changed .*(its objects|all models of this code) share"):
            publish(build, lambda m: change())
    finally:
        undo()


class Unbound:
    """As a proxy of a web framework outside of a request, or a weak one whose object is gone."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"nothing is bound that has {name}")


class Lazy(collections.OrderedDict[str, Any]):
    """As mappings of transformers: whoever asks for items imports them, and some cannot be."""

    def items(self) -> Any:
        raise ImportError("an item of a mapping that nobody has asked for")

    __iter__ = __len__ = items


def _for_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("make", [Unbound, lambda: [Unbound()], Lazy, _for_inference])
def test_a_global_that_cannot_be_asked(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason not to share a model."""
    monkeypatch.setitem(globals(), "GLOBAL", make())

    def build(m: Model, flag: float) -> None:
        m.own = Using()

    attach(publish(build), build)
    with pytest.raises(NotShareableError, match=r"loading changed .*GLOBAL, which all models of this code share"):
        publish(build, lambda m: monkeypatch.setitem(globals(), "GLOBAL", make()))


@pytest.mark.usefixtures("process")
def test_loading_writes_to_a_global_made_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts no writes to it."""
    held = _for_inference()
    monkeypatch.setitem(globals(), "GLOBAL", held)

    def build(m: Model, flag: float) -> None:
        m.own = Using()

    def load(m: Model) -> None:
        with torch.inference_mode():
            held.mul_(2)

    attach(publish(build), build)
    with pytest.raises(NotShareableError, match=r"loading changed .*GLOBAL, which all models of this code share"):
        publish(build, load)


def test_what_packages_keep_for_all_models_may_change() -> None:
    """einops notes what arrays it has met."""

    def build(m: Model, flag: float) -> None:
        m.layer = einops_torch.Rearrange("a b -> b a")
        einops._backends._type2backend.clear()

    def load(m: Model) -> None:
        einops.rearrange(np.ones((2, 3)), "a b -> b a")

    attach(publish(build, load), build)


@pytest.mark.usefixtures("process")
def test_loading_changes_a_member_of_an_enum_that_the_model_has() -> None:
    """It is the same member in all models of a process."""

    def build(m: Model, flag: float) -> None:
        m.held = Colour.RED

    attach(publish(build), build)
    try:
        with pytest.raises(NotShareableError, match=r"loading changed .*Colour\.RED\.held, which its objects share"):
            publish(build, lambda m: setattr(m.held, "held", 2.0))
    finally:
        vars(Colour.RED).pop("held", None)


SWITCHES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "get_float32_matmul_precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "are_deterministic_algorithms_enabled": (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "math_sdp_enabled": (
        lambda: torch.backends.cuda.enable_math_sdp(False),
        lambda: torch.backends.cuda.enable_math_sdp(True),
    ),
    "allow_bf16_reduced_precision_reduction": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_loading_turns_a_switch_of_torch(name: str) -> None:
    """Kernels of the publisher would compute in another way than those of an engine that attaches."""
    change, undo = SWITCHES[name]
    try:
        with pytest.raises(NotShareableError, match=r"loading changed torch.*, which all models of this process share"):
            publish(plain, lambda m: change())
    finally:
        undo()
    attach(publish(lambda m, flag: (change(), undo())), plain)


PACKAGE = "a_models_package"
SOURCES = {
    "__init__": "",
    "state": """
        FLAG = False
        TABLE = {"a": 1}
        class Kept:
            held = [1.0]
        """,
    "aside": """
        NUMBER = 1
        class Kept:
            held = [1.0]
        """,
    "far": """
        SCALE, TABLE = 1, {}
        def scaled(x):
            return x * SCALE
        def set_scale(scale):
            global SCALE
            SCALE = scale
        class Options:
            modes = [1]
        class Kind(type):
            made = {}
        """,
    "model": """
        import functools, importlib
        from torch import nn

        class Layer(nn.Module):
            def set_flag(self):
                from . import state
                state.FLAG = True
            def fill(self):
                from .state import TABLE
                TABLE["a"] = 2
            def by_name(self):
                importlib.import_module("a_models_package.state").TABLE["b"] = 2
            def of_a_class(self):
                from a_models_package.state import Kept
                Kept.held.append(2.0)
            @property
            def in_a_property(self):
                from . import state
                state.TABLE["c"] = 2
            @staticmethod
            def in_a_static_method():
                def inner():
                    from . import state
                    state.TABLE["d"] = 2
                inner()
            def look(self):
                from . import state
                return state.FLAG

        @functools.cache
        def registry():
            return {}
        @functools.lru_cache(maxsize=2)
        def parts(n):
            return [n]
        @functools.cache
        def number(n):
            return n, str(n)
        @functools.lru_cache
        def table(n):
            import torch
            return torch.arange(n)
        @functools.lru_cache
        def written(n):
            import torch
            return torch.arange(n).mul_(2)
        class Remembering:
            @functools.lru_cache
            def kept(self):
                return {}
        """,
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of a model's code, in a package of which nothing else has been imported."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    constants.set_here.clear()
    yield importlib.import_module(f"{PACKAGE}.model")
    constants.set_here.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def with_layer(code: ModuleType) -> Callable[[Model, float], None]:
    def build(m: Model, flag: float) -> None:
        m.own = code.Layer()

    return build


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    name: lambda layer, name=name: getattr(layer, name)()  # type: ignore[misc]
    for name in ("fill", "by_name", "of_a_class", "in_a_static_method")
} | {"in_a_property": lambda layer: layer.in_a_property}


class TestModulesThatFunctionsImport:
    @pytest.mark.parametrize("kind", CHANGES)
    def test_a_change_is_refused(self, code: ModuleType, kind: str) -> None:
        importlib.import_module(f"{PACKAGE}.state")
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.state\."):
            publish(with_layer(code), lambda m: CHANGES[kind](m.own))

    def test_of_what_a_package_hands_on(self, code: ModuleType) -> None:
        """Its module is used, though no code names that."""
        kept = importlib.import_module(f"{PACKAGE}.aside").Kept
        vars(code)["package"] = sys.modules[PACKAGE]
        vars(sys.modules[PACKAGE])["Handed"] = kept
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.aside\.Kept\.held"):
            publish(with_layer(code), lambda m: kept.held.append(2.0))

    def test_a_constant_is_carried(self, code: ModuleType) -> None:
        state = importlib.import_module(f"{PACKAGE}.state")
        published = publish(with_layer(code), lambda m: m.own.set_flag())
        state.FLAG = False
        constants.set_here.clear()
        assert attach(published, with_layer(code)).own.look() is True

    def test_what_only_others_import_is_none_of_the_models(self, code: ModuleType) -> None:
        aside = importlib.import_module(f"{PACKAGE}.aside")
        publish(with_layer(code), lambda m: setattr(aside, "NUMBER", 2))


HELD: dict[str, Callable[[ModuleType], Any]] = {
    "function": lambda far: far.scaled,
    "partial": lambda far: [functools.partial(far.scaled, 2)],
    "class": lambda far: far.Options,
    "module": lambda far: {"a": far},
    "object of a class that has a class": lambda far: far.Kind("Made", (Box,), {"__module__": __name__})(1),
}


class TestModulesOfWhatAModelHolds:
    """Though nothing else in its code leads there."""

    @pytest.mark.parametrize("kind", HELD)
    @pytest.mark.parametrize("what", ["TABLE", "Options.modes", "Kind.made"])
    def test_a_change_is_refused(self, code: ModuleType, kind: str, what: str) -> None:
        far = importlib.import_module(f"{PACKAGE}.far")

        def build(m: Model, flag: float) -> None:
            m.own, m.held = code.Layer(), HELD[kind](far)

        def load(m: Model) -> None:
            table = operator.attrgetter(what)(far)
            table.append(2) if isinstance(table, list) else table.update(a=2)

        publish(build)
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.far\.{what}"):
            publish(build, load)

    def test_a_constant_is_carried(self, code: ModuleType) -> None:
        far = importlib.import_module(f"{PACKAGE}.far")

        def build(m: Model, flag: float) -> None:
            m.scaled = far.scaled

        published = publish(build, lambda m: far.set_scale(4))
        far.SCALE = 1
        constants.set_here.clear()
        assert attach(published, build).scaled(2) == 8

    def test_functions_in_a_table(self, code: ModuleType) -> None:
        """As those of a registry, which a module has from another one."""
        far = importlib.import_module(f"{PACKAGE}.far")
        code.FUNCTIONS = {"scaled": far.scaled}  # type: ignore[attr-defined]
        publish(with_layer(code))
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.far\.TABLE"):
            publish(with_layer(code), lambda m: far.TABLE.update(a=1))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported, each observation is told of, as a publisher does."""
    made: list[observe.Observation] = []
    begin = observe.Observation.__init__

    def init(self: observe.Observation, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    execute = importlib.machinery.SourceFileLoader.exec_module

    def exec_module(self: Any, module: ModuleType) -> None:
        execute(self, module)
        for observation in made:
            observation.note_import(module)

    monkeypatch.setattr(observe.Observation, "__init__", init)
    monkeypatch.setattr(importlib.machinery.SourceFileLoader, "exec_module", exec_module)


@pytest.mark.usefixtures("noted")
class TestModulesThatLoadingImports:
    @pytest.mark.parametrize("kind", [*CHANGES, "set_flag"])
    def test_a_change_is_refused(self, code: ModuleType, kind: str) -> None:
        change = CHANGES.get(kind, lambda layer: layer.set_flag())
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.state\."):
            publish(with_layer(code), lambda m: change(m.own))

    def test_what_importing_makes_there_is_no_change(self, code: ModuleType) -> None:
        published = publish(with_layer(code), lambda m: m.own.look())
        assert f"{PACKAGE}.state" in sys.modules
        assert attach(published, with_layer(code)).own.look() is False

    def test_others_count_for_nothing(self, code: ModuleType) -> None:
        publish(with_layer(code), lambda m: setattr(importlib.import_module(f"{PACKAGE}.aside"), "NUMBER", 2))


REMEMBERED: dict[str, tuple[Callable[[ModuleType], object], bool]] = {
    "an object that is written to": (lambda code: code.registry().update(a=1), False),
    "an object that may have been": (lambda code: code.registry(), False),
    "of few": (lambda code: code.parts(1), False),
    "of a method": (lambda code: code.Remembering().kept(), False),
    "a tensor that is written to": (lambda code: code.written(3), False),
    "values": (lambda code: code.number(3), True),
    "a tensor": (lambda code: code.table(3), True),
}


@pytest.mark.parametrize("kind", REMEMBERED)
def test_caches_of_functions(code: ModuleType, kind: str) -> None:
    """What is in one, each process computes. But if it can be written to, it may be no longer what was computed."""
    call, is_shared = REMEMBERED[kind]
    if is_shared:
        publish(with_layer(code), lambda m: call(code))
    else:
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.model\.[\w.]+, which (all|its)"):
            publish(with_layer(code), lambda m: call(code))


@pytest.mark.parametrize("change", [lambda t: t.numpy().fill(7), lambda t: t.add_(1)])
@pytest.mark.parametrize("kind", ["table", "written"])
def test_a_tensor_that_was_in_a_cache_before(
    code: ModuleType, kind: str, change: Callable[[torch.Tensor], object]
) -> None:
    function = getattr(code, kind)
    held = function(3)
    publish(with_layer(code))
    publish(with_layer(code), lambda m: code.table(4))
    with pytest.raises(NotShareableError, match=rf"loading changed .*\.{kind}"):
        publish(with_layer(code), lambda m: change(held))


def test_an_object_that_was_in_a_cache_before(code: ModuleType) -> None:
    held = code.registry()["a"] = Box([1])
    publish(with_layer(code))
    with pytest.raises(NotShareableError, match=r"loading changed .*\.registry"):
        publish(with_layer(code), lambda m: held.value.append(2))


def test_a_cache_that_was_filled_before(code: ModuleType) -> None:
    """Only what loading does to it counts."""
    code.registry()["a"] = [1]
    publish(with_layer(code), nothing)
    with pytest.raises(NotShareableError, match=r"loading changed .*\.registry"):
        publish(with_layer(code), lambda m: code.registry()["a"].append(2))
