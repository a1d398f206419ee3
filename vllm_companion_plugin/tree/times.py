"""Numbers that come from a clock, and what is computed from them. They tell when and how fast a model was loaded, and
nothing of the model: one that loading leaves in it is the engine's own. A container of them is a value like any other,
as what else is in it may be the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.tree.values import Marked, class_name


class Seconds(Marked, float):
    """A time, or a span of it. Whatever arithmetic makes of it is one, too."""

    __slots__ = ()


class Ticks(Marked, int):
    """The same, of a clock that counts in whole numbers."""

    __slots__ = ()


_OPERATIONS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
_NAMES = (
    *(f"__{name}__" for name in _OPERATIONS),
    *(f"__r{name}__" for name in _OPERATIONS),
    *("__neg__", "__pos__", "__abs__", "__round__"),
)


def from_clock(value: Any) -> Any:
    """`value`, if it is a number, as one that comes from a clock."""
    if type(value) is float:
        return Seconds(value)
    if type(value) is int:
        return Ticks(value)
    return value


def plain(value: Any) -> Any:
    """A number that comes from a clock as a plain one; anything else as it is."""
    if isinstance(value, Seconds):
        return float(value)
    return int(value) if isinstance(value, Ticks) else value


def is_time(text: str | None) -> bool:
    """Whether this is the text of a number that comes from a clock."""
    return text is not None and text.startswith(_TEXTS)


def _marked(cls: type, name: str) -> Callable[..., Any]:
    operation = getattr(cls, name)

    def compute(self: Any, *others: Any) -> Any:
        if cls is int and others and isinstance(others[0], float):
            return from_clock(getattr(float, name)(float(self), *others))
        return from_clock(operation(self, *others))

    return compute


for _cls, _base in ((Seconds, float), (Ticks, int)):
    for _name in _NAMES:
        setattr(_cls, _name, _marked(_base, _name))

_TEXTS = tuple(f"{class_name(cls)}(" for cls in (Seconds, Ticks))
