"""What building gave to a model, or set beside it, that the model's own code uses while it loads.

Values that building made are each engine's own, as they may follow from its flags. If the code that loads uses one,
then weights may follow from it, too: so an engine that attaches has to have built the same. vLLM's own code uses only
what the key names.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.behind import Cached, behind
from vllm_companion_plugin.tree.capture import MODULE_INTERNALS, capture, capture_values
from vllm_companion_plugin.tree.common import values_of
from vllm_companion_plugin.tree.holders import (
    Holder,
    acts_for_callers,
    find,
    is_own,
    mentioned_in,
    of_class,
    reference_of,
)
from vllm_companion_plugin.tree.live import Tree, full_name, plain_tensors
from vllm_companion_plugin.tree.states import parts_of, state_of
from vllm_companion_plugin.tree.times import is_time
from vllm_companion_plugin.tree.values import is_value

_CONFIGURATION = "transformers.configuration_utils"


class Uses:
    """Of one model, from before it is built until it is loaded.

    Args:
        model: the class that will be built; None if that is not known: then nobody sees what building sets beside it.

    Attributes:
        set_by_building: as of `Manifest`.
        are_looked_for: whether the model has code that serves not all models, so that `noting` should be used while it
            loads.
    """

    are_looked_for = False

    def __init__(self, model: type | None) -> None:
        self._holders = [] if model is None else [one for one in of_class(model) if is_own(one)]
        self._before = _values_in(self._holders, Tree([]))
        self.set_by_building: dict[str, str] = {}
        self._texts = _Texts()
        self._met: dict[int, tuple[str, str]] = {}
        # By id: the path of a module, and what precedes the names of its attributes, or of a tensor's of it.
        self._places: dict[int, tuple[str, str]] = {}
        self._read: dict[str, set[str]] = {}

    def built(self, tree: Tree, holders: Iterable[Holder]) -> None:
        """The model was built, and is `tree`; `holders` are its classes and modules."""
        now = _values_in(self._holders, tree)
        self.set_by_building = dict(now.items() - self._before.items())
        self.are_looked_for = any(map(is_own, holders))
        if self.are_looked_for:
            self._texts, self._met = _Texts.of(tree), tree.met
            mentioned = _mentioned(holders)
            is_blind = not mentioned.isdisjoint(_READING_UNSEEN)
            for live in tree.modules:
                if is_blind or _looks_up(type(live.module)) is not _looks_up(nn.Module):  # nobody sees what it reads
                    self._read[live.path] = {*(packages.dictionary(live.module).keys() - MODULE_INTERNALS), _NAMES}
            for slot in tree.slots() if is_blind else ():
                names = {f"{slot.name}.{name}" for name in (*slot.tensor.__dict__, _NAMES)}
                self._read[tree.modules[slot.module].path] |= names
            self._read.setdefault("", set()).update(name for word, name in _STATES.items() if word in mentioned)
            # Not kept alive, so another object may get the id, which costs no more than that its reads count.
            self._places = {id(slot.tensor): (tree.modules[slot.module].path, f"{slot.name}.") for slot in tree.slots()}
            self._places |= {id(live.module): (live.path, "") for live in tree.modules}

    def noting(self, read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        """A way to read attributes, of modules or of tensors, that notes what the model's own code reads."""

        def get(held: Any, name: str) -> Any:
            try:
                found = read(held, name)
            except AttributeError:  # of a tensor or a child, or it is not there, and code may ask for that
                if (place := self._places.get(id(held))) is not None:
                    self._note(held, name, *place, read(held, "__dict__"), None, is_there=False)
                raise
            if name not in MODULE_INTERNALS or (found and name.endswith("hooks")):
                place = self._places.get(id(held))
                if place is not None:
                    self._note(held, name, *place, read(held, "__dict__"), found)
            return found

        return get

    def _note(
        self, held: Any, name: str, path: str, prefix: str, own: dict[str, Any], found: Any, *, is_there: bool = True
    ) -> None:
        kind: Any = type(held)
        known = self._read.setdefault(path, set())
        if name in MODULE_INTERNALS:  # hooks: who looks at them calls them
            known |= {f"{name}[{position}]" for position in range(len(found))}
            return
        if name in _WHOLE:
            new = {prefix + each for each in (*(own.keys() - MODULE_INTERNALS), _NAMES)}
            is_asked = packages.top(_module_of(sys._getframe(2))) != "torch"  # which looks up names
        elif is_there:
            new, is_asked = {prefix + name}, name in own or _may_be_its_own(kind, name)
        else:
            new, is_asked = {prefix + name}, name not in own.get("_modules", ())
        if is_asked and not new <= known and (_is_own_code(found) or _is_read_by_own_code()):
            known |= new
            found = found() if type(found) is weakref.ref else found
            if (first := self._met.get(id(found))) is not None:  # what is in it is noted there
                self._read.setdefault(first[0], set()).add(first[1])

    def loaded(self, drawn_on: Iterable[str] = ()) -> None:
        """The model was loaded. `drawn_on`: kinds of devices for which operators drew random numbers meanwhile."""
        if self.are_looked_for:
            built = self._texts.by_path[""]
            drawn = {name for name, state in _random_states().items() if built.get(name) != state}
            drawn |= {_RANDOM + ("torch" if kind == "cpu" else f"torch.{kind}") for kind in drawn_on}
            self._read.setdefault("", set()).update(drawn)

    def used(self) -> dict[str, str]:
        """As of `Manifest.used`."""
        found: dict[str, str] = {}
        waiting = [(path, name) for path, names in self._read.items() for name in names]
        seen = {*waiting}
        while waiting:
            path, name = waiting.pop()
            below = self._texts.below(path, name) or {name: _ABSENT}
            found |= {f"{path}:{full}": text for full, text in below.items()}
            new = {place for place in map(_referred, below.values()) if place} - seen
            seen |= new
            waiting += new
        return found


@dataclass(slots=True)
class _Texts:
    """What building made.

    Attributes:
        by_path: of each module, by path, the texts of values by name, also of plain ones behind what hangs on tensors,
            and the forms of tensors.
        keyed: which of them are configurations of Transformers (path and name).
    """

    by_path: dict[str, dict[str, str]] = field(default_factory=dict)
    keyed: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, tree: Tree) -> _Texts:
        texts = {live.path: live.attributes.copy() for live in tree.modules}
        slots = [(tree.modules[slot.module].path, slot) for slot in tree.slots()]
        hung = capture_values([(slot.name, slot.tensor.__dict__) for _, slot in slots], tree)
        for (path, slot), live in zip(slots, hung.modules, strict=True):
            texts[path][slot.name] = _form(slot.tensor)
            texts[path][f"{slot.name}.{_NAMES}"] = " ".join(sorted(slot.tensor.__dict__))
            texts[path] |= {f"{slot.name}.{name}": text for name, text in live.attributes.items() if is_value(text)}
        for live in tree.modules:
            texts[live.path][_NAMES] = " ".join(sorted(packages.dictionary(live.module).keys() - MODULE_INTERNALS))
        opaque = {
            (tree.modules[index].path, name): value
            for (index, name), value in tree.opaque.items()
            if packages.top(type(value).__module__) not in _HAVE_FLAGS
        }
        inside = capture_values([(name, _parts_of(value)) for (_, name), value in opaque.items()], tree)
        for ((path, name), value), live in zip(opaque.items(), inside.modules, strict=True):
            texts[path] |= {f"{name}.(in it).{part}": text for part, text in live.attributes.items()}
            if (state := state_of(value)) is not None:
                texts[path][f"{name}.(state)"] = state
        texts[""] |= _random_states()
        keyed = {
            (live.path, name)
            for live in tree.modules
            for name, value in packages.dictionary(live.module).items()
            if _is_configuration(value)
        }
        return cls(texts, keyed)

    def below(self, path: str, name: str) -> dict[str, str]:
        """The value of this name, and all that is in it. What is hung on parameters is read there."""
        texts = self.by_path.get(path, {})
        if (text := texts.get(name, "")).startswith(_PARAMETER):
            return {name: text}
        parts, is_keyed = tuple(f"{name}{sign}" for sign in _SIGNS), (path, name) in self.keyed
        return {
            full: text
            for full, text in texts.items()
            if (full == name or full.startswith(parts))
            # What a configuration of Transformers notes for itself, as where it was read.
            and not (is_time(text) or (is_keyed and full.rpartition(".")[2].startswith("_")))
        }


_NAMES = "(names)"
_RANDOM = "random numbers of "
_ABSENT = "absent"
_PARAMETER = "parameter "
_SIGNS = ".[{"
"""What is between the name of an object and that of a part of it."""
_HAVE_FLAGS = ("vllm", "transformers")
"""Objects of these packages that no walk looks into are configurations, whose fields are in the key, or watched."""


def _random_states() -> dict[str, str]:
    """What decides which random numbers come next, by who makes them."""
    states: dict[str, Any] = {"numpy": np.random.get_state(), "torch": _bytes_of(torch.get_rng_state())}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["torch.cuda"] = _bytes_of(torch.cuda.get_rng_state())
    states["torch's seed"] = torch.initial_seed()
    return {_RANDOM + who: hashlib.sha256(repr(state).encode()).hexdigest()[:16] for who, state in states.items()}


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _parts_of(value: Any) -> dict[str, Any]:
    """As `parts_of`. Of PyTorch's own objects what is called, as by hooks: they also have numbers of the process."""
    parts = parts_of(value)
    is_torchs = packages.top(type(value).__module__) == "torch"
    return {name: part for name, part in parts.items() if callable(part)} if is_torchs else parts


def _form(tensor: torch.Tensor) -> str:
    kind = _PARAMETER if isinstance(tensor, nn.Parameter) else "tensor "
    return kind + ("lazy" if is_lazy(tensor) else f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}")


def _referred(text: str) -> tuple[str, str] | None:
    """The place (path and name) of which a text says that the object is there, unless that is a module."""
    path, _, name = text.rpartition(" @")[2].partition(":")
    return (path, name) if " @" in text and name and not is_value(text) else None


def _values_in(holders: Sequence[Holder], known: Tree) -> dict[str, str]:
    """The texts of what is in classes and modules, and in all that these hold but for modules of `known`, by place."""
    held = behind([(reference_of(one), dict(values_of(one))) for one in holders], replace(known, met={}))
    of_model = {id(slot.tensor) for slot in known.slots()}
    return {
        f"{reference_of(one)}#{name}": text
        for one, entries in zip(holders, held, strict=True)
        for name, entry in entries.items()
        if (text := _text_of_entry(entry, of_model)) is not None and not is_time(text)
    }


def _text_of_entry(entry: Any, of_model: set[int]) -> str | None:
    if isinstance(entry, str):
        return entry if is_value(entry) else None
    if isinstance(entry, Cached) or id(entry.value) in of_model:
        return None
    if isinstance(entry.value, torch.Tensor):
        _, _, *form = entry.state  # but for how often it was written
        return f"tensor {hashlib.sha256(repr(form).encode()).hexdigest()[:16]}"
    return entry.state if isinstance(entry.state, str) else None


_READING_UNSEEN = frozenset(
    (
        *("__getattribute__", "getattr_static", "getmembers_static", "__reduce_ex__", "__getstate__"),
        *("get_referents", "get_referrers", "get_objects", "py_object"),
    )
)
"""Names by which code reads attributes where nobody sees it: it may have read all."""
_STATES = {
    "initial_seed": f"{_RANDOM}torch's seed",
    "default_generator": f"{_RANDOM}torch's seed",
    "get_rng_state": f"{_RANDOM}torch",
    "get_state": f"{_RANDOM}numpy",
}
"""Names by which code reads what decides about random numbers, without drawing any."""


def _mentioned(holders: Iterable[Holder]) -> set[str]:
    """What the functions of the model's own code mention."""
    modules = (one for one in holders if isinstance(one, types.ModuleType) and is_own(one))
    return {name for module in modules for name in mentioned_in(module)}


_WHOLE = frozenset(("__dict__", "__reduce_ex__", "__getstate__"))
"""Names by which all values of an object are asked for, to look at or to copy them."""


def _looks_up(cls: Any) -> Any:
    """The function by which objects look up their attributes."""
    return next(vars(base)["__getattribute__"] for base in cls.__mro__ if "__getattribute__" in vars(base))


@functools.cache
def _may_be_its_own(cls: Any, name: str) -> bool:
    """Whether an object may have a value of its own where others have that of `cls`. Of methods that says nothing."""
    found = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if isinstance(found, types.MemberDescriptorType):
        return True
    is_method = callable(found) or isinstance(found, (staticmethod, classmethod)) or hasattr(type(found), "__set__")
    return not (is_method or (name.startswith("__") and name.endswith("__")))


def _is_configuration(value: Any) -> bool:
    return any(base.__module__ == _CONFIGURATION for base in type(value).__mro__)


def _is_own_code(value: Any) -> bool:
    """Whether `value` runs code that serves not all models if it is called or asked: it uses what it holds."""
    while type(value) is functools.partial:
        value = value.func
    if type(value) is types.MethodType:
        return _is_own_code(value.__func__) or _is_own_code(value.__self__)
    if isinstance(value, (nn.Module, torch.Tensor)):  # what is read of these is seen
        return False
    return is_own(packages.module_of(value) if type(value) is types.FunctionType else type(value))


def _is_read_by_own_code() -> bool:
    """Whether the nearest caller that acts on its own account is code that serves not all models."""
    frame = sys._getframe(3)  # past `get`
    while (caller := frame.f_back) is not None and acts_for_callers(_module_of(frame)):
        frame = caller
    return is_own(_module_of(frame))


def _module_of(frame: types.FrameType) -> str:
    """The name of the module whose code runs; "" if it is of none."""
    return frame.f_globals.get("__name__") or ""


def check(manifest: Manifest, model: nn.Module) -> None:
    """Check that building gave this model what loading used of the published one. Nothing has been changed yet.

    Raises:
        ParityError: it is another value; it is named.
    """
    if not (manifest.set_by_building or manifest.used):
        return
    with plain_tensors():
        tree = capture(model)
        texts = _Texts.of(tree)
        holders = {place.partition("#")[0]: None for place in manifest.set_by_building}
        beside = _values_in([one for one in map(find, holders) if one is not None], tree)
    for place, there in sorted(manifest.set_by_building.items()):
        if (here := beside.get(place, _ABSENT)) != there:
            where = place.replace(":", ".").replace("#", ".")
            text = f"{where} is {here} here after building and {there} there, and all models of this code share it."
            raise ParityError(text, where, here)
    here_used: dict[str, str] = {}
    wholes: set[str] = set()
    for place in sorted(manifest.used):
        if not any(place[:end] in wholes for end, sign in enumerate(place) if sign in _SIGNS):  # else a part of one
            if not manifest.used[place].startswith(_PARAMETER):
                wholes.add(place)
            path, _, name = place.partition(":")
            here_used |= {f"{path}:{full}": text for full, text in texts.below(path, name).items()}
    for place in sorted(manifest.used.keys() | here_used.keys()):
        here, there = here_used.get(place, _ABSENT), manifest.used.get(place, _ABSENT)
        if here != there:
            path, _, name = place.partition(":")
            where = full_name(path, name)
            text = f"{where} is built as {here} here and as {there} in the published model, and loading uses it."
            raise ParityError(text, where, here)
