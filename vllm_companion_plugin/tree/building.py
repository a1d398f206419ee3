"""Build a model without memory for its weights, and with everything else as a normal load builds it.

Memory that a constructor asks for without giving it values will be filled by loading: it becomes a meta
tensor. Whatever a constructor computes (caches, work space, tables, small numbers) is made for real, on the real
device: its values are this engine's own, and may follow from this engine's flags.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

DEFERRED_BYTES = 64 << 10
"""Smaller memory is made for real. That costs nothing, and constructors that fill it by hand get what they expect."""

_UNINITIALIZED = frozenset(
    (
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    )
)
_data_of: Callable[..., Any] = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class WithoutWeights:
    """What was deferred while one model was built.

    Attributes:
        device: where the model will be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By address of the C++ storage, with what keeps that address from being used again.
        self._deferred: dict[int, torch.UntypedStorage] = {}
        self._touched: set[int] = set()
        self._computed: list[torch.UntypedStorage] = []

    @contextmanager
    def building(self) -> Iterator[None]:
        """While open, this thread builds the model."""
        thread = threading.get_ident()

        def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if threading.get_ident() == thread and parameter is not None:
                with torch._C.DisableTorchFunction():  # modes would slow down each look at the parameter
                    self._defer_parameter(parameter)

        hook = register_module_parameter_registration_hook(registered)
        try:
            with self.device, _Deferring(self):
                yield
        finally:
            hook.remove()

    def is_uninitialized(self, tensor: torch.Tensor) -> bool:
        """Whether a deferred tensor was never given a value, so that any memory will do for it."""
        address = tensor.untyped_storage()._cdata
        return address in self._deferred and address not in self._touched and tensor._version == 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, nobody watches what is done with tensors, because no constructor does it."""
        with torch.overrides._pop_mode_temporarily():  # `_Deferring`, which else would be asked for nothing
            yield

    def is_left(self, besides: Iterable[torch.Tensor] = ()) -> bool:
        """Whether something still uses what was deferred, or what was computed from it. Ask once, at the end.

        Args:
            besides: tensors that may use it.
        """
        known = {tensor.untyped_storage()._cdata for tensor in besides}
        deferred = [storage for address, storage in self._deferred.items() if address not in known]
        storages = [StorageWeakRef(storage) for storage in (*deferred, *self._computed)]  # type: ignore[no-untyped-call]
        del deferred
        self._deferred.clear()
        self._touched.clear()
        self._computed.clear()
        return not all(storage.expired() for storage in storages)  # type: ignore[no-untyped-call]

    def note(self, tensor: torch.Tensor) -> None:
        """`tensor` was deferred."""
        storage = tensor.untyped_storage()
        self._deferred[storage._cdata] = storage

    def note_computed(self, tensor: torch.Tensor) -> None:
        """`tensor` is on meta because it was computed from what was deferred."""
        self._computed.append(tensor.untyped_storage())

    def touch(self, tensor: torch.Tensor) -> None:
        """`tensor` was given values, or may have been given some. They are lost."""
        self._touched.add(tensor.untyped_storage()._cdata)

    def _defer_parameter(self, parameter: nn.Parameter) -> None:
        """Let a large parameter give up its values: the checkpoint or the publisher has those that count."""
        if type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or nn.parameter.is_lazy(parameter):
            return
        if parameter.device.type != self.device.type or parameter.nbytes < DEFERRED_BYTES:
            return
        if (
            parameter.untyped_storage().nbytes() != parameter.nbytes
        ):  # the parameter is a part of something that may stay
            return
        data = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        try:
            torch.utils.swap_tensors(parameter, twin)  # type: ignore[no-untyped-call]
        except RuntimeError:  # something else holds it, which keeps its memory anyway
            return
        self.note(parameter)
        self.touch(parameter)


class _Deferring(TorchFunctionMode):
    def __init__(self, model: WithoutWeights) -> None:
        super().__init__()
        self._model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNINITIALIZED:
            return self._uninitialized(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.is_meta:
            if func == _data_of:
                self._model.touch(result)  # writes through it are not counted
            self._model.note_computed(result)
        return result

    def _uninitialized(self, func: Any, args: Any, kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is None and args and isinstance(args[0], torch.Tensor):
            wanted = args[0].device
        kind = self._model.device.type if wanted is None else torch.device(wanted).type
        if kind != self._model.device.type or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        where = {name: value for name, value in kwargs.items() if name != "pin_memory"} | {"device": "meta"}
        with torch._C.DisableTorchFunction():
            deferred = func(*args, **where)
            is_small = deferred.nbytes < DEFERRED_BYTES
            if not is_small:
                self._model.note(deferred)
        return func(*args, **kwargs) if is_small else deferred
