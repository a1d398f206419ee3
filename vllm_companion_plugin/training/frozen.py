"""Parameters on memory that this process cannot write to: an attempt is an error, before it would end the process."""

from __future__ import annotations

import types
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vllm_companion_plugin.errors import SharedWeightsError

NOT_TRACED = "Parameters on shared memory are guarded in Python. Compile the model without fullgraph=True."
"""Why PyTorch's compiler leaves out what looks after them."""


class FrozenTensor(torch.Tensor):
    """A view of a `FrozenParameter`: what is written to it would be written to the parameter."""

    companion_name: str

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __copy__(self) -> FrozenTensor:
        return _view(plain(self), self.companion_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A tensor of PyTorch's own, with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = plain(self).clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def as_subclass(self, cls: type[Any]) -> Any:
        return _as_subclass(self, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a tensor of PyTorch's own: what is saved can be loaded anywhere."""
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class FrozenParameter(nn.Parameter):
    """A parameter that views memory which engines use, too. Nothing of it is trained.

    Attributes:
        companion_name: which one it is, for errors.
    """

    companion_name: str

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __copy__(self) -> FrozenParameter:
        """On the same memory, as of any other; so it is guarded, too."""
        copied = freeze(self.companion_name, self)
        copied.requires_grad = self.requires_grad
        return copied

    def as_subclass(self, cls: type[Any]) -> Any:
        return _as_subclass(self, cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A parameter with memory of its own, as of any other."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(plain(self).clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(plain(self), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _copied(frozen: Any) -> Any:
    """For other processes: PyTorch would move what it sends into memory of its own, and the model with it."""
    copied = plain(frozen).clone()
    made = nn.Parameter(copied, frozen.requires_grad) if isinstance(frozen, nn.Parameter) else copied
    return reduce_tensor(made)  # type: ignore[no-untyped-call]


for _kind in (FrozenTensor, FrozenParameter):
    ForkingPickler.register(_kind, _copied)


def freeze(name: str, view: torch.Tensor) -> FrozenParameter:
    """A parameter on the memory of `view`, without a copy. Errors name it `name`."""
    frozen: FrozenParameter = torch.Tensor._make_subclass(FrozenParameter, plain(view), False)
    frozen.companion_name = name
    return frozen


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without the guard."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor._make_subclass(torch.Tensor, tensor.detach(), False)


def _view(tensor: torch.Tensor, name: str) -> FrozenTensor:
    view: FrozenTensor = tensor.as_subclass(FrozenTensor)
    view.companion_name = name
    return view


def _as_subclass(frozen: Any, cls: type[Any]) -> Any:
    """PyTorch asks no `__torch_function__` here, and a tensor of a class without the guard could be written to."""
    if not issubclass(FrozenTensor, cls):
        raise _refused(frozen.companion_name)
    with torch._C.DisableTorchFunctionSubclass():
        return _view(frozen.view_as(frozen), frozen.companion_name)


@torch.compiler.disable(reason=NOT_TRACED)  # type: ignore[untyped-decorator, no-untyped-call]
def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name: str = getattr(func, "__name__", "")
    if name in _ELEMENT_BY_ELEMENT:
        raise _refused(args[0].companion_name)
    with torch._C.DisableTorchFunctionSubclass():
        if not _may_write(func, name, kwargs):
            result = func(*args, **kwargs)
        else:
            with _Guard(args, kwargs):
                result = func(*args, **kwargs)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
            return result
        frozen = _by_storage((args, kwargs))
        if isinstance(result, (tuple, list)) and all(type(each) is torch.Tensor for each in result):
            return type(result)(_guarded(each, frozen) for each in result)
        return _guarded(result, frozen) if type(result) is torch.Tensor else result


_ELEMENT_BY_ELEMENT = ("apply_", "map_", "map2_")
"""Functions that write without any operator of PyTorch."""


def _may_write(func: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write to what it is given: by its schema or its name, or because it is Python.

    What it does is looked at then. Functions whose names say nothing do not write to what they are given.
    """
    if isinstance(func, OpOverload):
        return bool(func._schema.is_mutable)
    if isinstance(func, OpOverloadPacket):
        return any(getattr(func, each)._schema.is_mutable for each in func.overloads())  # type: ignore[no-untyped-call]
    if isinstance(func, types.FunctionType):
        return True
    if name.startswith("__"):
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_") or "out" in kwargs


def _guarded(result: torch.Tensor, frozen: dict[int | None, Any]) -> torch.Tensor:
    """`result`, guarded as well if it views the memory of a frozen argument: so do views, `detach` and `data`."""
    if (of := frozen.get(_storage(result))) is not None:
        return _view(result, of.companion_name)
    return result


def _by_storage(values: Any) -> dict[int | None, Any]:
    """The frozen tensors among `values`."""
    frozen = (each for each in tree_iter(values) if isinstance(each, (FrozenParameter, FrozenTensor)))
    return {address: each for each in frozen if (address := _storage(each)) is not None}


def _refused(name: str) -> SharedWeightsError:
    return SharedWeightsError(
        f"{name} is read-only: engines use the same bytes.", remedy="Train adapters beside it, or clone it first."
    )


def _storage(tensor: torch.Tensor) -> int | None:
    """Where its memory is; None of a tensor without any. What `torch.func` wraps has that of what is in it."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


class _Guard(TorchDispatchMode):
    """Raises before an operation writes to memory of a frozen tensor among `args` and `kwargs`."""

    def __init__(self, args: Any, kwargs: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._frozen = _by_storage((args, kwargs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._check(argument, value)
        for argument in func._schema.arguments:
            self._check(argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _check(self, argument: Any, value: Any) -> None:
        if value is None or argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tree_iter(value):
            if isinstance(tensor, torch.Tensor) and (of := self._frozen.get(_storage(tensor))) is not None:
                raise _refused(of.companion_name)
