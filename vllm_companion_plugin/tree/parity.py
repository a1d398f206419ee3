"""Compare a live tree with a published one: modules, classes, values, tensors, and the meta device.

Equal where it matters, the engine's own where it follows from the engine's flags:

- modules, classes of objects, functions, enums and dtypes decide how bytes are understood, and must be equal;
- plain values (numbers, strings, containers of them; times) that neither loading nor post-processing changed were made
  by building this model here, from this engine's flags: they stay as they are. So does what only one of both has, and
  which method an object calls: engines that compile differently share;
- what loading changed was set to the published value before, and must be equal now;
- a number that post-processing made is this engine's own, too, unless it read data of tensors: then a float is
  set to the published value. Anything else that it made must be equal.
"""

from __future__ import annotations

import collections
import enum
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import NOTHING_OBSERVED, Manifest, ModuleInfo, Observed, TensorInfo
from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.descriptions import tensor_attributes
from vllm_companion_plugin.tree.live import LiveSlot, Tree, full_name
from vllm_companion_plugin.tree.notation import is_restorable
from vllm_companion_plugin.tree.values import class_name, dtype_name, is_value, value_of

_name_of: Callable[[type], str] = functools.cache(class_name)


def compare_modules(tree: Tree, manifest: Manifest) -> None:
    """Check that there are the same modules under the same names, in the same order, of the same classes.

    Raises:
        ParityError: naming the first that differs.
    """
    for live, published in zip(tree.modules, manifest.modules, strict=False):
        if live.path != published.path or (*live.aliases,) != published.aliases:
            raise ParityError(
                f"module {live.path!r} {live.aliases} here is {published.path!r} in the published model.",
                live.path or "the model",
            )
        if (here := _name_of(type(live.module))) != published.class_name:
            where = live.path or "the model"
            raise ParityError(f"{where} is a {here} here and a {published.class_name} in the published model.", where)
    if len(tree.modules) != len(manifest.modules):
        raise ParityError(f"{len(tree.modules)} modules here, {len(manifest.modules)} in the published model.")


def set_measured(model: nn.Module, tree: Tree, manifest: Manifest) -> None:
    """Set the floats that the publisher's post-processing measured on weights. Here it had only placeholders."""
    wanted = {}
    for live, published in zip(tree.modules, manifest.modules, strict=True):
        if published.observed.measured and live.attributes != published.attributes:
            names = [name for name in published.observed.processed if _is_measured(live.attributes, published, name)]
            if names:
                wanted[live.path] = names
    if not wanted:
        return
    places = capture(model, wanted=wanted).places
    for (index, name), place in places.items():
        text = manifest.modules[index].attributes[name]
        place.set(value_of(text))
        tree.modules[index].attributes[name] = text


def _is_measured(here: dict[str, str], published: ModuleInfo, name: str) -> bool:
    there = published.attributes.get(name)
    return here.get(name) != there and _is_float(here.get(name)) and _is_float(there)


def _is_float(text: str | None) -> bool:
    if text is None or text[:1] not in "-0123456789ni":
        return False
    try:
        return type(value_of(text)) is float
    except ValueError:
        return False


def compare_values(tree: Tree, manifest: Manifest) -> dict[str, str]:
    """Check that values and classes are equal where they must be.

    Returns:
        This engine's own values that differ from the published ones, by full name.

    Raises:
        ParityError: naming module, attribute and both values.
    """
    own: dict[str, str] = {}
    for live, published in zip(tree.modules, manifest.modules, strict=True):
        own |= _own_values(live.path, live.attributes, published, manifest)
    return own


def _own_values(path: str, attributes: Mapping[str, str], published: ModuleInfo, manifest: Manifest) -> dict[str, str]:
    """Those of one module, as of `compare_values`."""
    if attributes == published.attributes:
        return {}
    own = {}
    changed = set(published.observed.values)
    processed = set(published.observed.processed)
    for name in sorted({name for name, _ in attributes.items() ^ published.attributes.items()}):
        here, there = attributes.get(name), published.attributes.get(name)
        where = full_name(path, name)
        is_own = name not in changed and not (published.observed.measured and name in processed)
        # Where nobody observed how the model was made, loading may have made a choice.
        fits = _are_numbers if name in processed else _are_choices if manifest.is_observed else _are_data
        if not (is_own and fits(here, there)):
            raise ParityError(
                f"{where} is {here or 'absent'} here and {there or 'absent'} in the published model.",
                where,
                here or "absent",
            )
        own[where] = here or "absent"
    return own


_WHOLE = (
    *("stage", "storages", "files", "is_observed"),
    *("added_modules", "removed_modules", "emptied_modules", "retied_modules", "moved_modules"),
)


def compare_published(mine: Manifest, other: Manifest) -> None:
    """Check that a model that was published anew can take the place of the one of before, where its bytes were.

    All must be equal but values that are each engine's own.

    Raises:
        ParityError: naming the first that is not.
    """
    for name in _WHOLE:
        here, there = getattr(mine, name), getattr(other, name)
        if here != there:
            raise ParityError(f"{name.replace('_', ' ')}: {here} here, and {there} in the published model.", name)
    if len(mine.modules) != len(other.modules) or len(mine.tensors) != len(other.tensors):
        raise ParityError(
            f"{len(mine.modules)} modules and {len(mine.tensors)} tensors here, {len(other.modules)} and "
            f"{len(other.tensors)} in the published model."
        )
    for module, published in zip(mine.modules, other.modules, strict=True):
        where = module.path or "the model"
        if replace(module, attributes={}, observed=NOTHING_OBSERVED) != replace(
            published, attributes={}, observed=NOTHING_OBSERVED
        ):
            raise ParityError(f"{where} has other names, classes or tensors than in the published model.", where)
        _check_changed(module, published)
        own = _own_values(module.path, module.attributes, published, mine)
        if own and not mine.is_observed:
            name, value = next(iter(own.items()))
            raise ParityError(f"{name} is {value} here and another in the published model.", name, value)
    for number, (tensor, info) in enumerate(zip(mine.tensors, other.tensors, strict=True)):
        if tensor != info and not (tensor.own and info.own):
            raise ParityError(f"tensor {number} is {tensor} here, and {info} in the published model.")


def _check_changed(module: ModuleInfo, published: ModuleInfo) -> None:
    """Raise `ParityError` unless loading made the same of both, whatever was there before."""
    here, there = ({name: after for name, (_, after) in each.observed.values.items()} for each in (module, published))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            where = full_name(module.path, name)
            mine, other = (values.get(name) or "absent" for values in (here, there))
            raise ParityError(f"loading made {where} {mine} here and {other} in the published model.", where, mine)
    ours, theirs = _by_processing(module, published), _by_processing(published, module)
    if ours != theirs:
        where = module.path or "the model"
        what = next(each.name for each in fields(ours) if getattr(ours, each.name) != getattr(theirs, each.name))
        raise ParityError(
            f"loading or processing changed other things ({what}) in {where} than in the published model.", where
        )


def _by_processing(module: ModuleInfo, other: ModuleInfo) -> Observed:
    """What was observed of `module`, without the values that `other` has, too, however it came to them.

    A module of several models, as vLLM's activation functions are, has been processed with the first one of a process.
    Numbers that may have been measured count all the same: an engine that attaches has none of them by itself.
    """
    seen = module.observed
    measured = seen.measured or other.observed.measured
    alike = module.attributes.items() & other.attributes.items()
    same = {name for name, text in alike if not (measured and _has_numbers(text))}
    processed = tuple(name for name in seen.processed if name not in same)
    return replace(seen, values={}, processed=processed, measured=seen.measured and bool(processed))


def _has_numbers(text: str) -> bool:
    """Whether a value is a number, or has one in it. A choice is none."""
    try:
        value = value_of(text)
    except ValueError:  # a class or a function
        return False
    return _has_number(value)


def _has_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_number, (*value.keys(), *value.values())))
    if isinstance(value, Collection) and not isinstance(value, str):
        return any(map(_has_number, value))
    return isinstance(value, (int, float, complex, np.generic)) and not isinstance(value, bool)


def _are_numbers(here: str | None, there: str | None) -> bool:
    return _is_number(here) and _is_number(there)


def _are_data(here: str | None, there: str | None) -> bool:
    return _is_data(here) and _is_data(there)


def _are_choices(here: str | None, there: str | None) -> bool:
    """Whether flags may have chosen between these two when the model was built, and bytes mean the same with either.

    Flags decide whether an attribute is made at all, and which method of a layer runs: vLLM's layers have one for each
    way to be compiled.
    """
    if here is None or there is None:
        return not _is_meaning(here or there)
    return _are_methods(here, there) or _are_data(here, there)


def _is_meaning(text: str | None) -> bool:
    """Whether it is a class, an enum or a dtype. They say how bytes are understood even where nothing was before."""
    return text is not None and (text.startswith("class ") or (is_value(text) and not _is_data(text)))


def _are_methods(here: str, there: str) -> bool:
    """Whether both are methods of classes with names; one may be a static one of the same class."""
    kinds, names = zip(*(text.partition(" ")[::2] for text in (here, there)), strict=True)
    if any("<" in name for name in names):
        return False
    in_one_class = names[0].rpartition(".")[0] == names[1].rpartition(".")[0]
    return kinds == ("method", "method") or (sorted(kinds) == ["function", "method"] and in_one_class)


def _is_data(text: str | None) -> bool:
    """Whether a text is that of numbers, strings and containers of them: no class, function, enum or dtype."""
    if text is None or text.isdecimal():
        return True
    try:
        return not _names_code(value_of(text))
    except ValueError:
        return False


def _names_code(value: Any) -> bool:
    if isinstance(value, (enum.Enum, torch.dtype, np.dtype, torch.layout, torch.memory_format, type)):
        return True
    if isinstance(value, dict):
        return any(map(_names_code, (*value.keys(), *value.values())))
    return isinstance(value, (list, tuple, set, frozenset, collections.deque)) and any(map(_names_code, value))


def _is_number(text: str | None) -> bool:
    return text is None or text[0].isdigit() or text[0] == "-" or text in ("nan", "inf")


def compare_tensor_attributes(slot: LiveSlot, info: TensorInfo, path: str, observed: Observed) -> None:
    """Check that what was hung on a published tensor is equal, or this engine's own like any other value.

    Marks that are missing here are made if they can be: post-processing hangs them on the tensors that it makes.

    Raises:
        ParityError: naming tensor, attribute and both values.
    """
    tensor, where = slot.tensor, full_name(path, slot.name)
    _set_missing_attributes(tensor, info)
    mine = tensor_attributes(tensor)
    for name in mine.keys() | info.attributes.keys():
        here, there = mine.get(name), info.attributes.get(name)
        if here != there and (f"{slot.name}.{name}" in observed.values or not (_is_data(here) and _is_data(there))):
            raise ParityError(
                f"{where}.{name} is {here or 'absent'} here and {there or 'absent'} in the published model.",
                f"{where}.{name}",
                here or "absent",
            )


def _set_missing_attributes(tensor: torch.Tensor, info: TensorInfo) -> None:
    for name in info.attributes.keys() - tensor.__dict__.keys():
        if name.isidentifier() and not name.startswith("__") and is_restorable(info.attributes[name]):
            try:
                tensor.__dict__[name] = value_of(info.attributes[name])
            except ValueError:
                continue


def is_like(tensor: torch.Tensor, info: TensorInfo) -> bool:
    """Whether `tensor` has the dtype, the shape and the stride of what was published."""
    return dtype_name(tensor.dtype) == info.dtype and tensor.shape == info.shape and tensor.stride() == info.stride


def tensor_difference(tensor: torch.Tensor, info: TensorInfo) -> str | None:
    """How `tensor` differs from what was published, values aside; None if it does not."""
    if tensor.requires_grad != info.requires_grad and tensor.is_leaf:
        tensor.requires_grad_(info.requires_grad)
    if is_like(tensor, info) and _name_of(type(tensor)) == info.class_name:
        return None
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("dtype", dtype_name(tensor.dtype), info.dtype),
        ("shape", tuple(tensor.shape), info.shape),
        ("stride", tensor.stride(), info.stride),
        ("class", class_name(type(tensor)), info.class_name),
    )
    for what, here, published in checks:
        if here != published:
            return f"{what} is {here} here and {published} in the published model"
    return None
