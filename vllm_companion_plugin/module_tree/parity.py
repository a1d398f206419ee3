"""Compare a live tree with a published one: modules, classes, attributes, and the meta device."""

from __future__ import annotations

from vllm_companion_plugin.errors import ParityError
from vllm_companion_plugin.module_tree.capture import Tree, class_name
from vllm_companion_plugin.types import Manifest


def compare_modules(tree: Tree, manifest: Manifest) -> None:
    """The same modules under the same names, in the same order, of the same classes.

    Raises:
        ParityError: naming the first that differs.
    """
    for live, published in zip(tree.modules, manifest.modules, strict=False):
        where = live.path or "the model"
        if live.path != published.path or tuple(live.aliases) != published.aliases:
            raise ParityError(f"module {live.path!r} {live.aliases} here is {published.path!r} in the published model.")
        if (here := class_name(type(live.module))) != published.class_name:
            raise ParityError(f"{where} is a {here} here and a {published.class_name} in the published model.")
    if len(tree.modules) != len(manifest.modules):
        raise ParityError(f"{len(tree.modules)} modules here, {len(manifest.modules)} in the published model.")


def compare_structure(tree: Tree, manifest: Manifest) -> None:
    """Equal attributes, floats included, and no tensor left without data.

    Raises:
        ParityError: naming module, attribute and both values.
    """
    for live, published in zip(tree.modules, manifest.modules, strict=True):
        where = live.path or "the model"
        if live.attributes != published.attributes:
            name = _first_difference(live.attributes, dict(published.attributes))
            here, there = live.attributes.get(name, "absent"), published.attributes.get(name, "absent")
            raise ParityError(f"{where}.{name} is {here} here and {there} in the published model.")
        if live.floats.keys() != published.floats.keys():
            name = min(live.floats.keys() ^ published.floats.keys())
            raise ParityError(f"{where}.{name} is a number in only one of this and the published model.")
    for slot in tree.slots():
        if slot.tensor.is_meta:
            raise ParityError(f"{tree.describe(slot)} was left without data.")


def _first_difference(here: dict[str, str], there: dict[str, str]) -> str:
    return min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
