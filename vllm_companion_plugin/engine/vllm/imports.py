"""What happens when modules are imported.

A callback just after one is: importing vLLM's loader or worker modules costs seconds, and
`register()` runs in processes that never need them. And a context around those that a model
imports while it is built: their constants are tensors, too, but none of the model's.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType

from vllm_companion_plugin.engine.vllm import patches

Callback = Callable[[ModuleType], None]
Around = Callable[[ModuleType], AbstractContextManager[object]]


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` once module `name` has been executed in this process."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    sys.meta_path.insert(0, _Finder(name, callback))


@contextmanager
def around_imports(around: Around) -> Iterator[None]:
    """While open, each Python module that this thread executes is executed inside `around(module)`."""
    # Not a finder: `trust_remote_code` imports without any. These patches stay, as other threads may be importing.
    for patch in (patches.SOURCE_FILES, patches.COMPILED_FILES):
        patch.apply(_surrounded)
    _open.contexts = (*_contexts(), around)
    try:
        yield
    finally:
        _open.contexts = _contexts()[:-1]


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


_open = threading.local()


def _contexts() -> tuple[Around, ...]:
    """What this thread has open, the outermost first."""
    contexts: tuple[Around, ...] = getattr(_open, "contexts", ())
    return contexts


def _surrounded(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def exec_module(self: object, module: ModuleType) -> None:
        with ExitStack() as stack:
            for around in _contexts():
                stack.enter_context(around(module))
            inner(self, module)

    return exec_module
