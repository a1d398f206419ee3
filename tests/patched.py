"""Finds what the plugin put on things of others: its functions, classes and objects that hang there.

A replaced function keeps its names (`functools.wraps`), so it is known by the file that its code is from.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

import vllm_companion_plugin
from vllm_companion_plugin.engine.vllm.patches import PATCHES
from vllm_companion_plugin.engine.vllm.patching import How, Lifetime, Patch

PACKAGE = vllm_companion_plugin.__name__
ROOT = str(Path(vllm_companion_plugin.__file__).parent)
OTHERS = (
    *("vllm", "torch", "transformers", "safetensors", "huggingface_hub"),
    *("importlib", "_frozen_importlib", "_frozen_importlib_external", "sys", "builtins", "os", "gc"),
)
"""Packages that are looked at, with all below them."""

_PLAIN = frozenset((str, bytes, int, float, bool, type(None), torch.dtype, types.BuiltinFunctionType))

Place = tuple[int, str]
"""An owner, by its id, and the name of what it has."""


def on_modules_and_classes() -> dict[Place, str]:
    """What of ours hangs on loaded modules of others and their classes, or lies in a table of theirs: dotted names."""
    owners: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if issubclass(type(module), types.ModuleType) and _is_others(name):
            owners[id(module)] = module
            owners |= {id(cls): cls for cls in _classes(module)}  # most are in many modules
    return dict(itertools.chain.from_iterable(_hanging(owner) for owner in owners.values()))


def on_objects() -> dict[Place, str]:
    """What of ours hangs on single objects of others: their classes' dotted names, with the attribute's."""
    gc.unfreeze()  # a started engine freezes its objects, which are not listed then
    found: dict[Place, str] = {}
    for value in gc.get_objects():
        cls = type(value)
        if not issubclass(cls, (type, types.ModuleType, types.FunctionType)) and _is_others(str(cls.__module__)):
            for name, item in list(_attributes(value).items()):
                if _is_code_of_ours(item):
                    found[id(value), name] = f"{cls.__module__}.{cls.__qualname__}.{name}"
    return found


def modes() -> list[str]:
    """Modes of PyTorch that are open in this thread."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return [
        type(mode).__qualname__ for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    ]


def differences(lifetimes: Iterable[Lifetime]) -> dict[str, list[str]]:
    """How what hangs on modules and classes differs from what rows of these lifetimes say: strays, and what is missing.

    An interface that only takes (`atexit.register`) shows nothing; one that has a table does.
    """
    rows = [patch for patch in PATCHES if patch.lifetime in lifetimes and applies(patch) and _is_visible(patch)]
    expected = {(id(patch.find_owner()), patch.attribute): patch.target for patch in rows}
    found = on_modules_and_classes()
    return {
        "stray": sorted(found[place] for place in found.keys() - expected.keys()),
        "missing": sorted(expected[place] for place in expected.keys() - found.keys()),
    }


def _is_visible(patch: Patch) -> bool:
    if patch.how is How.HOOKED:
        return not callable(getattr(patch.find_owner(), patch.attribute))
    return patch.how in (How.REPLACED, How.ADDED) and not patch.each


def applies(patch: Patch) -> bool:
    """Whether this version of vLLM, and this device, are the row's, and what it changes is there."""
    import vllm

    if patch.where.partition(":")[0] not in sys.modules:
        return False
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if patch.device_type not in ("", device_type):
        return False
    return not patch.before or Version(vllm.__version__).release < Version(patch.before).release


def _is_others(name: str) -> bool:
    return name.partition(".")[0] in OTHERS


def _classes(module: types.ModuleType) -> Iterator[type]:
    for value in list(vars(module).values()):
        if issubclass(type(value), type) and _is_others(str(value.__module__)):
            yield value


def _hanging(owner: Any) -> Iterator[tuple[Place, str]]:
    for name, value in list(vars(owner).items()):
        if _is_of_ours(value) or any(map(_is_of_ours, _items(value))):
            where = (
                owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
            )
            yield (id(owner), name), f"{where}.{name}"


def _items(value: Any) -> list[Any]:
    if type(value) in (list, tuple, set, frozenset):
        return list(value)
    # By `type`, as deprecated objects warn whoever asks for their class; by `dict`, as some import what is asked for.
    return list(dict.values(value)) if issubclass(type(value), dict) and value is not sys.modules else []


def _is_of_ours(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN or issubclass(kind, types.ModuleType):
        return False
    module = value.__module__ if issubclass(kind, type) else kind.__module__
    return str(module).partition(".")[0] == PACKAGE or _is_code_of_ours(value)


def _is_code_of_ours(value: Any) -> bool:
    kind = type(value)
    if kind in (staticmethod, classmethod, types.MethodType):
        value = value.__func__
    elif kind is functools.partial:
        value = value.func
    elif kind is property:
        return any(map(_is_code_of_ours, (value.fget, value.fset, value.fdel)))
    return type(value) is types.FunctionType and value.__code__.co_filename.startswith(ROOT)


def _attributes(value: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError, ReferenceError):
        return {}
    return found if type(found) is dict else {}
