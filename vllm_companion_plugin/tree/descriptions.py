"""Short texts that tell apart what is no plain value: functions, classes, keys, what was hung on a tensor."""

from __future__ import annotations

import collections
import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any

import torch

from vllm_companion_plugin.tree.values import class_name, text_of


def describe_value(value: Any) -> str | None:
    """Canonical text of a plain value, a class or a function; None for everything else."""
    text = text_of(value)
    if text is not None:
        return text
    kind = type(value)  # a proxy may have no answer for whoever asks for its class
    if issubclass(kind, type):
        return f"class {class_name(value)}"
    if issubclass(kind, functools.partial):
        made_from_it = "" if kind is functools.partial else f"{class_name(kind)}, a "
        return f"{made_from_it}partial of {describe_value(value.func)}"
    if issubclass(kind, types.MethodType):
        function: Any = value.__func__  # anything that can be called
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"method {named.__module__}.{named.__qualname__}{_local_code(function)}"
    if issubclass(kind, (types.FunctionType, types.BuiltinFunctionType)):
        return f"function {value.__module__}.{value.__qualname__}{_local_code(value)}"
    return None


def answers(value: Any) -> bool:
    """Whether `value` says what it is. A proxy of what is not there raises whatever it likes."""
    try:
        return isinstance(value.__class__, type)
    except Exception:
        return False


def _local_code(function: Any) -> str:
    """A digest that tells local functions of one name apart; nothing for functions that are not local."""
    code = getattr(function, "__code__", None)
    if code is None or "<" not in getattr(function, "__qualname__", ""):
        return ""
    return f" {_code_digest(code)}"


@functools.cache
def _code_digest(code: types.CodeType) -> str:
    constants = [
        _code_digest(constant) if isinstance(constant, types.CodeType) else text_of(constant)
        for constant in code.co_consts
    ]
    return hashlib.sha256(repr((code.co_code, code.co_names, code.co_varnames, constants)).encode()).hexdigest()[:8]


def tensor_attributes(tensor: torch.Tensor) -> dict[str, str]:
    """The attributes that were hung on a tensor, as canonical text."""
    return {name: describe_value(value) or class_name(type(value)) for name, value in tensor.__dict__.items()}


def key_texts(keys: Iterable[Any]) -> list[str]:
    """Texts that tell the keys of one dict apart, in their order."""
    found = []
    alike: collections.Counter[str] = collections.Counter()
    for key in keys:
        text = describe_value(key) or class_name(type(key))
        alike[text] += 1
        found.append(text if alike[text] == 1 else f"{text} {alike[text]}")  # objects of one class as keys
    return found
