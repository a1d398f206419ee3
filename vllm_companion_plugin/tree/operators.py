"""Watch operators of PyTorch while a model is loaded: what they write, and what that was computed from.

What no operator shows (a thread that was there before, a kernel launched past PyTorch) is found by comparing bytes
(observe.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from vllm_companion_plugin.tree.live import plain_tensors
from vllm_companion_plugin.tree.placing import Placing


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which storages operations write and make.

    Storages are told apart by the address of their C++ object, which no other one gets meanwhile (`keep_addresses`).

    Attributes:
        built: storages that building the model made.
        written: storages that an operation wrote to.
        clean: storages that hold nothing of the checkpoint.
        parameters: those of `built` that were parameters. What is written there are weights, whoever has them later.
        computed: storages that were read from the checkpoint, parameters that were written, and what operations filled
            from such. What Python made is none, nor what was computed of that alone.
        measured: ids of modules whose processing read data into Python; None for what belongs to no module.
        module: what is being processed.
        is_loading: the model is being loaded, and not yet processed.
        counts_parameters: what building put into parameters may mean something. In those of vLLM's own models it does
            not, before they are loaded.
        sources: by storage, those of `built` that it was computed from while these were as building had made them.
        looked: those of `built` whose data, or what was computed of it, loading read into Python.
        drawn_on: kinds of devices for which random numbers of PyTorch were drawn, but by a generator of somebody's own.
        lent: those of `built` whose memory was given to who can write there without an operator.
        partly: by storage of `built`, which of its bytes loading overwrote.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.built: set[int] = set()
        self.written: set[int] = set()
        self.clean: set[int] = set()
        self.parameters: set[int] = set()
        self.computed: set[int] = set()
        self.measured: set[int | None] = set()
        self.module: nn.Module | None = None
        self.placing = Placing()
        self.is_loading = True
        self.ended = False  # threads that loading began may live on
        self.counts_parameters = False
        self.sources: dict[int, set[int]] = {}
        self.looked: set[int] = set()
        self.drawn_on: set[str] = set()
        self.lent: set[int] = set()
        self.partly: dict[int, np.ndarray[Any, Any]] = {}
        self._paused_in: set[int] = set()  # threads
        self._lock = threading.RLock()
        self._addresses: list[StorageWeakRef] = []

    def keep_addresses(self, value: Any) -> None:
        """No other storage gets the addresses of those of `value`, though these free their memory as ever.

        Else `torch.tensor` and NumPy, which no operation shows, would make storages at the addresses of freed ones.
        """
        self._addresses += map(StorageWeakRef, _storages_of(value))

    def came(self, tensor: torch.Tensor) -> None:
        """`tensor` comes from the checkpoint."""
        self.keep_addresses(tensor)
        self.clean.difference_update(_storages(tensor))
        self.computed.update(_storages(tensor))

    def note_look(self) -> None:
        """Data was read into Python."""
        if not self._paused:
            self.measured.add(None if self.module is None else id(self.module))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, operations are our own, and do not belong to loading."""
        thread = threading.get_ident()
        is_outermost = thread not in self._paused_in
        self._paused_in.add(thread)
        try:
            yield
        finally:
            if is_outermost:
                self._paused_in.discard(thread)

    @property
    def _paused(self) -> bool:
        return threading.get_ident() in self._paused_in

    @contextmanager
    def beside(self) -> Iterator[None]:
        """While open, this thread is watched, too, beside the one that has entered the mode.

        Entering it here as well would mix up what PyTorch keeps of modes for all threads of the process.
        """
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (self.ended or self._paused):
            with plain_tensors(), self._lock:
                self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        writes, reads, draws = _traits(func)
        if draws and kwargs.get("generator") is None:
            self.drawn_on.update(tensor.device.type for tensor in _tensors((result, *args)))
        if reads or _leaves_device(args, result):
            self.note_look()
        read: set[int] = set()
        for value in (*args, *kwargs.values()):
            read.update(_storages(value))
        if reads:
            self.placing.looked_at(read)
            self.note_data(read)
        operator = func._schema.name
        derived = not read <= self.clean and operator not in _SHAPED
        is_known = derived and not read.isdisjoint(self.computed) and operator not in _EMPTY
        takes_shapes = operator in _SHAPED or operator in _EMPTY
        sources = self._sources_of(func, args, kwargs, read) if self.is_loading and not takes_shapes else None
        targets: list[torch.Tensor] = []
        if operator in _FILLING and _is_whole(args[0]):
            self.sources.pop(int(args[0].untyped_storage()._cdata), None)
        if operator in _FILLING and self._is_loading_alone and _is_plain(args[0]):
            self._overwritten(args[0])
        for position, name in writes:
            target = args[position] if position is not None and position < len(args) else kwargs.get(name)
            targets.extend(
                each for each in (target if isinstance(target, (list, tuple)) else [target]) if _is_plain(each)
            )
            for storage in _storages(target):
                self.written.add(storage)
                if sources:
                    self.sources.setdefault(storage, set()).update(sources)
                if derived:
                    self.clean.discard(storage)
                if derived and (is_known or storage in self.parameters):
                    self.computed.add(storage)
        if targets and operator in _FILLING:
            self._filled(targets[0], args[1:])
        made = [storage for storage in _storages(result) if storage not in read]  # else it is a view
        for storage in made:
            self.placing.made(storage)
        if targets or made:
            into = {storage for target in targets for storage in _storages(target)}
            self.placing.note(func, args, read - into, targets, result)
            # Who reads other parts of the memory that it writes uses what was copied there: no part keeps its place.
            known = {*map(id, targets)}
            beside = [value for value in _tensors((*args, *kwargs.values())) if id(value) not in known]
            self.placing.looked_at(into & {*_storages(beside)})
        for storage in made:
            self.built.discard(storage)
            self.written.discard(storage)
            if sources:
                self.sources[storage] = sources
            else:
                self.sources.pop(storage, None)
            (self.clean.discard if derived else self.clean.add)(storage)
            (self.computed.add if is_known else self.computed.discard)(storage)
        if made:
            self.keep_addresses(result)

    def _sources_of(self, func: Any, args: Any, kwargs: Any, read: set[int]) -> set[int]:
        if func._schema.name in _FILLING:  # what was there does not count
            read = {storage for value in (*args[1:], *kwargs.values()) for storage in _storages(value)}
        return self._built_under(read)

    def _overwritten(self, target: torch.Tensor) -> None:
        """Loading overwrites `target`, and nothing else of its memory: the rest stays as building made it."""
        storage = target.untyped_storage()
        number = int(storage._cdata)
        if number not in self.built or number in self.parameters or storage.nbytes() > _MOST_PARTLY:
            return
        if (covered := self.partly.get(number)) is None:
            covered = self.partly[number] = np.zeros(storage.nbytes(), dtype=bool)
        size = target.element_size()
        strides = (*(stride * size for stride in target.stride()), 1)
        start = covered[target.storage_offset() * size :]
        np.lib.stride_tricks.as_strided(start, (*target.shape, size), strides)[...] = True

    def overwritten_partly(self) -> set[int]:
        """Those of `built` of which loading left a part as building made it."""
        return {number for number, covered in self.partly.items() if number in self.built and not covered.all()}

    def _built_under(self, read: set[int]) -> set[int]:
        """Those of `built` that `read` are, or were computed from."""
        found = {
            storage
            for storage in read
            if storage in self.built
            and storage not in self.written
            and (self.counts_parameters or storage not in self.parameters)
        }
        for storage in read & self.sources.keys():
            found |= self.sources[storage]
        return found

    @property
    def _is_loading_alone(self) -> bool:
        """Whether nothing is processed meanwhile, as online quantization does: engines do that for themselves."""
        return self.is_loading and self.module is None

    def note_given(self, tensor: Any, *, memory: bool) -> None:
        """Python has got the values of `tensor`; or, with NumPy and others, its `memory`, from now on."""
        if self._paused:
            return
        storages = {*_storages(tensor)}
        if memory:
            self.keep_addresses(tensor)
            self.placing.given(storages)
        else:
            self.placing.looked_at(storages)
        self.note_data(storages)

    def note_lent(self, tensor: Any) -> None:
        """Others than operators may write to the memory of `tensor` from now on."""
        if not self._paused:
            self.lent |= self.built & {*_storages(tensor)}

    def note_data(self, storages: set[int]) -> None:
        """Python was given data of these storages."""
        if self._is_loading_alone and not self._paused:
            self.looked |= self._built_under(storages)

    def _filled(self, target: torch.Tensor, values: Any) -> None:
        """All elements of `target` have got `values`, whatever they were."""
        if _is_whole(target) and {*_storages(values)} <= self.clean:
            storage = int(target.untyped_storage()._cdata)
            self.clean.add(storage)
            self.computed.discard(storage)


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is all that is in its memory."""
    return _is_plain(tensor) and tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


class Unseen(TorchFunctionMode):
    """Notes who gives data of the host to Python, or to NumPy, without an operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING and args and _is_plain(args[0]):
            if args[0].device.type == "cpu":
                self._watch.note_look()
            if name in _GIVING:
                self._watch.note_given(args[0], memory=name in _LENDING)
        return func(*args, **(kwargs or {}))


class Looks(TorchFunctionMode):
    """Notes of which tensors of the host data is given to Python, or to NumPy, without an operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._watch.is_loading and not self._watch.ended and name in _READING and args:
            if name in _GIVING:
                self._watch.note_given(args[0], memory=name in _LENDING)
            if name not in _COPYING:
                self._watch.note_lent(args[0])
        return func(*args, **(kwargs or {}))


_LENDING = frozenset(("numpy", "__array__", "__dlpack__"))
"""Names of methods that give the memory of a tensor to others than operators."""
_COPYING = frozenset(("tolist", "__reduce_ex__"))
"""Names of methods that give a copy of the data of a tensor to others than operators."""
_GIVING = _LENDING | _COPYING
"""Names of methods that give data of a tensor to others than operators."""
_READING = frozenset(
    (
        *("tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "__reduce_ex__"),
        *("storage", "untyped_storage", "_typed_storage"),
    )
)
"""Names of methods that give data of a tensor, or the place of it, to others than operators."""
_SHAPED = frozenset(
    f"aten::{name}"
    for name in (
        *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_zeros", "new_ones", "new_full"),
    )
)
"""Operators that give a tensor values of their own, and take the shape of another one. What makes empty tensors is not
among them: kernels fill those, unseen."""
_EMPTY = frozenset(f"aten::{name}" for name in ("empty_like", "new_empty", "new_empty_strided"))
"""Operators that take the shape of a tensor, and nothing else."""
_MOST_PARTLY = 64 << 20
"""Of larger memory it is not followed which part is overwritten."""
_FILLING = frozenset(
    f"aten::{name}_"
    for name in ("zero", "fill", "copy", "normal", "uniform", "random", "bernoulli", "exponential", "log_normal")
)
"""Operators that overwrite their first argument, and read the others alone."""


@functools.cache
def _traits(func: Any) -> tuple[tuple[tuple[int | None, str], ...], bool, bool]:
    """Which arguments an operator writes, whether what it returns to Python depends on data, whether it is random."""
    writes = tuple(
        (None if argument.kwarg_only else position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    tags = getattr(func, "tags", ())
    reads = any(tag in tags for tag in (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))
    return writes, reads, torch.Tag.nondeterministic_seeded in tags


def _leaves_device(args: Any, result: Any) -> bool:
    """Whether data of a device went to the host, where Python reads it."""
    return (
        isinstance(result, torch.Tensor)
        and result.device.type == "cpu"
        and any(isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta") for value in args)
    )


def _storages(value: Any) -> Iterator[int]:
    for storage in _storages_of(value):
        yield int(storage._cdata)


def _storages_of(value: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in _tensors(value):
        try:
            yield tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, or a wrapper around others
            continue


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument of an operator, or in several."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and storage_of(value) is not None and not value.is_meta


def storage_of(tensor: torch.Tensor) -> int | None:
    """The address of the C++ storage; None for tensors that have none of their own."""
    return next(_storages(tensor), None)
