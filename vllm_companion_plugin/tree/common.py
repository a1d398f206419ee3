"""What a model's code keeps outside of its objects: in its classes and modules, and by switches of torch.

All objects of a process have these in common, and an attached engine would compute with what building left there. So a
publication carries the plain values that loading set. If loading changes anything else there, a model is not shared.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, EnumMeta
from typing import Any, TypeGuard

import torch

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.core.module_tree import CommonValue
from vllm_companion_plugin.errors import NotShareableError, ParityError
from vllm_companion_plugin.tree.capture import capture_values
from vllm_companion_plugin.tree.descriptions import answers, describe_value
from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.states import state_of
from vllm_companion_plugin.tree.times import is_time
from vllm_companion_plugin.tree.values import class_name, loaded_class, value_of

_FOUNDATION = ("torch", "builtins", "abc", "typing")
# Of the code of these packages only what its classes hold themselves is compared: what is behind that serves all models
# (registries, caches of kernels).
_GENERAL = frozenset(("torch", "vllm", "transformers", "numpy", __name__.partition(".")[0], *sys.stdlib_module_names))
_Holder = type | types.ModuleType


@dataclass(slots=True)
class Common:
    """What classes, and modules of the model's own code, hold at one moment.

    Attributes:
        held: texts of plain values, and other objects, by name.
        behind: of all that is behind such objects the texts, and what tells it from another one. It has no entry for
            what the model holds, too.
        switches: of torch, which say how kernels compute.
        met: what the model held, as of `Tree`.
    """

    held: dict[_Holder, dict[str, Any]]
    behind: dict[_Holder, dict[str, Any]]
    switches: dict[str, Any]
    met: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, tree: Tree) -> Common:
        """Of the model that `tree` was captured from."""
        classes = _with_bases([*tree.classes, *(type(live.module) for live in tree.modules)])
        modules = _modules_of(classes, type(tree.modules[0].module))
        classes |= _with_bases(each for module in modules for each in _classes_in(module))
        return cls._of([*modules, *(one for one in classes if packages.top(one.__module__) not in _FOUNDATION)], tree)

    def now(self, tree: Tree) -> Common:
        """The same holders, as they are now that the model is `tree`."""
        found = self._of([*self.held], tree)
        if self._misses(found):  # of what the model holds since then
            before = self._of([*self.held], replace(tree, met=self.met))
            for one, parts in found.behind.items():
                for name in self.behind[one].keys() - parts.keys() & before.behind[one].keys():
                    parts[name] = before.behind[one][name]
        return found

    def _misses(self, now: Common) -> bool:
        return any(parts.keys() - now.behind[one].keys() for one, parts in self.behind.items())

    @classmethod
    def _of(cls, holders: Sequence[_Holder], tree: Tree) -> Common:
        modules = {one.__name__ for one in holders if isinstance(one, types.ModuleType)}
        own = [one for one in holders if isinstance(one, types.ModuleType) or one.__module__ in modules]
        return cls({one: _shown(vars(one)) for one in holders}, _behind(own, tree), _switches(), tree.met)

    def changes(self, now: Common) -> tuple[CommonValue, ...]:
        """The plain values that are others in `now`, and those that an earlier load of this process had set.

        Raises:
            NotShareableError: something else has changed, or had; the first is named.
        """
        found, others = [], []
        for one, before in self.held.items():
            after = now.held[one]
            changed = {*_different(before, after), *_different(self.behind.get(one, {}), now.behind.get(one, {}))}
            earlier = _set_here.get(one, frozenset())
            if changed:
                _set_here[one] = earlier | changed
            for name in sorted(earlier | changed):
                then, text = before.get(name), after.get(name)
                is_known = then is None or isinstance(then, str)
                if is_known and _is_constant(text) and _find(_reference(one)) is one:
                    found.append(CommonValue(_reference(one), name, then, text))
                elif not (isinstance(text, str) and is_time(text)):
                    who = "loading" if name in changed else "loading another model in this process"
                    others.append(f"{who} changed {_name(one)}.{name}, which {_users(one)}")
        others += [
            f"loading changed {name}, which all models of this process share"
            for name in _different(self.switches, now.switches)
        ]
        if others:
            raise NotShareableError(min(others))
        return tuple(found)


@contextmanager
def as_loaded(values: Sequence[CommonValue]) -> Iterator[None]:
    """Set `values` as loading did. If what goes on inside fails, all is as before.

    Raises:
        ParityError: one is not here what it was for the publisher; nothing was set.
    """
    places = [(_holder(value), value) for value in values]
    for one, value in places:
        here = _shown({value.name: vars(one)[value.name]}).get(value.name) if value.name in vars(one) else None
        if here != value.before:
            where = f"{_name(one)}.{value.name}"
            shown, published = _in_words(here), _in_words(value.before)
            text = f"{where}, which {_users(one)}, is {shown} here before loading, and was {published} there."
            raise ParityError(text, where, shown)
    before = [vars(one).get(value.name) for one, value in places]
    for one, value in places:
        setattr(one, value.name, value_of(value.after))
        _set_here[one] = _set_here.get(one, frozenset()) | {value.name}
    try:
        yield
    except BaseException:
        for (one, value), there in zip(places, before, strict=True):
            if value.before is None:
                delattr(one, value.name)
            else:
                setattr(one, value.name, there)
        raise


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else "absent" if value is None else "no plain value"


_set_here: MutableMapping[_Holder, Set[str]] = weakref.WeakKeyDictionary()
"""Names of what loading has set in this process: an engine that is new has something else there."""


def _is_constant(text: Any) -> TypeGuard[str]:
    """Whether a text is that of a value that can be made, and that nobody can change."""
    try:
        return isinstance(text, str) and _cannot_change(value_of(text))
    except ValueError:
        return False


def _cannot_change(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_cannot_change, value))
    return isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, Enum))


def _reference(one: _Holder) -> str:
    return f"{one.__module__}:{one.__qualname__}" if isinstance(one, type) else one.__name__


def _find(reference: str) -> _Holder | None:
    """Return the class or module of a reference, if it is loaded and `Common` may look at it."""
    module, colon, qualified = reference.partition(":")
    if packages.top(module) in (_FOUNDATION if colon else _GENERAL):
        return None
    return loaded_class(f"{module}.{qualified}") if colon else sys.modules.get(module)


def _holder(value: CommonValue) -> _Holder:
    """Return what has a value here.

    Raises:
        ParityError: nothing that is loaded here.
    """
    found = _find(value.holder)
    if found is None:
        where = f"{value.holder}.{value.name}"
        raise ParityError(
            f"{where}, which loading set for the publisher, is no part of the model here.", where, "absent"
        )
    return found


def _switches() -> dict[str, Any]:
    found = {}
    for name, read in _SWITCHES.items():
        with contextlib.suppress(RuntimeError):  # it was set by the other of two ways
            found[name] = read()
    for place in ("cudnn", "cuda.matmul", "mkldnn", "mkldnn.matmul"):
        holder = operator.attrgetter(place)(torch.backends)
        for name in _OF_BACKENDS:
            with contextlib.suppress(AttributeError, RuntimeError, AssertionError):  # this build has none of it
                found[f"torch.backends.{place}.{name}"] = getattr(holder, name)
    return found


_SWITCHES: Mapping[str, Callable[[], Any]] = {
    "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "torch.backends.cuda.flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled,
    "torch.backends.cuda.mem_efficient_sdp_enabled": torch.backends.cuda.mem_efficient_sdp_enabled,
    "torch.backends.cuda.math_sdp_enabled": torch.backends.cuda.math_sdp_enabled,
    "torch.backends.cuda.cudnn_sdp_enabled": torch.backends.cuda.cudnn_sdp_enabled,
}
_OF_BACKENDS = (
    *("enabled", "benchmark", "deterministic", "allow_tf32", "fp32_precision", "allow_fp16_accumulation"),
    *("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
)


def _different(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        text = after.get(name)
        if before.get(name) != text and not (isinstance(text, str) and is_time(text)):
            yield name


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _Object(value) if issubclass(type(value), _CODE) else describe_value(value) or _Object(value)
        for name, value in list(values.items())
        if not (name.startswith("__") or issubclass(type(value), types.ModuleType))
    }


_CODE = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property, types.MemberDescriptorType)


@dataclass(slots=True)
class _Object:
    """Equal to itself alone, whatever its class says."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value


def _behind(holders: Sequence[_Holder], tree: Tree) -> dict[_Holder, dict[str, Any]]:
    found = capture_values([(_name(one), dict(_values_of(one))) for one in holders], tree)
    behind: list[dict[str, Any]] = [dict(live.attributes) for live in found.modules]
    for (index, name), value in found.opaque.items():
        behind[index][name] = _Object(value), state_of(value)
    for slot in found.slots():
        behind[slot.module][slot.name] = _Object(slot.tensor), _writes_of(slot.tensor)
    return dict(zip(holders, behind, strict=True))


def _writes_of(tensor: torch.Tensor) -> int | str | None:
    """What becomes another one when somebody writes to `tensor`. Of what was made for inference nothing is counted."""
    if not tensor.is_inference():
        return tensor._version
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    with torch.inference_mode():
        return state_of(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _values_of(one: _Holder) -> Iterator[tuple[str, Any]]:
    """What `one` holds, with the functions in their wrappings, and attributes of members."""
    for name, value in list(vars(one).items()):
        if name.startswith("__") or issubclass(type(value), (type, types.ModuleType, types.MemberDescriptorType)):
            continue
        if not answers(value):
            yield name, value
        elif isinstance(value, (staticmethod, classmethod)):
            yield name, value.__func__
        elif isinstance(value, property):
            yield from ((f"{name}.{part}", getattr(value, part)) for part in ("fget", "fset") if getattr(value, part))
        elif isinstance(value, functools.cached_property):
            yield name, value.func
        elif not isinstance(value, Enum):
            yield name, value
    members: Mapping[str, Any] = one.__members__ if isinstance(one, EnumMeta) else {}
    for name, member in members.items():
        yield from ((f"{name}.{part}", held) for part, held in vars(member).items() if not part.startswith("_"))


def _modules_of(classes: Iterable[type], model: type) -> list[types.ModuleType]:
    """The modules of the model's own code: those of its classes, and those that these modules use.

    What packages with a version keep (layers of einops, pydantic) serves all models, but for the package of `model`.
    """
    found: dict[str, types.ModuleType] = {}
    waiting = [each.__module__ for each in classes]
    of_model = {packages.top(base.__module__) for base in model.__mro__}
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if module is None or name in found or not _is_own(name):
            continue
        if packages.top(name) not in of_model and _is_installed(module):
            continue
        found[name] = module
        waiting += map(packages.module_of, list(vars(module).values()))
    return list(found.values())


def _classes_in(module: types.ModuleType) -> list[type]:
    values = list(vars(module).values())
    return [value for value in values if issubclass(type(value), type) and value.__module__ == module.__name__]


def _with_bases(classes: Iterable[type]) -> set[type]:
    return {base for each in classes for base in each.__mro__}


def _is_own(module: str) -> bool:
    return packages.top(module) not in _GENERAL


def _is_installed(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or packages.is_installed(file)


def _users(one: _Holder) -> str:
    return "its objects share" if isinstance(one, type) else "all models of this code share"


def _name(one: _Holder) -> str:
    return class_name(one) if isinstance(one, type) else one.__name__
