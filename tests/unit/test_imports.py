"""Constants of modules that a model imports while it is built."""

from __future__ import annotations

import importlib
import importlib.util
import py_compile
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vllm_companion_plugin.engine.vllm import imports
from vllm_companion_plugin.engine.vllm.imports import around_imports

pytestmark = pytest.mark.core
MODULES = {
    "outer": "import torch\nfrom companion_constants import inner\nEPS = torch.tensor(1.0)\n",
    "inner": "import torch\nEPS = torch.tensor(2.0)\n",
    "broken": "raise LookupError\n",
    "elsewhere": "import torch\nEPS = torch.tensor(3.0)\n",
}


@pytest.fixture
def entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A package of `MODULES` can be imported; each time that something is executed apart, the list grows."""
    package = tmp_path / "companion_constants"
    package.mkdir()
    for name, text in {"__init__": "", **MODULES}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    importlib.import_module("companion_constants")
    found: list[str] = []

    @contextmanager
    def apart(module: ModuleType) -> Iterator[None]:
        found.append(module.__name__.split(".")[-1])
        with torch.device("cpu"):
            yield

    with torch.device("meta"), around_imports(apart):
        yield found
    for name in ["companion_constants", *(f"companion_constants.{name}" for name in MODULES)]:
        sys.modules.pop(name, None)


def eps(name: str) -> torch.Tensor:
    module = importlib.import_module(f"companion_constants.{name}")
    constant = module.EPS
    assert isinstance(constant, torch.Tensor)
    return constant


def test_a_module_imported_on_meta_has_its_constants(entered: list[str]) -> None:
    assert not eps("outer").is_meta
    assert not eps("inner").is_meta
    assert entered == ["outer", "inner"]
    assert torch.empty(1).is_meta


def test_a_module_that_no_finder_finds_is_one_too(entered: list[str]) -> None:
    """Transformers imports a model's own code so."""
    path = Path(sys.modules["companion_constants"].__path__[0]) / "inner.py"
    spec = importlib.util.spec_from_file_location("companion_constants.inner", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert entered == ["inner"]
    assert not module.EPS.is_meta


def test_a_module_without_its_source_is_one_too(entered: list[str], tmp_path: Path) -> None:
    source = tmp_path / "companion_constants" / "inner.py"
    py_compile.compile(str(source), str(source.with_suffix(".pyc")))
    source.unlink()
    importlib.invalidate_caches()
    assert not eps("inner").is_meta


def test_a_module_that_fails_ends_nothing(entered: list[str]) -> None:
    with pytest.raises(LookupError):
        importlib.import_module("companion_constants.broken")
    assert not eps("inner").is_meta
    assert entered == ["broken", "inner"]


def test_another_thread_imports_as_it_would(entered: list[str]) -> None:
    thread = threading.Thread(target=eps, args=("elsewhere",))
    thread.start()
    thread.join(10)
    assert not entered
    assert not eps("elsewhere").is_meta  # it had no device chosen


def test_what_is_open_outside_is_entered_first_and_closed_last(entered: list[str]) -> None:
    with around_imports(lambda module: torch.device("meta")):
        assert eps("inner").is_meta
    assert entered == ["inner"]
    assert not eps("elsewhere").is_meta


def test_afterwards_nothing_is_around() -> None:
    with around_imports(lambda module: nullcontext()):
        pass
    exec_module = importlib.machinery.SourceFileLoader.exec_module
    with around_imports(lambda module: nullcontext()):
        pass
    with pytest.raises(LookupError), around_imports(lambda module: nullcontext()):
        raise LookupError
    assert imports._contexts() == ()
    assert importlib.machinery.SourceFileLoader.exec_module is exec_module
