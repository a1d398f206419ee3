"""What the walk of a model (capture.py) does with the objects of a class, as far as the class alone says it."""

from __future__ import annotations

import array
import collections
import functools
import itertools
import random
import types
import weakref
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.tree.values import MAY_BE_PLAIN

_SIMPLE = frozenset((bool, int, float, str, type(None)))
# Objects of these packages, and of classes made from theirs, are noted by their class alone. They are shared
# infrastructure: an engine's configuration (its flags are its own), tokenizers and processors, process groups, loggers.
# What they hold is the same for every model of an engine, or belongs to the process.
_OPAQUE = (
    "transformers.feature_extraction_utils",
    "transformers.image_processing_base",
    "transformers.processing_utils",
    "transformers.tokenization_utils_base",
    "transformers.video_processing_utils",
    "vllm.config",
    "vllm.distributed",
    "logging",
    "asyncio",
    "concurrent",
)
# So are objects of these packages: locks, handles of the driver. What other code makes from their classes has its own
# attributes beside.
OPAQUE_THEMSELVES = ("torch", "threading", "_thread", "numpy", "pydantic", "weakref")
LEAVES = (type, types.ModuleType, types.CodeType, types.FrameType)
MUTABLE: frozenset[type] = frozenset(
    (
        *(list, dict, set, bytearray, array.array, itertools.count, types.SimpleNamespace, random.Random),
        *(collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter, torch.Generator),
        *(np.ndarray, np.random.RandomState, np.random.Generator),
    )
)
"""Plain values of these types can be changed in place."""
PLAIN_CONTAINERS = frozenset((dict, list, tuple, collections.deque, set, frozenset, collections.OrderedDict))
HOLDERS = (dict, list, collections.deque)
CONTAINERS = (*HOLDERS, tuple, set, frozenset)
_WEAK = frozenset((weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType))
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_PLAIN_ANSWERS = frozenset(cls.__getattribute__ for cls in (object, type, torch.dtype, *FUNCTIONS))
"""The ways to look up an attribute that run no code of a class."""


@functools.cache
def is_opaque(cls: Any) -> bool:
    assert isinstance(cls, type)
    modules = [getattr(base, "__module__", None) or "" for base in cls.__mro__]
    if any(module == package or module.startswith(f"{package}.") for module in modules for package in _OPAQUE):
        return True
    tops = [module.partition(".")[0] for module in modules]
    return tops[0] in (*OPAQUE_THEMSELVES, "vllm") and any(top in OPAQUE_THEMSELVES for top in tops)


@functools.cache
def slot_members(cls: Any) -> tuple[tuple[str, Any], ...]:
    """Names and descriptors of what objects of `cls` hold outside their dictionary."""
    assert isinstance(cls, type)
    return tuple(
        (name, member)
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


@functools.cache
def has_state_of_c(cls: Any) -> bool:
    """Whether objects of `cls` hold what no attribute, slot or item shows, as a class made in C may let them."""
    assert isinstance(cls, type)
    bases = (base for base in cls.__mro__ if base not in _SHOWN)
    return any(base.__basicsize__ > object.__basicsize__ and _is_of_c(base) for base in bases)


_SHOWN = frozenset((*CONTAINERS, collections.OrderedDict, collections.defaultdict, str, bytes, int, float))


def _is_of_c(cls: type) -> bool:
    """Whether `cls` was made in C, which shows in its methods. Python itself makes slots, and these two, so."""
    slots = vars(cls).get("__slots__", ())
    of_python = {"__dict__", "__weakref__", *((slots,) if isinstance(slots, str) else slots)}
    parts = (part for name, part in vars(cls).items() if name not in of_python)
    return any(isinstance(part, _OF_C) and part.__objclass__ is cls for part in parts)


_OF_C = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)


class Kind(Enum):
    """How to take note of the objects of a class. A model has some hundred classes and a hundred thousand objects."""

    EXACT = "the text is the `repr`, and many modules have the same"
    SIMPLE = "the text is the `repr`; a float 0.0 equals -0.0, and many strings are names of one module"
    CONSTANT = "there is one of it, with one text"
    MEMBER = "of an enum: there is one of it, with one text, and it may have attributes"
    FUNCTION = "code, and what it takes along"
    ITEMS = "a list or a tuple"
    TENSOR = "a tensor that needs no further look"
    OBJECT = "state behind attributes and slots, no value and no container"
    OPAQUE = "noted by its class alone"
    WEAK = "what it leads to may be gone, so it can be asked for nothing"
    OTHER = "to be looked at"


@functools.cache
def kind_of(cls: Any) -> Kind:
    if cls in _SIMPLE:
        return Kind.SIMPLE if cls is float or cls is str else Kind.EXACT
    if cls in _WEAK:
        return Kind.WEAK
    if cls is list or cls is tuple:
        return Kind.ITEMS
    if not _is_what_it_says(cls):
        return Kind.OTHER
    if issubclass(cls, (type, torch.dtype)):
        return Kind.CONSTANT
    if issubclass(cls, Enum):
        return Kind.MEMBER
    if issubclass(cls, FUNCTIONS):
        return Kind.FUNCTION
    if issubclass(cls, torch.Tensor):
        return Kind.TENSOR
    if issubclass(cls, (nn.Module, np.ndarray, *LEAVES, *CONTAINERS, *MAY_BE_PLAIN)):
        return Kind.OTHER
    return Kind.OPAQUE if is_opaque(cls) else Kind.OBJECT


def _is_what_it_says(cls: Any) -> bool:
    """Whether `__class__` of each object of `cls` is `cls`. Proxies and mocks stand for something else."""
    asked, answer = (
        next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        for name in ("__class__", "__getattribute__")
    )
    return asked is vars(object)["__class__"] and answer in _PLAIN_ANSWERS


def base_of(value: Any) -> Any:
    """The built-in class of a container, whose methods run no code of the container's own class."""
    return next(base for base in CONTAINERS if isinstance(value, base))
