"""Parameters on memory that this process cannot write to: an attempt is an error, before it would end the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vllm_companion_plugin.errors import SharedWeightsError


class FrozenTensor(torch.Tensor):
    """A view of a `FrozenParameter`: what is written to it would be written to the parameter."""

    companion_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class FrozenParameter(nn.Parameter):
    """A parameter that views memory which engines use, too. Nothing of it is trained.

    Attributes:
        companion_name: which one it is, for errors.
    """

    companion_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A parameter with memory of its own, as of any other."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(plain(self).clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied


def freeze(name: str, view: torch.Tensor) -> FrozenParameter:
    """A parameter on the memory of `view`, without a copy. Errors name it `name`."""
    frozen: FrozenParameter = torch.Tensor._make_subclass(FrozenParameter, plain(view), False)
    frozen.companion_name = name
    return frozen


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without the guard."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor._make_subclass(torch.Tensor, tensor.detach(), False)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if not _may_write(func, kwargs):
            result = func(*args, **kwargs)
        else:
            with _Guard(args, kwargs):
                result = func(*args, **kwargs)
        if isinstance(result, (tuple, list)) and all(type(each) is torch.Tensor for each in result):
            return type(result)(_guarded(each, args) for each in result)
        return _guarded(result, args) if type(result) is torch.Tensor else result


def _may_write(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the name of a function says that it may write to what it is given; what it does is looked at then."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_") or "out" in kwargs


def _guarded(result: torch.Tensor, args: Any) -> torch.Tensor:
    """`result`, guarded as well if it views the memory of its first argument: so do views, `detach` and `data`."""
    of = args[0] if args else None
    if isinstance(of, (FrozenParameter, FrozenTensor)) and _storage(result) == _storage(of):
        view: FrozenTensor = result.as_subclass(FrozenTensor)
        view.companion_name = of.companion_name
        return view
    return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Guard(TorchDispatchMode):
    """Raises before an operation writes to memory of a frozen tensor among `args` and `kwargs`."""

    def __init__(self, args: Any, kwargs: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {
            _storage(each): each.companion_name
            for each in tree_iter((args, kwargs))
            if isinstance(each, (FrozenParameter, FrozenTensor))
        }

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
            if isinstance(tensor, torch.Tensor) and (name := self._names.get(_storage(tensor))) is not None:
                raise SharedWeightsError(
                    f"{name} is read-only: engines use the same bytes.",
                    remedy="Train adapters beside it, or clone it first.",
                )
