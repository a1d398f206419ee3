"""Describing all that a live model leads to, by name: every Python value and every tensor, to compare two engines.

The walk is the judge of `tree.capture` and shares no code with it. Capture knows what models consist of; the walk asks
the garbage collector (`gc.get_referents`), which also sees objects that no attribute and no container names. Names
come from attributes, slots, items, arguments and closures; the walk numbers objects without a name. Two engines that
loaded the same model have equal descriptions, in any two processes.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import dis
import enum
import fractions
import functools
import gc
import hashlib
import itertools
import os
import random
import re
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

NOT_THE_MODELS: Mapping[str, str] = {
    "vllm.config": "flags of this engine, the load format among them; the key names those that decide weights",
    "vllm.distributed": "process groups belong to the process",
    "torch.distributed": "process groups belong to the process",
    "torch._C._distributed_c10d": "process groups belong to the process",
    "vllm.compilation": "compilers note what was asked, and where their caches are",
    "torch._dynamo": "compilers note what was asked",
    "torch._functorch": "compilers note what was asked",
    "torch._inductor": "compilers note what was asked",
    "torch.fx": "compilers note what was asked",
    "triton": "compilers note what was asked",
    "torch._ops": "operators are the program",
    "torch._library": "operators are the program",
    "torch.library": "operators are the program",
    "torch.utils.hooks": "handles of hooks have numbers that the process counts",
    "torch.cuda": "streams, events and graphs belong to the process",
    "vllm.lora.model_manager": "adapters come and go with requests",
    "vllm.lora.punica_wrapper": "adapters come and go with requests",
    "logging": "loggers belong to the process",
    "_thread": "locks belong to the process",
    "threading": "threads belong to the process",
    "concurrent": "threads belong to the process",
    "_io": "files belong to the process",
    "_contextvars": "a context belongs to its task",
}
"""Packages whose objects the walk notes by class alone, with the reason: these objects lead to the whole program."""

LEFT_OUT: Mapping[str, str] = {
    r"\.kv_cache(\[\d+\])?$": "vLLM's cache comes after loading and holds what requests left in it",
    r"\.lora_[ab]_stacked\b": "slots of adapters hold those that requests named",
    r"\.adapter_enabled$": "tells which of these slots are in use",
    r"\.topk_indices_buffer$": "a work buffer, written before it is read; what is not in use is never initialized",
    r"quant_config\.online_quantization_time$": "a measured time",
    r"quant_config\.(modules_in_block_to_quantize|modules_to_not_convert)\[": "a set's names in any order",
    r"\.handler_tensor$": "an address, of what a library packed for this process",
    r"(^|\.)load_weights$": "the plugin's own, so that who writes to shared weights later gets private ones first",
}
"""Paths that the walk leaves out, with the reason."""

_PROGRAM = (types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, functools._lru_cache_wrapper)
_VALUES = (type(None), bool, int, float, complex, str, bytes, bytearray, range)
_EXACT_VALUES = frozenset(_VALUES)
# The text of such a value says all about the value.
_TEXTS: tuple[type, ...] = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype, np.generic),
    *(decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
    *(uuid.UUID, os.PathLike, type(Ellipsis), type(NotImplemented)),
)
# Python makes such objects anew at each access, or interns them. So identity of two such objects means nothing.
_WITHOUT_IDENTITY = (tuple, frozenset, types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)
# Their classes are the program.
_LIBRARIES = frozenset(("torch", "numpy", *sys.stdlib_module_names))
_WITH_VERSIONS = frozenset(("vllm", "transformers"))
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_MODULE_TABLES = ("_parameters", "_buffers", "_modules")
# Attributes of torch.compile: https://github.com/pytorch/pytorch/blob/main/torch/_dynamo/decorators.py has dozens.
_COMPILERS = re.compile(r"dynamo_|^_compiled_call_impl$")
_ADDRESS = re.compile(r"\b0x[0-9a-f]+\b")
_LONGEST_TEXT = 200


@dataclass
class Reached:
    """All that a model leads to. Modules and their tensors have their paths of `nn.Module` where these exist."""

    values: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


def walk(model: nn.Module, left_out: Mapping[str, str] = LEFT_OUT) -> Reached:
    """Describe everything reachable from `model`. Reads all tensors, changes nothing, calls no code of the model.

    Args:
        left_out: patterns of paths that the walk does not follow, each with its reason.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return _Walk(left_out).run(model)


class _Walk:
    """One walk, breadth first. Modules, parameters and buffers come before all others, because their names are best."""

    def __init__(self, left_out: Mapping[str, str]) -> None:
        self._left_out = re.compile("|".join(left_out)) if left_out else re.compile(r"(?!)")
        self._reached = Reached()
        self._tree: collections.deque[tuple[str, Any]] = collections.deque()
        self._others: collections.deque[tuple[str, Any]] = collections.deque()
        # Paths by id. The walk keeps the objects, so that no new object gets the id of a freed one.
        self._met: dict[int, tuple[str, Any]] = {}
        self._classes: set[type] = set()
        self._weak: list[tuple[str, Any]] = []

    def run(self, model: nn.Module) -> Reached:
        self._tree.append(("", model))
        while self._tree or self._others:
            path, value = (self._tree or self._others).popleft()
            if not self._left_out.search(path):
                self._visit(path, value)
        self._note_weak_references()
        self._note_common_memory()
        return self._reached

    def _visit(self, path: str, value: Any) -> None:
        if issubclass(type(value), weakref.ReferenceType):
            self._weak.append((path, value))
            return
        if (text := _text(value)) is not None:
            self._reached.values[path] = text
            return
        if not issubclass(type(value), _WITHOUT_IDENTITY):
            first = self._met.setdefault(id(value), (path, value))[0]
            if first != path:
                self._reached.values[path] = f"is {first or 'the model'}"
                return
        if issubclass(type(value), torch.Tensor):
            self._reached.tensors[path] = _describe(value)
        else:
            self._reached.values[path] = _shortened(_form(value))
        for cls in type(value).__mro__:
            if cls not in self._classes:
                self._classes.add(cls)
                self._others.extend((f"class {name_of(cls)}.{name}", part) for name, part in _held_by(cls))
        parts = list(_parts(value, self._place_of))
        for way, part, in_tree in parts:
            (self._tree if in_tree else self._others).append(((path + way).removeprefix("."), part))
        self._others.extend(
            (f"{path}<{number}>", part) for number, part in enumerate(_unnamed(value, [part for _, part, _ in parts]))
        )

    def _place_of(self, value: Any) -> str:
        """Return where the walk met an object, or the object of a method, which is made anew at each access."""
        value = value.__self__ if issubclass(type(value), types.MethodType) else value
        met = self._met.get(id(value))
        return "" if met is None else met[0]

    def _note_weak_references(self) -> None:
        """Note what weak references lead to, by the path on which the walk reached that through its owner."""
        for path, reference in self._weak:
            value = reference()
            met = self._met.get(id(value))
            to = (met[0] or "the model") if met is not None else f"a {name_of(type(value))}"
            self._reached.values[path] = f"weak reference to {to}"

    def _note_common_memory(self) -> None:
        """Note for each tensor or array which earlier one shares its memory: a write to one of them changes both."""
        tensors = self._reached.tensors
        order = {path: number for number, path in enumerate(tensors)}
        for first, other in _sharing(
            (*_span(value), order[path], path)
            for path, value in self._met.values()
            if path in order and issubclass(type(value), torch.Tensor) and _span(value)[1]
        ):
            tensors[other]["memory"] = first
        for first, other in _sharing(
            (*_bounds(value), number, path)
            for number, (path, value) in enumerate(self._met.values())
            if issubclass(type(value), np.ndarray) and value.size
        ):
            self._reached.values[f"{other}.memory"] = f"that of {first}"


def _sharing(spans: Iterable[tuple[int, int, int, str]]) -> Iterator[tuple[str, str]]:
    """Yield the paths of those whose memory overlaps, each with the path of the first of them.

    Args:
        spans: start, end, number and path of each.
    """
    group: list[tuple[int, str]] = []
    end = -1
    for start, stop, number, path in [*sorted(spans), (sys.maxsize, sys.maxsize, -1, "")]:
        if start >= end:
            first = min(group, default=(-1, ""))[1]
            yield from ((first, other) for _, other in group if other != first)
            group = []
        group.append((number, path))
        end = max(end, stop) if start < end else stop


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return where an array's items begin and end in memory."""
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    start = np.ndarray.ctypes.__get__(array).data
    return start + sum(min(step, 0) for step in steps), start + sum(max(step, 0) for step in steps) + array.itemsize


def _text(value: Any) -> str | None:
    """Return the full text of a value without parts; None for all others."""
    cls = type(value)
    if cls in _EXACT_VALUES:
        text = repr(value)
    elif issubclass(cls, enum.Enum):
        what = "" if _is_found(cls) else f" = {_text(value._value_)}, {_class_digest(cls)}"
        return f"{name_of(cls)}.{value._name_}{what}"
    elif issubclass(cls, re.Pattern):  # whose own text is cut short
        text = f"{cls.__name__} {value.pattern!r} {value.flags}"
    elif issubclass(cls, _TEXTS):
        text = f"{cls.__name__} {value!r}"
    elif issubclass(cls, type):
        return f"class {name_of(value)}" if _is_found(value) else f"class {name_of(value)} {_class_digest(value)}"
    elif issubclass(cls, types.ModuleType):
        return f"module {value.__name__}"
    elif issubclass(cls, _PROGRAM) or _reason(cls):
        return f"a {name_of(cls)}"
    elif issubclass(cls, weakref.ReferenceType):
        return f"weak reference to a {name_of(type(value()))}"  # as a key
    else:
        return None
    return _shortened(text)


def _is_found(cls: type) -> bool:
    """Tell whether the name of a class leads to it, and so to the same class in each process."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found is cls


def _class_digest(cls: type) -> str:
    """Return what tells two classes of one name apart: code and values that say all of themselves."""
    texts = []
    for name, part in sorted(vars(cls).items()):
        if isinstance(part, type):  # which may lead back here
            texts.append(f"{name} {name_of(part)}")
        elif name == "__module__" or not (name.startswith("__") or isinstance(part, enum.Enum)):
            function = getattr(part, "__func__", getattr(part, "fget", part))
            is_code = isinstance(function, types.FunctionType)
            texts.append(f"{name} {_code_digest(function.__code__) if is_code else _text(part)}")
    return hashlib.sha256(repr(texts).encode(errors="surrogatepass")).hexdigest()[:8]


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}... sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"


def _reason(cls: type) -> str | None:
    """Return why the walk does not follow objects of a class, or None."""
    package = cls.__module__ if isinstance(cls.__module__, str) else ""
    while package:
        if package in NOT_THE_MODELS:
            return NOT_THE_MODELS[package]
        package = package.rpartition(".")[0]
    return None


def _form(value: Any) -> str:
    """Describe a value with parts, without these parts."""
    cls = type(value)
    name = name_of(cls)
    if issubclass(cls, types.FunctionType):
        line = value.__code__.co_firstlineno
        return f"function {value.__module__}.{value.__qualname__}:{line} {_code_digest(value.__code__)}"
    if issubclass(cls, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return f"function {value.__qualname__}"
    for kind in _VALUES:  # subclasses of these types
        if issubclass(cls, kind):
            base: Any = kind
            return f"{name} {base.__repr__(value)}"
    if issubclass(cls, dict):
        return f"{name} of {', '.join(_key(key, number) for number, key in enumerate(_items_of(value)))}"
    if issubclass(cls, (set, frozenset)):
        return f"{name} of {', '.join(sorted(_key(item, 0) for item in value))}"
    if issubclass(cls, collections.deque):
        return f"{name} of {len(value)}, at most {value.maxlen}"
    if issubclass(cls, (list, tuple)):
        return f"{name} of {len(value)}"
    if issubclass(cls, memoryview):
        return f"{name} {value.format} {value.shape}, sha256 {hashlib.sha256(value.tobytes()).hexdigest()}"
    if issubclass(cls, np.ndarray):
        data = (
            ""
            if value.dtype.hasobject
            else f", sha256 {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
        )
        return f"{name} {value.dtype} {value.shape} {value.strides}{data}"
    if issubclass(cls, torch.UntypedStorage):
        return f"{name} of {value.nbytes()} bytes, sha256 {digest(_bytes_of(value))}"
    if issubclass(cls, torch.Generator):
        return f"{name} on {value.device}, seed {value.initial_seed()}, state {digest(value.get_state())}"
    return name


@functools.cache
def _code_digest(code: types.CodeType) -> str:
    """Return what tells two functions of one name and line apart."""
    texts = (_code_digest(one) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts)
    return hashlib.sha256(repr((code.co_code, code.co_names, *texts)).encode()).hexdigest()[:8]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _parts(value: Any, place_of: Callable[[Any], str]) -> Iterator[tuple[str, Any, bool]]:
    """Yield the named parts of a value: name, part, and whether the part is a module or tensor of the module tree.

    Args:
        place_of: tells where the walk met an object; "" if it did not.
    """
    cls = type(value)
    if issubclass(cls, nn.Module):
        for name in sorted(_MODULE_INTERNALS.intersection(value.__dict__)):
            part = value.__dict__[name]
            if not part or _is_compilers(value, name):  # most of these tables are empty
                continue
            if name in _MODULE_TABLES:
                yield f".{name}", tuple(part), False
                yield from ((f".{child}", tensor, True) for child, tensor in part.items())
            else:  # keys of hooks are numbers of this process
                yield f".{name}", list(part.values()) if isinstance(part, collections.OrderedDict) else part, False
        yield from _attributes(value, _MODULE_INTERNALS)
        return
    if issubclass(cls, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with_content = [cell.cell_contents] if cell != types.CellType() else []
            yield from ((f".__closure__[{name}]", content, False) for content in with_content)
        yield from ((f".{name}", getattr(value, name), False) for name in ("__defaults__", "__kwdefaults__"))
    elif issubclass(cls, (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)):
        yield ".__self__", value.__self__, False
        if issubclass(cls, types.MethodType):
            yield ".__func__", value.__func__, False
            return  # a bound method shows its function's attributes as its own
    elif issubclass(cls, (torch.Generator, torch.UntypedStorage)):
        return  # their other attributes only say where they are
    elif issubclass(cls, types.GeneratorType):
        yield ".gi_frame.f_locals", dict(value.gi_frame.f_locals) if value.gi_frame else None, False
    elif issubclass(cls, torch.Tensor):
        if value.is_leaf:  # keys of hooks are numbers of this process
            yield ".grad", value.grad, False
            yield "._backward_hooks", list((value._backward_hooks or {}).values()), False
    elif issubclass(cls, dict):
        for number, (key, part) in enumerate(_items_of(value).items()):
            yield f"[{_key(key, number)}]", part, False
            if _text(key) is None:
                yield f".keys()[{number}]", key, False
    elif issubclass(cls, (list, tuple, collections.deque)):
        yield from ((f"[{number}]", part, False) for number, part in enumerate(value))
    elif issubclass(cls, (set, frozenset)):
        unknown = (part for part in value if _text(part) is None)
        members = sorted(unknown, key=lambda part: (name_of(type(part)), place_of(part)))  # iteration order: addresses
        yield from ((f"{{{number}}}", part, False) for number, part in enumerate(members))
    elif issubclass(cls, np.ndarray) and value.dtype.hasobject:
        yield ".flat", list(value.flat), False
    elif issubclass(cls, random.Random):
        yield ".getstate()", _asked(value.getstate), False
    elif type(vars(cls).get("__reduce__")) is types.MethodDescriptorType and cls is not functools.partial:
        yield (
            ".__reduce__()",
            _asked(value.__reduce__),
            False,
        )  # state that only C code sees: iterators, generators, getters
    yield from _attributes(value)


def _attributes(value: Any, besides: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any, bool]]:
    """Yield attributes that a value itself holds, in its dictionary or in slots. Calls no property."""
    found = {name: part for name, part in _dictionary(value).items() if name not in besides}
    for cls in reversed(type(value).__mro__):
        for name, slot in vars(cls).items():
            if type(slot) is types.MemberDescriptorType and not (name.startswith("__") and name.endswith("__")):
                try:
                    found[name] = slot.__get__(value)
                except AttributeError:  # the slot is empty
                    continue
    for name in sorted(found, key=str):
        if not _is_compilers(value, str(name)):
            yield f".{name}", found[name], False


def _held_by(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what all objects of a class share. Code, which is what binds to an object, only of classes outside vLLM."""
    if cls.__module__.partition(".")[0] in _LIBRARIES or _reason(cls):
        return
    is_outside = cls.__module__.partition(".")[0] not in _WITH_VERSIONS
    for name, part in sorted(vars(cls).items()):
        if name.startswith("__") or name == "_abc_impl" or isinstance(part, type):
            continue
        if not hasattr(type(part), "__get__"):
            yield name, part
        elif is_outside:  # code that others may have replaced, and what it takes along
            function = getattr(part, "__func__", getattr(part, "fget", getattr(part, "func", part)))
            if isinstance(function, types.FunctionType):
                yield name, function


def _unnamed(value: Any, named: list[Any]) -> Iterator[Any]:
    """Yield what the garbage collector sees besides the named parts."""
    cls = type(value)
    if issubclass(cls, (types.FunctionType, types.MethodType, nn.Module)):
        return  # all other parts have names; the rest of a function is the program
    seen = {id(part) for part in named} | {id(cls), id(_dictionary(value))}
    seen |= {id(part) for name, part in _dictionary(value).items() if _is_compilers(value, str(name))}
    if issubclass(cls, dict):
        seen.update(map(id, _items_of(value)))
    if issubclass(cls, torch.Tensor) and value.is_leaf:
        seen.add(id(value._backward_hooks))
    for part in gc.get_referents(value):
        # Objects without parts are keys, names and texts; all of these that matter have names.
        if id(part) not in seen and _text(part) is None and not (type(part) is dict and not part):
            yield part


def _is_compilers(holder: Any, name: str) -> bool:
    """Tell whether an attribute is a note that a compiler left on a compiled model."""
    if _COMPILERS.search(name):
        return True
    wrapper = getattr(sys.modules.get("vllm.compilation.wrapper"), "TorchCompileWithNoGuardsWrapper", None)
    return wrapper is not None and issubclass(type(holder), wrapper) and name in _set_by_vllms_compiler()


@functools.cache
def _set_by_vllms_compiler() -> frozenset[str]:
    """Return the attributes that vLLM's wrapper of torch.compile sets on a wrapped module, from the wrapper's code."""
    names: set[str] = set()
    codes: list[types.CodeType] = []
    for module in filter(None, map(sys.modules.get, ("vllm.compilation.wrapper", "vllm.compilation.decorators"))):
        classes = (vars(member) for member in vars(module).values() if isinstance(member, type))
        functions = (member for members in (vars(module), *classes) for member in members.values())
        own = (function for function in functions if getattr(function, "__module__", "") == module.__name__)
        codes += [function.__code__ for function in own if isinstance(function, types.FunctionType)]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = list(dis.get_instructions(code))
        for before, step in itertools.pairwise(steps):
            if step.opname == "STORE_ATTR" and before.argval == "self":
                names.add(step.argval)
    return frozenset(names)


def _dictionary(value: Any) -> dict[Any, Any]:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def _items_of(value: dict[Any, Any]) -> dict[Any, Any]:
    """Return the items in their order. Bypasses methods of the dictionary's class."""
    if isinstance(value, collections.OrderedDict):
        return dict(collections.OrderedDict.items(value))
    return value if type(value) is dict else dict(dict.items(value))


def _key(key: Any, number: int) -> str:
    return _text(key) or f"{name_of(type(key))} #{number}"


def _asked(state: Callable[[], Any]) -> Any:
    try:
        return state()
    except Exception as error:  # the object has no state that can be read
        return type(error)


def name_of(cls: type) -> str:
    """Return the qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Describe a tensor without the attributes set on it."""
    return {
        "class": name_of(type(tensor)),
        "device": tensor.device.type,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [list(part.shape) for part in tensor.unbind()] if tensor.is_nested else list(tensor.shape),
        "stride": list(tensor.stride()) if _is_strided(tensor) else str(tensor.layout),
        "requires_grad": tensor.requires_grad,
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
        "sha256": digest(tensor),
    }


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of the elements in logical order, in hexadecimal; or why the elements cannot be read."""
    if tensor.is_meta:
        return "meta"
    found = hashlib.sha256()
    try:
        for part in _elements(tensor.detach()):
            plain = part.resolve_conj().resolve_neg().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).cpu().numpy().data if plain.numel() else b"")
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a wrapper around others
        return type(error).__name__
    return found.hexdigest()


def _elements(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return plain tensors that say all that is in a tensor."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    if tensor.is_quantized:
        return tensor.int_repr(), tensor.dequantize()
    return tensor.unbind() if tensor.is_nested else (tensor,)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor's elements begin and end in memory; (0, 0) if the tensor has none."""
    if not _is_strided(tensor) or tensor.is_meta or not tensor.numel():
        return 0, 0
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
