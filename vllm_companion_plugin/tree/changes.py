"""Give a model that was built, and not loaded, what loading would have changed in it besides its tensors' bytes.

The publisher saw what loading did (observe.py): values that it set, modules and tensors that it added,
removed or tied to others. The same is done here to a model that was only built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import AddedSlot, Manifest, Observed, TensorKind
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.descriptions import tensor_attributes
from vllm_companion_plugin.tree.live import Tree, full_name, named_modules
from vllm_companion_plugin.tree.live_values import LiveValues, free_name
from vllm_companion_plugin.tree.notation import (
    AS_BUILT,
    CHILDREN,
    CLASS,
    KEPT,
    OF_TENSOR,
    PART,
    REFERENCE,
    without_known,
)
from vllm_companion_plugin.tree.states import built_text, fingerprints, is_sampled
from vllm_companion_plugin.tree.values import loaded_class, value_of


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
    renamed = _removed_tensors(modules, changed)
    for path, observed in changed.items():
        if path in modules:
            _remove_slots(modules[path], observed)
    wanted = {path: _wanted(observed) for path, observed in changed.items()}
    for reference in _references(changed):
        owner, _, name = reference.partition(":")
        wanted.setdefault(owner, set()).add(name)
    tree = capture(model, wanted=wanted)
    values = LiveValues(tree)
    for path, observed in changed.items():
        if path in values.by_path:
            values.check_as_built(values.by_path[path], observed)
    for path, observed in changed.items():
        live = values.by_path.get(path)
        if live is not None:
            values.change(live, observed)
    # All are looked up before the first is put: loading may have swapped them.
    retied = [
        (
            values.by_path[path],
            name,
            renamed[first] if first in renamed else values.tensor(first),
            _kind_of(manifest, path, name),
        )
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
        f"{path}:{name.removesuffix(OF_TENSOR)}": built.removeprefix(AS_BUILT)
        for path, observed in changed.items()
        for name, (built, _) in observed.values.items()
        if name.endswith(OF_TENSOR) and built is not None
    }
    if not wanted:
        return
    tree = capture(model)
    found = {f"{tree.modules[slot.module].path}:{slot.name}": slot.tensor for slot in tree.slots()}
    for full, there in wanted.items():
        tensor = found.get(full)
        here = "without data"
        if tensor is not None and is_unwritten(tensor):
            continue
        if tensor is not None and not tensor.is_meta:
            storage = tensor.untyped_storage()._cdata
            sampled = (storage,) if is_sampled(tensor) else ()
            here = built_text(tensor.shape, fingerprints({storage: tensor}, sampled)[storage])
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


def _removed_tensors(modules: dict[str, nn.Module], changed: dict[str, Observed]) -> dict[str, torch.Tensor]:
    """Parameters and buffers that loading removed from one slot and put into another, by full name of the first."""
    found: dict[str, torch.Tensor] = {}
    for full in {first for observed in changed.values() for first in observed.retied.values()}:
        path, _, name = full.partition(":")
        if path in modules and path in changed and name in changed[path].removed:
            for table in (modules[path]._parameters, modules[path]._buffers):
                if (tensor := table.get(name)) is not None:
                    found[full] = tensor
    return found


def _remove_slots(module: nn.Module, observed: Observed) -> None:
    for name in observed.removed:
        free_name(module, name, {})


def _wanted(observed: Observed) -> set[str]:
    """The names of the values that change, and of what holds these values."""
    changed = (name.removesuffix(KEPT) for name in observed.values)
    names = {*changed, *(slot.name for slot in observed.added), *observed.retied}
    for name in list(names):
        while (part := PART.fullmatch(name)) is not None:
            name = part["parent"]
            names.add(name)
    return names


def _references(changed: dict[str, Observed]) -> set[str]:
    texts = (after for observed in changed.values() for _, after in observed.values.values() if after)
    return {text.partition(" @")[2] for text in texts if REFERENCE.fullmatch(text)}


def _kind_of(manifest: Manifest, path: str, name: str) -> TensorKind:
    module = next(module for module in manifest.modules if module.path == path)
    return next((slot.kind for slot in module.slots if slot.name == name), TensorKind.PARAMETER)
