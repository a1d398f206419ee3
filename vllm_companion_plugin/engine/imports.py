"""What happens when modules are imported.

A callback just after one is: importing vLLM's loader or worker modules costs seconds, and
`register()` runs in processes that never need them. And a context around those that a model
imports while it is built: their constants are tensors, too, but none of the model's.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


@contextmanager
def around_imports(
    make: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[list[ModuleType]]:
    """While open, modules that this thread imports are executed inside `make()`; the list of them, which grows.

    What such a module imports in turn is executed inside the same context.
    """
    finder = _Surrounder(make)
    sys.meta_path.insert(0, finder)
    try:
        yield finder.modules
    finally:
        sys.meta_path.remove(finder)


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
            spec.loader = _Loader(spec.loader, self._then)
        return spec

    @contextmanager
    def _then(self, module: ModuleType) -> Iterator[None]:
        yield
        self._callback(module)


class _Surrounder(importlib.abc.MetaPathFinder):
    """Finds what the finders after it find."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self.modules: list[ModuleType] = []
        self._make = make
        self._thread = threading.get_ident()
        self._executing = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if threading.get_ident() != self._thread:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):  # a namespace has no loader
                    assert spec.loader is not None
                    spec.loader = _Loader(spec.loader, self._around)
                return spec
        return None

    @contextmanager
    def _around(self, module: ModuleType) -> Iterator[None]:
        self.modules.append(module)
        if self._executing:
            yield
            return
        self._executing = True
        try:
            with self._make():
                yield
        finally:
            self._executing = False


class _Loader(importlib.abc.Loader):
    """Executes the module as its own loader would, with something around it."""

    def __init__(
        self, inner: importlib.abc.Loader, around: Callable[[ModuleType], AbstractContextManager[object]]
    ) -> None:
        self._inner = inner
        self._around = around

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        with self._around(module):
            self._inner.exec_module(module)
