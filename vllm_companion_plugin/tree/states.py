"""Texts of what only C code, or Python itself, sees of an object's state."""

from __future__ import annotations

import contextvars
import random
import threading
import types
import warnings
import weakref
from typing import Any

import numpy as np

from vllm_companion_plugin.tree.descriptions import answers, describe_value
from vllm_companion_plugin.tree.values import class_name, text_of

_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


def state_of(value: Any) -> str | None:
    """The state of an object whose attributes do not show it, as far as that tells; None if nothing does.

    Positions of iterators, generators and random numbers, bytes of memory, items of weak containers, what a thread or
    a context sees.
    """
    if not answers(value):
        return None
    if isinstance(value, (np.ndarray, memoryview)):
        return text_of(np.asarray(value))
    if isinstance(value, random.Random):
        return text_of(value.getstate())
    if isinstance(value, _WEAK):
        items = [*value.items()] if hasattr(value, "items") else [*value]
        return repr(sorted(map(repr, map(_parts_text, items))))
    if isinstance(value, threading.local):
        return repr(_parts_text([*vars(value).items()]))
    if isinstance(value, contextvars.ContextVar):
        return repr(_parts_text((value.get(None),)))
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return None if frame is None else repr((frame.f_lasti, _parts_text([*frame.f_locals.items()])))
    reduce = next(vars(cls)["__reduce__"] for cls in type(value).__mro__ if "__reduce__" in vars(cls))
    if type(reduce) is not types.MethodDescriptorType or reduce is object.__reduce__:
        return None  # Python code, or nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr([_parts_text(part) for part in reduce(value)[1:]])
    except Exception:  # it cannot be asked
        return None


def _parts_text(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_parts_text(part) for part in value]
    return describe_value(value) or class_name(type(value))
