"""Walk a live model and list all that makes it what it is: tensors, ties, values, classes.

Everything that Python can reach from the model is visited: parameters, buffers, plain attributes,
containers, helper objects that modules own (attention backends, kernels, quantization methods), slots,
what functions captured, arguments of `functools.partial`, hooks, what was hung on tensors, and modules
that live in any of these. Plain values are noted as canonical text (values.py), objects by their class,
so that two trees can be compared. The walk is deterministic; an object met again is noted by where it was
first met.
"""

from __future__ import annotations

import array
import collections
import functools
import hashlib
import itertools
import random
import sys
import types
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import TensorKind
from vllm_companion_plugin.tree.values import MAY_BE_PLAIN, class_name, text_of

MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
"""What PyTorch keeps in every module for itself: tables of parameters, buffers, children and hooks."""
_HOOKS = tuple(sorted(name for name, value in nn.Module().__dict__.items() if name.endswith("hooks")))
_SIMPLE = frozenset((bool, int, float, str, type(None)))
_MAX_DEPTH = 48
"""Deeper objects are no state of a model: nothing in vLLM is half as deep."""

# Objects of these packages, and of classes made from theirs, are noted by their class alone. They are shared
# infrastructure: an engine's configuration (its flags are its own), tokenizers and processors, process groups, loggers,
# locks, handles of the driver. What they hold is the same for every model of an engine, or belongs to the process.
_OPAQUE = (
    "torch",
    "transformers.feature_extraction_utils",
    "transformers.image_processing_base",
    "transformers.processing_utils",
    "transformers.tokenization_utils_base",
    "transformers.video_processing_utils",
    "vllm.config",
    "vllm.distributed",
    "logging",
    "threading",
    "_thread",
    "numpy",
    "pydantic",
    "asyncio",
    "concurrent",
    "weakref",
)
_LEAVES = (type, types.ModuleType, types.CodeType, types.FrameType)
MUTABLE: frozenset[type] = frozenset(
    (
        *(list, dict, set, bytearray, array.array, itertools.count, types.SimpleNamespace, random.Random),
        *(collections.deque, collections.OrderedDict, collections.defaultdict, torch.Generator),
        *(np.ndarray, np.random.RandomState, np.random.Generator),
    )
)
"""Plain values of these types can be changed in place."""
_PLAIN_CONTAINERS = frozenset((dict, list, tuple, collections.deque, set, frozenset, collections.OrderedDict))
_HOLDERS = (dict, list, collections.deque)
_CONTAINERS = (*_HOLDERS, tuple, set, frozenset)
_WEAK = frozenset((weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType))
_OURS = __name__.partition(".")[0] + "."
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


NO_PARAMETER = "no parameter"
NO_BUFFER = "no buffer"
"""Texts of names that a module keeps for a tensor and that hold none."""


@dataclass(slots=True)
class LiveSlot:
    """A tensor and the place it was found. `module` is the index of its module; `holder` has the tensor as `key`."""

    name: str
    kind: TensorKind
    tensor: torch.Tensor
    module: int
    holder: Any = None
    key: Any = None


@dataclass(slots=True)
class LiveModule:
    """One module object with what was found in it."""

    module: nn.Module
    path: str
    aliases: list[str] = field(default_factory=list)
    slots: list[LiveSlot] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Place:
    """Where a value lives, to be changed. `steps` lead to it: each a holder and the key in it, the outermost first."""

    steps: tuple[tuple[Any, Any], ...]
    value: Any

    def set(self, value: Any) -> None:
        """Put `value` here. Raises `TypeError` or `AttributeError` where nothing can be put."""
        for holder, key in reversed(self.steps):
            if not isinstance(holder, tuple):
                _set_item(holder, key, value)
                return
            items = (*holder[:key], value, *holder[key + 1 :])
            value = items if type(holder) is tuple else tuple.__new__(type(holder), items)
        raise TypeError("it is a part of nothing that can be changed")

    def delete(self) -> None:
        """Remove what is here. Raises `TypeError` or `AttributeError` where nothing can be removed."""
        holder, key = self.steps[-1]
        if isinstance(holder, dict):
            del holder[key]
        elif isinstance(holder, (list, tuple, collections.deque, types.CellType, functools.partial)):
            raise TypeError(f"a {type(holder).__name__} cannot do without it")
        else:
            object.__delattr__(holder, key)


def _set_item(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, (dict, list, collections.deque)):
        holder[key] = value
    elif isinstance(holder, types.CellType):
        holder.cell_contents = value
    elif isinstance(holder, functools.partial):
        holder.__setstate__((holder.func, value, holder.keywords, vars(holder)))  # type: ignore[attr-defined]
    else:
        object.__setattr__(holder, key, value)


@dataclass(slots=True)
class Tree:
    """A captured model: live references, to be described, packed or rebound.

    Attributes:
        opaque: objects that are noted by their class alone, by module and name: whether one was replaced by
            another can be known by nothing but the object.
        mutable: plain values that can be changed in place, by module and name.
        orders: texts of the keys of dicts that hold more than plain values, in their order, by module and name.
        places: of what was asked for.
        classes: classes of all objects that were met, besides modules.
        hung: what was hung on tensors, as `tensor_attributes` says it, by id of the tensor.
    """

    modules: list[LiveModule]
    opaque: dict[tuple[int, str], Any] = field(default_factory=dict)
    mutable: dict[tuple[int, str], Any] = field(default_factory=dict)
    orders: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)
    places: dict[tuple[int, str], Place] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    hung: dict[int, dict[str, str]] = field(default_factory=dict)

    def slots(self) -> Iterator[LiveSlot]:
        for module in self.modules:
            yield from module.slots

    def describe(self, slot: LiveSlot) -> str:
        """The full name of a slot, for messages."""
        return full_name(self.modules[slot.module].path, slot.name)


def full_name(path: str, name: str) -> str:
    """How a message names something in a module."""
    return f"{path}.{name}" if path else name


def capture(model: nn.Module, *, wanted: Mapping[str, Collection[str]] | None = None) -> Tree:
    """The tree of `model`, in the order of `named_modules`. Reads no tensor data.

    Args:
        wanted: names of values by path of their module, whose places are wanted to change them.
    """
    by_id: dict[int, LiveModule] = {}
    for path, module in named_modules(model):
        known = by_id.get(id(module))
        if known is None:
            by_id[id(module)] = LiveModule(module, path)
        else:
            known.aliases.append(path)
    tree = Tree(list(by_id.values()))
    walk = _Walk(tree, by_id, wanted)
    for index, live in enumerate(tree.modules):
        walk.named_module(live, index)
    tree.classes = walk.classes()
    return tree


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `model.named_modules(remove_duplicate=False)` gives, without a generator a level.

    Raises:
        RecursionError: a module is inside of itself.
    """
    deepest = sys.getrecursionlimit()
    waiting: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    while waiting:
        path, module, depth = waiting.pop()
        if depth > deepest:
            raise RecursionError("a module is inside of itself")
        if type(module).named_modules is not nn.Module.named_modules:  # it has its own names
            yield from module.named_modules(prefix=path, remove_duplicate=False)
            continue
        yield path, module
        if children := module._modules:
            start = f"{path}." if path else ""
            depth += 1
            waiting += [(start + name, child, depth) for name, child in reversed(children.items()) if child is not None]


def plain_tensors() -> AbstractContextManager[None]:
    """While open, tensors of any class answer like plain ones: vLLM's parameters take a way through Python for it.

    https://docs.pytorch.org/docs/stable/notes/extending.html
    """
    plain: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return plain


def describe_value(value: Any) -> str | None:
    """Canonical text of a plain value, a class or a function; None for everything else."""
    text = text_of(value)
    if text is not None:
        return text
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if isinstance(value, functools.partial):
        return f"partial of {describe_value(value.func)}"
    if isinstance(value, types.MethodType):
        return f"method {value.__module__}.{value.__qualname__}{_local_code(value.__func__)}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return f"function {value.__module__}.{value.__qualname__}{_local_code(value)}"
    return None


def _local_code(function: Any) -> str:
    """What tells functions of one name apart, which another function makes; nothing for other functions."""
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
    """What was hung on a tensor, as canonical text."""
    return {name: describe_value(value) or class_name(type(value)) for name, value in tensor.__dict__.items()}


@functools.cache
def _is_opaque(cls: Any) -> bool:
    assert isinstance(cls, type)
    return any(
        module == package or module.startswith(f"{package}.")
        for module in (getattr(base, "__module__", None) or "" for base in cls.__mro__)
        for package in _OPAQUE
    )


@functools.cache
def _slot_members(cls: Any) -> tuple[tuple[str, Any], ...]:
    """What objects of `cls` hold outside their dictionary: names and descriptors."""
    assert isinstance(cls, type)
    return tuple(
        (name, member)
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


class _Kind(Enum):
    """What a class alone says of its objects: a model has some hundred classes and a hundred thousand objects."""

    SIMPLE = "its text is its `repr`"
    CONSTANT = "there is one of it, with one text"
    FUNCTION = "code, and what it takes along"
    OBJECT = "state behind attributes and slots, no value and no container"
    OPAQUE = "noted by its class alone"
    OTHER = "to be looked at"


@functools.cache
def _kind(cls: Any) -> _Kind:
    if cls in _SIMPLE:
        return _Kind.SIMPLE
    if issubclass(cls, (type, torch.dtype, Enum)):
        return _Kind.CONSTANT
    if issubclass(cls, _FUNCTIONS):
        return _Kind.FUNCTION
    if issubclass(cls, (torch.Tensor, nn.Module, np.ndarray, *_LEAVES, *_CONTAINERS, *MAY_BE_PLAIN)):
        return _Kind.OTHER
    return _Kind.OPAQUE if _is_opaque(cls) else _Kind.OBJECT


class _Walk:
    """One walk over a tree; remembers the objects it has met."""

    def __init__(
        self,
        tree: Tree,
        named: Mapping[int, LiveModule],
        wanted: Mapping[str, Collection[str]] | None,
    ) -> None:
        self._tree = tree
        self._named = named
        self._wanted = wanted
        # Object id to where it was first met. Objects are kept alive by the model meanwhile.
        self._met: dict[int, str] = {}
        self._kinds: dict[type, _Kind] = {}
        # By id, with what keeps the id valid.
        self._texts: dict[int, tuple[Any, str]] = {}
        self._steps: list[tuple[Any, Any]] = []

    def classes(self) -> list[type]:
        return [cls for cls, kind in self._kinds.items() if kind is _Kind.OBJECT]

    def named_module(self, live: LiveModule, index: int) -> None:
        self._module(live, index, "", live.module, 0)

    def _module(self, live: LiveModule, index: int, prefix: str, module: nn.Module, depth: int) -> None:
        attributes = live.attributes
        own = module.__dict__
        for name, parameter in own["_parameters"].items():
            if parameter is None:
                attributes[prefix + name] = NO_PARAMETER
            else:
                self._tensor(
                    live, index, prefix + name, TensorKind.PARAMETER, parameter, module._parameters, name, depth
                )
        for name, buffer in own["_buffers"].items():
            if buffer is None:
                attributes[prefix + name] = NO_BUFFER
                continue
            transient = name in module._non_persistent_buffers_set
            kind = TensorKind.NON_PERSISTENT_BUFFER if transient else TensorKind.BUFFER
            self._tensor(live, index, prefix + name, kind, buffer, module._buffers, name, depth)
        self._attributes(live, index, prefix, own, own, depth, without=MODULE_INTERNALS)
        cls: Any = type(module)
        if members := _slot_members(cls):
            self._members(live, index, prefix, module, members, depth)
        for name in _HOOKS:
            if hooks := own.get(name):  # by position: keys are numbers that the process counts
                for position, (key, hook) in enumerate(hooks.items()):
                    self._value(live, index, f"{prefix}{name}[{position}]", hook, hooks, key, depth)

    def _attributes(
        self,
        live: LiveModule,
        index: int,
        prefix: str,
        own: dict[str, Any],
        holder: Any,
        depth: int,
        without: frozenset[str] = frozenset(),
    ) -> None:
        """All of a dictionary of attributes. Most are numbers, names and flags, which need no look of their own."""
        simple, attributes = _SIMPLE if self._wanted is None else (), live.attributes
        for name, value in list(own.items()):
            if name in without:
                continue
            if type(value) in simple:
                attributes[prefix + name] = repr(value)
            else:
                self._value(live, index, prefix + name, value, holder, name, depth)

    def _members(
        self, live: LiveModule, index: int, prefix: str, value: Any, members: tuple[tuple[str, Any], ...], depth: int
    ) -> bool:
        """What is behind the slots of `value`. Returns whether there is anything."""
        found = False
        for name, member in members:
            try:
                item = member.__get__(value)
            except AttributeError:  # nothing was put there yet
                continue
            found = True
            self._value(live, index, f"{prefix}{name}", item, value, name, depth)
        return found

    def _tensor(
        self,
        live: LiveModule,
        index: int,
        path: str,
        kind: TensorKind,
        tensor: torch.Tensor,
        holder: Any,
        key: Any,
        depth: int,
    ) -> None:
        live.slots.append(LiveSlot(path, kind, tensor, index, holder, key))
        hung = tensor.__dict__
        if hung and id(tensor) not in self._met:
            self._met[id(tensor)] = path
            texts = self._tree.hung[id(tensor)] = {}
            for name, value in list(hung.items()):
                text = self._text(value)
                texts[name] = class_name(type(value)) if text is None else text
                if text is None:  # the others are noted with the tensor
                    self._value(live, index, f"{path}.{name}", value, hung, name, depth + 1)

    def _text(self, value: Any) -> str | None:
        """What `describe_value` says, and of functions only once each: every tensor of a model may have some."""
        kind = type(value)
        if kind in _SIMPLE:
            return repr(value)
        if kind is types.MethodType and type(value.__func__) is types.FunctionType:
            return "method" + self._text_once(value.__func__).removeprefix("function")
        return self._text_once(value) if kind is types.FunctionType else describe_value(value)

    def _text_once(self, value: Any) -> str:
        known = self._texts.get(id(value))
        if known is None:
            known = self._texts[id(value)] = value, describe_value(value) or ""
        return known[1]

    def _value(self, live: LiveModule, index: int, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if self._wanted is None:
            self._note(live, index, path, value, holder, key, depth)
            return
        self._steps.append((holder, key))
        if path in self._wanted.get(live.path, ()):
            self._tree.places[index, path] = Place(tuple(self._steps), value)
        self._note(live, index, path, value, holder, key, depth)
        self._steps.pop()

    def _note(self, live: LiveModule, index: int, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        cls: Any = type(value)
        if cls in _WEAK:  # what it leads to may be gone: it can be asked for nothing
            live.attributes[path] = class_name(cls)
            self._tree.opaque[index, path] = value
            return
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = _kind(cls)
        if getattr(value, "__class__", cls) is not cls:  # it stands for something else
            kind = _Kind.OTHER
        if kind is _Kind.SIMPLE:
            text = repr(value)
        elif kind is _Kind.CONSTANT:
            text = self._text_once(value)
        elif kind is _Kind.OBJECT or kind is _Kind.OPAQUE:
            text = self._object(live, index, path, value, depth, is_opaque=kind is _Kind.OPAQUE)
        elif isinstance(value, torch.Tensor):
            self._tensor(live, index, path, TensorKind.ATTRIBUTE, value, holder, key, depth)
            return
        elif kind is _Kind.FUNCTION or isinstance(value, _FUNCTIONS):
            if isinstance(value, types.FunctionType) and value.__module__.startswith(_OURS):
                return  # it hangs there while we watch the model, and is none of it
            text = self._text(value) or ""
            self._function(live, index, path, value, depth)
        else:
            known = describe_value(value)
            if known is not None and cls in MUTABLE:
                self._tree.mutable[index, path] = value
            text = self._compound(live, index, path, value, depth) if known is None else known
        live.attributes[path] = text

    def _object(self, live: LiveModule, index: int, path: str, value: Any, depth: int, *, is_opaque: bool) -> str:
        name = class_name(type(value))
        if depth >= _MAX_DEPTH:
            return name
        first = self._first(live, path, value)
        if first is not None:
            return f"{name} @{first}"
        if is_opaque:
            self._tree.opaque[index, path] = value
        else:
            self._insides(live, index, path, value, depth)
        return name

    def _compound(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> str:
        cls: Any = type(value)
        name = class_name(cls)
        if isinstance(value, nn.Module):
            if (known := self._named.get(id(value))) is not None:
                return f"{name} @{known.path}:"
            first = self._first(live, path, value)
            if first is None:
                self._inner_module(live, index, path, value, depth + 1)
            return name if first is None else f"{name} @{first}"
        if isinstance(value, _LEAVES) or depth >= _MAX_DEPTH:
            return name
        first = self._first(live, path, value)
        if first is not None:
            return name if isinstance(value, (tuple, frozenset)) else f"{name} @{first}"
        if isinstance(value, _CONTAINERS):
            self._items(live, index, path, value, depth)
            if cls not in _PLAIN_CONTAINERS:
                self._insides(live, index, path, value, depth)
            return f"{name} of {len(value)}"
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            for position, item in enumerate(value.flat):
                self._value(live, index, f"{path}[{position}]", item, None, "", depth + 1)
            return f"{name} of {value.shape}"
        if isinstance(value, (str, bytes, int, float)):  # with attributes of its own
            self._insides(live, index, path, value, depth)
            base = next(base for base in (str, bytes, int, float) if isinstance(value, base))
            return f"{name} {base.__repr__(value)}"
        if _is_opaque(cls):
            self._tree.opaque[index, path] = value
            return name
        self._insides(live, index, path, value, depth)
        return name

    def _items(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            items = list(value.items())
            texts = key_texts(key for key, _ in items)
            self._tree.orders[index, path] = tuple(texts)
            for text, (item_key, item) in zip(texts, items, strict=True):
                self._value(live, index, f"{path}[{text}]", item, value, item_key, depth + 1)
        elif isinstance(value, (set, frozenset)):
            for position, item in enumerate(_in_order(value)):
                self._value(live, index, f"{path}{{{position}}}", item, None, "", depth + 1)
        else:
            for position, item in enumerate(value):
                self._value(live, index, f"{path}[{position}]", item, value, position, depth + 1)

    def _insides(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> None:
        own = _dictionary(value)
        holder = own if isinstance(value, _HOLDERS) else value  # their items are set otherwise than their attributes
        prefix = f"{path}."
        self._attributes(live, index, prefix, own, holder, depth + 1)
        cls: Any = type(value)
        members = _slot_members(cls)
        found = self._members(live, index, prefix, value, members, depth + 1) if members else False
        if not own and not found and not isinstance(value, _CONTAINERS):
            self._tree.opaque[index, path] = value

    def _inner_module(self, live: LiveModule, index: int, path: str, module: nn.Module, depth: int) -> None:
        """A module that is no child of another one: a container or a helper object holds it."""
        self._module(live, index, f"{path}.", module, depth)
        for name, child in module._modules.items():
            if child is not None:
                self._value(live, index, f"{path}.{name}", child, module._modules, name, depth + 1)

    def _function(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> None:
        """What a function takes along: captured values, defaults, arguments, the object of a method."""
        if depth >= _MAX_DEPTH or self._first(live, path, value) is not None:
            return
        if isinstance(value, functools.partial):
            self._value(live, index, f"{path}.func", value.func, None, "", depth + 1)
            self._value(live, index, f"{path}.args", value.args, value, "args", depth + 1)
            for key, item in value.keywords.items():
                self._value(live, index, f"{path}.keywords[{key!r}]", item, value.keywords, key, depth + 1)
        elif isinstance(value, types.MethodType):
            self._value(live, index, f"{path}.__self__", value.__self__, None, "", depth + 1)
            self._function(live, index, f"{path}.__func__", value.__func__, depth + 1)
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                try:
                    item = cell.cell_contents
                except ValueError:  # a variable that was deleted, or not set yet
                    continue
                self._value(live, index, f"{path}.__closure__[{name!r}]", item, cell, 0, depth + 1)
            for name in ("__defaults__", "__kwdefaults__"):
                if getattr(value, name):
                    self._value(live, index, f"{path}.{name}", getattr(value, name), value, name, depth + 1)
            for key, item in value.__dict__.items():
                self._value(live, index, f"{path}.{key}", item, value.__dict__, key, depth + 1)
        elif isinstance(value.__self__, torch.Tensor) or not isinstance(value.__self__, _LEAVES):
            self._value(live, index, f"{path}.__self__", value.__self__, None, "", depth + 1)

    def _first(self, live: LiveModule, path: str, value: Any) -> str | None:
        """Where `value` was met before; None for the first time."""
        here = f"{live.path}:{path}"
        first = self._met.setdefault(id(value), here)
        return None if first is here else first


def key_texts(keys: Iterable[Any]) -> list[str]:
    """Texts that tell the keys of one dict apart, in their order."""
    found = []
    alike: collections.Counter[str] = collections.Counter()
    for key in keys:
        text = describe_value(key) or class_name(type(key))
        alike[text] += 1
        found.append(text if alike[text] == 1 else f"{text} {alike[text]}")  # objects of one class as keys
    return found


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Parts of a set in an order that does not depend on addresses, as far as they can be told apart."""

    def text(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {tuple(value.shape)}"
        held = [f"{name}={text_of(item)}" for name, item in sorted(_dictionary(value).items())]
        return describe_value(value) or f"{class_name(type(value))} {held}"

    return sorted(values, key=text)


def _dictionary(value: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}
