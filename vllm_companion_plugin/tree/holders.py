"""The classes and modules that all models of some code have in common: which they are, and how they are called."""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.tree.classes import CONTAINERS, base_of
from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.values import class_name, loaded_class

_FOUNDATION = ("torch", "builtins", "abc", "typing")
# Of the code of these packages only what its classes hold themselves is compared: what is behind that serves all models
# (registries, caches of kernels).
_GENERAL = frozenset(("torch", "vllm", "transformers", "numpy", __name__.partition(".")[0], *sys.stdlib_module_names))
Holder = type | types.ModuleType


def holders_of(tree: Tree) -> list[Holder]:
    """Those of the model that `tree` was captured from, modules first."""
    held = [value for value in tree.code if isinstance(value, type)]
    classes = _with_bases([*tree.classes, *held, *(type(live.module) for live in tree.modules)])
    used = {*(each.__module__ for each in classes), *map(packages.module_of, tree.code)}
    modules = _modules_of(used, type(tree.modules[0].module))
    classes |= _with_bases(each for module in modules for each in classes_in(module))
    return [*modules, *(one for one in classes if packages.top(one.__module__) not in _FOUNDATION)]


def reference_of(one: Holder) -> str:
    """Return the text by which `find` finds it in another process."""
    return f"{one.__module__}:{one.__qualname__}" if isinstance(one, type) else one.__name__


def find(reference: str) -> Holder | None:
    """Return the class or module of a reference, if it is loaded and `holders_of` could name it."""
    module, colon, qualified = reference.partition(":")
    if packages.top(module) in (_FOUNDATION if colon else _GENERAL):
        return None
    return loaded_class(f"{module}.{qualified}") if colon else sys.modules.get(module)


def _modules_of(names: Iterable[str], model: type) -> list[types.ModuleType]:
    """The modules of the model's own code: those with these names, and those that these modules use."""
    found: dict[str, types.ModuleType] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if module is None or name in found or not may_serve_one(module, model):
            continue
        found[name] = module
        waiting += map(packages.module_of, _in_containers(list(vars(module).values())))
        waiting += _imported_by(module)
    return list(found.values())


def _in_containers(values: Iterable[Any]) -> Iterator[Any]:
    """Yield `values`, and what is in containers among them, as in a registry of functions."""
    for value in values:
        yield value
        kind = type(value)
        if issubclass(kind, CONTAINERS):
            items = dict.values(value) if issubclass(kind, dict) else base_of(value).__iter__(value)
            yield from itertools.islice(items, _MOST_ITEMS)


_MOST_ITEMS = 4096
"""Of tables with more items not all are asked whose they are."""


def may_serve_one(module: types.ModuleType, model: type) -> bool:
    """Whether what `module` holds may be `model`'s own.

    What packages with a version keep (layers of einops, pydantic) serves all models, but for the package of `model`.
    """
    if not is_own(module):
        return False
    file, top = getattr(module, "__file__", None), packages.top(module.__name__)
    is_package = file is None or packages.is_installed(file)
    return not is_package or top in {packages.top(base.__module__) for base in model.__mro__}


def _imported_by(module: types.ModuleType) -> set[str]:
    """Return the names of loaded modules that its functions mention, as those do that import when they are called."""
    mentioned: set[str] = set()
    waiting = list(_codes_in(module))
    while waiting:
        code = waiting.pop()
        mentioned.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                waiting.append(constant)
            elif isinstance(constant, str):  # as for `import_module`
                mentioned.add(constant.lstrip("."))
    parts = module.__name__.split(".")
    packages_of_it = ["", *(".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))]
    return {name for one in mentioned for around in packages_of_it if (name := around + one) in sys.modules}


def _codes_in(module: types.ModuleType) -> Iterator[types.CodeType]:
    """Yield the code of its functions, also of those in wrappings, and of the methods of its classes."""
    waiting, seen = list(vars(module).values()), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)  # a proxy of what is not there cannot be asked
        if issubclass(kind, (staticmethod, classmethod)):
            waiting.append(value.__func__)
        elif issubclass(kind, property):
            waiting += [value.fget, value.fset, value.fdel]
        elif issubclass(kind, functools.cached_property):
            waiting.append(value.func)
        elif packages.module_of(value) == module.__name__:
            if kind is types.FunctionType:
                yield value.__code__
            if issubclass(kind, type):
                waiting += vars(value).values()
            else:
                waiting.append(packages.dictionary(value).get("__wrapped__"))


def classes_in(module: types.ModuleType) -> list[type]:
    """Return the classes that `module` defines, also those inside of others."""
    found: dict[type, None] = {}
    waiting = list(vars(module).values())
    while waiting:
        value = waiting.pop()
        if issubclass(type(value), type) and value not in found and value.__module__ == module.__name__:
            found[value] = None
            waiting += list(vars(value).values())
    return list(found)


def _with_bases(classes: Iterable[type]) -> set[type]:
    """Return the classes, what they are made from, and the classes that they are objects of."""
    return {base for each in classes for kind in (each, type(each)) for base in kind.__mro__}


def is_own(one: Holder) -> bool:
    """Whether `one` is of no package that serves all models."""
    return _is_own(one.__module__ if isinstance(one, type) else one.__name__)


def _is_own(module: str) -> bool:
    return packages.top(module) not in _GENERAL


def users_of(one: Holder) -> str:
    """Return who sees what it holds, for messages."""
    return "its objects share" if isinstance(one, type) else "all models of this code share"


def name_of(one: Holder) -> str:
    """Return its full name, for messages."""
    return class_name(one) if isinstance(one, type) else one.__name__
