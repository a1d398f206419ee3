"""The table of what is patched: that it is true, and that there is nothing else."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.utils import request_memory

from tests import patched
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.engine.vllm import budget, patches, patching
from vllm_companion_plugin.engine.vllm.patches import PATCHES
from vllm_companion_plugin.engine.vllm.patching import How, Lifetime, Patch

pytestmark = pytest.mark.core

PACKAGE = Path(patched.ROOT)


def row(where: str, *, each: bool = False) -> Patch:
    return Patch(where, "tests", How.REPLACED, Lifetime.LOADING, "a test", "this file", "by itself", each=each)


class Base:
    def text(self) -> str:
        return "base"


class Derived(Base):
    pass


def louder(inner: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: inner(*args) + "!"


@pytest.fixture
def derived() -> Iterator[Patch]:
    """A row of a method that its class inherits."""
    made = row(f"{__name__}:Derived.text")
    yield made
    patching._applied.pop(made, None)


class TestPatch:
    """Replacing, and putting back."""

    def test_apply(self, derived: Patch) -> None:
        """It replaces once, however often it is applied, and puts back that nothing was there."""
        applied = derived.apply(louder)
        assert derived.apply(louder) is applied
        assert (Derived().text(), Base().text()) == ("base!", "base")
        applied.undo()
        assert Derived().text() == "base"
        assert "text" not in vars(Derived)

    def test_object(self) -> None:
        """One object changes and no other; what is opened last ends first, also by an error."""
        patch, model, other = row("torch.nn:Module.load_weights", each=True), nn.Module(), nn.Module()
        vars(model)["load_weights"] = vars(other)["load_weights"] = before = str
        with suppress(LookupError), patch.on(model, louder), patch.on(model, louder):
            assert (model.load_weights(1), other.load_weights(1)) == ("1!!", "1")
            raise LookupError
        assert vars(model)["load_weights"] is before

    def test_module(self) -> None:
        patch = row(f"{__name__}:louder")
        before = louder
        with patch.on(sys.modules[__name__], lambda inner: None):
            assert louder is None
        assert louder is before

    def test_other_owner(self, derived: Patch) -> None:
        """A row is of one place: the table would not be true otherwise."""
        with pytest.raises(TypeError, match="another text"), derived.on(Base, louder):
            pass
        with pytest.raises(TypeError, match="load_weights"), patches.LOADERS_WEIGHTS.on(nn.Module(), louder):
            pass


class TestTable:
    """Each row names what there is."""

    @pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
    def test_target(self, patch: Patch) -> None:
        module = importlib.import_module(patch.where.partition(":")[0])
        owner = patch.find_owner()
        named = patch.attribute in {*dir(owner), *getattr(owner, "__annotations__", {})}
        # Of single objects.
        set_by_constructors = ("load_weights", "process_weights_after_loading", "requested_memory", "weight_loader")
        ours = patch.how is How.ADDED and patch.attribute.startswith("companion_")
        assert named or ours or (patch.each and patch.attribute in set_by_constructors), module
        importlib.import_module(f"vllm_companion_plugin.{patch.by}")

    @pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
    def test_link(self, patch: Patch) -> None:
        """What makes a patch necessary is in the file that it names; of another version of vLLM it may not be."""
        file, _, names = patch.link.partition(": ")
        if file.startswith("Python's ") or patch.before or re.search(r"\(0\.\d+\)$", patch.link):
            return
        package, _, inner = file.partition("/")
        root = importlib.import_module(package).__path__[0]
        text = Path(root, inner).read_text()
        assert re.search(rf"(def|class) {names.split('.')[-1]}\b", text), patch.link

    def test_versions(self) -> None:
        """What is found by looking at a function is what the table says by number."""
        looked = not budget.has_external_memory_hook(request_memory)
        importlib.import_module("vllm.v1.worker.gpu_worker")
        assert patched.applies(patches.REQUEST_MEMORY) is looked
        assert patched.applies(patches.REQUEST_MEMORY_OF_WORKER) is looked

    def test_all_rows(self) -> None:
        """One row for each place; of single objects, one for each time; of an interface, one for each user."""
        rows = {(patch.where, patch.each and patch.lifetime, patch.how is How.HOOKED and patch.by) for patch in PATCHES}
        assert len(PATCHES) == len(rows) > 20


class TestScan:
    """What looks for patches finds them."""

    def test_modules_and_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever a function is wrapped in; also in a table, as PyTorch's of hooks is."""
        before = patched.on_modules_and_classes()
        strays = [printable, staticmethod(printable), property(printable), functools.partial(printable), Patch]
        for number, stray in enumerate([*strays, PATCHES[0]]):
            monkeypatch.setattr(nn.Linear, f"stray{number}", stray, raising=False)
        monkeypatch.setattr(torch, "stray", printable, raising=False)
        monkeypatch.setitem(torch.nn.modules.module._global_parameter_registration_hooks, -1, printable)
        found = patched.on_modules_and_classes()
        assert {text for place, text in found.items() if place not in before} == {
            *(f"torch.nn.modules.linear.Linear.stray{number}" for number in range(len(strays) + 1)),
            *("torch.stray", "torch.nn.modules.module._global_parameter_registration_hooks"),
        }

    def test_object(self) -> None:
        class Loader(BaseModelLoader):
            load_weights = download_model = lambda *_: None  # type: ignore[assignment]

        Loader.__module__ = "vllm.made"
        loader = Loader.__new__(Loader)
        vars(loader)["load_weights"] = printable
        assert (id(loader), "load_weights") in patched.on_objects()


# ---- what the sources do, whether a test runs it or not

PARTS_IN_ENGINES = ("core", "host", "wire", "memory", "tree", "client", "engine")
INTERFACES = re.compile(
    r"addaudithook|meta_path|path_hooks|setswitchinterval|setrecursionlimit|settrace|setprofile|\w*excepthook|displayhook"
    r"|register_at_fork|register_module_\w+|register_\w+_hook|\w*_global_\w+hooks?|Torch(Dispatch|Function)Mode"
    r"|set_default_(dtype|device|tensor_type)|use_deterministic_algorithms|simplefilter|filterwarnings"
)
"""By which a process is told to do something otherwise. With an owner's name: those whose own names say little."""
QUALIFIED = (
    *("gc.disable", "gc.freeze", "gc.callbacks", "atexit.register", "signal.signal", "signal.setitimer"),
    "resource.setrlimit",
)
OF_OUR_PROCESSES = {("core.logs", "excepthook"), ("core.process", "setrlimit")}
"""Of the companion, the keeper and the command line: no engine calls these."""
OF_OURS = {
    ("engine.adapters", "atexit"),  # of a finalizer that was just made
    ("engine.attach", "data"),  # of a parameter that is made private
    ("engine.live", "unsleepable"),  # of our own `LiveModel`
    ("engine.live", "is_stale"),  # of our own `Attachment`
    ("engine.publish", "processed"),
    ("engine.publish", "manifest"),
    ("engine.publish", "reading"),
    ("engine.session", "atexit"),  # of a finalizer that was just made
    ("engine.run.verify", "worker_extension_cls"),  # of arguments that were just parsed
    ("engine.vllm.adapters.loading", "lora_path"),  # of a copy
    ("engine.vllm.adapters.requests", "load_inplace"),  # of a copy, as the next ones
    ("engine.vllm.adapters.requests", "lora_int_id"),
    ("engine.vllm.adapters.requests", "lora_name"),
    ("engine.vllm.adapters.requests", "lora_path"),
    ("engine.vllm.adapters.requests", "lora_request"),
    ("engine.vllm.building", "compilation_config"),  # of a copy, with which a model is built once more
    ("engine.vllm.building", "load_config"),
    ("engine.vllm.flags", "default"),
    ("engine.vllm.flags", "load_format"),
    ("engine.vllm.flags", "model"),
    ("engine.vllm.flags", "model_loader_extra_config"),
    ("engine.progress", "bar_format"),  # of a bar
    ("engine.progress", "n"),
    ("engine.progress", "total"),
    ("engine.vllm.imports", "__loader__"),  # of a module that its own loader is about to execute
    ("engine.vllm.imports", "loader"),  # of the spec that the module's own finder just made
    ("engine.vllm.imports", "contexts"),  # of our own `threading.local`
    ("engine.vllm.rehearsal", "weight_loader"),  # of tensors that were just made
}
"""Attributes of objects that the module, or the plugin, has made."""


def sources(*parts: str) -> Iterator[tuple[str, ast.Module]]:
    for part in parts:
        for path in sorted((PACKAGE / part).rglob("*.py")):
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text())


def test_interfaces_are_used_where_the_table_says() -> None:
    """Each module of engines that hooks into a process by an interface of it has a row for that."""
    used = set()
    for module, tree in sources(*PARTS_IN_ENGINES):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else node.attr
                if name in QUALIFIED or INTERFACES.fullmatch(node.attr):
                    used.add((module, node.attr))
            elif isinstance(node, ast.ImportFrom):
                used |= {(module, alias.name) for alias in node.names if INTERFACES.fullmatch(alias.name)}
    rows = {(patch.by, patch.attribute) for patch in PATCHES if patch.how is How.HOOKED}
    of_vllm = (patches.LOADER, patches.TRANSFER, patches.TRANSFER_OF_TRAINER)  # where vLLM has others register
    rows -= {(patch.by, patch.attribute) for patch in of_vllm}
    assert used - OF_OUR_PROCESSES == rows


def test_attributes_of_others_are_set_where_the_table_says() -> None:
    """No module of engines assigns to anything but itself and what it made, or what a row names."""
    found = set()
    for module, tree in sources("engine"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    found.add((module, node.attr))
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("setattr", "delattr")
            ):
                found.add((module, node.func.id))
    rows = {(patch.by, patch.attribute) for patch in PATCHES if patch.how is How.SET}
    assert found - rows - OF_OURS == {
        ("engine.vllm.patching", "setattr"),
        ("engine.vllm.patching", "delattr"),
        ("engine.draft", "setattr"),  # flags of a draft that is being attached
    }
    assert found >= OF_OURS
