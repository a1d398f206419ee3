"""What happens when modules are imported.

A callback just after one is: importing vLLM's loader or worker modules costs seconds, and
`register()` runs in processes that never need them. And a context around those that a model
imports while it is built or loaded: their constants are tensors, and none of the model's.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import SourceFileLoader
from types import ModuleType

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` once module `name` has been executed in this process."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    sys.meta_path.insert(0, _Finder(name, callback))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module by asking the other finders, and removes itself."""

    def __init__(self, name: str, callback: Callback) -> None:
        self._name = name
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._callback)
        return spec


class _Loader(importlib.abc.Loader):
    """Executes the module as its own loader would, then calls back."""

    def __init__(self, inner: importlib.abc.Loader, callback: Callback) -> None:
        self._inner = inner
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._callback(module)


@contextmanager
def around_imports(make: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """While open, modules that this thread imports are executed inside `make()`, each with what it imports in turn."""
    inner, thread, executing = SourceFileLoader.exec_module, threading.get_ident(), False

    def exec_module(self: SourceFileLoader, module: ModuleType) -> None:
        nonlocal executing
        if executing or threading.get_ident() != thread:
            return inner(self, module)
        executing = True
        try:
            with make():
                return inner(self, module)
        finally:
            executing = False

    SourceFileLoader.exec_module = exec_module  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        SourceFileLoader.exec_module = inner  # type: ignore[method-assign]
