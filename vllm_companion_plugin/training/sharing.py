"""What a model has of a companion: an entry that its parameters view, and whether they still do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import NotSharedError
from vllm_companion_plugin.training.frozen import NOT_TRACED, FrozenParameter

_ATTRIBUTE = "_companion_sharing"
_SHOWN = 8
"""Most names in an error."""
_WRAPPERS = ("", "base_model.model.", "module.")
"""What PEFT and others put before the names of a model that they wrap."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter is, and what it views."""

    name: str
    module: weakref.ref[nn.Module]
    attribute: str
    dtype: torch.dtype
    address: int
    shape: torch.Size
    stride: tuple[int, ...]


class Places:
    """Where parameters of a model were when it was made, on an entry's memory.

    Args:
        names: of the parameters that view it.
        label: of the entry, for errors.

    Attributes:
        size_bytes: of these parameters; those that are tied count once.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], label: str) -> None:
        self._label = label
        self._places = [_place(model, name) for name in names]
        base = getattr(model, "base_model", model)  # which may be all that the user keeps
        paths = {each: path for path, each in model.named_modules()}
        self._roots = [(weakref.ref(each), path) for each, path in {model: "", base: paths.get(base, "")}.items()]
        sizes = {place.address: place.shape.numel() * place.dtype.itemsize for place in self._places}
        self.size_bytes = sum(sizes.values())

    def check(self) -> None:
        """Raise `NotSharedError` if parameters are not there any more."""
        root, path = next(((each, path) for ref, path in self._roots if (each := ref()) is not None), (None, ""))
        if root is None:
            return
        there = _reachable(root)
        with torch._C.DisableTorchFunctionSubclass():
            left = [
                each.name
                for each in self._places
                if each.name.startswith(path and f"{path}.") and not _is_there(each, root, path, there)
            ]
        if left:
            raise NotSharedError(
                f"{several(left, _SHOWN)} left the memory of {self._label}: another dtype or device, a "
                "wrapper, assigned weights or other modules have replaced what engines use.",
                remedy="Ask for the dtype that the engines have, and wrap the model, but replace nothing in it.",
            )


class Sharing:
    """An entry that the parameters of a model view. It ends with the last tensor that views the entry's memory.

    Args:
        model: whose parameters are frozen views, or are named in `copied`.
        shared: names of the views.
        attachment: to the entry; owned from now on.
        copied: bytes of each parameter that has memory of its own, by name; an attribute, too.

    Attributes:
        shared_bytes: of the parameters that are views; those that are tied count once.
    """

    def __init__(
        self, model: nn.Module, shared: Iterable[str], attachment: Attachment, copied: Mapping[str, int]
    ) -> None:
        self.copied = dict(copied)
        self._attachment = attachment
        self._places = Places(model, shared, attachment.label)
        self.shared_bytes = self._places.size_bytes
        for each in dict.fromkeys([model, getattr(model, "base_model", model)]):  # PEFT calls the inner one only
            vars(each)[_ATTRIBUTE] = self
            each.register_forward_pre_hook(_check)
        # DistributedDataParallel writes the first rank's values to all ranks' parameters.
        vars(model)["_ddp_params_and_buffers_to_ignore"] = _Names(model)
        attachment.leave_to_tensors(attachment.close_later)

    @property
    def generation(self) -> int:
        """Of the entry that is used."""
        return self._attachment.generation

    @property
    def label(self) -> str:
        """Which entry it is: model, rank and device."""
        return self._attachment.label

    def check(self) -> None:
        """Raise `NotSharedError` if parameters do not view the entry's memory any more. Done before each step."""
        self._places.check()

    def close(self) -> None:
        """Unmap the memory and end the lease; the model cannot be used any more. Idempotent."""
        self._attachment.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model shares nothing, and neither does one that was saved."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


# Traced, the parameters would have other addresses.
@torch.compiler.disable(reason=NOT_TRACED)  # type: ignore[untyped-decorator, no-untyped-call]
def _check(module: nn.Module, _: Any) -> None:
    """Before the forward pass of a model that shares, or of a copy of one."""
    if (sharing := vars(module).get(_ATTRIBUTE)) is not None:
        sharing.check()


class _Names:
    """The names of shared parameters as a model has them by now, also with what wrappers put before them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __iter__(self) -> Iterator[str]:
        model = self._model()
        parameters = model.named_parameters() if model is not None else ()
        names = [name for name, each in parameters if isinstance(each, FrozenParameter)]
        return iter([f"{wrapper}{name}" for wrapper in _WRAPPERS for name in names])

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()


def sharing_of(model: nn.Module) -> Sharing | None:
    """The sharing of a model that `from_companion` has made, however it is wrapped; None of other models."""
    for module in model.modules():
        if (sharing := vars(module).get(_ATTRIBUTE)) is not None:
            assert isinstance(sharing, Sharing)
            return sharing
    return None


def _place(model: nn.Module, name: str) -> _Place:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters[attribute]
    assert parameter is not None
    return _Place(
        name,
        weakref.ref(module),
        attribute,
        parameter.dtype,
        parameter.data_ptr(),
        parameter.shape,
        parameter.stride(),
    )


def _reachable(root: nn.Module) -> set[int]:
    """The ids of all modules in `root`: `root.modules()`, which makes names of them, takes several times as long."""
    found: set[int] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found.add(id(module))
            waiting += [child for child in module._modules.values() if child is not None]
    return found


def _is_there(place: _Place, root: nn.Module, path: str, there: set[int]) -> bool:
    """Whether the module that had it does, wherever a wrapper has put it; or another one in its place.

    Args:
        root: of the model's modules, that was at `path`.
        there: ids of all modules in it.
    """
    module = place.module()
    if module is not None and id(module) in there and _has(module, place):
        return True
    try:
        module = root.get_submodule(place.name.rpartition(".")[0].removeprefix(path).removeprefix("."))
    except AttributeError:
        return False
    return _has(module, place)


def _has(module: nn.Module, place: _Place) -> bool:
    now: Any = module._parameters.get(place.attribute)
    if now is None and hasattr(module, "parametrizations"):  # as PEFT does with parameters of experts
        now = getattr(getattr(module.parametrizations, place.attribute, None), "original", None)
    if now is None or now.dtype != place.dtype or now.shape != place.shape or now.stride() != place.stride:
        return False
    try:
        address: int = now.data_ptr()
    except RuntimeError:  # of a tensor that is spread over ranks
        return False
    return address == place.address
