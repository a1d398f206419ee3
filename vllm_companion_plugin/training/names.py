"""Which tensors of a checkpoint a parameter of a Transformers model is made of, and which part each one is.

Transformers 5 gives parameters other names than checkpoints do, and merges some: all experts of a layer are one
parameter. It can undo that when it saves a model. That way is followed here on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_companion_plugin.core.placements import View

core_model_loading: Any
try:
    from transformers import core_model_loading
except ImportError:  # Transformers 4, whose parameters are named as in checkpoints
    core_model_loading = None

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint, as a part of a parameter.

    Attributes:
        name: in the checkpoint.
        shape: of that tensor.
        steps: to it from the parameter, as `Placed.steps`.
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[View, ...]


def parts_of(model: Any, checkpoint: Iterable[str]) -> dict[str, list[Part]]:
    """The parts of each tensor in the state of `model`, by its name; none of one whose parts are not known.

    Args:
        model: of Transformers, on the meta device.
        checkpoint: the names of all tensors that there are.
    """
    known = set(checkpoint)
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    found: dict[str, list[Part]] = {name: [] for name in state}
    with _Following(state) as following:
        saved = core_model_loading.revert_weight_conversion(model, dict(state)) if core_model_loading else state
    for name, tensor in saved.items():
        origin = following.origin(tensor)
        if origin is not None and name in known:
            found[origin[0]].append(Part(name, tuple(tensor.shape), origin[1]))
    missing = [name for name, parts in found.items() if not parts]
    for name, parameter in _renamed(model, known, missing).items():
        whole = state[parameter]
        view = View(tuple(whole.shape), tuple(whole.stride()), 0)
        found[parameter].append(Part(name, view.shape, (view,)))
    return found


class _Following(TorchDispatchMode):
    """Knows what part of which tensor each tensor is that is made of them by views and copies."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[str, tuple[View, ...]]] = {}
        self._addresses: list[StorageWeakRef] = []  # which nothing else gets meanwhile
        for name, tensor in tensors.items():
            self._note(tensor, (name, ()))

    def origin(self, tensor: torch.Tensor) -> tuple[str, tuple[View, ...]] | None:
        """The name of the tensor that this is a part of, and the steps to it."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        return known[0], (*known[1], View(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())))

    def _note(self, tensor: torch.Tensor, origin: tuple[str, tuple[View, ...]]) -> None:
        storage = tensor.untyped_storage()
        self._addresses.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        self._known[storage._cdata] = origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES and result.is_contiguous() and result.dtype == args[0].dtype:
            origin = self.origin(args[0])
            if origin is not None and result.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
                self._note(result, origin)
        return result


def _renamed(model: Any, checkpoint: Iterable[str], missing: list[str]) -> dict[str, str]:
    """Parameters that a checkpoint has under a name that Transformers reads, and does not write; by that name."""
    if not missing or core_model_loading is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, core_model_loading.WeightConverter)]
    state, wanted, found = model.state_dict(), set(missing), dict[str, str]()
    for name in sorted(checkpoint):
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is None and renamed in wanted:
            wanted.remove(renamed)
            found[name] = renamed
    return found
