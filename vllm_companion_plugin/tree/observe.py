"""Watch a model being loaded, to know of every tensor and value where it came from.

A value belongs to the engine if building the model made it, and to the publication if loading or
post-processing changed it. So the model is looked at when it has been built, when it has been loaded and
when it has been processed, and in between every operation on tensors is watched:

- a storage is *own* if building the model made it, no operation wrote to it and its bytes are still
  what they were;
- it is *derived* if it may hold bytes of the checkpoint, or what was computed from such a storage. What was made of
  nothing (zeros, a workspace) is not;
- it is *computed* if it was seen to get such bytes. What Python or a kernel fills unseen may be a workspace.

What cannot be watched (a thread that was there before, a kernel launched past PyTorch) is found by comparing bytes, of
a large parameter a sample of them. If the memory of a large one was lent to who may have written a part of it unseen,
then it is published without being shared: no engine computes with a guess.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_companion_plugin.core.module_tree import CommonValue, Observed, TensorKind
from vllm_companion_plugin.core.placements import Source
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.tree.behind import different
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.common import Common
from vllm_companion_plugin.tree.descriptions import describe_value
from vllm_companion_plugin.tree.live import LiveSlot, Tree, full_name, plain_tensors
from vllm_companion_plugin.tree.notation import (
    CHILDREN,
    CLASS,
    as_built,
    can_be_put,
    holders_of,
    in_order,
    is_restorable,
    keeps_part,
    keeps_parts,
    loaded_function,
    of_tensor,
    reference,
    without_known,
)
from vllm_companion_plugin.tree.of_process import Before
from vllm_companion_plugin.tree.operators import Looks, Unseen, Watch, storage_of
from vllm_companion_plugin.tree.snapshot import Snapshot
from vllm_companion_plugin.tree.states import built_text, fingerprints, is_sampled
from vllm_companion_plugin.tree.times import is_time, plain
from vllm_companion_plugin.tree.uses import Uses
from vllm_companion_plugin.tree.values import class_name, loaded_class

_PARAMETER, _ATTRIBUTE = TensorKind.PARAMETER, TensorKind.ATTRIBUTE


@dataclass(slots=True)
class Loaded:
    """What loading did to the structure of a model, and to the values of its modules by path."""

    added_modules: dict[str, str] = field(default_factory=dict)
    removed_modules: tuple[str, ...] = ()
    emptied_modules: tuple[str, ...] = ()
    retied_modules: dict[str, str] = field(default_factory=dict)
    moved_modules: dict[str, str] = field(default_factory=dict)
    common_values: tuple[CommonValue, ...] = ()
    modules: dict[str, Observed] = field(default_factory=dict)


class Observation:
    """Watches one model from the moment it was built.

    Args:
        model: just built, nothing loaded yet.
        uses: from before it was built.
    """

    def __init__(self, model: nn.Module, uses: Uses | None = None) -> None:
        self.uses = Uses(None) if uses is None else uses
        with plain_tensors():
            tree = capture(model, to_compare=True)
            check_plain(tree)
            self._common = Common.of(tree)
            self.uses.built(tree, self._common.held)
            self._built = Snapshot.of(model, tree)
            self._before = Before()
            self._of_autograd = {
                id(slot.tensor): found for slot in tree.slots() if (found := _of_autograd(slot.tensor))
            }
            self._watch = Watch()
            self._watch.counts_parameters = self.uses.are_looked_for
            # By full name: which memory building put there.
            self._built_at = {
                f"{tree.modules[slot.module].path}:{slot.name}": _memory_of(slot.tensor) for slot in tree.slots()
            }
            compared: dict[int, torch.Tensor] = {}
            sampled: set[int] = set()
            whole: set[int] = set()
            for slot in tree.slots():
                storage = storage_of(slot.tensor)
                if storage is None or slot.tensor.is_meta or is_lazy(slot.tensor):
                    continue
                self._watch.keep_addresses(slot.tensor)
                self._watch.built.add(storage)
                if slot.kind is _PARAMETER:
                    self._watch.parameters.add(storage)
                compared.setdefault(storage, slot.tensor)
                if slot.kind is _PARAMETER and is_sampled(slot.tensor):
                    sampled.add(storage)
                else:
                    whole.add(storage)
            self._sampled = sampled - whole
            self._fingerprints = fingerprints(compared, self._sampled)
            self._watch.clean |= self._watch.built
        # By id: modules that were post-processed before all was loaded, as online quantization does. All that
        # changed in them counts as made by processing, which engines do for themselves.
        self._processed_early: dict[int, nn.Module] = {}
        self._moved: dict[str, str] = {}
        self._looks = ExitStack()  # until loading ends: what processing compiles is run without
        self._loaded_values: dict[str, dict[str, str]] | None = None
        self._loaded = Loaded()
        self._same: dict[int, bool] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, all operations of this thread on tensors are watched."""
        self._watch.ended = False
        try:
            with self._watch, self._looks:
                self._looks.enter_context(Looks(self._watch))
                yield
        finally:
            self._watch.ended = True

    @property
    def watching_beside(self) -> Callable[[], AbstractContextManager[None]]:
        """The same in another thread, which works for the one that loads. It may outlive the model."""
        return functools.partial(_watching_beside, self._watch)

    def note_import(self, module: types.ModuleType) -> None:
        """`module` has just been imported."""
        with plain_tensors(), self._watch.paused():
            self._common.note_import(module)

    def note_read(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` was read from the checkpoint. No operator shows who fills empty memory."""
        if storage_of(tensor) is not None:
            self._watch.came(tensor)
            self._watch.placing.read(name, tensor)

    def sources(
        self, storages: Mapping[int, Callable[[int, int], int | None]], held: Iterable[int]
    ) -> dict[str, Source]:
        """As of `Placing.sources`."""
        return self._watch.placing.sources(storages, held)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, operations belong to publishing, and not to loading."""
        with self._watch.paused():
            yield

    @contextmanager
    def processing(self, module: nn.Module) -> Iterator[None]:
        """While open, `module` is post-processed."""
        if self._loaded_values is None:
            self._processed_early[id(module)] = module
        before, self._watch.module = self._watch.module, module
        try:
            with Unseen(self._watch):
                yield
        finally:
            self._watch.module = before

    def end_loading(self, model: nn.Module) -> None:
        """The model has been loaded and not been processed yet.

        Raises:
            NotShareableError: loading changed something that no engine could restore; it is named.
        """
        self._looks.close()
        self.uses.loaded(self._watch.drawn_on)
        with plain_tensors(), self._watch.paused():
            tree = capture(model, to_compare=True)
            self._compare_bytes(tree)
            now = Snapshot.of(model, tree)
            self._loaded = self._compare(now, tree)
            self._loaded_values = now.attributes
            self._watch.is_loading = False
            self._same.clear()  # processing may still write

    def look_at(self, tree: Tree) -> None:
        """`tree` is that of the finished model: `is_own` will be asked about its tensors."""
        with plain_tensors(), self._watch.paused():
            self._compare_bytes(tree)

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Whether building the model made the storage of `tensor` and nothing wrote to it since."""
        storage = storage_of(tensor)
        if storage is None or storage not in self._watch.built or storage in self._watch.written:
            return False
        return self._same.get(storage, False)

    def _compare_bytes(self, tree: Tree) -> None:
        """Note which of the storages that building made, and that no operation wrote, still have the same bytes."""
        unwritten = self._watch.built - self._watch.written
        tensors = {
            storage: slot.tensor
            for slot in tree.slots()
            if (storage := storage_of(slot.tensor)) in unwritten and storage in self._fingerprints
        }
        # Somebody may have written a part of what was lent, of which a sample says nothing.
        for storage in self._sampled & self._watch.lent:
            tensors.pop(storage, None)
        now = fingerprints(tensors, self._sampled)
        self._same = {storage: data == self._fingerprints[storage] for storage, data in now.items()}

    def is_derived(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` holds, or was computed from, bytes of the checkpoint."""
        return storage_of(tensor) not in self._watch.clean

    def is_computed(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` was seen to be filled from the checkpoint, and was no work space that building made."""
        storage = storage_of(tensor)
        is_new = storage not in self._watch.built or storage in self._watch.parameters
        return storage in self._watch.computed and is_new

    def finish(self, tree: Tree) -> Loaded:
        """What was observed, for a model that is ready to be published.

        Args:
            tree: of the model as it is now, with its final values.
        """
        before = self._loaded_values or {}
        measured = self._watch.measured
        for live in tree.modules:
            seen = self._loaded.modules.get(live.path, Observed())
            then = before.get(live.path, {})
            processed = tuple(
                name
                for name, text in live.attributes.items()
                if then.get(name) != text and not (is_time(text) or is_time(then.get(name)))
            )
            reads = id(live.module) in measured or (None in measured and bool(processed))
            if processed or reads:
                seen = Observed(
                    seen.values, seen.added, seen.removed, seen.retied, seen.untouched, processed, measured=reads
                )
            self._loaded.modules[live.path] = seen
        _make_plain(tree)
        return self._loaded

    def _compare(self, now: Snapshot, tree: Tree) -> Loaded:
        loaded = Loaded()
        built = self._built
        now.tensors |= built.tensors  # of which either holds
        # What processing sets there each engine sets for itself, so of a model that was processed meanwhile only its
        # own code is asked.
        loaded.common_values = self._common.changes(self._common.now(tree), own_alone=bool(self._processed_early))
        paths = {path: reference() for path, reference in built.modules.items()}
        removed = [path for path in paths if path not in now.modules]
        for path in removed:
            parent, _, name = path.rpartition(".")
            if parent in removed:
                continue
            if name in now.children.get(parent, ()):
                loaded.emptied_modules += (path,)
            else:
                loaded.removed_modules += (path,)
        for path, weak in now.modules.items():
            module = weak()
            is_in_new_one = path.rpartition(".")[0] in loaded.added_modules
            if path in paths and paths[path] is module and not is_in_new_one:
                continue
            first = next((known for known, there in paths.items() if there is module), None)
            if first is None and path in {live.path for live in tree.modules}:
                name = class_name(type(module))
                if loaded_class(name) is not type(module):
                    raise NotShareableError(f"loading added the module {path!r}, whose class {name} cannot be found")
                loaded.added_modules[path] = name
                continue
            if first is None:  # another name of one that was added
                first = next(live.path for live in tree.modules if live.module is module)
            if path.rpartition(".")[0] not in (*loaded.retied_modules, *loaded.moved_modules):
                there = now.modules.get(first, lambda: None)()
                is_moved = there is not module and first in paths
                (loaded.moved_modules if is_moved else loaded.retied_modules)[path] = first
        was_at: dict[int, str] = {}
        for path, module in paths.items():
            was_at.setdefault(id(module), path)
        is_at = {was_at.get(id(live.module), live.path): live.path for live in tree.modules}
        for live in tree.modules:
            was, is_new = was_at.get(id(live.module), live.path), live.path in loaded.added_modules
            if id(live.module) in self._processed_early:
                now.attributes[live.path] = built.attributes.get(was, {})
                loaded.modules[live.path] = Observed(untouched=self._untouched(live.slots))
            else:
                loaded.modules[live.path] = self._compare_module(live.path, was, is_at, now, live.slots, is_new=is_new)
        self._mark_moved(loaded, tree, is_at)
        self._mark_computed(loaded, tree, is_at)
        _check_functions(loaded, tree)
        self._check_common_parts(now, loaded, tree, is_at)
        self._check_process(loaded, tree)
        for slot in tree.slots():
            if _of_autograd(slot.tensor) not in ([], self._of_autograd.get(id(slot.tensor))):
                raise NotShareableError(f"loading left a gradient, or a hook of gradients, on {tree.describe(slot)}")
        added = {f"{path}:{slot.name}" for path, seen in loaded.modules.items() for slot in seen.added}
        if self._moved:
            full = {f"{tree.modules[slot.module].path}:{slot.name}": slot.tensor for slot in tree.slots()}
            added |= {name for name, tensor in full.items() if not self.is_own(tensor)}
        for name, origin in self._moved.items():
            if origin in added:  # an engine could not tell the one that was there from the one that is there now
                raise NotShareableError(f"loading moved {origin} to {name} and put another one there")
        return loaded

    def _check_common_parts(self, now: Snapshot, loaded: Loaded, tree: Tree, is_at: dict[str, str]) -> None:
        """Raise `NotShareableError` if loading changed values that have parts in common, or which ones have."""
        early = {live.path for live in tree.modules if id(live.module) in self._processed_early}

        def is_changed(place: tuple[str, str]) -> bool:
            return place[1] in loaded.modules.get(place[0], Observed()).values

        # What loading changed has parts of its own in an engine.
        kept = [
            frozenset(
                (place, way) for (was, name), way in group if not is_changed(place := (is_at.get(was, was), name))
            )
            for group in self._built.in_common
        ]
        before = {group for group in kept if len(group) > 1 and any(way for _, way in group)}
        for group in sorted(before | now.in_common, key=repr):
            places = sorted({place for place, _ in group})
            if not early.isdisjoint(path for path, _ in places):
                continue
            changed = [*filter(is_changed, places)]
            if changed or group not in before or group not in now.in_common:
                where = full_name(*(changed or places)[0])
                raise NotShareableError(f"loading changed {where}, which has a part in common with another value")

    def _check_process(self, loaded: Loaded, tree: Tree) -> None:
        """Raise `NotShareableError` if loading set a value to what names a thing of this process."""
        ids = {*tree.met, *(id(live.module) for live in tree.modules), *(id(slot.tensor) for slot in tree.slots())}
        for path, seen in loaded.modules.items():
            for name, (_, text) in seen.values.items():
                what = self._before.found_in(f"{name} {text}" if "[" in name else text, ids) if text else None
                if what is not None:
                    raise NotShareableError(
                        f"loading set {full_name(path, name)} to {what}, which is this process's own"
                    )

    def _mark_moved(self, loaded: Loaded, tree: Tree, is_at: dict[str, str]) -> None:
        """Mark what changed in objects that building made and loading moved: an engine has to have built the same.

        What is in such an object may follow from flags, and does not come from loading. (An object that takes the place
        in memory of one that is gone counts, too, which costs no more than that.)
        """
        marked: dict[str, set[str]] = {}
        for number, (was, name) in self._common.met.items():
            now, before = tree.met.get(number), (is_at.get(was, was), name)
            if now is not None and now != before:
                for path, place in (now, before):
                    marked.setdefault(path, set()).add(place)
        for path in marked.keys() & loaded.modules.keys():
            parts = tuple(f"{place}{sign}" for place in marked[path] for sign in ".[{")
            seen = loaded.modules[path]
            changed = {
                name: (as_built(built), text)
                for name, (built, text) in seen.values.items()
                if built is not None and name.startswith(parts)
            }
            if changed:
                loaded.modules[path] = replace(seen, values={**seen.values, **changed})

    def _mark_computed(self, loaded: Loaded, tree: Tree, is_at: dict[str, str]) -> None:
        """Mark tensors of which only building knows, if loading computed something of them: they may follow from flags.

        What Python computes of their data is not seen, so that it read any counts. So does it if a part of one stays as
        it was built, beside what loading wrote.
        """
        used = self._watch.looked | self._watch.overwritten_partly()
        for slot in tree.slots():
            if (storage := storage_of(slot.tensor)) is not None and not self.is_own(slot.tensor):
                used |= self._watch.sources.get(storage, set())
        if not used:
            return
        for full, memory in self._built_at.items():
            was, _, name = full.partition(":")
            if memory[0] not in used or (path := is_at.get(was, was)) not in loaded.modules:
                continue
            used.remove(memory[0])
            seen, data = loaded.modules[path], self._fingerprints.get(memory[0])
            if data is not None:
                text = built_text(self._built.slots[was][name].shape, data)
                values = {**seen.values, of_tensor(name): (as_built(text), "a tensor that building made")}
                loaded.modules[path] = replace(seen, values=values)

    def _compare_module(
        self, path: str, was: str, is_at: dict[str, str], now: Snapshot, slots: list[LiveSlot], *, is_new: bool
    ) -> Observed:
        built = self._built
        texts, then = now.attributes[path], {} if is_new else built.attributes.get(was, {})
        values = {
            name: (then.get(name), texts.get(name))
            for name in texts.keys() | then.keys()
            if then.get(name) != texts.get(name) and name not in now.slots[path] and not is_time(texts.get(name))
        }
        values = without_known(values)
        for name in [*values]:
            method = name.removesuffix(".__self__")
            if (owner := now.owners.get((path, method))) is not None and (text := texts.get(method)) is not None:
                values.pop(f"{method}.__self__", None)
                values[method] = then.get(method), f"{text} of {owner}"
        for name, text in texts.items():
            keys, first = now.orders.get((path, name)), now.aliases.get((path, name))
            was_first = None if is_new else built.aliases.get((was, name))
            if keys is not None and not is_new and keys != built.orders.get((was, name), keys):
                values[name] = then.get(name), in_order(text, keys)
            elif first is not None and (name in values or was_first is None or _renamed(was_first, is_at) != first):
                values[name] = None, reference(type(now.mutable[path, name]), first)
            elif first is None and was_first is not None and (path, name) in now.mutable:
                values[name] = None, text
        for name, (_, text) in values.items():
            if now.mutable.get((path, name)) is not built.mutable.get((was, name)):
                values[name] = None, text  # whoever else has the one that building made keeps it as it was
            if not is_restorable(text) or not (name in then or text is None or can_be_put(name)):
                raise NotShareableError(f"loading set {full_name(path, name)} to {text}, which cannot be described")
        known = {} if is_new else built.named.get(was, {})
        for name, parts in now.named.get(path, {}).items():
            if name not in values and name in known and not _are_same(parts, known[name]):
                raise NotShareableError(f"loading set {full_name(path, name)} to another {texts[name]}")
        fixed = now.fixed.get(path, {}) | ({} if is_new else built.fixed.get(was, {}))
        for name, (_, text) in values.items():
            if (fixed and _is_fixed(name, fixed, values)) or (text is None and _is_left(name, values)):
                raise NotShareableError(f"loading changed {full_name(path, name)}, in whose place no other can be put")
        for name, (_, text) in list(values.items()):
            if (before := then.get(name)) is not None and text is not None:
                values |= keeps_part(name, before, text)
        if not is_new and (cls := now.classes[path]) is not built.classes.get(was, cls):
            if loaded_class(class_name(cls)) is not cls:
                raise NotShareableError(f"loading made {path!r} a {class_name(cls)}, a class that cannot be found")
            values[CLASS] = describe_value(built.classes[was]), describe_value(cls)
        if now.children[path] != ([] if is_new else built.children.get(was, [])):
            values[CHILDREN] = None, repr(now.children[path])
        opaque = {} if is_new else built.opaque.get(was, {})
        for name, value in now.opaque.get(path, {}).items():
            if name in values or name not in opaque:
                continue
            if opaque[name] is not value:
                raise NotShareableError(
                    f"loading replaced {full_name(path, name)} by another {texts[name]}, which cannot be described"
                )
            then_in, now_in = built.insides.get((was, name), {}), now.insides.get((path, name), {})
            if built.states[was, name] != now.states[path, name] or any(different(then_in, now_in, now.tensors)):
                raise NotShareableError(
                    f"loading changed {full_name(path, name)}, a {texts[name]}, which cannot be described"
                )
        here, there = now.slots[path], {} if is_new else built.slots.get(was, {})
        # A slot that is tied to nothing any more has its own name here.
        tied = {
            name: now.ties[f"{path}:{name}"]
            for name in here
            if is_new or now.ties[f"{path}:{name}"] != _renamed(built.ties.get(f"{was}:{name}", f"{was}:{name}"), is_at)
        }
        for slot in slots:
            if tied.get(slot.name, f"{path}:{slot.name}") == f"{path}:{slot.name}" and self.is_own(slot.tensor):
                origin = self._origin(slot, f"{was}:{slot.name}", full_name(path, slot.name))
                if origin is not None:
                    tied[slot.name] = self._moved[full_name(path, slot.name)] = _renamed(origin, is_at)
        return Observed(
            values=dict(sorted(values.items())),
            added=tuple(
                slot
                for name, slot in here.items()
                if (there.get(name) != slot or name in tied) and tied.get(name) in (None, f"{path}:{name}")
            ),
            removed=tuple(name for name in there if name not in here),
            retied={name: first for name, first in tied.items() if first != f"{path}:{name}"},
            untouched=self._untouched(slots),
        )

    def _origin(self, slot: LiveSlot, was: str, name: str) -> str | None:
        """Where building had put the memory that loading moved to this slot; None if it was in this slot."""
        memory = _memory_of(slot.tensor)
        if self._built_at.get(was) == memory:
            return None
        for origin, built in self._built_at.items():
            if built == memory:
                return origin
        raise NotShareableError(f"loading set {name} to a part of what building made, which cannot be described")

    def _untouched(self, slots: list[LiveSlot]) -> tuple[str, ...]:
        return tuple(slot.name for slot in slots if slot.kind is not _ATTRIBUTE and self.is_own(slot.tensor))


@contextmanager
def _watching_beside(watch: Watch) -> Iterator[None]:
    with watch.beside(), Looks(watch):
        yield


def _of_autograd(tensor: torch.Tensor) -> list[int]:
    """The ids of a tensor's gradient and of its hooks."""
    if not tensor.is_leaf:
        return []
    hooks = [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]
    return [id(each) for each in (tensor.grad, *hooks) if each is not None]


def _are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _is_fixed(name: str, fixed: Mapping[str, bool], values: Mapping[str, tuple[str | None, str | None]]) -> bool:
    """Whether an engine could not give the value of this name another text: it is fixed, or a part of what is."""
    holders = [*holders_of(name)]
    if any(holder in values and not keeps_parts(values[holder][1]) for holder in holders):
        return False  # it comes, or goes, with what holds it
    return name in fixed or any(fixed.get(holder, False) for holder in holders)


def _is_left(name: str, values: Mapping[str, tuple[str | None, str | None]]) -> bool:
    """Whether the value of this name is gone from a function, which has no fewer in an engine."""
    holder = next(holders_of(name), "")
    return holder.endswith(".__closure__") and not any(each in values for each in holders_of(holder))


def _check_functions(loaded: Loaded, tree: Tree) -> None:
    """Raise `NotShareableError` if a function or a class that loading put there is not the one that has its name.

    One that wraps another says that it is that one.
    """
    wanted = {
        path: names
        for path, seen in loaded.modules.items()
        if (names := {name: text for name, (_, text) in seen.values.items() if text and _FUNCTION.match(text)})
    }
    for (index, name), place in capture(tree.modules[0].module, wanted=wanted).places.items() if wanted else ():
        path = tree.modules[index].path
        function = place.value.func if isinstance(place.value, functools.partial) else place.value
        find = loaded_class if isinstance(function, type) else loaded_function
        if isinstance(function, _PYTHONS) and find(class_name(function)) is not function:  # type: ignore[arg-type]
            raise NotShareableError(f"loading set {full_name(path, name)} to another {wanted[path][name]}")


_FUNCTION = re.compile(r"(partial of )*function |class ")
_PYTHONS = (types.FunctionType, types.BuiltinFunctionType, type)


def _make_plain(tree: Tree) -> None:
    """Times that loading left are plain numbers from now on, in the model and in `tree`."""
    wanted = {
        live.path: names
        for live in tree.modules
        if (names := [name for name, text in live.attributes.items() if is_time(text)])
    }
    if not wanted:
        return
    for (index, name), place in capture(tree.modules[0].module, wanted=wanted).places.items():
        value = plain(place.value)
        place.set(value)
        tree.modules[index].attributes[name] = repr(value)


def _renamed(full: str, is_at: dict[str, str]) -> str:
    """The full name of a tensor at the place where its module is now."""
    path, _, name = full.partition(":")
    return f"{is_at.get(path, path)}:{name}"


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A value that is equal for the same elements of the same storage, as long as that storage lives."""
    storage = None if is_lazy(tensor) else storage_of(tensor)
    return (id(tensor),) if storage is None else (storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def check_plain(tree: Tree) -> None:
    """Raise `NotShareableError` if what a tensor holds is elsewhere than in its own storage, or in another form."""
    for slot in tree.slots():
        tensor = slot.tensor
        if not (tensor.is_meta or is_lazy(tensor) or _is_strided(tensor)):
            what = f"a {class_name(type(tensor))} ({'nested' if tensor.is_nested else tensor.layout})"
            raise NotShareableError(f"{tree.describe(slot)} is not a plain tensor but {what}.")


def _is_strided(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if is_traceable_wrapper_subclass(tensor):
        return False
    storage = tensor.untyped_storage()
    try:
        return storage.nbytes() == 0 or storage.data_ptr() != 0
    except RuntimeError:  # a wrapper that nothing traces
        return False
