"""Code that stands in vLLM's modules and is not vLLM's: somebody replaced a function or a class at run time.

A user's script, a `sitecustomize` or a library of a trainer does so, and is no plugin that vLLM lists. What a function
says of itself (`__module__`) proves nothing, because `functools.wraps` copies that. Its code says which file it comes
from, and its globals which module.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, cast

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.core.process import collector_paused
from vllm_companion_plugin.engine.identity import outside, places
from vllm_companion_plugin.errors import NotShareableError

# Parts of vLLM that take requests and answer them, or tell of that. What is put in there makes no weights.
_OF_REQUESTS = (
    *(f"distributed.{name}" for name in ("kv_transfer", "ec_transfer", "kv_events", "aux_output_connector")),
    *("assets", "benchmarks", "engine", "entrypoints", "inputs", "logging_utils", "parser", "profiler", "reasoning"),
    *("renderers", "third_party", "tokenizers", "tool_parsers", "tracing", "usage"),
    *("v1.core", "v1.engine", "v1.kv_offload", "v1.metrics", "v1.sample", "v1.structured_output"),
)
_PLAIN = frozenset(
    {str, int, float, bool, type(None), tuple, list, dict, set, frozenset}
    | {BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType, WrapperDescriptorType}
)
_VLLM = b"vllm"
_USING_VLLM = (b"import vllm", b"from vllm", b'"vllm.', b"'vllm.")
_AROUND = ("__wrapped__", "__func__", "func", "fget", "fset", "_self_wrapper")
"""Where objects of Python and of packages keep the function that they stand for, or call instead of it."""


@dataclass
class Found:
    """What is no code of vLLM: names of loaded modules, and files that no loaded module has."""

    modules: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


@collector_paused()
def found() -> Found:
    """Return the code that stands in vLLM's modules and classes, and is not vLLM's.

    Raises:
        NotShareableError: such code comes from no file, so nothing tells two versions of it apart.
    """
    walk = _Walk()
    left_out = tuple(f"vllm.{name}." for name in _OF_REQUESTS)
    for name, module in list(sys.modules.items()):
        if packages.top(name) == "vllm" and not f"{name}.".startswith(left_out):
            walk.module(name, packages.dictionary(module))
    return walk.found


class _Walk:
    def __init__(self) -> None:
        self.found = Found()
        self._root = os.path.join(places.vllm(), "")
        self._is_vllms: dict[str, bool] = {}
        self._seen: set[int] = set()
        self._data: set[type] = {*_PLAIN}

    def module(self, name: str, attributes: dict[str, Any]) -> None:
        path = attributes.get("__file__")
        if isinstance(path, str) and not self._is_of_vllm(path):
            self.found.files.add(os.path.abspath(path))
        self._values(name, attributes)

    def _values(self, where: str, attributes: Mapping[str, Any]) -> None:
        is_vllms, seen, data = self._is_vllms, self._seen, self._data
        for name, value in list(attributes.items()):
            kind = type(value)
            if kind is staticmethod or kind is classmethod or kind is MethodType:
                value = value.__func__
                kind = type(value)
            if kind is FunctionType:
                if not is_vllms.get(value.__code__.co_filename) or value.__closure__ is not None:
                    self._function(f"{where}.{name}", value)
            elif kind not in data and id(value) not in seen:
                self._other(f"{where}.{name}", value)

    def _is_of_vllm(self, path: str) -> bool:
        if path not in self._is_vllms:
            # What was made of a text says "<string>", which is below whatever folder this process is in.
            self._is_vllms[path] = not path.startswith("<") and os.path.abspath(path).startswith(self._root)
        return self._is_vllms[path]

    def _is_new(self, value: object) -> bool:
        number = id(value)
        is_new = number not in self._seen
        self._seen.add(number)
        return is_new

    def _function(self, where: str, function: FunctionType) -> None:
        if not self._is_new(function):
            return
        if not self._is_of_vllm(function.__code__.co_filename):
            self._add(where, function)
            self._inside(where, [function.__dict__.get("__wrapped__")])
        self._inside(where, _captured(function))

    def _other(self, where: str, value: object) -> None:
        if not self._is_new(value):
            return
        kind = type(value)
        if issubclass(kind, type):
            self._class(where, cast("type[Any]", value))
            return
        if self._is_new(kind):
            self._class(where, kind)
        if not callable(value) and not hasattr(kind, "__get__"):
            self._data.add(kind)
        else:
            self._inside(where, _around(value))
            if packages.top(kind.__module__) != "vllm":
                self._inside(where, packages.dictionary(value).values())

    def _inside(self, where: str, values: Iterable[object]) -> None:
        """Look at what is called by way of something else."""
        for value in list(values):
            if isinstance(value, FunctionType):
                self._function(where, value)
            elif isinstance(value, (MethodType, partial, staticmethod, classmethod)):
                self._other(where, value)

    def _class(self, where: str, kind: type) -> None:
        name = kind.__module__ if isinstance(kind.__module__, str) else ""
        if issubclass(kind, logging.Logger):  # an application's own, which every module has
            return
        if packages.top(name) == "vllm":
            self._values(where, vars(kind))
        elif packages.top(name) not in outside.KNOWN:
            path = _file_of(name)
            if path is None:
                if name == "__main__":
                    raise _no_file(where, name)
                self._values(where, vars(kind))
            elif _counts(path):
                self.found.modules.add(name)

    def _add(self, where: str, function: FunctionType) -> None:
        path, name = function.__code__.co_filename, str(function.__globals__.get("__name__"))
        path = path if path.startswith("<") else os.path.abspath(path)
        if packages.top(name) in outside.KNOWN and _file_of(name) == path:  # as a decorator of PyTorch
            return
        module = sys.modules.get(name)
        is_its = module is not None and packages.dictionary(module) is function.__globals__
        if os.path.isabs(path) and _is_file(path):
            if not _counts(path):
                return
            if is_its and _file_of(name) == path:
                self.found.modules.add(name)
            else:  # a program that another one runs, or that was compiled by hand
                self.found.files.add(path)
        elif is_its and (packages.top(name) in outside.KNOWN or _file_of(name) is not None):
            # Python and packages make functions of texts in the name of a module, as of a dataclass.
            if packages.top(name) not in outside.KNOWN and _counts(str(_file_of(name))):
                self.found.modules.add(name)
        elif function.__globals__.get("__builtins__") != {}:  # without these it makes a named tuple, and nothing else
            raise _no_file(where, name)


def _no_file(where: str, module: str) -> NotShareableError:
    return NotShareableError(
        f"{where} is code of {module} that comes from no file, so nothing tells two versions of it apart",
        remedy="Put that code into a module.",
    )


def _captured(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue


def _around(value: object) -> Iterator[object]:
    for name in _AROUND:
        try:
            yield object.__getattribute__(value, name)
        except AttributeError:
            continue


def _file_of(module: str) -> str | None:
    path = packages.dictionary(sys.modules.get(module)).get("__file__")
    return os.path.abspath(path) if isinstance(path, str) else None


@cache
def _is_file(path: str) -> bool:
    return os.path.isfile(path)


@cache
def _counts(path: str) -> bool:
    """Tell whether code is the user's, or that of a package that is made for vLLM. vLLM itself uses the others."""
    if places.is_own(path):
        return False
    if not packages.is_installed(path) and not places.is_pythons(path):
        return True
    try:
        source = Path(path).read_bytes()
        return _VLLM in source and any(text in source for text in _USING_VLLM)
    except OSError:
        return False
