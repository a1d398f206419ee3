"""Walk a live model and list all that makes it what it is: tensors, ties, attributes, classes.

Tensors are found as parameters, as buffers, in plain attributes, inside lists, tuples and
dicts, and inside the helper objects that modules own (attention backends, kernels,
quantization methods). Everything else is noted as canonical text, so that two trees can be
compared. The walk is deterministic; an object met again is noted by where it was first met.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.types import TensorKind

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_PRIMITIVES = (bool, int, str, bytes, type(None))
_EXACT_PRIMITIVES = frozenset(_PRIMITIVES)
_TEXT_TYPES = (torch.dtype, torch.Size, torch.memory_format, torch.layout, enum.Enum)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_MAX_DEPTH = 4
_MAX_SEARCH_DEPTH = 16

# Objects of these packages are shared infrastructure (configs, process groups, loggers), not
# state of one module: their class is noted, their insides are not.
_OPAQUE = ("torch", "transformers", "vllm.config", "vllm.distributed", "logging", "threading", "numpy", "pydantic")


@dataclass(slots=True)
class LiveSlot:
    """A tensor and the place it was found. `module` is the index of its module."""

    name: str
    kind: TensorKind
    tensor: torch.Tensor
    module: int


@dataclass(slots=True)
class LiveFloat:
    """A float attribute and how to set it."""

    value: float
    holder: Any
    key: Any

    def set(self, value: float) -> None:
        if isinstance(self.holder, (dict, list)):
            self.holder[self.key] = value
        elif not isinstance(self.holder, tuple):
            object.__setattr__(self.holder, self.key, value)


@dataclass(slots=True)
class LiveModule:
    """One module object with what was found in it."""

    module: nn.Module
    path: str
    aliases: list[str] = field(default_factory=list)
    slots: list[LiveSlot] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    floats: dict[str, LiveFloat] = field(default_factory=dict)


@dataclass(slots=True)
class Tree:
    """A captured model: live references, to be described, packed or rebound."""

    modules: list[LiveModule]

    def slots(self) -> Iterator[LiveSlot]:
        for module in self.modules:
            yield from module.slots

    def describe(self, slot: LiveSlot) -> str:
        """The full name of a slot, for messages."""
        path = self.modules[slot.module].path
        return f"{path}.{slot.name}" if path else slot.name


def capture(model: nn.Module, opaque: tuple[type, ...] = ()) -> Tree:
    """The tree of `model`, in the order of `named_modules`. Reads no tensor data.

    Args:
        opaque: classes of objects whose insides are not state of the model: they follow from its
            configuration, and may differ from process to process.
    """
    by_id: dict[int, LiveModule] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        known = by_id.get(id(module))
        if known is None:
            by_id[id(module)] = LiveModule(module, path)
        else:
            known.aliases.append(path)
    tree = Tree(list(by_id.values()))
    walk = _Walk(opaque)
    for index, live in enumerate(tree.modules):
        walk.module(live, index)
    return tree


def plain_tensors() -> AbstractContextManager[None]:
    """While open, tensors of any class answer like plain ones: vLLM's parameters take a way through Python for it.

    https://docs.pytorch.org/docs/stable/notes/extending.html
    """
    plain: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return plain


def class_name(cls: type) -> str:
    """Qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe_value(value: Any) -> str | None:
    """Canonical text of a value without parts, or None for everything else."""
    if type(value) in _EXACT_PRIMITIVES:  # nearly all of them, and this runs 10,000 times in an attach
        return repr(value)
    if isinstance(value, _TEXT_TYPES):
        return str(value)
    if isinstance(value, _PRIMITIVES):
        return repr(value)
    if isinstance(value, torch.device):
        return f"device:{value.type}"  # the index is this process's affair
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if isinstance(value, _FUNCTIONS):
        return f"function {value.__qualname__}"
    if isinstance(value, functools.partial):
        return f"partial of {describe_value(value.func)}"
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object holds, with how to write the way to it."""
    if isinstance(value, (list, tuple)):
        yield from ((f"[{position}]", item) for position, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, functools.partial):
        yield from ((f".args[{position}]", item) for position, item in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", item) for key, item in value.keywords.items())
    else:
        yield from ((f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items()))
        yield from ((f".{name}", item) for name, item in _slots(value))


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds outside its dictionary."""
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


class _Walk:
    """One walk over a tree; remembers the objects it has met."""

    def __init__(self, opaque: tuple[type, ...]) -> None:
        self._opaque = opaque
        # Object id to where it was first met. Objects are kept alive by the model meanwhile.
        self._met: dict[int, str] = {}
        self._searched: set[int] = set()

    def module(self, live: LiveModule, index: int) -> None:
        module = live.module
        for name, parameter in module._parameters.items():
            if parameter is None:
                live.attributes[name] = "None"
            else:
                live.slots.append(LiveSlot(name, TensorKind.PARAMETER, parameter, index))
        for name, buffer in module._buffers.items():
            if buffer is None:
                live.attributes[name] = "None"
                continue
            transient = name in module._non_persistent_buffers_set
            kind = TensorKind.NON_PERSISTENT_BUFFER if transient else TensorKind.BUFFER
            live.slots.append(LiveSlot(name, kind, buffer, index))
        for name, value in module.__dict__.items():
            if name in _MODULE_INTERNALS:
                continue
            if type(value) in _EXACT_PRIMITIVES:
                live.attributes[name] = repr(value)
            else:
                self._value(live, index, name, value, module.__dict__, name, 0)

    def _value(self, live: LiveModule, index: int, path: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            live.slots.append(LiveSlot(path, TensorKind.ATTRIBUTE, value, index))
            return
        if type(value) is float:
            live.floats[path] = LiveFloat(value, holder, key)
            return
        text = describe_value(value)
        if text is None:
            text = self._compound(live, index, path, value, depth)
        elif isinstance(value, functools.partial):
            self._search(live, index, path, value, depth)
        live.attributes[path] = text

    def _compound(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> str:
        cls = type(value)
        name = class_name(cls)
        if isinstance(value, nn.Module):
            return name
        if depth >= _MAX_DEPTH:
            self._search(live, index, path, value, depth)
            return name
        first = self._met.setdefault(id(value), f"{live.path}:{path}")
        if first != f"{live.path}:{path}":
            return f"{name} @{first}" if not isinstance(value, tuple) else name
        if isinstance(value, (list, tuple)):
            for position, item in enumerate(value):
                self._value(live, index, f"{path}[{position}]", item, value, position, depth + 1)
            return f"{name} of {len(value)}"
        if isinstance(value, dict):
            for item_key, item in value.items():
                self._value(live, index, f"{path}[{item_key!r}]", item, value, item_key, depth + 1)
            return f"{name} of {len(value)}"
        if isinstance(value, (set, frozenset)):
            return f"{name} of {sorted(map(str, value))}"
        if not name.startswith(_OPAQUE) and not isinstance(value, self._opaque):
            for item_key, item in list(getattr(value, "__dict__", {}).items()):
                self._value(live, index, f"{path}.{item_key}", item, value, item_key, depth + 1)
            for item_key, item in _slots(value):
                self._look(live, index, f"{path}.{item_key}", item, depth)
        return name

    def _search(self, live: LiveModule, index: int, path: str, value: Any, depth: int) -> None:
        """Only the tensors, further down: kernels keep scales several objects deep, and each must be found."""
        if isinstance(value, nn.Module) or depth >= _MAX_SEARCH_DEPTH or id(value) in self._searched:
            return
        if class_name(type(value)).startswith(_OPAQUE) or isinstance(value, self._opaque):
            return
        self._searched.add(id(value))
        for way, item in _parts(value):
            self._look(live, index, f"{path}{way}", item, depth)

    def _look(self, live: LiveModule, index: int, path: str, item: Any, depth: int) -> None:
        if isinstance(item, torch.Tensor):
            live.slots.append(LiveSlot(path, TensorKind.ATTRIBUTE, item, index))
        elif isinstance(item, functools.partial) or describe_value(item) is None:
            self._search(live, index, path, item, depth + 1)
