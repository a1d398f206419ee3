"""How a manifest says what loading changed: names of values, and texts of values that are no plain ones, and back.

Plain values have the texts of values.py. The text of anything else (a function, an object that was met before, a
container of objects) says what it is. What needs no other object is made of its text here; what does need one is
looked up in a live model (live_values.py).
"""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from vllm_companion_plugin.tree.capture import MODULE_INTERNALS
from vllm_companion_plugin.tree.classes import is_opaque
from vllm_companion_plugin.tree.descriptions import describe_value
from vllm_companion_plugin.tree.live import NO_BUFFER, NO_PARAMETER
from vllm_companion_plugin.tree.values import class_name, loaded_class, value_of

CHILDREN = "_modules"
"""Among the values that loading changed: names of a module's children, in their order."""
CLASS = "__class__"
"""Among them: the class that loading gave to a module that building made of another one."""
AS_BUILT = "as built: "
"""Before the text of what building has to have made here, too."""
OF_TENSOR = "!"
"""After the name of a tensor that has to be built the same."""
KEPT = "?"
"""After the name of a value of which loading kept a part when it put another one there."""
PART = re.compile(r"(?P<parent>.+?)(?:\.(?P<name>[^.\[\]]+)|\[(?P<key>[^\[\]]+)\])")
"""The name of a part of a value: the name of the value that holds it, then the part's own name or its key."""
REFERENCE = re.compile(r"[\w.<>]+ @.*:.*", re.DOTALL)
"""The text of an object that was met before. No value has such a text: that of a string begins with a quote."""
METHOD = re.compile(r"(?P<method>method [\w.]+) of (?P<owner>.*)", re.DOTALL)
"""The text of a method of a module in the tree, and where that module is."""
CONTAINER = re.compile(
    r"(?P<kind>[\w.]+) of (?P<size>\d+)(?: at most (?P<most>\d+))?(?: in the order (?P<order>.*))?", re.DOTALL
)
"""The text of a container of more than plain values; that of a dict goes on with its keys if loading changed them."""
_CONTAINERS: dict[str, Callable[[], Any]] = {
    "builtins.list": list,
    "builtins.dict": dict,
    "collections.deque": collections.deque,
    "collections.OrderedDict": collections.OrderedDict,
}
_PARTIAL = "partial of "
_LARGEST_TUPLE = 1 << 16


def reference(kind: type, first: str) -> str:
    """The text of an object that was met first at `first`, a path of a module, a colon and a name."""
    return f"{class_name(kind)} @{first}"


def in_order(text: str, keys: Sequence[str]) -> str:
    """The text of a dict, followed by the texts of its keys."""
    return f"{text} in the order {list(keys)!r}"


def of_tensor(name: str) -> str:
    """The name under which it is noted how a tensor was built."""
    return name + OF_TENSOR


def keeps_part(name: str, built: str, text: str) -> dict[str, tuple[str, str]]:
    """What is noted if loading put the container of `text` where building had put that of `built`, and kept a part.

    A part that loading kept may follow from flags of the engine: others have to have built the same.
    """
    try:
        before, after = (set(_leaves(value_of(each), ())) for each in (built, text))
    except ValueError:
        return {}
    return {name + KEPT: (as_built(built), "a container of which loading kept a part")} if before & after else {}


def _leaves(value: Any, keys: tuple[str | None, ...]) -> Iterator[tuple[tuple[str | None, ...], str | None]]:
    """The values in containers, by the keys that lead there."""
    if isinstance(value, types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, (*keys, describe_value(key)))
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque, bytearray, array.array)):
        for part in value:
            yield from _leaves(part, keys)
    else:
        yield keys, describe_value(value)


def as_built(text: str) -> str:
    """The text of a value before loading, for a value that has to be the same in an engine that was only built."""
    return AS_BUILT + text


def holders_of(name: str) -> Iterator[str]:
    """The names of what holds the value of this name, the nearest first."""
    while (part := _HELD.fullmatch(name)) is not None:
        name = part["parent"]
        yield name


_HELD = re.compile(r"(?P<parent>.+?)(?:\.[^.\[\]]+|\[[^\[\]]+\]|\{\d+\})")


def keeps_parts(text: str | None) -> bool:
    """Whether parts of a value of this text are values of their own."""
    return text is not None and (CONTAINER.fullmatch(text) is not None or _is_data(loaded_class(text) or object))


def is_restorable(text: str | None) -> bool:
    """Whether a value of this text, or its absence, can be brought about in another model."""
    if text is None or text in (NO_PARAMETER, NO_BUFFER) or REFERENCE.fullmatch(text) or METHOD.fullmatch(text):
        return True
    try:
        made_of(text)
    except ValueError:
        return False
    return True


def without_known(values: dict[str, tuple[str | None, str | None]]) -> dict[str, tuple[str | None, str | None]]:
    """Changed values without the parts of functions that each engine finds by their names: these have them there."""
    found = tuple(
        f"{name}."
        for name, (_, text) in values.items()
        if text is not None and text.startswith("function ") and is_restorable(text)
    )
    return {name: pair for name, pair in values.items() if not name.startswith(found)} if found else values


def can_be_put(name: str) -> bool:
    """Whether a value can be put where a module has nothing of this name."""
    part = PART.fullmatch(name)
    if part is None:
        return name.isidentifier() and name not in MODULE_INTERNALS and not _is_pythons(name)
    if part["parent"] in MODULE_INTERNALS:  # a hook, whose key is a number of the process
        return False
    if part["name"] is not None:
        return not part["name"].startswith("__")
    if part["parent"].endswith(".__closure__"):  # of a function that is another one without a name of its own
        return False
    try:
        value_of(part["key"])
    except ValueError:
        return False
    return True


def _is_pythons(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def made_of(text: str) -> Any:
    """The value of a text that needs no other object. Raises `ValueError` if there is none."""
    if (container := CONTAINER.fullmatch(text)) is not None and container["kind"] in _CONTAINERS:
        if (most := container["most"]) is not None:
            return collections.deque(maxlen=int(most))
        return _CONTAINERS[container["kind"]]()
    if container is not None and (items := _tuple_of(container["kind"], int(container["size"]))) is not None:
        return items
    if text.startswith("class ") and (cls := loaded_class(text.removeprefix("class "))) is not None:
        return cls
    if text.startswith("function "):
        return loaded_function(text.removeprefix("function "))
    if text.startswith(_PARTIAL):
        inner = text.removeprefix(_PARTIAL)
        if inner.startswith(("function ", _PARTIAL)):
            return functools.partial(made_of(inner))  # its arguments are values of their own
    cls = loaded_class(text)
    if cls is not None and _is_data(cls):
        return object.__new__(cls)  # its fields are values of their own
    return value_of(text)


def loaded_function(name: str) -> Any:
    """A function by its name. Raises `ValueError` unless a loaded module, or a class of it, has it."""
    module, rest = name, ""
    while module and module not in sys.modules:
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    here: Any = sys.modules.get(module)
    last = rest.rpartition(".")[2]
    owner = loaded_class(name.rpartition(".")[0])
    # Those of torch say that they are of a class, which has no such name.
    for holder in (here, owner):
        found: Any = vars(holder).get(last) if holder is not None else None
        if isinstance(found, staticmethod):
            found = found.__func__
        is_function = isinstance(found, (types.FunctionType, types.BuiltinFunctionType))
        if is_function and f"{found.__module__}.{found.__qualname__}" == name:
            return found
    raise ValueError(f"{name} is no function that is loaded")


def _is_data(cls: type) -> bool:
    """Whether objects of `cls` are nothing but their fields, so that one can be made without its constructor."""
    made_by: Any = cls.__new__
    is_plain = made_by is object.__new__ and not hasattr(cls, "__del__") and not issubclass(cls, nn.Module)
    return is_plain and dataclasses.is_dataclass(cls) and not is_opaque(cls)


def _tuple_of(kind: str, size: int) -> tuple[None, ...] | None:
    """A tuple, or a named one, whose items are put there later."""
    cls = loaded_class(kind)
    if cls is None or not issubclass(cls, tuple) or size > _LARGEST_TUPLE:
        return None
    if cls is tuple or len(getattr(cls, "_fields", ())) == size:
        made: tuple[None, ...] = tuple.__new__(cls, (None,) * size)
        return made
    return None
