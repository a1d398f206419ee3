"""What building gave to a model, or set beside it, that the model's own code uses while it loads.

Values that building made are each engine's own, as they may follow from its flags. If the code that loads uses one,
then weights may follow from it, too: so an engine that attaches has to have built the same. vLLM's own code uses only
what the key names.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.capture import MODULE_INTERNALS, capture, capture_values
from vllm_companion_plugin.tree.classes import slot_members
from vllm_companion_plugin.tree.common import values_of
from vllm_companion_plugin.tree.holders import (
    Holder,
    acts_for_callers,
    find,
    is_own,
    of_class,
    reference_of,
)
from vllm_companion_plugin.tree.live import Tree, full_name, plain_tensors
from vllm_companion_plugin.tree.times import is_time
from vllm_companion_plugin.tree.values import value_of

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
        self._before = _plain_in(self._holders, Tree([]))
        self.set_by_building: dict[str, str] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._met: dict[int, tuple[str, str]] = {}
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        # By id: the path of a module, and what precedes the names of its attributes, or of a parameter's of it.
        self._places: dict[int, tuple[str, str]] = {}
        self._read: dict[str, set[str]] = {}

    def built(self, tree: Tree, holders: Iterable[Holder]) -> None:
        """The model was built, and is `tree`; `holders` are its classes and modules."""
        now = _plain_in(self._holders, tree)
        self.set_by_building = dict(now.items() - self._before.items())
        self.are_looked_for = any(map(is_own, holders))
        if self.are_looked_for:
            self._modules = {live.path: weakref.ref(live.module) for live in tree.modules}
            self._texts, self._met = _texts_of(tree)
            # Not kept alive, so another object may get the id, which costs no more than that its reads count.
            self._places = {id(slot.tensor): (tree.modules[slot.module].path, f"{slot.name}.") for slot in tree.slots()}
            self._places |= {id(live.module): (live.path, "") for live in tree.modules}

    def noting(self, read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        """A way to read attributes, of modules or of parameters, that notes what the model's own code reads."""

        def get(held: Any, name: str) -> Any:
            found = read(held, name)
            if name not in MODULE_INTERNALS and (place := self._places.get(id(held))) is not None:
                self._note(held, name, *place, read(held, "__dict__"), found)
            return found

        return get

    def _note(self, held: Any, name: str, path: str, prefix: str, own: dict[str, Any], found: Any) -> None:
        known, cls = self._read.setdefault(path, set()), type(held)
        if name in _WHOLE:
            new = {prefix + each for each in own.keys() - MODULE_INTERNALS}
            is_asked = packages.top(sys._getframe(2).f_globals.get("__name__") or "") != "torch"  # which looks up names
        else:
            new, is_asked = {prefix + name}, name in own or name in dict(slot_members(cls))  # type: ignore[arg-type]
        if is_asked and not new <= known and _is_read_by_own_code():
            known |= new
            if (first := self._met.get(id(found))) is not None:  # what is in it is noted there
                self._read.setdefault(first[0], set()).add(first[1])

    def used(self) -> dict[str, str]:
        """As of `Manifest.used`."""
        found: dict[str, str] = {}
        for path, names in self._read.items():
            module = self._modules[path]()
            held = {} if module is None else packages.dictionary(module)
            for name in names:
                is_keyed = _is_configuration(held.get(name))
                for full, text in _below(name, self._texts[path]):
                    # What a configuration of Transformers notes for itself, as where it was read.
                    if not (is_time(text) or (is_keyed and full.rpartition(".")[2].startswith("_"))):
                        found[f"{path}:{full}"] = text
        return found


def _plain_in(holders: Iterable[Holder], known: Tree) -> dict[str, str]:
    """The texts of plain values in classes and modules and all that these hold, but for what is `known`, by place."""
    found = capture_values([(reference_of(one), dict(values_of(one))) for one in holders], known)
    return {
        f"{live.path}#{name}": text
        for live in found.modules
        for name, text in live.attributes.items()
        if _is_plain(text) and not is_time(text)
    }


_WHOLE = frozenset(("__dict__", "__reduce_ex__", "__getstate__"))
"""Names by which all values of an object are asked for, to look at or to copy them."""


def _is_plain(text: str) -> bool:
    try:
        value_of(text)
    except ValueError:
        return False
    return True


def _below(name: str, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The value of this name, and all that is in it."""
    parts = tuple(f"{name}{sign}" for sign in ".[{")
    return ((full, text) for full, text in texts.items() if full == name or full.startswith(parts))


def _texts_of(tree: Tree) -> tuple[dict[str, dict[str, str]], dict[int, tuple[str, str]]]:
    """Of each module, by path, the texts of values by name, also of plain ones behind what hangs on tensors; and where
    each object was met first (path and name), by id."""
    texts = {live.path: live.attributes.copy() for live in tree.modules}
    slots = [(tree.modules[slot.module].path, slot) for slot in tree.slots()]
    hung = capture_values([(slot.name, slot.tensor.__dict__) for _, slot in slots], tree)
    for (path, slot), live in zip(slots, hung.modules, strict=True):
        texts[path] |= {f"{slot.name}.{name}": text for name, text in live.attributes.items() if _is_plain(text)}
    return texts, tree.met


def _is_configuration(value: Any) -> bool:
    return any(base.__module__ == _CONFIGURATION for base in type(value).__mro__)


def _is_read_by_own_code() -> bool:
    """Whether the nearest caller that acts on its own account is code that serves not all models."""
    frame = sys._getframe(3)  # past `get`
    while (caller := frame.f_back) is not None and acts_for_callers(frame.f_globals.get("__name__") or ""):
        frame = caller
    return is_own(frame.f_globals.get("__name__") or "")


def check(manifest: Manifest, model: nn.Module) -> None:
    """Check that building gave this model what loading used of the published one. Nothing has been changed yet.

    Raises:
        ParityError: it is another value; it is named.
    """
    if not (manifest.set_by_building or manifest.used):
        return
    with plain_tensors():
        tree = capture(model)
        texts, _ = _texts_of(tree)
        holders = {place.partition("#")[0]: None for place in manifest.set_by_building}
        beside = _plain_in([one for one in map(find, holders) if one is not None], tree)
    for place, there in manifest.set_by_building.items():
        if (here := beside.get(place, "absent")) != there:
            where = place.replace(":", ".").replace("#", ".")
            text = f"{where} is {here} here after building and {there} there, and all models of this code share it."
            raise ParityError(text, where, here)
    for place, there in manifest.used.items():
        path, _, name = place.partition(":")
        if (here := texts.get(path, {}).get(name, "absent")) != there:
            where = full_name(path, name)
            text = f"{where} is built as {here} here and as {there} in the published model, and loading uses it."
            raise ParityError(text, where, here)
