"""A rehearsal of loading a model, with tensors that have no memory: what vLLM's reload would lose of it.

vLLM's reload repeats what the loaders of tensors do (`weight_loader`), one layer after the other. Until it does, the
whole model is on the meta device. So what a model's own code does with a parameter besides is in vain: a copy into it
is lost, and what is computed of it has no values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import meta
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_companion_plugin.engine.vllm import building, processing
from vllm_companion_plugin.engine.vllm.naming import named_as_source
from vllm_companion_plugin.tree.building import WithoutWeights
from vllm_companion_plugin.tree.live import full_name, named_modules, plain_tensors


@dataclass(frozen=True)
class Rehearsed:
    """What became of the tensors of a model that has no memory.

    Attributes:
        left: the tensors of each module into which no loader loaded anything, by name.
        by_hand: full names of those that the model's own code wrote, replaced, or computed something of.
    """

    model: nn.Module
    left: dict[nn.Module, frozenset[str]]
    by_hand: list[str]


def rehearse(vllm_config: Any, weights: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> Rehearsed:
    """Load `weights` into a second model, none of which takes memory; this engine's own one knows nothing of that.

    Args:
        weights: on the meta device, as a checkpoint has them.
        device: of the engine's model.

    Raises:
        Exception: of the model's code, which needs values of the weights.
    """
    with (
        building.beside(vllm_config, is_draft=False) as config,
        named_as_source(config.load_config),
        set_current_vllm_config(config),
        building.model_without_weights(config, config.model_config, "", WithoutWeights(device)) as model,
        set_default_torch_dtype(config.model_config.dtype),
        torch.no_grad(),
    ):
        return rehearsed(model, weights)


def rehearsed(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Rehearsed:
    """As `rehearse`, of a model that nobody needs: it has no memory any more."""
    places = [(path, module, name) for path, module in named_modules(model) for name in _tensors(module)]
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object] = model.load_weights  # type: ignore[assignment]
    with _Watch(_take_memory(model)) as watch:
        load(weights)
    left: dict[nn.Module, set[str]] = {}
    by_hand: dict[str, None] = {}
    for path, module, name in places:
        tensor = _tensors(module).get(name)  # loading may have removed it
        storage = -1 if tensor is None else _storage(tensor)
        if storage not in watch.loaded:
            left.setdefault(module, set()).add(name)
        if tensor is not None and (storage in watch.by_hand or storage not in watch.known):
            by_hand[full_name(path, name)] = None
    return Rehearsed(model, {module: frozenset(names) for module, names in left.items()}, [*by_hand])


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of `module` itself."""
    return {name: tensor for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}


def _take_memory(model: nn.Module) -> list[torch.Tensor]:
    """Give each module tensors on meta in place of its own, with the same class, attributes and original loader."""
    made: dict[int, torch.Tensor] = {}
    before: list[torch.Tensor] = []  # no other tensor gets the address of one that is freed meanwhile
    for module in model.modules():
        processing.end_online_loading(module)
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if tensor is not None and id(tensor) not in made:
                    before.append(tensor)
                    with plain_tensors():
                        made[id(tensor)] = meta.to_meta_tensor(tensor)
                if tensor is not None:
                    registered[name] = made[id(tensor)]  # type: ignore[assignment]
    return [*made.values()]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells what loaders do with tensors from what others do.

    Storages are told apart by the address of their C++ object.

    Args:
        tensors: kept alive meanwhile. They have loaders afterwards that note their calls.

    Attributes:
        known: of `tensors`.
        loaded: of those that a loader was called for.
        by_hand: of those that somebody else wrote, or computed something of.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self._is_loading = False
        self.known = {*map(_storage, tensors)}
        self.loaded: set[int] = set()
        self.by_hand: set[int] = set()
        for tensor in tensors:  # all have loaders, as when vLLM reloads them
            loader = getattr(tensor, "weight_loader", default_weight_loader)
            tensor.weight_loader = self._noting(loader, _storage(tensor))  # type: ignore[attr-defined]

    def _noting(self, loader: Callable[..., Any], storage: int) -> Callable[..., Any]:
        @functools.wraps(loader)
        def noting(*args: Any, **kwargs: Any) -> Any:
            before, self._is_loading = self._is_loading, True
            try:
                return loader(*args, **kwargs)
            finally:
                self._is_loading = before
                self.loaded.add(storage)

        return noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_loading:
            with plain_tensors():
                given = {*_storages((*args, *(kwargs or {}).values()))}
                if func._schema.is_mutable or not given.issuperset(_storages((result,))):  # no view
                    self.by_hand |= given & self.known
        return result


def _storages(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield _storage(value)
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
