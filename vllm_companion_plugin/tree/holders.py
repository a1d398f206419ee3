"""The classes and modules that all models of some code have in common: which they are, and how they are called."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
    return _with_modules(classes, used, type(tree.modules[0].module))


def of_class(model: type) -> list[Holder]:
    """Return those of a class, before any model was made of it."""
    classes = _with_bases([model])
    return _with_modules(classes, {each.__module__ for each in classes}, model)


def _with_modules(classes: set[type], used: Iterable[str], model: type) -> list[Holder]:
    """Return the modules of `model`'s own code among those of these names and what they use, and all classes."""
    modules = _modules_of(used, model)
    classes = classes | _with_bases(each for module in modules for each in classes_in(module))
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
    """The modules of the model's own code: those with these names, and those that these modules use.

    A package has all of its modules that anybody has imported: of these, those whose names the code mentions.
    """
    found: dict[str, types.ModuleType] = {}
    waiting, mentioned, inner = list(names), set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if module is not None and name not in found and may_serve_one(module, model):
            found[name] = module
            for value in _in_containers(list(vars(module).values())):
                used = packages.module_of(value)
                is_inner = issubclass(type(value), types.ModuleType) and used.rpartition(".")[0] == name
                inner.add(used) if is_inner else waiting.append(used)
            for code in _codes_in(module):
                mentioned.update(code.co_names)
                waiting += _imported_by(code, module)
        if not waiting:
            waiting += [one for one in inner if one.rpartition(".")[2] in mentioned and one not in found]
            inner -= {*waiting}
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


def _imported_by(code: types.CodeType, module: types.ModuleType) -> Iterator[str]:
    """Yield the names of loaded modules that a function of `module` imports when it is called."""
    if _IMPORT in code.co_code[::2]:
        yield from _imports_of(code, module)
    if not _BY_NAME.isdisjoint(code.co_names):
        texts = [constant for constant in code.co_consts if isinstance(constant, str)]
        yield from (name for text in texts if (name := _absolute(text, module)) in sys.modules)


_IMPORT = dis.opmap["IMPORT_NAME"]
_BY_NAME = frozenset(("import_module", "__import__", "modules"))


def _imports_of(code: types.CodeType, module: types.ModuleType) -> Iterator[str]:
    """Yield what the import statements of a function name: modules, and what is taken from one and may be a module."""
    level: Any = 0
    taken: Any = ()  # this and the level are the last two constants before it
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            name = _absolute("." * level + instruction.argval, module)
            yield from (each for each in (name, *(f"{name}.{one}" for one in taken or ())) if each in sys.modules)
        elif instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            level, taken = taken, instruction.argval


def _absolute(name: str, module: types.ModuleType) -> str:
    """Return the full name of what `module` names with dots before it."""
    bare = name.lstrip(".")
    level = len(name) - len(bare)
    if not level:
        return name
    parts = module.__name__.split(".")
    is_package = hasattr(module, "__path__")
    return ".".join([*parts[: len(parts) + is_package - level], *([bare] if bare else [])])


def _codes_in(module: types.ModuleType) -> Iterator[types.CodeType]:
    """Yield the code of its functions, also of those that wrappings and functions hold, and of its classes' methods."""
    waiting, seen = [*_in_containers(list(vars(module).values()))], set[int]()
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
        elif issubclass(kind, functools.partial):
            waiting += [value.func, *value.args]
        elif packages.module_of(value) == module.__name__:
            if kind is types.FunctionType:
                yield from _with_inner(value.__code__)
                waiting += _in_containers(_held_by(value))
            if issubclass(kind, type):
                waiting += vars(value).values()
            else:
                waiting.append(packages.dictionary(value).get("__wrapped__"))


def _held_by(function: types.FunctionType) -> list[Any]:
    """Return what a function captured, and its defaults."""
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing is in it yet
            held.append(cell.cell_contents)
    return held


def mentioned_in(module: types.ModuleType) -> set[str]:
    """Return the names and texts that the functions of `module` mention."""
    found: set[str] = set()
    for code in _codes_in(module):
        if code.co_name != "__getattribute__":  # which asks those that it inherits; its objects are known
            found.update(code.co_names)
            found.update(constant for constant in code.co_consts if isinstance(constant, str))
    return found


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


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


def is_own(one: Holder | str) -> bool:
    """Whether `one`, or the module of this name, is of no package that serves all models."""
    if isinstance(one, str):
        return _is_own(one)
    return _is_own(one.__module__ if isinstance(one, type) else one.__name__)


def acts_for_callers(module: str) -> bool:
    """Whether code of a module does what its caller wants, whoever that is."""
    return not _is_own(module) and packages.top(module) not in _ON_THEIR_OWN


_ON_THEIR_OWN = ("vllm", "transformers", __name__.partition(".")[0])


def _is_own(module: str) -> bool:
    return packages.top(module) not in _GENERAL


def users_of(one: Holder) -> str:
    """Return who sees what it holds, for messages."""
    return "its objects share" if isinstance(one, type) else "all models of this code share"


def name_of(one: Holder) -> str:
    """Return its full name, for messages."""
    return class_name(one) if isinstance(one, type) else one.__name__
