"""What loading changes in a model's own code, wherever that keeps it: attached engines have it, or it is refused."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from tests.unit.test_origins import Model, attach, nothing, publish
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.tree import constants, observe

PACKAGE = "a_models_package"
SOURCES = {
    "__init__": "",
    "state": """
        FLAG = False
        TABLE = {"a": 1}
        class Kept:
            held = [1.0]
        """,
    "aside": "NUMBER = 1",
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


def using(code: ModuleType) -> Callable[[Model, float], None]:
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
            publish(using(code), lambda m: CHANGES[kind](m.own))

    def test_a_constant_is_carried(self, code: ModuleType) -> None:
        state = importlib.import_module(f"{PACKAGE}.state")
        published = publish(using(code), lambda m: m.own.set_flag())
        state.FLAG = False
        constants.set_here.clear()
        assert attach(published, using(code)).own.look() is True

    def test_what_only_others_import_is_none_of_the_models(self, code: ModuleType) -> None:
        aside = importlib.import_module(f"{PACKAGE}.aside")
        publish(using(code), lambda m: setattr(aside, "NUMBER", 2))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported, each observation is told of, as a publisher does."""
    made: list[observe.Observation] = []
    begin = observe.Observation.__init__

    def init(self: observe.Observation, model: nn.Module) -> None:
        begin(self, model)
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
            publish(using(code), lambda m: change(m.own))

    def test_what_importing_makes_there_is_no_change(self, code: ModuleType) -> None:
        published = publish(using(code), lambda m: m.own.look())
        assert f"{PACKAGE}.state" in sys.modules
        assert attach(published, using(code)).own.look() is False

    def test_others_count_for_nothing(self, code: ModuleType) -> None:
        publish(using(code), lambda m: setattr(importlib.import_module(f"{PACKAGE}.aside"), "NUMBER", 2))


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
        publish(using(code), lambda m: call(code))
    else:
        with pytest.raises(NotShareableError, match=rf"loading changed {PACKAGE}\.model\.[\w.]+, which (all|its)"):
            publish(using(code), lambda m: call(code))


def test_a_cache_that_was_filled_before(code: ModuleType) -> None:
    """Only what loading does to it counts."""
    code.registry()["a"] = [1]
    publish(using(code), nothing)
    with pytest.raises(NotShareableError, match=r"loading changed .*\.registry"):
        publish(using(code), lambda m: code.registry()["a"].append(2))
