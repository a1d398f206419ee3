"""What a model's code keeps outside of its objects: in its classes and modules, and by switches of torch.

All objects of a process have these in common, and an attached engine would compute with what building left there. So a
publication carries the plain values that loading set. If loading changes anything else there, a model is not shared.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, EnumMeta
from typing import Any

from vllm_companion_plugin.core.module_tree import CommonValue
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.tree.behind import Same, behind, different
from vllm_companion_plugin.tree.constants import is_constant, set_here
from vllm_companion_plugin.tree.descriptions import answers, describe_value
from vllm_companion_plugin.tree.holders import (
    Holder,
    classes_in,
    find,
    holders_of,
    is_own,
    may_serve_one,
    name_of,
    reference_of,
    users_of,
)
from vllm_companion_plugin.tree.live import Tree
from vllm_companion_plugin.tree.switches import switches
from vllm_companion_plugin.tree.times import is_time
from vllm_companion_plugin.tree.values import class_name


@dataclass(slots=True)
class Common:
    """What classes, and modules of the model's own code, hold at one moment.

    Attributes:
        held: texts of plain values, and other objects, by name.
        behind: of all that is behind such objects the texts, and what tells it from another one. It has no entry for
            what the model holds, too.
        model: the model's class.
        switches: of torch, which say how kernels compute.
        met: what the model held, as of `Tree`.
        tensors: ids of those that the model had.
        imported: what modules hold that were imported since then, as they were just afterwards.
    """

    held: dict[Holder, dict[str, Any]]
    behind: dict[Holder, dict[str, Any]]
    model: type
    switches: dict[str, Any]
    met: dict[int, tuple[str, str]]
    tensors: set[int]
    imported: dict[Holder, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Tree) -> Common:
        """Of the model that `tree` was captured from."""
        return cls._of(holders_of(tree), tree, type(tree.modules[0].module))

    def note_import(self, module: types.ModuleType) -> None:
        """`module` has just been executed. If the model turns out to use it, what changes in it since counts, too."""
        if may_serve_one(module, self.model):
            new = self._of([module, *classes_in(module)], Tree([], met=self.met), self.model)
            self.imported |= {one: (held, new.behind.get(one, {})) for one, held in new.held.items()}

    def now(self, tree: Tree) -> Common:
        """The same holders, and those that were imported, as they are now that the model is `tree`."""
        for one in holders_of(tree):
            if one in self.imported:
                self.held[one], self.behind[one] = self.imported[one]
        found = self._of([*self.held], tree, self.model)
        if self._misses(found):  # of what the model holds since then
            before = self._of([*self.held], replace(tree, met=self.met), self.model)
            for one, parts in found.behind.items():
                for name in self.behind[one].keys() - parts.keys() & before.behind[one].keys():
                    parts[name] = before.behind[one][name]
        return found

    def _misses(self, now: Common) -> bool:
        return any(parts.keys() - now.behind.get(one, {}).keys() for one, parts in self.behind.items())

    @classmethod
    def _of(cls, holders: Sequence[Holder], tree: Tree, model: type) -> Common:
        modules = {one.__name__ for one in holders if isinstance(one, types.ModuleType)}
        own = [one for one in holders if isinstance(one, types.ModuleType) or one.__module__ in modules]
        held = {one: _shown(vars(one)) for one in holders}
        return cls(held, _behind(own, tree), model, switches(), tree.met, {id(slot.tensor) for slot in tree.slots()})

    def changes(self, now: Common, *, own_alone: bool = False) -> tuple[CommonValue, ...]:
        """The plain values that are others in `now`, and those that an earlier load of this process had set.

        Args:
            own_alone: of the model's own code alone.

        Raises:
            NotShareableError: something else has changed, or had; the first is named.
        """
        found, others = [], []
        tensors = self.tensors | now.tensors
        model = class_name(self.model)
        for one, before in self.held.items():
            if own_alone and not is_own(one):
                continue
            after = now.held[one]
            changed = _changed(before, after, tensors)
            changed |= _changed(self.behind.get(one, {}), now.behind.get(one, {}), tensors)
            earlier = set_here.setdefault(one, {})
            for name in sorted(earlier.keys() | changed):
                then, text = before.get(name), after.get(name)
                if name in changed:
                    earlier[name] = then, model, text
                elif earlier[name][1:] == (model, text):
                    then = earlier[name][0]  # as the load of this model found it that set it
                is_known = then is None or isinstance(then, str)
                is_there = one not in self.imported and find(reference_of(one)) is one
                if is_known and is_constant(text) and is_there:
                    found.append(CommonValue(reference_of(one), name, then, text))
                elif not _is_time(text):
                    who = "loading" if name in changed else "loading another model in this process"
                    others.append(f"{who} changed {name_of(one)}.{name}, which {users_of(one)}")
        others += [
            f"loading changed {name}, which all models of this process share"
            for name in _changed(self.switches, now.switches, set())
        ]
        if others:
            raise NotShareableError(min(others))
        return tuple(found)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], tensors: set[int]) -> set[str]:
    """The names of what is another one `after`, but for times."""
    return {name for name in different(before, after, tensors) if not _is_time(after.get(name))}


def _is_time(text: Any) -> bool:
    return isinstance(text, str) and is_time(text)


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: Same(value, _code_of(value)) if issubclass(type(value), _CODE) else describe_value(value) or Same(value)
        for name, value in list(values.items())
        if not (_is_pythons(name, value) or issubclass(type(value), types.ModuleType))
    }


def _code_of(value: Any) -> Any:
    """The code of a function, which may be given another one."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return Same(function.__code__) if isinstance(function, types.FunctionType) else None


_CODE = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property, types.MemberDescriptorType)


def _is_pythons(name: str, value: Any) -> bool:
    """Whether Python itself keeps this in classes and modules. What they define are functions by such names."""
    return name.startswith("__") and name.endswith("__") and not issubclass(type(value), _CODE)


def _behind(holders: Sequence[Holder], tree: Tree) -> dict[Holder, dict[str, Any]]:
    found = behind([(name_of(one), dict(values_of(one))) for one in holders], tree)
    return dict(zip(holders, found, strict=True))


def values_of(one: Holder) -> Iterator[tuple[str, Any]]:
    """What `one` holds, with the functions in their wrappings, and attributes of members."""
    for name, value in list(vars(one).items()):
        if _is_pythons(name, value) or issubclass(type(value), (type, types.ModuleType, types.MemberDescriptorType)):
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
