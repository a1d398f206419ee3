"""Layers: lower may not import higher, and nobody imports what is not theirs.

docs/architecture.md has the table with the reasons.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "vllm_companion_plugin"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

BASE = {"", "errors", "types", "interpreter", "logs", "peer"}
LOW = BASE | {"settings", "protocol", "arena", "launch"}
CLIENT = LOW | {"client", "lease", "publication", "holder"}

# Part: (internal parts, third-party packages) that it may import, lazily or not.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "": ({"api"}, set()),
    "errors": (set(), set()),
    "types": (set(), set()),
    "interpreter": (set(), set()),
    "logs": (set(), set()),
    "peer": ({"errors"}, set()),
    "settings": (BASE, set()),
    "protocol": (BASE | {"protocol"}, {"google", "grpc"}),
    "arena": (BASE | {"arena"}, {"cuda"}),
    "launch": (BASE | {"settings", "launch"}, {"filelock"}),
    "keeper": (BASE | {"settings", "arena", "launch"}, set()),
    "companion": (
        BASE | {"settings", "protocol", "launch", "companion"},
        {"grpc", "google", "filelock"},
    ),
    "publication": (BASE | {"protocol", "launch"}, {"grpc"}),
    "lease": (BASE | {"protocol", "launch", "publication"}, {"grpc"}),
    "client": (BASE | {"settings", "protocol", "launch", "lease", "publication"}, {"grpc"}),
    "holder": (BASE | {"settings", "launch", "protocol", "client"}, set()),
    "module_tree": (BASE | {"arena", "module_tree"}, {"torch", "numpy"}),
    "api": (CLIENT | {"module_tree", "api"}, {"torch"}),
    "engine": (
        CLIENT | {"module_tree", "engine"},
        {"torch", "numpy", "vllm", "tqdm", "huggingface_hub", "blake3", "filelock", "PIL"},
    ),
    "cli": (CLIENT | {"companion", "cli"}, {"grpc", "google", "prometheus_client"}),
}
CUDA_ONLY_IN = "arena/cuda_"


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    relative = path.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py")
    internal, external = RULES["" if part == "__init__" else part]
    for name in imports(path):
        root = name.split(".")[0]
        if root == PACKAGE:
            assert part_of(name) in internal | {part}, f"{relative} imports {name}"
        elif root not in sys.stdlib_module_names:
            assert root in external, f"{relative} imports {name}"
            assert root != "cuda" or str(relative).startswith(CUDA_ONLY_IN)


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
        f"import {PACKAGE}.client",
        f"import {PACKAGE}.companion.process",
        f"import {PACKAGE}.cli.main",
        f"from {PACKAGE}.engine.register import register; register(); register()",
    ],
)
def test_light_parts_import_neither_torch_nor_vllm_nor_cuda(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in ('torch', 'vllm', 'cuda', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
