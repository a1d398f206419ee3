"""Constants of modules that a model imports while it is built."""

from __future__ import annotations

import importlib
import py_compile
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vllm_companion_plugin.engine.imports import around_imports

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
    def apart() -> Iterator[None]:
        found.append("entered")
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
    assert entered == ["entered"]
    assert torch.empty(1).is_meta


def test_all_that_was_imported_is_listed(entered: list[str]) -> None:
    with around_imports() as modules:
        eps("outer")
    assert [module.__name__ for module in modules] == ["companion_constants.outer", "companion_constants.inner"]
    assert entered  # what is open outside of it is entered all the same


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
    assert entered == ["entered", "entered"]


def test_another_thread_imports_as_it_would(entered: list[str]) -> None:
    thread = threading.Thread(target=eps, args=("elsewhere",))
    thread.start()
    thread.join(10)
    assert not entered
    assert not eps("elsewhere").is_meta  # it had no device chosen


def test_afterwards_nothing_is_left(entered: list[str]) -> None:
    with around_imports(lambda: torch.device("cpu")):
        pass
    assert not eps("inner").is_meta
    assert entered
    module = sys.modules["companion_constants.inner"]
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    finders = list(sys.meta_path)
    with around_imports(lambda: torch.device("cpu")):
        assert sys.meta_path[1:] == finders
    assert sys.meta_path == finders
