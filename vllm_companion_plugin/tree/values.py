"""Plain Python values as canonical text, and back.

A value is *plain* if its text says all of it: numbers, strings, containers of plain values in their
order, numpy's scalars and arrays, torch's dtypes, enums, states of random generators. Equal texts mean
equal values. The text of a plain value looks like the expression that makes it, and `value_of` reads it
without evaluating anything: only the constructors of this module are known.
"""

from __future__ import annotations

import array
import ast
import collections
import decimal
import enum
import fractions
import functools
import hashlib
import itertools
import pathlib
import random
import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

_LITERALS: frozenset[type] = frozenset((bool, int, float, str, bytes, type(None), type(Ellipsis)))
_TORCH_NAMES = (torch.dtype, torch.memory_format, torch.layout)
_MAX_DEPTH = 32
_MAX_BYTES = 1 << 20
"""The text of longer data has a digest of it. Such data can be compared, and cannot be made from its text."""


class Marked:
    """A number of which it is known where it came from. In a container it is a number like the others."""

    __slots__ = ()


def class_name(cls: type) -> str:
    """The qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the prefix."""
    return str(dtype).removeprefix("torch.")


def text_of(value: Any, depth: int = 0) -> str | None:
    """The canonical text of a plain value; None for everything else."""
    kind = type(value)
    if kind in _LITERALS:  # nearly all, and this runs 10,000 times in an attach
        return repr(value)
    if kind in _WRITERS:
        return None if depth > _MAX_DEPTH else _WRITERS[kind](value, depth + 1)
    if issubclass(kind, _BY_THEIR_CLASS) and not _is_loaded(kind):  # its text would be that of another class
        return None
    if issubclass(kind, enum.Flag) and value not in kind.__members__.values():  # several flags at once
        return f"{class_name(kind)}({value.value!r})"
    if issubclass(kind, enum.Enum):
        return f"{class_name(kind)}.{value.name}"
    if issubclass(kind, _TORCH_NAMES):
        return str(value)
    if issubclass(kind, np.generic):
        return _array_text("scalar", np.asarray(value))
    if issubclass(kind, np.dtype):
        return None if value.fields or value.subdtype else f"numpy.dtype({value.str!r})"
    if issubclass(kind, tuple) and hasattr(kind, "_fields") and depth <= _MAX_DEPTH:
        parts = _parts(value, depth + 1)
        return None if parts is None else f"{class_name(kind)}({', '.join(parts)})"
    if issubclass(kind, (str, bytes, int, float)) and not getattr(value, "__dict__", None):
        base = next(base for base in (str, bytes, int, float) if issubclass(kind, base))
        if depth and issubclass(kind, Marked):
            return base.__repr__(value)
        return f"{class_name(kind)}({base.__repr__(value)})"
    return None


def _is_loaded(cls: type) -> bool:
    """Whether the name of a class leads to it."""
    if cls not in _loaded:
        if cls.__module__ not in _PYTHONS and loaded_class(class_name(cls)) is not cls:
            return False
        _loaded.add(cls)
    return True


_loaded: set[type] = set()
_PYTHONS = ("builtins", "numpy", "torch")
_BY_THEIR_CLASS = (enum.Enum, tuple, str, bytes, int, float)


def value_of(text: str) -> Any:
    """The value that has this text. Mutable ones are new.

    Raises:
        ValueError: the text is that of no plain value, or of one whose class is not loaded here.
    """
    try:
        return _read(ast.parse(text, mode="eval").body)
    except _NO_VALUE as error:
        raise ValueError(f"no value can be made of {text[:200]!r}: {error}") from None


def is_value(text: str) -> bool:
    """Whether a value can be made of this text."""
    try:
        value_of(text)
    except ValueError:
        return False
    return True


def _parts(values: Any, depth: int) -> list[str] | None:
    texts = []
    for value in values:
        text = text_of(value, depth)
        if text is None:  # at once: a container that holds itself twice has 2**32 parts
            return None
        texts.append(text)
    return texts


def is_literal(values: Iterable[Any]) -> bool:
    """Whether Python's own text of a list, tuple or dictionary of these is the canonical one."""
    return _LITERALS.issuperset(map(type, values))


def _list(value: list[Any], depth: int) -> str | None:
    if is_literal(value):
        return repr(value)
    parts = _parts(value, depth)
    return None if parts is None else f"[{', '.join(parts)}]"


def _tuple(value: tuple[Any, ...], depth: int) -> str | None:
    if is_literal(value):
        return repr(value)
    parts = _parts(value, depth)
    return None if parts is None else f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _dict(value: dict[Any, Any], depth: int) -> str | None:
    if type(value) is dict and is_literal(value) and is_literal(value.values()):
        return repr(value)
    keys, values = _parts(value.keys(), depth), _parts(value.values(), depth)
    if keys is None or values is None:
        return None
    return "{" + ", ".join(f"{key}: {item}" for key, item in zip(keys, values, strict=True)) + "}"


def _set(value: set[Any], depth: int) -> str | None:
    parts = _parts(value, depth)
    return None if parts is None else f"set([{', '.join(sorted(parts))}])"


def _frozenset(value: frozenset[Any], depth: int) -> str | None:
    text = _set(value, depth)  # type: ignore[arg-type]
    return None if text is None else f"frozen{text}"


def _deque(value: collections.deque[Any], depth: int) -> str | None:
    parts = _parts(value, depth)
    return None if parts is None else f"collections.deque([{', '.join(parts)}], {value.maxlen!r})"


def _ordered(value: dict[Any, Any], depth: int) -> str | None:
    text = _dict(value, depth)
    return None if text is None else f"collections.OrderedDict({text})"


def _defaultdict(value: collections.defaultdict[Any, Any], depth: int) -> str | None:
    text, factory = _dict(value, depth), value.default_factory
    if text is None or factory not in (*_FACTORIES.values(), None):
        return None
    return f"collections.defaultdict({factory.__name__ if isinstance(factory, type) else None}, {text})"


def _counter(value: collections.Counter[Any], depth: int) -> str | None:
    text = _dict(value, depth)
    return None if text is None else f"collections.Counter({text})"


def _bytes_text(data: bytes) -> str:
    return repr(data) if len(data) <= _MAX_BYTES else f"sha256 {hashlib.sha256(data).hexdigest()}"


def _array_text(what: str, value: np.ndarray[Any, Any]) -> str | None:
    if value.dtype.hasobject:
        return None
    if what == "scalar" and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return f"numpy.{value.dtype.name}({value.item()!r})"
    data = np.ascontiguousarray(value).tobytes()
    layout = value.dtype.descr if value.dtype.names else value.dtype.str
    order = ", 'F'" if value.flags.f_contiguous and not value.flags.c_contiguous else ""
    return f"numpy.{what}({layout!r}, {value.shape!r}, {_bytes_text(data)}{order})"


def _generator(value: torch.Generator, depth: int) -> str:
    return f"torch.Generator({value.device.type!r}, {bytes(value.get_state().numpy())!r})"


def _device(value: torch.device, depth: int) -> str:
    return f"torch.device({value.type!r})"  # the index is this process's affair


def _slice(value: slice, depth: int) -> str | None:
    parts = _parts((value.start, value.stop, value.step), depth)
    return None if parts is None else f"slice({', '.join(parts)})"


_WRITERS: dict[type, Callable[[Any, int], str | None]] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    set: _set,
    frozenset: _frozenset,
    collections.deque: _deque,
    collections.OrderedDict: _ordered,
    collections.Counter: _counter,
    collections.defaultdict: _defaultdict,
    complex: lambda value, depth: f"complex({value.real!r}, {value.imag!r})",
    torch.Size: lambda value, depth: f"torch.Size({list(value)!r})",
    torch.device: _device,
    torch.Generator: _generator,
    bytearray: lambda value, depth: f"bytearray({_bytes_text(bytes(value))})",
    range: lambda value, depth: f"range({value.start}, {value.stop}, {value.step})",
    slice: _slice,
    array.array: lambda value, depth: f"array.array({value.typecode!r}, {_bytes_text(value.tobytes())})",
    itertools.count: lambda value, depth: f"itertools.{value!r}",
    decimal.Decimal: lambda value, depth: f"decimal.Decimal({str(value)!r})",
    fractions.Fraction: lambda value, depth: f"fractions.Fraction({value.numerator}, {value.denominator})",
    random.Random: lambda value, depth: f"random.Random({value.getstate()!r})",
    np.ndarray: lambda value, depth: _array_text("array", value),
    np.random.RandomState: lambda value, depth: _random_state_text(value, depth),
    np.random.Generator: lambda value, depth: _numpy_generator_text(value, depth),
    types.SimpleNamespace: lambda value, depth: _namespace_text(value, depth),
    pathlib.PosixPath: lambda value, depth: f"pathlib.PosixPath({str(value)!r})",
    re.Pattern: lambda value, depth: f"re.compile({value.pattern!r}, {value.flags})",
}


def _random_state_text(value: np.random.RandomState, depth: int) -> str | None:
    text = text_of(value.get_state(legacy=False), depth)
    return None if text is None else f"numpy.random.RandomState({text})"


def _numpy_generator_text(value: np.random.Generator, depth: int) -> str | None:
    text = text_of(value.bit_generator.state, depth)
    return None if text is None else f"numpy.random.Generator({text})"


def _namespace_text(value: types.SimpleNamespace, depth: int) -> str | None:
    text = _dict(vars(value), depth)
    return None if text is None else f"types.SimpleNamespace({text})"


MAY_BE_PLAIN: tuple[type, ...] = (
    type,
    enum.Enum,
    *_TORCH_NAMES,
    np.generic,
    np.dtype,
    tuple,
    str,
    bytes,
    int,
    float,
    *_LITERALS,
    *_WRITERS,
)
"""`text_of` may have a text for objects of these classes and of what is derived from them, and for no others."""


# What parsing and the constructors raise; the last ones of nested text.
_NO_VALUE = (SyntaxError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, MemoryError, re.error)
_CONSTANTS = {"nan": float("nan"), "inf": float("inf"), "Ellipsis": ...}
_FACTORIES: dict[str, type] = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str}


def _checked(value: Any, kind: type) -> Any:
    """`value` if it is a `kind`. A constructor that gets a number may make gigabytes."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _make_array(dtype: Any, shape: tuple[int, ...], data: bytes, order: str = "C") -> np.ndarray[Any, Any]:
    made = np.frombuffer(bytearray(data), dtype=np.dtype(dtype)).reshape(shape)
    return np.asfortranarray(made) if order == "F" else made


def _make_generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _make_random(state: Any) -> random.Random:
    made = random.Random()
    made.setstate(state)
    return made


def _make_random_state(state: Any) -> np.random.RandomState:
    made = np.random.RandomState()
    made.set_state(state)
    return made


def _make_numpy_generator(state: Any) -> np.random.Generator:
    cls: Any = getattr(np.random, state["bit_generator"])
    if not (isinstance(cls, type) and issubclass(cls, np.random.BitGenerator)):
        raise ValueError("no bit generator")
    bits: Any = cls()
    bits.state = state
    return np.random.Generator(bits)


_MAKERS: dict[str, Callable[..., Any]] = {
    "complex": complex,
    "set": set,
    "frozenset": frozenset,
    "collections.deque": collections.deque,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": lambda items: collections.Counter(_checked(items, dict)),
    "collections.defaultdict": collections.defaultdict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.Generator": _make_generator,
    "bytearray": lambda data: bytearray(_checked(data, bytes)),
    "range": range,
    "slice": slice,
    "array.array": lambda kind, data: array.array(kind, _checked(data, bytes)),
    "itertools.count": itertools.count,
    "decimal.Decimal": decimal.Decimal,
    "fractions.Fraction": lambda *parts: fractions.Fraction(*(_checked(part, int) for part in parts)),
    "random.Random": _make_random,
    "numpy.array": _make_array,
    "numpy.scalar": lambda *parts: _make_array(*parts)[()],
    "numpy.random.RandomState": _make_random_state,
    "numpy.random.Generator": _make_numpy_generator,
    "types.SimpleNamespace": lambda values: types.SimpleNamespace(**values),
    "numpy.dtype": lambda text: np.dtype(_checked(text, str)),
    "pathlib.PosixPath": lambda text: pathlib.PosixPath(_checked(text, str)),
    "re.compile": re.compile,
}


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_read(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_read(item) for item in node.elts)
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary is unpacked")
        return {_read(key): _read(item) for key, item in zip(node.keys, node.values, strict=True) if key is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_read_number(node.operand)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _named(_dotted(node))
    if isinstance(node, ast.Call) and not node.keywords:
        name, parts = _dotted(node.func), [_read(part) for part in node.args]
        return _MAKERS[name](*parts) if name in _MAKERS else _made_by_class(name, parts)
    raise ValueError(f"{type(node).__name__} is not understood")


def _read_number(node: ast.expr) -> Any:
    value = _read(node)
    if type(value) not in (int, float):
        raise ValueError("a sign before something that is no number")
    return value


def _dotted(node: ast.expr) -> str:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("a name that is none")
    return ".".join([node.id, *reversed(names)])


def _named(name: str) -> Any:
    """A constant by its name. No module is imported for it."""
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in _FACTORIES:
        return _FACTORIES[name]
    owner, _, last = name.rpartition(".")
    found = getattr(torch, last, None) if owner == "torch" else None
    if isinstance(found, _TORCH_NAMES):
        return found
    cls = loaded_class(owner)
    if cls is not None and issubclass(cls, enum.Enum):
        return cls[last]
    raise ValueError(f"{name} is unknown")


def _made_by_class(name: str, parts: list[Any]) -> Any:
    """A named tuple, a numpy scalar, or several flags of an enum."""
    if name.startswith("numpy.") and len(parts) == 1:
        kind = np.dtype(name.removeprefix("numpy.")).type
        if type(parts[0]) in (bool, int, float):
            return kind(parts[0])
    cls = loaded_class(name)
    if cls is not None and issubclass(cls, enum.Flag) and len(parts) == 1:
        return cls(_checked(parts[0], int))
    if cls is not None and issubclass(cls, tuple) and len(getattr(cls, "_fields", ())) == len(parts) > 0:
        return tuple.__new__(cls, parts)
    raise ValueError(f"{name} is unknown")


def loaded_class(name: str) -> type | None:
    """A class by its qualified name, if its module is loaded."""
    module, rest = name, ""
    while module and module not in sys.modules:
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    found: Any = sys.modules.get(module)
    for part in rest.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None
