"""Build a model without memory for its weights, and with everything else as a normal load builds it.

Memory that a constructor asks for without giving it values will be filled by loading: it becomes a meta
tensor. Whatever a constructor computes (caches, work space, tables, small numbers) is made for real, on the real
device: its values are this engine's own, and may follow from this engine's flags. So memory that is no parameter's
becomes real when a constructor writes to it by hand. A parameter's does so only if the publication names the parameter
as one that loading leaves alone (`left_by_loading`); for others random numbers are drawn as in a normal load, because
what is drawn later follows from them. And what was deferred says that it is on the real device,
where a constructor that asks makes something of its own, as Marlin's work space. What would be computed of values that
are not there yet is on meta, too; where it would reach something real, building fails.
"""

from __future__ import annotations

import functools
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vllm_companion_plugin.core.module_tree import Manifest, ModuleInfo, SlotInfo, TensorInfo, TensorKind
from vllm_companion_plugin.tree.notation import CLASS, of_tensor
from vllm_companion_plugin.tree.values import class_name, dtype_name

DEFERRED_BYTES = 64 << 10
"""Smaller memory is made for real, which costs nothing."""

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
_WRITES = re.compile(
    r"[a-z0-9_]*[a-z0-9]_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__"
    r"|numpy|__array__|data_ptr|__dlpack__|storage|untyped_storage|_typed_storage"
)
"""Names of what writes to a tensor, or lets others do so."""
_WRITES_NOT = re.compile(
    r"(requires_grad|detach|share_memory|rename|t|transpose|swapaxes|swapdims|squeeze|unsqueeze|as_strided|resize)_"
)
_DRAWS = re.compile(r"(\w*normal|\w*uniform|random|bernoulli|exponential|cauchy|geometric)_")
"""Names of what draws random numbers."""
_DRAWS_OF = re.compile(r"\w*dropout|bernoulli|multinomial|normal|poisson|binomial|gumbel_softmax|rrelu")
"""Names of what draws random numbers for the values of its first argument."""
_SHAPED = frozenset((torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.expand_as, torch.broadcast_tensors))
"""What takes the shape of a tensor and none of its values."""
_MADE_LIKE = frozenset(
    (
        *(torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like, torch.randint_like),
        *(torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.new_tensor),
    )
)
"""What takes the device of a tensor and none of its values."""
_VALUELESS = _MADE_LIKE | _SHAPED
_MOVES = frozenset((torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.cuda, torch.Tensor.cpu))
_is_meta_of: Callable[..., Any] = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
"""PyTorch's `trunc_normal_` and `orthogonal_` ask for it before they write, and draw nothing without memory."""
_data_of: Callable[..., Any] = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda device: device,
    torch.Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
}
"""Properties that say where a tensor is, and what each says of one on a device."""


_Form = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Forms:
    """Dtypes and shapes of parameters that are called the same.

    Attributes:
        known: those that they have in the end.
        are_all: they may be built in any other form, too.
    """

    known: frozenset[_Form] = frozenset()
    are_all: bool = True

    def has(self, parameter: torch.Tensor) -> bool:
        return self.are_all or self.knows(parameter)

    def knows(self, parameter: torch.Tensor) -> bool:
        return (dtype_name(parameter.dtype), tuple(parameter.shape)) in self.known


Left = Mapping[tuple[str, str], Forms]


def left_by_loading(manifest: Manifest) -> Left:
    """The parameters that a constructor made and that loading left alone, or used: each engine makes its own.

    Returns:
        By class of the module and name of the parameter, as they are built: their forms, which are all where no other
        parameter has that class and name, or post-processing has removed it. A constructor does not say which module
        will be which.
    """
    modules = {module.path: module for module in manifest.modules}
    left: dict[tuple[str, str], set[_Form]] = {}
    others: set[tuple[str, str]] = set()
    for module, slot, info, is_left in _parameters_of(manifest):
        if is_left:
            left.setdefault(_place_when_built(module, slot, modules), set()).add((info.dtype, info.shape))
    if left:  # which is rare: attaching looks at thousands of others else
        others = {
            _place_when_built(module, slot, modules)
            for module, slot, _, is_left in _parameters_of(manifest)
            if not is_left
        }
    places = {*left, *_removed_by_processing(manifest)}
    return {
        place: Forms(frozenset(left.get(place, ())), are_all=place not in left or place not in others)
        for place in places
    }


def _removed_by_processing(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What loading left alone and is not there any more, so nothing says what form it had."""
    for module in manifest.modules:
        if untouched := module.observed.untouched:
            there = {slot.name for slot in module.slots}
            yield from ((_class_when_built(module), name) for name in untouched if name not in there)


def _parameters_of(manifest: Manifest) -> Iterator[tuple[ModuleInfo, SlotInfo, TensorInfo, bool]]:
    """The parameters with data, and whether loading left each alone, or used what building put there."""
    tensors, parameter = manifest.tensors, TensorKind.PARAMETER
    for module in manifest.modules:
        values = module.observed.values
        for slot in module.slots:
            info = tensors[slot.tensor]
            if slot.kind is parameter and not info.meta:
                yield module, slot, info, info.own or bool(values and of_tensor(slot.name) in values)


def _place_when_built(module: ModuleInfo, slot: SlotInfo, modules: Mapping[str, ModuleInfo]) -> tuple[str, str]:
    """The class of the module that building gave a parameter, and its name there."""
    path, _, name = module.observed.retied.get(slot.name, f"{module.path}:{slot.name}").partition(":")
    return _class_when_built(modules.get(path, module)), name


def _class_when_built(module: ModuleInfo) -> str:
    built, _ = module.observed.values.get(CLASS, (None, None))
    return module.class_name if built is None else built.removeprefix("class ")


class WithoutWeights:
    """What was deferred while one model was built.

    Args:
        left: as of `left_by_loading`: parameters that are not deferred.

    Attributes:
        device: where the model will be.
    """

    def __init__(self, device: torch.device, left: Left = MappingProxyType({})) -> None:
        self.device = device
        self._left = left
        if device.type == "cuda" and device.index is None:  # which no tensor says of itself
            self.device = torch.device("cuda", torch.cuda.current_device())
        # By address of the C++ storage, with what keeps that address from being used again.
        self._deferred: dict[int, torch.UntypedStorage] = {}
        # By the same address: tensors on it, besides parameters.
        self._viewed_by: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self._touched: set[int] = set()
        # Of parameters that modules have, and that loading will fill.
        self._to_fill: set[int] = set()
        # The same for other memory that was asked for empty. Nobody else gets its address.
        self._small: dict[int, StorageWeakRef] = {}
        self._computed: list[torch.UntypedStorage] = []
        self._ours: set[int] = set()  # addresses of those that a normal load would have on the device

    @contextmanager
    def building(self) -> Iterator[None]:
        """While open, this thread builds the model."""
        thread = threading.get_ident()

        def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if threading.get_ident() == thread and parameter is not None:
                with torch._C.DisableTorchFunction():  # modes would slow down each look at the parameter
                    if self._left and self._is_left_alone(module, name, parameter):
                        if parameter.is_meta:
                            self._make_left(parameter, f"{class_name(type(module))}.{name}")
                    else:
                        self._defer_parameter(parameter)
                        if parameter.is_meta:
                            self._to_fill |= self._deferred.keys() & {parameter.untyped_storage()._cdata}

        hook = register_module_parameter_registration_hook(registered)
        try:
            with self.device, _Deferring(self):
                yield
        finally:
            hook.remove()
            self._viewed_by.clear()

    def is_uninitialized(self, tensor: torch.Tensor) -> bool:
        """Whether a deferred tensor was never given a value, so that any memory will do for it."""
        address = tensor.untyped_storage()._cdata
        if address not in self._deferred or address in self._touched:
            return False
        return tensor.is_inference() or tensor._version == 0  # of what was made for inference nothing is counted

    def is_unwritten(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that was not deferred was made empty, and the constructor gave it no value."""
        address = tensor.untyped_storage()._cdata
        is_known = address in self._small and address not in self._touched
        return is_known and not tensor.is_inference() and tensor._version == 0

    def has_no_value(self, tensor: torch.Tensor) -> bool:
        """Whether the constructor made a tensor empty, and gave it no value."""
        return self.is_unwritten(tensor) or self.is_uninitialized(tensor)

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
        self._to_fill.clear()
        self._small.clear()
        self._computed.clear()
        self._ours.clear()
        return not all(storage.expired() for storage in storages)  # type: ignore[no-untyped-call]

    def note(self, tensor: torch.Tensor) -> None:
        """`tensor` was deferred."""
        storage = tensor.untyped_storage()
        self._deferred[storage._cdata] = storage
        self._touched.discard(storage._cdata)  # of what had this address before
        self._to_fill.discard(storage._cdata)
        if not isinstance(tensor, nn.Parameter):
            self._viewed_by[storage._cdata] = [weakref.ref(tensor)]

    def note_small(self, tensor: torch.Tensor) -> None:
        """`tensor` was made empty, and was not deferred, because it is small or each engine makes its own."""
        storage = tensor.untyped_storage()
        self._small[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def make_real(self, tensor: torch.Tensor) -> None:
        """Give the deferred memory under `tensor` to all that view it, unless loading will fill the parameter."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._deferred:
            return
        views = [view for weak in self._viewed_by.get(storage._cdata, ()) if (view := weak()) is not None]
        if all(view is not tensor for view in views):
            if not self._may_be_left_alone(tensor, has_module=storage._cdata in self._to_fill):
                self.touch(tensor)
                return
            views.append(tensor)
        memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device=self.device).untyped_storage()
        for view in views:
            real = torch.empty(0, dtype=view.dtype, device=self.device)
            real.set_(memory, view.storage_offset(), view.shape, view.stride())
            if isinstance(view, nn.Parameter):
                real = torch.Tensor._make_subclass(type(view), real.data, view.requires_grad)  # nothing is written
            torch._C._swap_tensor_impl(view, real)
        self._viewed_by.pop(storage._cdata, None)
        del self._deferred[storage._cdata]

    def _make_left(self, parameter: nn.Parameter, title: str) -> None:
        """Make real what loading will leave alone. Raises `RuntimeError` if it has been given values that are lost."""
        address = parameter.untyped_storage()._cdata
        self._to_fill.discard(address)  # another module had it
        if self.is_uninitialized(parameter):
            self.make_real(parameter)
        if self.is_ours(parameter):
            raise RuntimeError(f"{title} was given values elsewhere")
        self.note_small(parameter)

    def _is_left_alone(self, module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
        place = class_name(type(module)), name
        return place in self._left and self._left[place].has(parameter)

    def _may_be_left_alone(self, tensor: torch.Tensor, *, has_module: bool) -> bool:
        """Whether it may become a parameter that loading leaves alone. Another module may have it before."""
        if not isinstance(tensor, nn.Parameter):
            return False
        return any(forms.knows(tensor) if has_module else forms.has(tensor) for forms in self._left.values())

    def note_made(self, tensor: torch.Tensor, *, is_ours: bool) -> None:
        """`tensor` is on meta because it is a view of what was deferred, or was computed from that.

        Args:
            is_ours: a normal load would have it on the device.
        """
        storage = tensor.untyped_storage()
        self._computed.append(storage)
        if is_ours:
            self._ours.add(storage._cdata)
        if (views := self._viewed_by.get(storage._cdata)) is not None:
            views.append(weakref.ref(tensor))

    def is_ours(self, tensor: object) -> bool:
        """Whether this is a tensor on meta that a normal load would have on the device."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            return False
        address = tensor.untyped_storage()._cdata
        return address in self._deferred or address in self._ours

    def touch(self, tensor: torch.Tensor) -> None:
        """`tensor` was given values, or may have been given some. They are lost."""
        self._touched.add(tensor.untyped_storage()._cdata)

    def _defer_parameter(self, parameter: nn.Parameter) -> None:
        """Let a large parameter give up its values: the checkpoint or the publisher has those that count."""
        if type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or nn.parameter.is_lazy(parameter):
            return
        if parameter.layout is not torch.strided:
            return
        if parameter.is_meta:  # on memory that is the parameter's now
            self._viewed_by.pop(parameter.untyped_storage()._cdata, None)
        if parameter.device.type != self.device.type or parameter.nbytes < DEFERRED_BYTES:
            return
        if parameter.untyped_storage().nbytes() != parameter.nbytes:  # it is a part of something that may stay
            return
        if self._may_be_left_alone(parameter, has_module=True):
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


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


@functools.cache
def _effects(name: str) -> tuple[bool, bool]:
    """Whether a function of this name writes to its first argument, and whether it draws random numbers for it."""
    return bool(_WRITES.fullmatch(name) and not _WRITES_NOT.fullmatch(name)), bool(_DRAWS.fullmatch(name))


def _first(args: Any, kwargs: Any) -> Any:
    """The first argument of a function, however it is given: PyTorch calls it `input` where it has a name."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and instead of a list or tuple what is in it."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta


def _check(func: Any, args: Any, kwargs: Any, deferred: list[torch.Tensor]) -> None:
    """Raise `RuntimeError` if `func` would write deferred values to a real tensor, or draw random numbers for them.

    PyTorch refuses most functions of a tensor on meta and a real one. It runs some without a word, and then nothing is
    written, and no number is drawn.
    """
    writes, _ = _effects(func.__name__)
    written = _flat((_first(args, kwargs),))
    if isinstance(func, _OPERATORS):  # whose names say nothing
        writes, written = True, _flat((*args, *kwargs.values()))
    if writes and any(map(_is_real, written)):
        raise _lost(func)
    if _DRAWS_OF.fullmatch(func.__name__) and any(each is _first(args, kwargs) for each in deferred):
        raise _lost(func)


def _lost(func: Any) -> RuntimeError:
    return RuntimeError(f"{func.__name__} of a weight that is not there yet")


_UNCOUNTED = frozenset(("numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage"))


def _is_memory(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout is torch.strided


class _Deferring(TorchFunctionMode):
    def __init__(self, model: WithoutWeights) -> None:
        super().__init__()
        self._model = model

    def __torch_function__(self, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNINITIALIZED:
            return self._uninitialized(func, args, kwargs)
        if (func == _data_of or getattr(func, "__name__", "") in _UNCOUNTED) and _is_memory(args[0]):
            self._model.touch(args[0])  # what is written by way of it is not counted
        if type(func) is types.MethodWrapperType:  # a property is read, or set
            return self._property(func, args)
        if self._is_drawn(func, args, kwargs):
            return _first(args, kwargs)
        if func in _MADE_LIKE:
            if kwargs.get("device") is None and self._model.is_ours(_first(args, kwargs)):
                kwargs = kwargs | {"device": self._model.device}
        elif func in _MOVES:
            return self._moved(func, args, kwargs)
        elif func is torch.Tensor.get_device and self._model.is_ours(args[0]):
            index = self._model.device.index
            return -1 if index is None else index
        deferred = [each for each in _flat((*args, *kwargs.values())) if self._model.is_ours(each)]
        if deferred:
            _check(func, args, kwargs, deferred)
        result = func(*args, **kwargs)
        if deferred and func not in _VALUELESS and any(map(_is_real, _flat((result,)))):
            raise _lost(func)
        return self._noted(result, is_ours=bool(deferred))

    def _property(self, func: Any, args: Any) -> Any:
        if func == _is_meta_of and self._model.is_ours(args[0]):
            self._model.make_real(args[0])
        if func in _PLACES and self._model.is_ours(args[0]):
            return _PLACES[func](self._model.device)
        result = func(*args)
        if isinstance(result, torch.Tensor) and result.is_meta:
            if func == _data_of:
                self._model.touch(result)  # writes through it are not counted
            self._model.note_made(result, is_ours=self._model.is_ours(args[0]))
        return result

    def _noted(self, result: Any, *, is_ours: bool) -> Any:
        """The result, of which the model knows what is on meta. `is_ours`: it was computed from what was deferred."""
        for made in _flat((result,)):
            if isinstance(made, torch.Tensor) and made.is_meta:
                self._model.note_made(made, is_ours=is_ours)
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func`, which moves a tensor, gives if all that was deferred is on the device."""
        tensor, rest = args[0], [*map(self._stand_in, args[1:])]
        named = {name: self._stand_in(value) for name, value in kwargs.items()}
        if not self._model.is_ours(tensor):
            return self._noted(func(tensor, *rest, **named), is_ours=False)
        kept = {name: named.pop(name) for name in ("copy", "memory_format") if name in named}
        wanted: torch.device | None
        if func is torch.Tensor.cuda:
            given = rest[0] if rest else named.get("device")
            wanted = torch.device("cuda", given) if isinstance(given, int) else torch.device(given or "cuda")
            dtype = None
        elif func is torch.Tensor.cpu:
            wanted, dtype = torch.device("cpu"), None
        else:
            if len(rest) > (3 if rest and isinstance(rest[0], (str, int, torch.device, type(None))) else 2):
                kept["copy"] = rest.pop()
            wanted, dtype, *_ = torch._C._nn._parse_to(*rest, **named)
        here = self._model.device
        if wanted is None or (wanted.type == here.type and wanted.index in (None, here.index)):
            return self._noted(torch.Tensor.to(tensor, dtype or tensor.dtype, **kept), is_ours=True)
        if wanted.type == "meta":  # on purpose: it says so
            return torch.empty_like(tensor, dtype=dtype, device="meta")
        return func(*args, **kwargs)

    def _stand_in(self, value: Any) -> Any:
        """For a deferred tensor, of which only device and dtype count."""
        return torch.empty(0, dtype=value.dtype, device=self._model.device) if self._model.is_ours(value) else value

    def _is_drawn(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Make real what `func` is about to write to, or draw the random numbers that it would write to a parameter."""
        target = _first(args, kwargs)
        if isinstance(target, torch.Tensor) and target.is_meta:
            writes, draws = _effects(func.__name__)
            if writes:
                self._model.make_real(target)
            if draws and target.is_meta:
                self._model.touch(target)
                real = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=self._model.device)
                given = [real if value is target else value for value in args]
                func(*given, **{name: real if value is target else value for name, value in kwargs.items()})
                return True
        if "out" in kwargs or isinstance(func, _OPERATORS):
            for value in (*args, kwargs.get("out")):
                if isinstance(value, torch.Tensor) and value.is_meta:
                    self._model.make_real(value)
        return False

    def _uninitialized(self, func: Any, args: Any, kwargs: Any) -> Any:
        wanted, like = kwargs.get("device"), _first(args, kwargs)
        if wanted is None and isinstance(like, torch.Tensor):
            wanted = self._model.device if self._model.is_ours(like) else like.device
            kwargs = kwargs | {"device": wanted}
        kind = self._model.device.type if wanted is None else torch.device(wanted).type
        if kind != self._model.device.type or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        where = {name: value for name, value in kwargs.items() if name != "pin_memory"} | {"device": "meta"}
        with torch._C.DisableTorchFunction():
            deferred = func(*args, **where)
            is_small = deferred.nbytes < DEFERRED_BYTES
            if not is_small:
                self._model.note(deferred)
        if not is_small:
            return deferred
        made = func(*args, **kwargs)
        self._model.note_small(made)
        return made
