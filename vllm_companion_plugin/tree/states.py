"""Texts of what only C code, or Python itself, sees of an object's state, and of bytes of tensors."""

from __future__ import annotations

import array
import contextvars
import ctypes
import dataclasses
import functools
import gc
import hashlib
import io
import random
import threading
import types
import warnings
import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.tree.classes import OPAQUE_THEMSELVES
from vllm_companion_plugin.tree.descriptions import answers, describe_value
from vllm_companion_plugin.tree.values import class_name, text_of

_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
_DEEPEST = 8
SMALL_BYTES = 1 << 20
"""Parameters up to this size are compared by all of their bytes, larger ones by a sample."""
_SAMPLES = 1024
_ROW_BYTES = 4096


def state_of(value: Any) -> str | None:
    """The state of an object whose attributes do not show it, as far as that tells; None if nothing does.

    Positions of iterators, generators and random numbers, bytes of memory, items of weak containers, what a thread or
    a context sees. Of configurations, which no walk looks into, the plain values.
    """
    return _state_of(value, 0)


def _state_of(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST or not answers(value):
        return None
    if _is_configuration(value):
        return _configured(value, depth) if hasattr(value, "__dict__") else None
    if isinstance(value, (np.ndarray, memoryview)):
        return text_of(np.asarray(value))
    if isinstance(value, (array.array, bytearray, ctypes.Array, ctypes.Structure)):  # and what is made from them
        return hashlib.sha256(memoryview(value).cast("B")).hexdigest()
    if isinstance(value, torch.Generator):
        return f"{value.device.type} {text_of(value.get_state().numpy())}"
    if isinstance(value, random.Random):
        return text_of(value.getstate())
    if isinstance(value, np.random.RandomState):
        return text_of(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return text_of(value.bit_generator.state)
    if isinstance(value, functools._lru_cache_wrapper):
        return repr(sorted(map(repr, map(_parts_text, _remembered(value)))))
    if isinstance(value, _WEAK):
        items = [*value.items()] if hasattr(value, "items") else [*value]
        return repr(sorted(map(repr, map(_parts_text, items))))
    if isinstance(value, threading.local):
        return repr(_parts_text([*vars(value).items()]))
    if isinstance(value, contextvars.ContextVar):
        return repr(_parts_text((_current(value),)))
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return None if frame is None else repr((frame.f_lasti, _parts_text([*frame.f_locals.items()])))
    if isinstance(value, (io.BytesIO, io.StringIO)):
        return None if value.closed else f"{value.tell()} {text_of(value.getvalue())}"
    reduce = next(vars(cls)["__reduce__"] for cls in type(value).__mro__ if "__reduce__" in vars(cls))
    if type(reduce) is not types.MethodDescriptorType or reduce is object.__reduce__:
        return None  # Python code, or nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr([_parts_text(part, depth) for part in reduce(value)[1:]])
    except Exception:  # it cannot be asked
        return None


def parts_of(value: Any) -> dict[str, Any]:
    """What is in an object of which a walk takes note by its class alone, as far as it may be a model's."""
    if not answers(value):
        return {}
    if isinstance(value, _WEAK):
        return {"items": [*value.items()] if hasattr(value, "items") else [*value]}
    if isinstance(value, functools._lru_cache_wrapper):
        return {"results": _remembered(value)}
    if isinstance(value, contextvars.ContextVar):
        return {"value": _current(value)}
    if isinstance(value, types.GeneratorType):
        return {} if value.gi_frame is None else dict(value.gi_frame.f_locals)
    if isinstance(value, types.MappingProxyType):
        return {"items": dict(value)}
    if isinstance(value, threading.local):
        return dict(vars(value))
    kind = type(value)
    if any(base.__module__ in _OF_PYTHON for base in kind.__mro__ if base is not object):
        return {"parts": [part for part in gc.get_referents(value) if not issubclass(type(part), type)]}
    is_public = not any(part.startswith("_") for part in kind.__module__.split("."))
    return dict(packages.dictionary(value)) if is_public and packages.top(kind.__module__) in OPAQUE_THEMSELVES else {}


def _current(variable: contextvars.ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return None


_OF_PYTHON = ("builtins", "types", "_queue")


def is_cache(value: Any) -> bool:
    """Whether it is a function that remembers results. Its name says all else of it."""
    return type(value) is functools._lru_cache_wrapper


def remembered_tensors(function: functools._lru_cache_wrapper[Any]) -> list[torch.Tensor]:
    """The tensors among the results that a cache of `functools` keeps."""
    return [result for result in _results(function) if issubclass(type(result), torch.Tensor)]


def _remembered(function: functools._lru_cache_wrapper[Any]) -> list[Any]:
    """The results that a cache of `functools` keeps, and that somebody may have written to since."""
    return [result for result in _results(function) if _may_be_written(result)]


def _results(function: functools._lru_cache_wrapper[Any]) -> list[Any]:
    attributes = vars(function)
    parts = [part for part in gc.get_referents(function) if part is not attributes]
    tables = [part for part in parts if type(part) is dict]
    if function.cache_parameters()["maxsize"] is None:
        return [result for table in tables for result in table.values()]
    # They are beside the table, as its keys are.
    table = next(table for table in tables if all(type(link) is _LINK for link in table.values()))
    others = {id(table), *map(id, table)}
    return [part for part in parts if id(part) not in others]


_LINK = next(
    part for part in gc.get_referents(functools.cache(id)) if getattr(part, "__name__", "") == "_lru_list_elem"
)
_FIXED = (
    *(bool, int, float, complex, str, bytes, type(None), type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device),
)


def _may_be_written(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # as a table that is computed once
        return not value.is_inference() and value._version > 0
    if type(value) in (tuple, frozenset):
        return any(map(_may_be_written, value))
    return not (isinstance(value, _FIXED) or type(value) is object)


def _is_configuration(value: Any) -> bool:
    """Whether it is data that says all of itself: vLLM's configurations are dataclasses, those of models have this."""
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or hasattr(type(value), "to_dict")


def _configured(value: Any, depth: int) -> str:
    """The attributes that are plain values, also those of configurations inside."""
    found = {}
    for name, part in list(vars(value).items()):
        text = describe_value(part)
        if text is None and _is_configuration(part):
            text = _state_of(part, depth + 1)
        found[name] = class_name(type(part)) if text is None else text
    return repr(found)


def _parts_text(value: Any, depth: int = 0) -> Any:
    if isinstance(value, (tuple, list)):
        return [_parts_text(part, depth) for part in value]
    # An iterator may have its position in others.
    return describe_value(value) or (class_name(type(value)), _state_of(value, depth + 1))


def built_text(shape: tuple[int, ...], fingerprint: bytes) -> str:
    """What a tensor was when it was built, to compare it with the one of another engine."""
    return f"{tuple(shape)} {hashlib.sha256(fingerprint).hexdigest()[:16]}"


def is_sampled(tensor: torch.Tensor) -> bool:
    """Whether a sample of the bytes of this tensor has to do."""
    return isinstance(tensor, torch.nn.Parameter) and tensor.nbytes > SMALL_BYTES


def fingerprints(tensors: dict[int, torch.Tensor], sampled: Collection[int] = ()) -> dict[int, bytes]:
    """For each storage a value that is equal if all bytes are: the bytes of small storages, sums of large ones.

    The bytes of all come from each device at once: one after the other, hundreds of them take tens of milliseconds.

    Args:
        sampled: storages of which some bytes are enough.
    """
    parts: dict[torch.device, dict[int, torch.Tensor]] = {}
    for storage, tensor in tensors.items():
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        if storage in sampled:
            flat = flat[:: (flat.numel() // _SAMPLES) | 1]  # an odd step meets all bytes of numbers
        elif flat.numel() > SMALL_BYTES:
            whole = flat.numel() // _ROW_BYTES * _ROW_BYTES
            rows = flat[:whole].view(-1, _ROW_BYTES)
            flat = torch.cat([rows.sum(0), rows.sum(1), flat[whole:].long()]).view(torch.uint8)
        parts.setdefault(tensor.device, {})[storage] = flat
    found: dict[int, bytes] = {}
    for device, flats in parts.items():
        data = torch.cat(list(flats.values())).cpu().numpy().tobytes()
        start = 0
        for storage, flat in flats.items():
            found[storage] = f"{device.type} ".encode() + data[start : start + flat.numel()]
            start += flat.numel()
    return found
