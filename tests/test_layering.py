"""Layers: each package says in its docstring what it may import, and nobody imports anything else."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "vllm_companion_plugin"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

TOP = {
    "errors": set(),
    "settings": {"core", "errors", "memory.kinds"},
    "_version": set(),
    "": {"_version", "client", "errors"},
}
"""What the modules beside the packages may import; "" is the package's own `__init__`."""
EVERYWHERE = {"_version"}
CUDA_ONLY_IN = ("memory/cuda_driver.py", "memory/tensors/cuda_")


@functools.cache
def rule_of(directory: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The parts and the other packages that modules in `directory` may import, by the nearest docstring on it."""
    docstring = ast.get_docstring(ast.parse((directory / "__init__.py").read_text())) or ""
    internal = re.search(r"^May import: (.*)\.$", docstring, re.MULTILINE)
    if internal is None:
        return rule_of(directory.parent)
    external = re.search(r"^Of other packages: (.*)\.$", docstring, re.MULTILINE)
    return frozenset(internal[1].split(", ")), frozenset(external[1].split(", ") if external else ())


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == PACKAGE:
                found |= {f"{PACKAGE}.{alias.name}" for alias in node.names if alias.name != "__version__"}
            else:
                found.add(node.module)
    return found


FILES = sorted(ROOT.rglob("*.py"))


def own_packages(relative: Path) -> set[str]:
    """The package of a module, and those around it: "engine.vllm" and "engine"."""
    parts = relative.parent.parts
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    relative = path.relative_to(ROOT)
    internal: frozenset[str] | set[str]
    if relative.parent == Path():
        name = relative.stem.replace("__init__", "")
        internal, external = TOP[name], frozenset[str]()
    else:
        internal, external = rule_of(path.parent)
    allowed = internal | EVERYWHERE | own_packages(relative)
    for name in imports(path):
        root, _, inner = name.partition(".")
        if root == PACKAGE:
            part = inner.split(".")
            assert any(".".join(part[:n]) in allowed for n in range(1, len(part) + 1)), f"{relative} imports {name}"
        elif root not in sys.stdlib_module_names:
            assert root in external, f"{relative} imports {name}"
            assert root != "cuda" or str(relative).startswith(CUDA_ONLY_IN), f"{relative} imports {name}"


def test_grpc_is_imported_where_it_is_made_harmless_to_forks() -> None:
    """By nobody else, tests included: whoever comes first decides for the process."""
    tests = Path(__file__).parent.rglob("*.py")
    found = [path.stem for path in (*FILES, *tests) if any(name.split(".")[0] == "grpc" for name in imports(path))]
    assert found == ["forking"]


def test_packages_do_not_import_each_other_in_circles() -> None:
    """Also not by imports inside functions."""
    uses: dict[str, set[str]] = {}
    for path in FILES:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith(f"{PACKAGE}.") and part != "__init__":
                uses.setdefault(part, set()).add(name.split(".")[1])
    done: list[str] = []
    while remaining := [part for part in uses if part not in done]:
        free = [part for part in remaining if uses[part] - {part} <= {*done} | (uses[part] - uses.keys())]
        assert free, f"a circle among {remaining}"
        done += free


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Also not by imports inside functions."""
    modules = {f"{PACKAGE}.{'.'.join(p.relative_to(ROOT).with_suffix('').parts)}": p for p in FILES}
    uses = {name: {n for n in imports(path) if n in modules} - {name} for name, path in modules.items()}
    uses.pop(f"{PACKAGE}.__init__")
    done: set[str] = set()
    while remaining := uses.keys() - done:
        free = {name for name in remaining if uses[name] <= done}
        assert free, f"a circle among {sorted(remaining)}"
        done |= free


def test_only_settings_reads_the_environment_of_the_project() -> None:
    for path in FILES:
        if path.name != "settings.py":
            assert "COMPANION_" not in "".join(
                line for line in path.read_text().splitlines() if "environ" in line or "getenv" in line
            ), path


@pytest.mark.parametrize(
    "statement",
    [
        f"import {PACKAGE}",
        f"import {PACKAGE}.client.connection",
        f"import {PACKAGE}.fleet",
        f"import {PACKAGE}.holder.process",
        f"import {PACKAGE}.cli.main",
        f"from {PACKAGE}.engine.register import register; register(); register()",
    ],
)
def test_light_parts_import_neither_torch_nor_vllm_nor_cuda(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in ('torch', 'vllm', 'cuda', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"
