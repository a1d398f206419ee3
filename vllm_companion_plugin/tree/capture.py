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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import TensorKind
from vllm_companion_plugin.tree.values import MAY_BE_PLAIN, class_name, is_literal, text_of

MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
"""Names of what PyTorch keeps in every module for itself: tables of parameters, buffers, children and hooks."""
_HOOKS = tuple(sorted(name for name, value in nn.Module().__dict__.items() if name.endswith("hooks")))
_SIMPLE = frozenset((bool, int, float, str, type(None)))
_MAX_DEPTH = 48
"""The walk goes no deeper: nothing in vLLM is half as deep."""

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
_OPAQUE_THEMSELVES = ("torch", "threading", "_thread", "numpy", "pydantic", "weakref")
_LEAVES = (type, types.ModuleType, types.CodeType, types.FrameType)
MUTABLE: frozenset[type] = frozenset(
    (
        *(list, dict, set, bytearray, array.array, itertools.count, types.SimpleNamespace, random.Random),
        *(collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter, torch.Generator),
        *(np.ndarray, np.random.RandomState, np.random.Generator),
    )
)
"""Plain values of these types can be changed in place."""
_PLAIN_CONTAINERS = frozenset((dict, list, tuple, collections.deque, set, frozenset, collections.OrderedDict))
_HOLDERS = (dict, list, collections.deque)
_CONTAINERS = (*_HOLDERS, tuple, set, frozenset)
_WEAK = frozenset((weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType))
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_PLAIN_ANSWERS = frozenset(cls.__getattribute__ for cls in (object, type, torch.dtype, *_FUNCTIONS))
"""The ways to look up an attribute that run no code of a class."""
_OURS = __name__.partition(".")[0] + "."


_PARAMETER, _BUFFER = TensorKind.PARAMETER, TensorKind.BUFFER
_NON_PERSISTENT_BUFFER, _ATTRIBUTE = TensorKind.NON_PERSISTENT_BUFFER, TensorKind.ATTRIBUTE
# The attribute of an enum takes Python 3.11 as long as two calls.

NO_PARAMETER = "no parameter"
NO_BUFFER = "no buffer"
"""The text of a name that a module keeps for a tensor, if there is no tensor."""


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
    index: int
    aliases: list[str] = field(default_factory=list)
    slots: list[LiveSlot] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Place:
    """Where a value lives, so that it can be changed.

    Attributes:
        steps: the way to the value, the outermost step first; each step is a holder and the key in it.
    """

    steps: tuple[tuple[Any, Any], ...]
    value: Any

    def set(self, value: Any) -> None:
        """Put `value` here. Raises `TypeError` or `AttributeError` if nothing can be put here."""
        for holder, key in reversed(self.steps):
            if not isinstance(holder, tuple):
                _set_item(holder, key, value)
                return
            items = (*holder[:key], value, *holder[key + 1 :])
            value = items if type(holder) is tuple else tuple.__new__(type(holder), items)
        raise TypeError("it is a part of nothing that can be changed")

    def delete(self) -> None:
        """Remove what is here. Raises `TypeError` or `AttributeError` if nothing can be removed here."""
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
        opaque: objects that are noted by their class alone, by module and name. Only the object itself shows whether
            another one has replaced it.
        mutable: plain values that can be changed in place, by module and name.
        orders: texts of the keys of dicts that hold more than plain values, in their order, by module and name.
        places: where the wanted values live, by module and name.
        classes: the classes of all objects that the walk looked into, besides modules, and all enums.
        hung: what was hung on tensors, as `tensor_attributes` says it, by id of the tensor.
        met: where each object was met first (path of the module, name), by its id. The model keeps objects alive.
    """

    modules: list[LiveModule]
    opaque: dict[tuple[int, str], Any] = field(default_factory=dict)
    mutable: dict[tuple[int, str], Any] = field(default_factory=dict)
    orders: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)
    places: dict[tuple[int, str], Place] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    hung: dict[int, dict[str, str]] = field(default_factory=dict)
    met: dict[int, tuple[str, str]] = field(default_factory=dict)

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
            by_id[id(module)] = LiveModule(module, path, len(by_id))
        else:
            known.aliases.append(path)
    tree = Tree(list(by_id.values()))
    walk = _Walk(tree, by_id, wanted)
    for live in tree.modules:
        walk.named_module(live)
    tree.classes = walk.classes()
    return tree


def capture_values(held: Iterable[tuple[str, Mapping[str, Any]]], known: Tree) -> Tree:
    """A tree of what is behind values of others, without what is in `known`.

    Args:
        held: names for who holds values, and these by name. Each is a "module" of the result, whose path is the name.
    """
    tree = Tree([], met=known.met.copy())
    walk = _Walk(tree, {id(live.module): live for live in known.modules}, None)
    for path, values in held:
        live = LiveModule(_NOBODY, path, len(tree.modules))
        tree.modules.append(live)
        walk.values(live, values)
    return tree


_NOBODY = nn.Module()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same as `model.named_modules(remove_duplicate=False)`, without one generator for each level.

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
    """While open, tensors of any class answer like plain ones. Else vLLM's parameters run Python code for each answer.

    https://docs.pytorch.org/docs/stable/notes/extending.html
    """
    plain: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return plain


def describe_value(value: Any) -> str | None:
    """Canonical text of a plain value, a class or a function; None for everything else."""
    text = text_of(value)
    if text is not None:
        return text
    kind = type(value)  # a proxy may have no answer for whoever asks for its class
    if issubclass(kind, type):
        return f"class {class_name(value)}"
    if issubclass(kind, functools.partial):
        return f"partial of {describe_value(value.func)}"
    if issubclass(kind, types.MethodType):
        return f"method {value.__module__}.{value.__qualname__}{_local_code(value.__func__)}"
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


@functools.cache
def is_opaque(cls: Any) -> bool:
    assert isinstance(cls, type)
    modules = [getattr(base, "__module__", None) or "" for base in cls.__mro__]
    if any(module == package or module.startswith(f"{package}.") for module in modules for package in _OPAQUE):
        return True
    tops = [module.partition(".")[0] for module in modules]
    return tops[0] in (*_OPAQUE_THEMSELVES, "vllm") and any(top in _OPAQUE_THEMSELVES for top in tops)


@functools.cache
def _slot_members(cls: Any) -> tuple[tuple[str, Any], ...]:
    """Names and descriptors of what objects of `cls` hold outside their dictionary."""
    assert isinstance(cls, type)
    return tuple(
        (name, member)
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


class _Kind(Enum):
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
def _kind(cls: Any) -> _Kind:
    if cls in _SIMPLE:
        return _Kind.SIMPLE if cls is float or cls is str else _Kind.EXACT
    if cls in _WEAK:
        return _Kind.WEAK
    if cls is list or cls is tuple:
        return _Kind.ITEMS
    if not _is_what_it_says(cls):
        return _Kind.OTHER
    if issubclass(cls, (type, torch.dtype)):
        return _Kind.CONSTANT
    if issubclass(cls, Enum):
        return _Kind.MEMBER
    if issubclass(cls, _FUNCTIONS):
        return _Kind.FUNCTION
    if issubclass(cls, torch.Tensor):
        return _Kind.TENSOR
    if issubclass(cls, (nn.Module, np.ndarray, *_LEAVES, *_CONTAINERS, *MAY_BE_PLAIN)):
        return _Kind.OTHER
    return _Kind.OPAQUE if is_opaque(cls) else _Kind.OBJECT


def _is_what_it_says(cls: Any) -> bool:
    """Whether `__class__` of each object of `cls` is `cls`. Proxies and mocks stand for something else."""
    asked, answer = (
        next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        for name in ("__class__", "__getattribute__")
    )
    return asked is vars(object)["__class__"] and answer in _PLAIN_ANSWERS


_NOTHING: dict[str, str] = {}
_name_of: Callable[[type], str] = functools.cache(class_name)
_Noting = Callable[[LiveModule, str, Any, Any, Any, int], None]
"""Takes note of a value: its module, its name, itself, the object that holds it and by which key, and its depth."""


class _Layout:
    """What dictionaries of attributes have in common if they have the same names and types, at one place in modules.

    Attributes:
        hooks: gives the tables of hooks of a module.
        simple: position, and name with its prefix, of the values whose kind is `SIMPLE`.
        others: position, name with its prefix, name, and what takes note of it, of all other values.
    """

    __slots__ = ("_exact", "_positions", "_texts", "hooks", "others", "simple")

    def __init__(
        self,
        prefix: str,
        names: tuple[Any, ...],
        types: tuple[type, ...],
        without: frozenset[str],
        noting: Callable[[type], _Noting],
    ) -> None:
        self._exact: list[tuple[int, str]] = []
        self.simple: list[tuple[int, str]] = []
        self.others: list[tuple[int, str, str, _Noting]] = []
        self._texts: dict[Any, dict[str, str]] = {}
        for position, (name, cls) in enumerate(zip(names, types, strict=True)):
            if name in without:
                continue
            kind = _kind(cls)
            if kind is _Kind.EXACT:
                self._exact.append((position, prefix + name))
            elif kind is _Kind.SIMPLE:
                self.simple.append((position, prefix + name))
            else:
                self.others.append((position, prefix + name, name, noting(cls)))
        self._positions = itemgetter(*(position for position, _ in self._exact)) if self._exact else None
        hooks = [position for position, name in enumerate(names) if name in _HOOKS and name in without]
        self.hooks = itemgetter(*hooks) if len(hooks) > 1 else None

    def texts_of_exact(self, values: tuple[Any, ...]) -> dict[str, str]:
        """The texts of those `values` whose kind is `EXACT`. Equal values are written once."""
        if self._positions is None:
            return _NOTHING
        exact = self._positions(values)
        texts = self._texts.get(exact)
        if texts is None:
            texts = self._texts[exact] = {name: repr(values[position]) for position, name in self._exact}
        return texts


class _Walk:
    """One walk over a tree, which remembers the objects that it has met."""

    def __init__(
        self,
        tree: Tree,
        named: Mapping[int, LiveModule],
        wanted: Mapping[str, Collection[str]] | None,
    ) -> None:
        self._tree = tree
        self._named = named
        self._wanted = wanted
        self._met = tree.met
        self._noting: dict[type, _Noting] = {}
        self._classes: dict[type, None] = {}
        self._layouts: dict[tuple[str, tuple[Any, ...], tuple[type, ...]], _Layout] = {}
        # By id, with what keeps the id valid.
        self._texts: dict[int, tuple[Any, str]] = {}
        self._steps: list[tuple[Any, Any]] = []

    def classes(self) -> list[type]:
        """As of `Tree`."""
        return list(self._classes)

    def values(self, live: LiveModule, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._value(live, name, value, None, name, 0)

    def named_module(self, live: LiveModule) -> None:
        self._module(live, "", live.module, 0)

    def _module(self, live: LiveModule, prefix: str, module: nn.Module, depth: int) -> None:
        own = module.__dict__
        parameters, buffers, transient = own["_parameters"], own["_buffers"], own["_non_persistent_buffers_set"]
        free: list[tuple[str, str]] = []
        for name, parameter in parameters.items():
            if parameter is None:
                free.append((prefix + name, NO_PARAMETER))
            else:
                self._tensor(live, prefix + name, parameter, parameters, name, depth, _PARAMETER)
        for name, buffer in buffers.items():
            if buffer is None:
                free.append((prefix + name, NO_BUFFER))
            else:
                kind = _NON_PERSISTENT_BUFFER if name in transient else _BUFFER
                self._tensor(live, prefix + name, buffer, buffers, name, depth, kind)
        has_hooks = self._attributes(live, prefix, own, own, depth, without=MODULE_INTERNALS)
        for name, text in free:
            live.attributes[name] = text
        cls: Any = type(module)
        if members := _slot_members(cls):
            self._members(live, prefix, module, members, depth)
        for name in _HOOKS if has_hooks else ():
            if hooks := own.get(name):  # by position: keys are numbers that the process counts
                for position, (key, hook) in enumerate(hooks.items()):
                    self._value(live, f"{prefix}{name}[{position}]", hook, hooks, key, depth)

    def _layout(
        self, prefix: str, own: dict[str, Any], values: tuple[Any, ...], without: frozenset[str] = frozenset()
    ) -> _Layout:
        key = prefix, tuple(own), tuple(map(type, values))
        known = self._layouts.get(key)
        if known is None:
            known = self._layouts[key] = _Layout(*key, without, self._noting_of)
        return known

    def _attributes(
        self,
        live: LiveModule,
        prefix: str,
        own: dict[str, Any],
        holder: Any,
        depth: int,
        without: frozenset[str] = frozenset(),
    ) -> bool:
        """Take note of a whole dictionary of attributes. Returns whether there may be hooks in it."""
        if self._wanted is not None:
            for name, value in list(own.items()):
                if name not in without:
                    self._value(live, prefix + name, value, holder, name, depth)
            return True
        values = tuple(own.values())
        layout = self._layout(prefix, own, values, without)
        attributes = live.attributes
        attributes.update(layout.texts_of_exact(values))  # first: copying into an empty dictionary is fastest
        for position, path in layout.simple:
            attributes[path] = repr(values[position])
        for position, path, name, note in layout.others:
            note(live, path, values[position], holder, name, depth)
        return layout.hooks is None or any(layout.hooks(values))

    def _members(
        self, live: LiveModule, prefix: str, value: Any, members: tuple[tuple[str, Any], ...], depth: int
    ) -> bool:
        """Take note of what is behind the slots of `value`. Returns whether there is anything."""
        found = False
        for name, member in members:
            try:
                item = member.__get__(value)
            except AttributeError:  # nothing was put there yet
                continue
            found = True
            self._value(live, f"{prefix}{name}", item, value, name, depth)
        return found

    def _tensor(
        self,
        live: LiveModule,
        path: str,
        tensor: torch.Tensor,
        holder: Any,
        key: Any,
        depth: int,
        kind: TensorKind = _ATTRIBUTE,
    ) -> None:
        live.slots.append(LiveSlot(path, kind, tensor, live.index, holder, key))
        hung = tensor.__dict__
        if hung and id(tensor) not in self._tree.hung:
            values = tuple(hung.values())
            layout = self._layout("", hung, values)
            texts = self._tree.hung[id(tensor)] = layout.texts_of_exact(values).copy()
            for position, name in layout.simple:
                texts[name] = repr(values[position])
            for position, _, name, _ in layout.others:
                value = values[position]
                text = self._text(value)
                texts[name] = _name_of(type(value)) if text is None else text
                if text is None:  # the others are noted with the tensor
                    self._value(live, f"{path}.{name}", value, hung, name, depth + 1)

    def _text(self, value: Any) -> str | None:
        """The answer of `describe_value`. A function is described once: every tensor of a model may have the same."""
        kind = type(value)
        if kind is types.MethodType and type(value.__func__) is types.FunctionType:
            return "method" + self._text_once(value.__func__)[len("function") :]
        return self._text_once(value) if kind is types.FunctionType else describe_value(value)

    def _text_once(self, value: Any) -> str:
        known = self._texts.get(id(value))
        if known is None:
            known = self._texts[id(value)] = value, describe_value(value) or ""
        return known[1]

    def _value(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        note = self._noting.get(type(value)) or self._noting_of(type(value))
        if self._wanted is None:
            note(live, path, value, holder, key, depth)
            return
        self._steps.append((holder, key))
        if path in self._wanted.get(live.path, ()):
            self._tree.places[live.index, path] = Place(tuple(self._steps), value)
        note(live, path, value, holder, key, depth)
        self._steps.pop()

    def _noting_of(self, cls: Any) -> _Noting:
        """The method that takes note of objects of `cls`."""
        by_kind: dict[_Kind, _Noting] = {
            _Kind.EXACT: self._simple,
            _Kind.SIMPLE: self._simple,
            _Kind.CONSTANT: self._constant,
            _Kind.MEMBER: self._member,
            _Kind.FUNCTION: self._callable,
            _Kind.ITEMS: self._list,
            _Kind.TENSOR: self._tensor,
            _Kind.OBJECT: self._object,
            _Kind.OPAQUE: self._opaque,
            _Kind.WEAK: self._weak,
            _Kind.OTHER: self._other,
        }
        found = self._noting[cls] = by_kind[_kind(cls)]
        return found

    def _simple(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = repr(value)

    def _constant(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = self._text_once(value)

    def _member(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        self._classes[type(value)] = None
        live.attributes[path] = self._text_once(value)

    def _weak(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = _name_of(type(value))
        self._tree.opaque[live.index, path] = value

    def _callable(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if id(value) in self._met:
            live.attributes[path] = self._text_once(value)
        elif not (isinstance(value, types.FunctionType) and value.__module__.startswith(_OURS)):
            live.attributes[path] = self._text_once(value)
            self._function(live, path, value, depth)
        # Ours hangs there while we watch the model, and is none of it.

    def _list(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if is_literal(value):
            live.attributes[path] = repr(value)
            if type(value) is list:
                self._tree.mutable[live.index, path] = value
        else:
            self._other(live, path, value, holder, key, depth)

    def _object(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        cls: Any = type(value)
        name = _name_of(cls)
        if depth < _MAX_DEPTH:
            first = self._first(live, path, value)
            if first is not None:
                name = f"{name} @{first}"
            else:
                self._insides(live, path, value, value, cls, depth)
        live.attributes[path] = name

    def _opaque(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        name = _name_of(type(value))
        if depth < _MAX_DEPTH:
            first = self._first(live, path, value)
            if first is not None:
                name = f"{name} @{first}"
            else:
                self._tree.opaque[live.index, path] = value
        live.attributes[path] = name

    def _other(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if not answers(value):
            self._weak(live, path, value, holder, key, depth)
        elif isinstance(value, torch.Tensor):
            self._tensor(live, path, value, holder, key, depth)
        elif isinstance(value, _FUNCTIONS):
            self._callable(live, path, value, holder, key, depth)
        else:
            text = describe_value(value)
            if text is None:
                text = self._compound(live, path, value, depth)
            elif type(value) in MUTABLE:
                self._tree.mutable[live.index, path] = value
            live.attributes[path] = text

    def _compound(self, live: LiveModule, path: str, value: Any, depth: int) -> str:
        cls: Any = type(value)
        name = class_name(cls)
        if isinstance(value, nn.Module):
            if (known := self._named.get(id(value))) is not None:
                return f"{name} @{known.path}:"
            first = self._first(live, path, value)
            if first is None:
                self._inner_module(live, path, value, depth + 1)
            return name if first is None else f"{name} @{first}"
        if isinstance(value, _LEAVES) or depth >= _MAX_DEPTH:
            return name
        first = self._first(live, path, value)
        if first is not None:
            return name if isinstance(value, (tuple, frozenset)) else f"{name} @{first}"
        if isinstance(value, _CONTAINERS):
            self._items(live, path, value, depth)
            if cls not in _PLAIN_CONTAINERS:
                # The items of a holder are set otherwise than its attributes.
                holder = _dictionary(value) if isinstance(value, _HOLDERS) else value
                self._insides(live, path, value, holder, cls, depth)
            return f"{name} of {_base_of(value).__len__(value)}{_limits(value)}"
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            for position, item in enumerate(value.flat):
                self._value(live, f"{path}[{position}]", item, None, "", depth + 1)
            return f"{name} of {value.shape}"
        if isinstance(value, (str, bytes, int, float)):  # with attributes of its own
            self._insides(live, path, value, value, cls, depth)
            base = next(base for base in (str, bytes, int, float) if isinstance(value, base))
            return f"{name} {base.__repr__(value)}"
        if is_opaque(cls):
            self._tree.opaque[live.index, path] = value
            return name
        self._insides(live, path, value, value, cls, depth)
        return name

    def _items(self, live: LiveModule, path: str, value: Any, depth: int) -> None:
        """Take note of what is in a container, and not of what its class would make for whoever asks for items."""
        if isinstance(value, dict):
            items = list((collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict).items(value))
            texts = key_texts(key for key, _ in items)
            self._tree.orders[live.index, path] = tuple(texts)
            for text, (item_key, item) in zip(texts, items, strict=True):
                self._value(live, f"{path}[{text}]", item, value, item_key, depth + 1)
        elif isinstance(value, (set, frozenset)):
            for position, item in enumerate(self._in_order(_base_of(value).__iter__(value))):
                self._value(live, f"{path}{{{position}}}", item, None, "", depth + 1)
        else:
            for position, item in enumerate(_base_of(value).__iter__(value)):
                self._value(live, f"{path}[{position}]", item, value, position, depth + 1)

    def _in_order(self, values: Iterable[Any]) -> list[Any]:
        """The parts of a set in an order that depends on no address, as far as the parts can be told apart.

        Parts that are alike are told apart by where else in the model they are.
        """

        def text(value: Any) -> tuple[str, tuple[str, str]]:
            if isinstance(value, torch.Tensor):
                return f"{value.dtype} {tuple(value.shape)}", self._tensors.get(id(value), ("", ""))
            held = [f"{name}={text_of(item)}" for name, item in sorted(_dictionary(value).items())]
            whole = describe_value(value) or f"{class_name(type(value))} {held}"
            value = value.__self__ if isinstance(value, types.MethodType) else value  # methods are made when asked for
            module = self._named.get(id(value))
            return whole, self._met.get(id(value), ("", "")) if module is None else (module.path, "")

        return sorted(values, key=text)

    @functools.cached_property
    def _tensors(self) -> dict[int, tuple[str, str]]:
        """Where parameters and buffers are, by id."""
        found: dict[int, tuple[str, str]] = {}
        for live in self._named.values():
            for table in (live.module._parameters, live.module._buffers):
                for name, tensor in table.items():
                    found.setdefault(id(tensor), (live.path, name))
        return found

    def _insides(self, live: LiveModule, path: str, value: Any, holder: Any, cls: Any, depth: int) -> None:
        self._classes[cls] = None
        own, prefix = _dictionary(value), path + "."
        if own:
            self._attributes(live, prefix, own, holder, depth + 1)
        members = _slot_members(cls)
        found = self._members(live, prefix, value, members, depth + 1) if members else False
        if not own and not found and not isinstance(value, _CONTAINERS):
            self._tree.opaque[live.index, path] = value

    def _inner_module(self, live: LiveModule, path: str, module: nn.Module, depth: int) -> None:
        """Take note of a module that a container or a helper object holds, and no other module."""
        self._module(live, f"{path}.", module, depth)
        for name, child in module._modules.items():
            if child is not None:
                self._value(live, f"{path}.{name}", child, module._modules, name, depth + 1)

    def _function(self, live: LiveModule, path: str, value: Any, depth: int) -> None:
        """Take note of what a function takes along: captured values, defaults, arguments, the object of a method."""
        if depth >= _MAX_DEPTH or id(value) in self._met:
            return
        self._met[id(value)] = live.path, path
        depth += 1
        if isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                try:
                    item = cell.cell_contents
                except ValueError:  # a variable that was deleted, or not set yet
                    continue
                self._value(live, f"{path}.__closure__['{name}']", item, cell, 0, depth)
            if value.__defaults__:
                self._value(live, f"{path}.__defaults__", value.__defaults__, value, "__defaults__", depth)
            if value.__kwdefaults__:
                self._value(live, f"{path}.__kwdefaults__", value.__kwdefaults__, value, "__kwdefaults__", depth)
            if own := value.__dict__:
                self._attributes(live, f"{path}.", own, own, depth)
        elif isinstance(value, types.MethodType):
            self._value(live, f"{path}.__self__", value.__self__, None, "", depth)
            self._function(live, f"{path}.__func__", value.__func__, depth)
        elif isinstance(value, functools.partial):
            self._value(live, f"{path}.func", value.func, None, "", depth)
            self._value(live, f"{path}.args", value.args, value, "args", depth)
            for key, item in value.keywords.items():
                self._value(live, f"{path}.keywords[{key!r}]", item, value.keywords, key, depth)
        elif isinstance(value.__self__, torch.Tensor) or not isinstance(value.__self__, _LEAVES):
            self._value(live, f"{path}.__self__", value.__self__, None, "", depth)

    def _first(self, live: LiveModule, path: str, value: Any) -> str | None:
        """Where the walk met `value` before; None for the first time."""
        first = self._met.get(id(value))
        if first is None:
            self._met[id(value)] = live.path, path
            return None
        return ":".join(first)


def _limits(value: Any) -> str:
    """What a container does with items that come later, as far as its class does not say it."""
    if isinstance(value, collections.deque):
        return "" if value.maxlen is None else f" at most {value.maxlen}"
    if isinstance(value, collections.defaultdict):
        factory = value.default_factory
        return f" made by {describe_value(factory) or class_name(type(factory))}"
    return ""


def _base_of(value: Any) -> Any:
    """The built-in class of a container, whose methods run no code of the container's own class."""
    return next(base for base in _CONTAINERS if isinstance(value, base))


def key_texts(keys: Iterable[Any]) -> list[str]:
    """Texts that tell the keys of one dict apart, in their order."""
    found = []
    alike: collections.Counter[str] = collections.Counter()
    for key in keys:
        text = describe_value(key) or class_name(type(key))
        alike[text] += 1
        found.append(text if alike[text] == 1 else f"{text} {alike[text]}")  # objects of one class as keys
    return found


def _dictionary(value: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}
