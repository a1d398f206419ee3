"""What is special about the draft of speculative decoding: parts of it are the target's.

After loading a draft vLLM replaces its embedding and its output layer by the target's, if it has none of its
own or an equal one. Such modules are not published, and an attached draft has the target's from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.engine.vllm import drafts


def left_to_target(vllm_config: Any, draft: nn.Module, target: nn.Module) -> list[str]:
    """Paths of the modules of a loaded `draft` that are not worth publishing."""
    return [
        path
        for path, module in drafts.replaced_by_target(vllm_config, draft, target).items()
        if not drafts.owns(draft, path) or _equal(draft.get_submodule(path), module)
    ]


def _equal(here: nn.Module, there: nn.Module) -> bool:
    mine, its = dict(here.named_parameters()), dict(there.named_parameters())
    return (
        type(here) is type(there)
        and mine.keys() == its.keys()
        and all(
            (tensor.shape, tensor.dtype, tensor.device) == (its[name].shape, its[name].dtype, its[name].device)
            and not tensor.is_meta
            and torch.equal(tensor, its[name])
            for name, tensor in mine.items()
        )
    )


def taken_from_target(
    manifest: Manifest, vllm_config: Any, draft: nn.Module, target: nn.Module
) -> dict[str, nn.Module]:
    """The target's modules for those that the publisher of `manifest` left to it, by path in `draft`."""
    published = {path for module in manifest.modules for path in (module.path, *module.aliases)}
    replaced = drafts.replaced_by_target(vllm_config, draft, target)
    return {path: module for path, module in replaced.items() if path not in published}


@contextmanager
def taken_out(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """While open, `model` lacks the modules at `paths`."""
    removed = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        children = model.get_submodule(parent)._modules
        removed.append((children, name, children.pop(name)))
    try:
        yield
    finally:
        for children, name, module in removed:
            children[name] = module


def put_in(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Replace the modules at these paths."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module


def set_flags(draft: nn.Module, manifest: Manifest) -> None:
    """Note in `draft` what vLLM notes while it reads a checkpoint."""
    published = manifest.modules[0].attributes
    for name in drafts.DRAFT_FLAGS:
        if name in published:
            setattr(draft, name, published[name] == "True")
