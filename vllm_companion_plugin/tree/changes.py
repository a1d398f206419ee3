"""Give a model that was built, and not loaded, what loading would have changed in it besides its tensors' bytes.

The publisher saw what loading did (observe.py): values that it set, modules and tensors that it added,
removed or tied to others. The same is done here to a model that was only built.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import functools
import random
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import AddedSlot, Manifest, Observed, TensorKind
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.capture import MODULE_INTERNALS, capture
from vllm_companion_plugin.tree.classes import MUTABLE, is_opaque
from vllm_companion_plugin.tree.descriptions import describe_value, key_texts, tensor_attributes
from vllm_companion_plugin.tree.live import NO_BUFFER, NO_PARAMETER, LiveModule, Place, Tree, full_name, named_modules
from vllm_companion_plugin.tree.states import built_text, fingerprints
from vllm_companion_plugin.tree.values import class_name, loaded_class, value_of

CHILDREN = "_modules"
"""Among the values that loading changed: names of a module's children, in their order."""
CLASS = "__class__"
"""Among them: the class that loading gave to a module that building made of another one."""
_AS_BUILT = "as built: "
"""Before the text of what building has to have made here, too."""
_PART = re.compile(r"(?P<parent>.+?)(?:\.(?P<name>[^.\[\]]+)|\[(?P<key>[^\[\]]+)\])")
_CONTAINERS: dict[str, Callable[[], Any]] = {
    "builtins.list": list,
    "builtins.dict": dict,
    "collections.deque": collections.deque,
    "collections.OrderedDict": collections.OrderedDict,
}
_REFERENCE = re.compile(r"[\w.<>]+ @.*:.*", re.DOTALL)
"""The text of an object that was met before. No value has such a text: that of a string begins with a quote."""
_METHOD = re.compile(r"(?P<method>method [\w.]+) of (?P<owner>.*)", re.DOTALL)
"""The text of a method of a module in the tree, and where that module is."""
_PARTIAL = "partial of "
_KEYWORDS = ".keywords"
_LARGEST_TUPLE = 1 << 16
_CONTAINER = re.compile(
    r"(?P<kind>[\w.]+) of (?P<size>\d+)(?: at most (?P<most>\d+))?(?: in the order (?P<order>.*))?", re.DOTALL
)
"""The text of a container of more than plain values; that of a dict goes on with its keys if loading changed them."""


def reference(kind: type, first: str) -> str:
    """The text of an object that was met first at `first`, a path of a module, a colon and a name."""
    return f"{class_name(kind)} @{first}"


def in_order(text: str, keys: Sequence[str]) -> str:
    """The text of a dict, followed by the texts of its keys."""
    return f"{text} in the order {list(keys)!r}"


_OF_TENSOR = "!"
"""After the name of a tensor that has to be built the same."""


def of_tensor(name: str) -> str:
    """The name under which it is noted how a tensor was built."""
    return name + _OF_TENSOR


_KEPT = "?"
"""After the name of a value of which loading kept a part when it put another one there."""


def keeps_part(name: str, built: str, text: str) -> dict[str, tuple[str, str]]:
    """What is noted if loading put the container of `text` where building had put that of `built`, and kept a part.

    A part that loading kept may follow from flags of the engine: others have to have built the same.
    """
    try:
        before, after = (set(_leaves(value_of(each), ())) for each in (built, text))
    except ValueError:
        return {}
    return {name + _KEPT: (as_built(built), "a container of which loading kept a part")} if before & after else {}


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
    return _AS_BUILT + text


def is_restorable(text: str | None) -> bool:
    """Whether a value of this text, or its absence, can be brought about in another model."""
    if text is None or text in (NO_PARAMETER, NO_BUFFER) or _REFERENCE.fullmatch(text) or _METHOD.fullmatch(text):
        return True
    try:
        _made(text)
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
    part = _PART.fullmatch(name)
    if part is None:
        return name.isidentifier() and name not in MODULE_INTERNALS and not _is_pythons(name)
    if part["parent"] in MODULE_INTERNALS:  # a hook, whose key is a number of the process
        return False
    if part["name"] is not None:
        return not part["name"].startswith("__")
    try:
        value_of(part["key"])
    except ValueError:
        return False
    return True


def _is_pythons(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def apply_loading(
    model: nn.Module, manifest: Manifest, is_unwritten: Callable[[torch.Tensor], bool] = lambda tensor: False
) -> None:
    """Change `model`, just built, as the publisher saw loading change its own.

    Args:
        is_unwritten: whether building gave a tensor no value: it holds whatever was in its memory.

    Raises:
        ParityError: a change that cannot be made here, because the model was built differently.
    """
    _apply_to_modules(model, manifest)
    if manifest.is_observed:
        seen = {info.path: info.observed for info in manifest.modules}
    else:
        seen = _differences(capture(model), manifest)
    changed = {path: observed for path, observed in seen.items() if _has_changes(observed)}
    if not changed:
        return
    _check_tensors(model, changed, is_unwritten)
    modules = dict(named_modules(model))
    for path, observed in changed.items():
        if path in modules:
            _remove_slots(modules[path], observed)
    wanted = {path: _wanted(observed) for path, observed in changed.items()}
    for reference in _references(changed):
        owner, _, name = reference.partition(":")
        wanted.setdefault(owner, set()).add(name)
    tree = capture(model, wanted=wanted)
    values = _Values(tree)
    for path, observed in changed.items():
        if path in values.by_path:
            values.check_as_built(values.by_path[path], observed)
    for path, observed in changed.items():
        live = values.by_path.get(path)
        if live is not None:
            values.change(live, observed)
    # All are looked up before the first is put: loading may have swapped them.
    retied = [
        (values.by_path[path], name, values.tensor(first), _kind_of(manifest, path, name))
        for path, observed in changed.items()
        if path in values.by_path
        for name, first in observed.retied.items()
    ]
    for live, name, tensor, kind in retied:
        values.put(live, name, tensor, kind)
    for path, observed in changed.items():
        for name, (_, text) in observed.values.items() if path in values.by_path else ():
            values.put_in_order(values.by_path[path], name, text)


def _check_tensors(
    model: nn.Module, changed: dict[str, Observed], is_unwritten: Callable[[torch.Tensor], bool]
) -> None:
    """Raise `ParityError` if building made another tensor here, of which loading computed something."""
    wanted = {
        f"{path}:{name.removesuffix(_OF_TENSOR)}": built.removeprefix(_AS_BUILT)
        for path, observed in changed.items()
        for name, (built, _) in observed.values.items()
        if name.endswith(_OF_TENSOR) and built is not None
    }
    if not wanted:
        return
    tree = capture(model)
    found = {f"{tree.modules[slot.module].path}:{slot.name}": slot.tensor for slot in tree.slots()}
    for full, there in wanted.items():
        tensor = found.get(full)
        here = "without data"
        if tensor is not None and not tensor.is_meta:
            if is_unwritten(tensor):
                continue
            storage = tensor.untyped_storage()._cdata
            here = built_text(tensor.shape, fingerprints({storage: tensor})[storage])
        if here != there:
            name = full_name(*full.split(":", 1))
            raise ParityError(
                f"{name} is built as {here} here and as {there} in the published model, and loading used it.",
                name,
                here,
            )


def _has_changes(observed: Observed) -> bool:
    return bool(observed.values or observed.added or observed.removed or observed.retied)


def _differences(tree: Tree, manifest: Manifest) -> dict[str, Observed]:
    """What would have to change in a model to make it the published one."""
    seen: dict[str, Observed] = {}
    by_path = {live.path: live for live in tree.modules}
    first_slot: dict[int, str] = {}
    for info in manifest.modules:
        live = by_path.get(info.path)
        if live is None:
            continue
        here = {slot.name: slot for slot in live.slots}
        added, retied = [], {}
        hung: dict[str, tuple[str | None, str | None]] = {}
        for slot in info.slots:
            first = first_slot.setdefault(slot.tensor, f"{info.path}:{slot.name}")
            if slot.name in here:
                mine, other = tensor_attributes(here[slot.name].tensor), manifest.tensors[slot.tensor].attributes
                hung |= {
                    f"{slot.name}.{name}": (mine.get(name), other.get(name)) for name in mine.keys() | other.keys()
                }
                continue
            tensor = manifest.tensors[slot.tensor]
            if first == f"{info.path}:{slot.name}":
                form = (tensor.dtype, tensor.shape, tensor.stride, tensor.class_name, tensor.requires_grad)
                added.append(AddedSlot(slot.name, slot.kind, *form))
            else:
                retied[slot.name] = first
        names = live.attributes.keys() | info.attributes.keys()
        texts = {name: (live.attributes.get(name), info.attributes.get(name)) for name in names} | hung
        seen[info.path] = Observed(
            values=without_known(
                {name: pair for name, pair in sorted(texts.items()) if pair[0] != pair[1] and name not in here}
            ),
            added=tuple(added),
            removed=tuple(here.keys() - {slot.name for slot in info.slots}),
            retied=retied,
        )
    return seen


def _apply_to_modules(model: nn.Module, manifest: Manifest) -> None:
    try:
        # All are looked up before the first is put: loading may have swapped them.
        retied = {**manifest.retied_modules, **manifest.moved_modules}
        built = {
            path: model.get_submodule(first)
            for path, first in retied.items()
            if path in manifest.moved_modules or first not in manifest.added_modules
        }
        for path, class_name in manifest.added_modules.items():
            _put_module(model, path, _empty_module(path, class_name))
        for path, first in retied.items():
            _put_module(model, path, built[path] if path in built else model.get_submodule(first))
        for path in manifest.removed_modules:
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules.pop(name, None)
        for path in manifest.emptied_modules:
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = None
        if manifest.added_modules or retied:
            for _ in named_modules(model):
                pass
        for info in manifest.modules:
            if (cls := info.observed.values.get(CLASS)) is not None:
                _become(model.get_submodule(info.path), info.path, (cls[1] or "").removeprefix("class "))
            if (order := info.observed.values.get(CHILDREN)) is not None:
                arrange(model.get_submodule(info.path)._modules, value_of(order[1] or ""))
    except (ValueError, TypeError) as error:
        raise ParityError(f"the published model has modules in no order: {error}.") from None
    except RecursionError:
        raise ParityError("the published model has a module inside of itself.") from None
    except AttributeError as error:
        raise ParityError(f"loading changed modules of the published model that do not exist here: {error}.") from None


def arrange(table: dict[str, Any], names: Iterable[str]) -> None:
    """Give what a module has under `names` their order."""
    order = [name for name in names if name in table]
    table.update({name: table.pop(name) for name in order})


def _put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    if not path or not name or name in model.get_submodule(parent).__dict__:
        raise ParityError(f"the published model has a module {path!r}, which cannot be put here.", path)
    model.get_submodule(parent)._modules[name] = module


def _empty_module(path: str, class_name: str) -> nn.Module:
    """Make a module that has nothing yet. Its values and tensors were published, so no constructor is called."""
    cls = loaded_class(class_name)
    if cls is None or not issubclass(cls, nn.Module):
        raise ParityError(f"{path} is a {class_name} in the published model, which is not known here.", path)
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


def _become(module: nn.Module, path: str, class_name: str) -> None:
    """Let `module` be of another class, as loading did. No constructor is called."""
    cls = loaded_class(class_name)
    if cls is None or not issubclass(cls, nn.Module):
        raise ParityError(f"{path} is a {class_name} in the published model, which is not known here.", path)
    try:
        module.__class__ = cls
    except TypeError as error:
        raise ParityError(f"{path} cannot become a {class_name}: {error}.", path) from None


def _remove_slots(module: nn.Module, observed: Observed) -> None:
    for name in observed.removed:
        _remove(module, name, {})


def _remove(module: nn.Module, name: str, besides: dict[str, Any]) -> None:
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


def _wanted(observed: Observed) -> set[str]:
    """The names of the values that change, and of what holds these values."""
    changed = (name.removesuffix(_KEPT) for name in observed.values)
    names = {*changed, *(slot.name for slot in observed.added), *observed.retied}
    for name in list(names):
        while (part := _PART.fullmatch(name)) is not None:
            name = part["parent"]
            names.add(name)
    return names


def _references(changed: dict[str, Observed]) -> set[str]:
    texts = (after for observed in changed.values() for _, after in observed.values.values() if after)
    return {text.partition(" @")[2] for text in texts if _REFERENCE.fullmatch(text)}


def _kind_of(manifest: Manifest, path: str, name: str) -> TensorKind:
    module = next(module for module in manifest.modules if module.path == path)
    return next((slot.kind for slot in module.slots if slot.name == name), TensorKind.PARAMETER)


class _Values:
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
            if built is None or not built.startswith(_AS_BUILT) or name.endswith(_OF_TENSOR):
                continue
            place, there = self._place(live, name.removesuffix(_KEPT)), built.removeprefix(_AS_BUILT)
            here = None if place is None else describe_value(place.value) or there  # an object is what is in it
            if here != there:
                full = full_name(live.path, name.removesuffix(_KEPT))
                raise ParityError(
                    f"{full} is built as {here or 'absent'} here and as {there} in the published model.", full
                )

    def change(self, live: LiveModule, observed: Observed) -> None:
        added = tuple(f"{slot.name}." for slot in observed.added)
        hung = {name for name in observed.values if name.startswith(added)}  # on tensors that are not there yet
        self._set_all(live, observed, observed.values.keys() - hung)
        gone = {name for name, (_, text) in observed.values.items() if text is None}
        for name in sorted(gone, reverse=True):
            part = _PART.fullmatch(name)
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
            if _PART.fullmatch(name) is None:
                _remove(module, name, {})
            self._put(live, name, value)
        elif name.startswith("__") or "." in name or not name:
            raise ParityError(f"{full_name(live.path, name)} cannot be a {kind.value} of a model that was only built.")
        elif kind is TensorKind.PARAMETER:
            _remove(module, name, module._parameters)
            module._parameters[name] = value
        else:
            _remove(module, name, module._buffers)
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
            if (method := _METHOD.fullmatch(text)) is not None:
                value = self._method(method["method"], method["owner"])
            else:
                value = self._referred(text) if _REFERENCE.fullmatch(text) else _made(text)
        except ValueError:
            return  # an object, which processing makes; the comparison says it if it does not
        place = self._place(live, name)
        if place is not None:
            if (container := _CONTAINER.fullmatch(text)) and _is_same_container(place.value, value):
                if isinstance(value, (list, collections.deque)):
                    while len(place.value) > int(container["size"]):
                        place.value.pop()
                return  # what is in it changes by itself
            if built is not None:  # loading changed this very object
                built = built.removeprefix(_AS_BUILT)
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
        container = _CONTAINER.fullmatch(text or "")
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
        part = _PART.fullmatch(name)
        module = live.module if part is None else self._holder(live, part["parent"])
        key = name if part is None else part["name"]
        if isinstance(module, nn.Module) and key is not None and not key.startswith("__"):
            table: dict[str, Any] = module._parameters if text == NO_PARAMETER else module._buffers
            _remove(module, key, table)
            table[key] = None

    def _put(self, live: LiveModule, name: str, value: Any) -> None:
        """Give `name` a value, if nothing has that name yet."""
        part = _PART.fullmatch(name)
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

    def _put_into_tuple(self, live: LiveModule, name: str, held: tuple[Any, ...], key: int, value: Any) -> None:
        """Let the tuple at `name` have another item: another tuple takes its place, also in a tuple that it is in."""
        items = tuple.__new__(type(held), (*held[:key], value, *held[key + 1 :]))
        place, part = self._place(live, name), _PART.fullmatch(name)
        if place is None:
            raise TypeError("it is a part of nothing that can be changed")
        around = self._holder(live, part["parent"]) if part is not None else None
        if part is not None and isinstance(around, tuple):
            self._put_into_tuple(live, part["parent"], around, value_of(part["key"]), items)
        else:
            place.set(items)
        place.value = items

    def _put_into(self, live: LiveModule, name: str, parent: Any, part: re.Match[str], value: Any) -> None:
        key: Any = part["name"]
        if key is not None:
            if key.startswith("__") or (isinstance(parent, nn.Module) and key in MODULE_INTERNALS):
                raise TypeError("it is Python's own, or PyTorch's")
            if not isinstance(parent, functools.partial):
                object.__setattr__(parent, key, value)
            elif key == "args":  # and it was made of its function
                Place(((parent, key),), None).set(value)
        else:
            key = value_of(part["key"])
            if isinstance(parent, tuple):
                self._put_into_tuple(live, part["parent"], parent, key, value)
            elif isinstance(parent, (list, collections.deque)) and key == len(parent):
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
            part = _PART.fullmatch(name)
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


def _change(live: LiveModule, name: str, change: Callable[[], None]) -> None:
    try:
        change()
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        where = full_name(live.path, name)
        raise ParityError(f"{where} cannot be set to what the published model has there: {error}.") from None


def _made(text: str) -> Any:
    """The value of a text that needs no other object. Raises `ValueError` if there is none."""
    if (container := _CONTAINER.fullmatch(text)) is not None and container["kind"] in _CONTAINERS:
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
            return functools.partial(_made(inner))  # its arguments are values of their own
    cls = loaded_class(text)
    if cls is not None and is_data(cls):
        return object.__new__(cls)  # its fields are values of their own
    return value_of(text)


def is_data(cls: type) -> bool:
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


def _is_same_container(one: Any, other: Any) -> bool:
    """Whether both do the same with items that come later."""
    return type(one) is type(other) and getattr(one, "maxlen", None) == getattr(other, "maxlen", None)


def _by_number(name: str) -> list[Any]:
    """What orders names as their numbers: the tenth item comes after the second."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))]


def _is_reference(text: str | None) -> bool:
    return text is not None and _REFERENCE.fullmatch(text) is not None


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
