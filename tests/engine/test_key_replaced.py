"""Code that somebody puts into vLLM's modules at run time is in the key, whatever it says of itself."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.support.configs import config
from vllm_companion_plugin.engine.identity import code, outside, replaced
from vllm_companion_plugin.engine.vllm import building
from vllm_companion_plugin.errors import NotShareableError

NAME = "oot_patches"
SOURCE = """
def load(self, *args, **kwargs):
    return FACTOR


class Class:
    def __call__(self, *args):
        return FACTOR

FACTOR = 1
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module that Python can import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    yield tmp_path / f"{NAME}.py"
    sys.modules.pop(NAME, None)
    importlib.invalidate_caches()


def fields() -> dict[str, str]:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    return code.fields(LlamaForCausalLM)


def named() -> set[str]:
    return {name for name in fields() if NAME in name}


Put = Callable[[types.ModuleType, pytest.MonkeyPatch], None]


def put(target: str, name: str, make: Callable[[types.ModuleType, Any], Any]) -> Put:
    """A way to replace what is called `name` of something of vLLM by what `make` makes of it."""

    def replace(patches: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, inner = target.partition(":")
        owner: Any = importlib.import_module(f"vllm.model_executor.{module}")
        owner = getattr(owner, inner) if inner else owner
        monkeypatch.setattr(owner, name, make(patches, getattr(owner, name)))

    return replace


def put_code(patches: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.llama import LlamaModel

    monkeypatch.setattr(LlamaModel.load_weights, "__code__", patches.load.__code__)


EMBEDDING = "layers.vocab_parallel_embedding:VocabParallelEmbedding"
UTILS = "model_loader.weight_utils"
ITERATOR = "safetensors_weights_iterator"
KINDS = {
    "a method of a part of the model": put("models.llama:LlamaModel", "load_weights", lambda made, old: made.load),
    "a loader of a parameter": put(EMBEDDING, "weight_loader", lambda made, old: made.load),
    "what reads the files": put(
        "model_loader.default_loader:DefaultModelLoader", "get_all_weights", lambda made, old: made.load
    ),
    "a function of a module": put(UTILS, ITERATOR, lambda made, old: made.load),
    "by the name of what it replaces": put(UTILS, ITERATOR, lambda made, old: functools.wraps(old)(made.load)),
    "a partial": put(UTILS, ITERATOR, lambda made, old: functools.partial(made.load, None)),
    "a static method": put(EMBEDDING, "weight_loader", lambda made, old: staticmethod(made.load)),
    "a property": put(EMBEDDING, "weight_loader", lambda made, old: property(made.load)),
    "a cached function": put(UTILS, ITERATOR, lambda made, old: functools.cache(made.load)),
    "behind a decorator of a package": put(UTILS, ITERATOR, lambda made, old: torch.no_grad()(made.load)),
    "an object": put(UTILS, ITERATOR, lambda made, old: made.Class()),
    "a method of an object": put(UTILS, ITERATOR, lambda made, old: made.Class().__call__),
    "a class": put("models.llama", "LlamaMLP", lambda made, old: made.Class),
    "the code of a function": put_code,
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_replaced_counts(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert not named()
    KINDS[kind](importlib.import_module(NAME), monkeypatch)
    assert named() == {f"code.{NAME}.py"}


def test_a_program_that_another_one_runs_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a debugger or a profiler does: no module has its file."""
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SOURCE, str(path), "exec"), made)
    KINDS["a function of a module"](types.SimpleNamespace(**made), monkeypatch)  # type: ignore[arg-type]
    before = fields()
    assert named() == {f"code.{NAME}.py"}
    path.write_text(SOURCE + "FACTOR = 2\n")
    assert fields() != before


@pytest.mark.parametrize("name", ["__main__", "oot_made"])
def test_what_comes_from_no_file_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As in a notebook, or of a text that a program makes."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(SOURCE, module.__dict__)
    KINDS["a function of a module"](module, monkeypatch)
    with pytest.raises(NotShareableError, match=rf"weight_utils.{ITERATOR} is code of {name} that comes from no file"):
        fields()


@pytest.mark.parametrize("name", ["__main__", "oot_made"])
def test_a_model_that_comes_from_no_file_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from vllm.model_executor.models import llama

    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec("class Model(Llama):\n    pass\n", module.__dict__ | {"Llama": llama.LlamaForCausalLM}, made := {})  # type: ignore[var-annotated]
    made["Model"].__module__ = name
    with pytest.raises(NotShareableError, match=rf"{name}.Model comes from no file"):
        code.fields(made["Model"])


def test_packages_that_vllm_uses_do_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is made for vLLM does, wherever it is installed."""
    packages = path.parent / "site-packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(packages)
    for text, counts in ((SOURCE, False), (f"import vllm\n{SOURCE}", True)):
        (packages / f"{NAME}.py").write_text(text)
        replaced._counts.cache_clear()
        sys.modules.pop(NAME, None)
        with monkeypatch.context() as patching:
            KINDS["a function of a module"](importlib.import_module(NAME), patching)
            assert bool(named()) == counts


def test_what_answers_requests_does_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import core

    monkeypatch.setattr(core.EngineCore, "add_request", importlib.import_module(NAME).load)
    assert not named()


def test_an_applications_loggers_do_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module of vLLM has one, of whichever class the application has set."""
    from vllm.model_executor.layers import linear

    path.write_text("import logging\nclass Logger(logging.Logger):\n    pass\n")
    monkeypatch.setattr(linear, "logger", importlib.import_module(NAME).Logger("vllm"))
    assert not named()


def test_in_an_ordinary_process_nothing_is_replaced() -> None:
    """Decorators, dataclasses, named tuples and what this package itself changes are no code of a user."""
    script = """
import vllm, vllm.v1.worker.cpu_worker, vllm.model_executor.models.qwen2_5_vl, vllm.v1.engine.core
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm_companion_plugin.engine import loading
from vllm_companion_plugin.engine.identity import replaced
found = replaced.found()
assert not found.modules and not found.files, found
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


class TestNamedByFlags:
    """What a flag names takes part in loading; that flag's text says nothing of the code."""

    def test_a_worker(self, path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = config(tiny, worker_cls=f"{NAME}.Class")
        assert building.loading_classes(made, "auto")[:-1] == ()
        loaded = importlib.import_module(NAME).Class
        assert building.loading_classes(made, "auto")[0] is loaded
        from vllm.model_executor.models.llama import LlamaForCausalLM

        assert f"code.{NAME}.py" in code.fields(LlamaForCausalLM, loaded)

    def test_a_loader(self, path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor import model_loader

        made = config(tiny)
        loader = importlib.import_module(NAME).Class
        monkeypatch.setitem(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "oot", loader)  # type: ignore[arg-type]
        assert loader in building.loading_classes(made, "oot")
        assert loader not in building.loading_classes(made, "auto")


REMOTE = "transformers_modules.org.model.configuration_x"


def test_code_of_a_checkpoint_counts_though_its_module_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration comes without its module to a process that was spawned. Both have one key."""
    assert not outside.has_file(REMOTE)
    file = (tmp_path / Path(*REMOTE.split("."))).with_suffix(".py")
    file.parent.mkdir(parents=True)
    file.write_text("import os\nSCALE = os.environ.get('MINE_SCALE')\n")
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setenv("MINE_SCALE", "3")
    assert outside.has_file(REMOTE)
    spawned = outside.fields([REMOTE])
    assert spawned["env.MINE_SCALE"] == "3"
    spec = importlib.util.spec_from_file_location(REMOTE, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, REMOTE, module)
    spec.loader.exec_module(module)
    assert outside.fields([REMOTE]) == spawned


def test_what_has_no_file() -> None:
    assert not outside.has_file("nobody_has_this")


def test_code_of_a_text_is_not_vllms_wherever_the_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name, as "<string>", would be below vLLM's package there."""
    monkeypatch.chdir(Path(vllm.__file__).parent)
    made: dict[str, Any] = {"__name__": "typed_in"}
    exec("def apply(self): pass", made)
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", made["apply"])
    with pytest.raises(NotShareableError, match=r"UnquantizedLinearMethod\.apply is code of typed_in"):
        replaced.found()
