"""Walk a live model and list all that makes it what it is: tensors, ties, values, classes.

Everything that Python can reach from the model is visited: parameters, buffers, plain attributes,
containers, helper objects that modules own (attention backends, kernels, quantization methods), slots,
what functions captured, arguments of `functools.partial`, hooks, what was hung on tensors, and modules
that live in any of these. Plain values are noted as canonical text (values.py), objects by their class,
so that two trees can be compared. The walk is deterministic; an object met again is noted by where it was
first met.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import TensorKind
from vllm_companion_plugin.core.packages import dictionary, module_of
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.tree.classes import (
    CONTAINERS,
    FUNCTIONS,
    HOLDERS,
    LEAVES,
    MUTABLE,
    PLAIN_CONTAINERS,
    Kind,
    base_of,
    has_state_of_c,
    is_opaque,
    kind_of,
    slot_members,
)
from vllm_companion_plugin.tree.descriptions import answers, describe_value, key_texts
from vllm_companion_plugin.tree.live import (
    NO_BUFFER,
    NO_PARAMETER,
    LiveModule,
    LiveSlot,
    Place,
    Tree,
    full_name,
    named_modules,
)
from vllm_companion_plugin.tree.values import class_name, is_literal, text_of

MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
"""Names of what PyTorch keeps in every module for itself: tables of parameters, buffers, children and hooks."""
_HOOKS = tuple(sorted(name for name, value in nn.Module().__dict__.items() if name.endswith("hooks")))
_STRETCH = 48
"""The walk goes so deep at once. What is deeper comes afterwards: Python's own stack has a limit."""
_MOST_STRETCHES = 20
"""Names of what is deeper would take more memory than the values. Nothing in vLLM is as deep as one stretch."""
_SAID = (str, bytes, int, float)
"""The text says all of these values, and of values of classes made from theirs, but for attributes."""
_OURS = __name__.partition(".")[0] + "."
# The attribute of an enum takes Python 3.11 as long as two calls.
_PARAMETER, _BUFFER = TensorKind.PARAMETER, TensorKind.BUFFER
_NON_PERSISTENT_BUFFER, _ATTRIBUTE = TensorKind.NON_PERSISTENT_BUFFER, TensorKind.ATTRIBUTE


def capture(model: nn.Module, *, wanted: Mapping[str, Collection[str]] | None = None, to_compare: bool = False) -> Tree:
    """The tree of `model`, in the order of `named_modules`. Reads no tensor data.

    Args:
        wanted: names of values by path of their module, whose places are wanted to change them.
        to_compare: note also what tells whether loading changed what has the same text: `Tree.named`, `Tree.fixed` and
            `Tree.tuples`. An engine that attaches needs none of it.
    """
    by_id: dict[int, LiveModule] = {}
    for path, module in named_modules(model):
        known = by_id.get(id(module))
        if known is None:
            by_id[id(module)] = LiveModule(module, path, len(by_id))
        else:
            known.aliases.append(path)
    tree = Tree(list(by_id.values()))
    walk = _Walk(tree, by_id, wanted, to_compare=to_compare)
    for live in tree.modules:
        walk.named_module(live)
    tree.classes, tree.code = walk.classes(), walk.code()
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
            kind = kind_of(cls)
            if kind is Kind.EXACT:
                self._exact.append((position, prefix + name))
            elif kind is Kind.SIMPLE:
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
        *,
        to_compare: bool = False,
    ) -> None:
        self._tree = tree
        self._named = named
        self._wanted = wanted
        self._to_compare = to_compare
        self._met = tree.met
        self._noting: dict[type, _Noting] = {}
        self._classes: dict[type, None] = {}
        self._layouts: dict[tuple[str, tuple[Any, ...], tuple[type, ...]], _Layout] = {}
        # By id, with what keeps the id valid.
        self._texts: dict[int, tuple[Any, str]] = {}
        self._modules: list[types.ModuleType] = []
        self._steps: list[tuple[Any, Any]] = []
        # How to go on at what is deep, with the steps to it, and how many stretches lead there.
        self._deep: collections.deque[tuple[Callable[[], None], list[tuple[Any, Any]], int]] = collections.deque()
        self._stretches = 0

    def classes(self) -> list[type]:
        """As of `Tree`."""
        return list(self._classes)

    def code(self) -> list[Any]:
        """As of `Tree`."""
        described = (value for value, _ in self._texts.values())
        return [*self._modules, *(value for value in described if isinstance(value, (type, *FUNCTIONS)))]

    def values(self, live: LiveModule, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._value(live, name, value, None, name, 0)
        self._go_deeper()

    def named_module(self, live: LiveModule) -> None:
        if isinstance(live.module, torch.jit.ScriptModule):
            where = f"{live.path} ({_name_of(type(live.module))})"
            raise NotShareableError(f"{where} is compiled by torch.jit, so that no Python object has its tensors")
        self._module(live, "", live.module, 0)
        self._go_deeper()

    def _later(self, live: LiveModule, path: str, go_on: Callable[[], None]) -> None:
        """Go on with what is at `path` when the stack is empty again.

        Raises:
            NotShareableError: it is too deep.
        """
        if self._stretches == _MOST_STRETCHES:
            where = full_name(live.path, f"{path[:80]}...")
            raise NotShareableError(f"{where} has objects inside of more than {_STRETCH * _MOST_STRETCHES} others")
        self._deep.append((go_on, self._steps.copy(), self._stretches + 1))

    def _go_deeper(self) -> None:
        while self._deep:
            go_on, self._steps, self._stretches = self._deep.popleft()
            go_on()
        self._steps, self._stretches = [], 0

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
        if members := slot_members(cls):
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
            holder, key = (
                (member, value) if isinstance(value, HOLDERS) else (value, name)
            )  # whose items have names, too
            self._value(live, f"{prefix}{name}", item, holder, key, depth)
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
        if (members := slot_members(type(tensor))) and id(tensor) not in self._met:
            self._met[id(tensor)] = live.path, path
            self._members(live, f"{path}.", tensor, members, depth + 1)
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
        by_kind: dict[Kind, _Noting] = {
            Kind.EXACT: self._simple,
            Kind.SIMPLE: self._simple,
            Kind.CONSTANT: self._constant,
            Kind.MEMBER: self._member,
            Kind.FUNCTION: self._callable,
            Kind.ITEMS: self._list,
            Kind.TENSOR: self._tensor,
            Kind.OBJECT: self._object,
            Kind.OPAQUE: self._opaque,
            Kind.WEAK: self._weak,
            Kind.OTHER: self._other,
        }
        found = self._noting[cls] = by_kind[kind_of(cls)]
        return found

    def _simple(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = repr(value)

    def _constant(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = self._text_once(value)
        if self._to_compare:
            self._tree.named[live.index, path] = value

    def _member(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        self._classes[type(value)] = None
        live.attributes[path] = self._text_once(value) or f"{value._name_} of a {_name_of(type(value))}"
        if self._to_compare:
            self._tree.named[live.index, path] = value

    def _weak(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        live.attributes[path] = _name_of(type(value))
        self._tree.opaque[live.index, path] = value

    def _callable(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if self._to_compare and type(value) in (types.FunctionType, types.MethodType):
            self._tree.named[live.index, path] = getattr(value, "__func__", value)
        if id(value) in self._met:
            live.attributes[path] = self._text_once(value)
        elif not (isinstance(value, types.FunctionType) and module_of(value).startswith(_OURS)):
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
        if depth >= _STRETCH:
            self._later(live, path, lambda: self._object(live, path, value, holder, key, 0))
            return
        cls: Any = type(value)
        name = _name_of(cls)
        first = self._first(live, path, value)
        if first is not None:
            name = f"{name} @{first}"
        else:
            self._insides(live, path, value, value, cls, depth)
        live.attributes[path] = name

    def _opaque(self, live: LiveModule, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        name = _name_of(type(value))
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
        elif isinstance(value, FUNCTIONS):
            self._callable(live, path, value, holder, key, depth)
        else:
            text = describe_value(value)
            if text is None:
                if depth >= _STRETCH:
                    self._later(live, path, lambda: self._other(live, path, value, holder, key, 0))
                    return
                text = self._compound(live, path, value, depth)
            elif type(value) in MUTABLE:
                self._tree.mutable[live.index, path] = value
            elif self._to_compare and isinstance(value, tuple):
                self._tree.tuples[live.index, path] = value
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
        if isinstance(value, LEAVES):
            if isinstance(value, types.ModuleType):
                self._modules.append(value)
            if self._to_compare:
                self._tree.named[live.index, path] = value
            return name
        first = self._first(live, path, value)
        if first is not None:
            return name if isinstance(value, (tuple, frozenset)) else f"{name} @{first}"
        if isinstance(value, CONTAINERS):
            self._items(live, path, value, depth)
            if cls not in PLAIN_CONTAINERS:
                # The items of a holder are set otherwise than its attributes.
                holder = dictionary(value) if isinstance(value, HOLDERS) else value
                self._insides(live, path, value, holder, cls, depth)
            return f"{name} of {base_of(value).__len__(value)}{_limits(value)}"
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            for position, item in enumerate(value.flat):
                self._fixed(live, f"{path}[{position}]", item, depth + 1)
            if cls is not np.ndarray:
                self._insides(live, path, value, value, cls, depth)
            return f"{name} of {value.shape}"
        if isinstance(value, _SAID):  # with attributes of its own
            self._insides(live, path, value, value, cls, depth)
            base = next(base for base in _SAID if isinstance(value, base))
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
            if not is_literal(key for key, _ in items):
                for position, (item_key, _) in enumerate(items):
                    if not answers(item_key) or text_of(item_key) is None:
                        self._fixed(live, f"{path}.keys()[{position}]", item_key, depth + 1, by_value=True)
        elif isinstance(value, (set, frozenset)):
            for position, item in enumerate(self._in_order(base_of(value).__iter__(value))):
                self._fixed(live, f"{path}{{{position}}}", item, depth + 1, by_value=True)
        else:
            for position, item in enumerate(base_of(value).__iter__(value)):
                self._value(live, f"{path}[{position}]", item, value, position, depth + 1)

    def _in_order(self, values: Iterable[Any]) -> list[Any]:
        """The parts of a set in an order that depends on no address, as far as the parts can be told apart.

        Parts that are alike are told apart by where else in the model they are.
        """

        def text(value: Any) -> tuple[str, tuple[str, str]]:
            if isinstance(value, torch.Tensor):
                return f"{value.dtype} {tuple(value.shape)}", self._tensors.get(id(value), ("", ""))
            held = [f"{name}={text_of(item)}" for name, item in sorted(dictionary(value).items())]
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
        if self._to_compare:
            self._tree.named[live.index, path] = cls
        own, prefix = dictionary(value), path + "."
        if own:
            self._attributes(live, prefix, own, holder, depth + 1)
        members = slot_members(cls)
        found = self._members(live, prefix, value, members, depth + 1) if members else False
        if has_state_of_c(cls) or not (own or found or isinstance(value, (*CONTAINERS, *_SAID))):
            self._tree.opaque[live.index, path] = value

    def _inner_module(self, live: LiveModule, path: str, module: nn.Module, depth: int) -> None:
        """Take note of a module that a container or a helper object holds, and no other module."""
        self._module(live, f"{path}.", module, depth)
        for name, child in module._modules.items():
            if child is not None:
                self._value(live, f"{path}.{name}", child, module._modules, name, depth + 1)

    def _function(self, live: LiveModule, path: str, value: Any, depth: int) -> None:
        """Take note of what a function takes along: captured values, defaults, arguments, the object of a method."""
        if id(value) in self._met:
            return
        if depth >= _STRETCH:
            self._later(live, path, lambda: self._function(live, path, value, 0))
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
            self._fixed(live, f"{path}.__self__", value.__self__, depth)
            note = self._function if isinstance(value.__func__, FUNCTIONS) else self._called
            note(live, f"{path}.__func__", value.__func__, depth)
        elif isinstance(value, functools.partial):
            self._fixed(live, f"{path}.func", value.func, depth)
            self._value(live, f"{path}.args", value.args, value, "args", depth)
            for key, item in value.keywords.items():
                self._value(live, f"{path}.keywords[{key!r}]", item, value.keywords, key, depth)
            if own := vars(value):
                self._attributes(live, f"{path}.", own, own, depth)
            cls: Any = type(value)
            if members := slot_members(cls):
                self._members(live, f"{path}.", value, members, depth)
        elif isinstance(value.__self__, torch.Tensor) or not isinstance(value.__self__, LEAVES):
            self._fixed(live, f"{path}.__self__", value.__self__, depth)

    def _called(self, live: LiveModule, path: str, value: Any, depth: int) -> None:
        """Take note of an object that is the function of a method."""
        self._fixed(live, path, value, depth)

    def _fixed(self, live: LiveModule, path: str, value: Any, depth: int, *, by_value: bool = False) -> None:
        """Take note of a value in whose place nothing else can be put.

        Args:
            by_value: it is found by its hash.
        """
        if self._to_compare:
            cls: Any = type(value)
            is_hashed = by_value and cls.__hash__ is not object.__hash__ and not issubclass(cls, torch.Tensor)
            self._tree.fixed[live.index, path] = is_hashed
        self._value(live, path, value, None, "", depth)

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
