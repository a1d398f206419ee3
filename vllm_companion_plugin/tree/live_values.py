"""Values of a live model that was only built, set one by one to what loading made of them at the publisher.

Each is set where it is in this model, which is known from a walk of it. An object that somebody else may have, too, is
changed in place where that is possible. A value that loading changed in part has to be built the same here.
"""

from __future__ import annotations

import array
import collections
import contextlib
import functools
import random
import re
import types
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import AddedSlot, Observed, TensorKind
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.capture import MODULE_INTERNALS
from vllm_companion_plugin.tree.classes import MUTABLE
from vllm_companion_plugin.tree.descriptions import describe_value, key_texts
from vllm_companion_plugin.tree.live import NO_BUFFER, NO_PARAMETER, LiveModule, Place, Tree, full_name
from vllm_companion_plugin.tree.notation import (
    AS_BUILT,
    CHILDREN,
    CLASS,
    CONTAINER,
    KEPT,
    METHOD,
    OF_TENSOR,
    PART,
    REFERENCE,
    can_be_put,
    loaded_function,
    made_of,
)
from vllm_companion_plugin.tree.values import loaded_class, value_of

_KEYWORDS = ".keywords"


class LiveValues:
    """Changes values of one captured tree."""

    def __init__(self, tree: Tree) -> None:
        self.by_path = {live.path: live for live in tree.modules}
        # By index of the module, and name.
        self._places: dict[int, dict[str, Place]] = collections.defaultdict(dict)
        for (index, name), place in tree.places.items():
            self._places[index][name] = place
        self._slots = {f"{tree.modules[slot.module].path}:{slot.name}": slot.tensor for slot in tree.slots()}
        # By id: what replaced an object that cannot be changed in place, and that object, which keeps the id valid.
        self._replaced: dict[int, tuple[Any, Any]] = {}

    def check_as_built(self, live: LiveModule, observed: Observed) -> None:
        """Raise `ParityError` if building made something else here that loading only moved."""
        for name, (built, _) in observed.values.items():
            if built is None or not built.startswith(AS_BUILT) or name.endswith(OF_TENSOR):
                continue
            place, there = self._place(live, name.removesuffix(KEPT)), built.removeprefix(AS_BUILT)
            here = None if place is None else describe_value(place.value) or there  # an object is what is in it
            if here != there:
                full = full_name(live.path, name.removesuffix(KEPT))
                raise ParityError(
                    f"{full} is built as {here or 'absent'} here and as {there} in the published model.", full
                )

    def change(self, live: LiveModule, observed: Observed) -> None:
        added = tuple(f"{slot.name}." for slot in observed.added)
        hung = {name for name in observed.values if name.startswith(added)}  # on tensors that are not there yet
        self._set_all(live, observed, observed.values.keys() - hung)
        gone = {name for name, (_, text) in observed.values.items() if text is None}
        for name in sorted(gone, reverse=True):
            part = PART.fullmatch(name)
            if part is None or part["parent"] not in gone:  # else it goes with what held it
                self._delete(live, name)
        for slot in observed.added:
            self.put(live, slot.name, self._without_data(live, slot), slot.kind)
        self._set_all(live, observed, hung)
        for name, (_, text) in observed.values.items():  # last, as constructors put a bias that there is not
            if text in (NO_PARAMETER, NO_BUFFER):
                self._keep_free(live, name, text)

    def _set_all(self, live: LiveModule, observed: Observed, names: Set[str]) -> None:
        # What holds others comes first; a reference, when what it leads to is there.
        for name in sorted(
            names - {CHILDREN, CLASS}, key=lambda name: (_is_reference(observed.values[name][1]), _by_number(name))
        ):
            built, text = observed.values[name]
            if text is not None and text not in (NO_PARAMETER, NO_BUFFER):
                self._set(live, name, text, built)

    def tensor(self, full: str) -> torch.Tensor:
        """The tensor at "path:name"."""
        path, _, name = full.partition(":")
        live = self.by_path.get(path)
        if live is not None:
            for table in (live.module._parameters, live.module._buffers):
                found = table.get(name)
                if found is not None:
                    return found
        if full not in self._slots:
            raise ParityError(f"the published model ties tensors to {full}, which does not exist here.")
        return self._slots[full]

    def put(self, live: LiveModule, name: str, value: Any, kind: TensorKind) -> None:
        """Let `name` hold a tensor."""
        module = live.module
        if kind is TensorKind.ATTRIBUTE:
            if PART.fullmatch(name) is None:
                free_name(module, name, {})
            self._put(live, name, value)
        elif name.startswith("__") or "." in name or not name:
            raise ParityError(f"{full_name(live.path, name)} cannot be a {kind.value} of a model that was only built.")
        elif kind is TensorKind.PARAMETER:
            free_name(module, name, module._parameters)
            module._parameters[name] = value
        else:
            free_name(module, name, module._buffers)
            module._buffers[name] = value
            if kind is TensorKind.BUFFER:
                module._non_persistent_buffers_set.discard(name)
            else:
                module._non_persistent_buffers_set.add(name)
        self._slots[f"{live.path}:{name}"] = value

    def _without_data(self, live: LiveModule, slot: AddedSlot) -> torch.Tensor:
        dtype = getattr(torch, slot.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ParityError(f"{full_name(live.path, slot.name)} is of the unknown dtype {slot.dtype!r}.")
        data = torch.empty_strided(slot.shape, slot.stride, dtype=dtype, device="meta")
        cls = loaded_class(slot.class_name)
        if cls is torch.Tensor:
            return data.requires_grad_(slot.requires_grad)
        if cls is None or not issubclass(cls, torch.Tensor):
            raise ParityError(f"{full_name(live.path, slot.name)} is a {slot.class_name}, which is not known here.")
        made = torch.Tensor._make_subclass(cls, data, slot.requires_grad)
        known = self._slots.get(f"{live.path}:{slot.name}")
        if known is not None:
            made.__dict__.update(known.__dict__)
        return made

    def _place(self, live: LiveModule, name: str) -> Place | None:
        return self._places[live.index].get(name)

    def _set(self, live: LiveModule, name: str, text: str, built: str | None) -> None:
        try:
            if (method := METHOD.fullmatch(text)) is not None:
                value = self._method(method["method"], method["owner"])
            else:
                value = self._referred(text) if REFERENCE.fullmatch(text) else made_of(text)
        except ValueError:
            return  # an object, which processing makes; the comparison says it if it does not
        place = self._place(live, name)
        if place is not None:
            if (container := CONTAINER.fullmatch(text)) and _is_same_container(place.value, value):
                if isinstance(value, (list, collections.deque)):
                    while len(place.value) > int(container["size"]):
                        place.value.pop()
                elif isinstance(value, tuple) and len(place.value) > len(value):
                    self._shorten(live, name, place, len(value))
                return  # what is in it changes by itself
            if built is not None:  # loading changed this very object
                built = built.removeprefix(AS_BUILT)
                self._check_built(live, name, place.value, built)
                if _assign_in_place(place.value, value):
                    return
                if type(place.value) in MUTABLE:  # whoever else had the object has the other one, too
                    value = self._replaced.setdefault(id(place.value), (place.value, value))[1]
            _change(live, name, lambda: place.set(value))
            self._forget_parts(live, name)
            place.value = value
        else:
            self._put(live, name, value)

    def _shorten(self, live: LiveModule, name: str, place: Place, size: int) -> None:
        """Take the items from a tuple that come after the first `size`."""
        for position in range(size, len(place.value)):
            self._places[live.index].pop(f"{name}[{position}]", None)
            self._forget_parts(live, f"{name}[{position}]")
        shorter = tuple.__new__(type(place.value), place.value[:size])
        _change(live, name, lambda: place.set(shorter))
        place.value = shorter

    def _check_built(self, live: LiveModule, name: str, value: Any, built: str) -> None:
        """Raise `ParityError` if loading changed a part of a value that was built as another one here.

        The rest of it follows from what this engine was given.
        """
        here = describe_value(value) if type(value) in MUTABLE else None
        if here is not None and here != built:
            full = full_name(live.path, name)
            raise ParityError(f"{full} is built as {here} here and as {built} in the published model.", full)

    def _forget_parts(self, live: LiveModule, name: str) -> None:
        """What was in the value that was at `name` is no part of the one that is there now."""
        places, parts = self._places[live.index], (f"{name}.", f"{name}[", f"{name}{{")
        for part in [part for part in places if part.startswith(parts)]:
            del places[part]

    def put_in_order(self, live: LiveModule, name: str, text: str | None) -> None:
        """Give the items of a dict their published order, if the text says one."""
        container = CONTAINER.fullmatch(text or "")
        place = self._place(live, name)
        if container is None or container["order"] is None or place is None or not isinstance(place.value, dict):
            return
        wanted, items = value_of(container["order"]), list(place.value.items())
        here = dict(zip(key_texts(key for key, _ in items), items, strict=True))
        if here.keys() == set(wanted):  # otherwise the comparison says what is missing
            place.value.clear()
            place.value.update(here[text] for text in wanted)

    def _keep_free(self, live: LiveModule, name: str, text: str) -> None:
        """Give a module a parameter or a buffer that is None."""
        part = PART.fullmatch(name)
        module = live.module if part is None else self._holder(live, part["parent"])
        key = name if part is None else part["name"]
        if isinstance(module, nn.Module) and key is not None and not key.startswith("__"):
            table: dict[str, Any] = module._parameters if text == NO_PARAMETER else module._buffers
            free_name(module, key, table)
            table[key] = None

    def _put(self, live: LiveModule, name: str, value: Any) -> None:
        """Give `name` a value, if nothing has that name yet."""
        part = PART.fullmatch(name)
        if part is None:
            if not can_be_put(name):
                raise ParityError(f"the published model has {full_name(live.path, name)}, which is no name here.")
            live.module.__dict__[name] = value
            self._note(live, name, live.module.__dict__, name, value)
            return
        parent = self._holder(live, part["parent"])
        if parent is None:
            return  # processing makes it; if it does not, the comparison says so
        _change(live, name, lambda: self._put_into(live, name, parent, part, value))

    def _put_into(self, live: LiveModule, name: str, parent: Any, part: re.Match[str], value: Any) -> None:
        key: Any = part["name"]
        if key is not None:
            if key.startswith("__") or (isinstance(parent, nn.Module) and key in MODULE_INTERNALS):
                raise TypeError("it is Python's own, or PyTorch's")
            if not isinstance(parent, functools.partial):
                object.__setattr__(parent, key, value)
            elif key == "args":
                Place(((parent, key),), None).set(value)
            elif key != "func":  # which it was made of
                vars(parent)[key] = value
        else:
            key = value_of(part["key"])
            if isinstance(parent, tuple) and (around := self._place(live, part["parent"])) is not None:
                place = self._places[live.index][name] = Place((*around.steps, (parent, key)), value)
                place.set(value)
                return
            if isinstance(parent, (list, collections.deque)) and key == len(parent):
                parent.append(value)
            else:
                parent[key] = value
        self._note(live, name, parent, key, value)

    def _note(self, live: LiveModule, name: str, holder: Any, key: Any, value: Any) -> None:
        self._places[live.index][name] = Place(((holder, key),), value)

    def _holder(self, live: LiveModule, name: str) -> Any:
        place = self._place(live, name)
        if place is None and name.endswith(_KEYWORDS):
            partial = self._holder(live, name.removesuffix(_KEYWORDS))
            if isinstance(partial, functools.partial):
                return partial.keywords
        return place.value if place is not None else self._slots.get(f"{live.path}:{name}")

    def _delete(self, live: LiveModule, name: str) -> None:
        place = self._place(live, name)
        if place is None:
            part = PART.fullmatch(name)
            tensor = self._slots.get(f"{live.path}:{part['parent']}") if part is not None else None
            if tensor is not None and part is not None and part["name"] is not None:
                tensor.__dict__.pop(part["name"], None)
            return  # with what held it
        holder, key = place.steps[-1]
        if isinstance(holder, (list, collections.deque)) and key >= len(holder):
            return  # it was cut off
        _change(live, name, place.delete)

    def _method(self, text: str, owner: str) -> Any:
        live = self.by_path.get(owner)
        found = getattr(live.module, text.rpartition(".")[2], None) if live is not None else None
        if describe_value(found) != text and live is not None:  # a function that loading bound to the module
            with contextlib.suppress(ValueError):
                found = types.MethodType(loaded_function(text.removeprefix("method ")), live.module)
        if describe_value(found) != text:
            raise ParityError(f"the published model refers to the {text} of {owner!r}, which does not exist here.")
        return found

    def _referred(self, text: str) -> Any:
        """The object at the place that the text names."""
        path, _, name = text.partition(" @")[2].partition(":")
        live = self.by_path.get(path)
        if live is not None:
            if not name:
                return live.module
            if (place := self._place(live, name)) is not None:
                return place.value
        raise ParityError(f"the published model refers to {path}:{name}, which does not exist here.")


def free_name(module: nn.Module, name: str, besides: dict[str, Any]) -> None:
    """Free `name` in all tables of `module` but one.

    Raises:
        ParityError: it is a table of the module itself.
    """
    if name in MODULE_INTERNALS:
        raise ParityError(f"the published model has a {name!r} of its own, which is PyTorch's in each module.", name)
    for table in (module._parameters, module._buffers, module.__dict__):
        if table is not besides:
            table.pop(name, None)
    if besides is not module._buffers:
        module._non_persistent_buffers_set.discard(name)


def _change(live: LiveModule, name: str, change: Callable[[], None]) -> None:
    try:
        change()
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        where = full_name(live.path, name)
        raise ParityError(f"{where} cannot be set to what the published model has there: {error}.", where) from None


def _is_same_container(one: Any, other: Any) -> bool:
    """Whether both do the same with items that come later."""
    return type(one) is type(other) and getattr(one, "maxlen", None) == getattr(other, "maxlen", None)


def _by_number(name: str) -> list[Any]:
    """What orders names as their numbers: the tenth item comes after the second."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))]


def _is_reference(text: str | None) -> bool:
    return text is not None and REFERENCE.fullmatch(text) is not None


def _assign_in_place(current: Any, value: Any) -> bool:
    """Give a mutable object the content of another one of its type. All that hold the object see the new content."""
    kind = type(current)
    if kind is not type(value):
        return False
    if kind is list or kind is bytearray or (kind is array.array and current.typecode == value.typecode):
        current[:] = value
    elif kind in (dict, set, collections.OrderedDict, collections.Counter) or (
        kind is collections.defaultdict and current.default_factory is value.default_factory
    ):
        current.clear()
        current.update(value)
    elif kind is types.SimpleNamespace:
        vars(current).clear()
        vars(current).update(vars(value))
    elif kind is random.Random:
        current.setstate(value.getstate())
    elif kind is np.random.RandomState:
        current.set_state(value.get_state(legacy=False))
    elif kind is np.random.Generator and type(current.bit_generator) is type(value.bit_generator):
        current.bit_generator.state = value.bit_generator.state
    elif kind is collections.deque and current.maxlen == value.maxlen:
        current.clear()
        current.extend(value)
    elif (
        kind is np.ndarray and (current.dtype, current.shape) == (value.dtype, value.shape) and current.flags.writeable
    ):
        current[...] = value
    elif kind is torch.Generator:
        current.set_state(value.get_state())
    else:
        return False
    return True
