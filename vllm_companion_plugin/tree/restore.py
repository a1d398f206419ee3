"""Bring a model that was built without its weights to the published state.

The engine builds the model itself (building.py), so everything that follows from its flags is its own. What
loading changed at the publisher is done here again (changes.py). The state that is not tensors (kernels
chosen, layouts, flags) comes from running the engine's own post-processing, module by module:

- `HIDE`: the module's tensors are bound first and stand aside as meta tensors while its method
  runs. For methods that leave tensors as they are; nothing can be written.
- `REPLAY`: the module's unprocessed tensors are materialized with benign values, its real
  method runs on them, and the results are replaced by the published tensors. Works for every
  method, at one module's memory. The results are placeholders, and none may be left.

Tensors are replaced inside their Python objects, so whatever holds a reference (a kernel, a
tuple, a closure) sees the published ones. Then the tree is compared (parity.py), and any difference
that matters raises before the model is used.
"""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_companion_plugin.core.module_tree import Manifest, ModuleInfo, SlotInfo, TensorInfo, TensorKind
from vllm_companion_plugin.core.placement import ALIGNMENT
from vllm_companion_plugin.errors import NotShareableError, ParityError
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of, view, without_storage
from vllm_companion_plugin.tree.building import WithoutWeights
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.changes import apply_loading, arrange
from vllm_companion_plugin.tree.hidden import Known, hidden_tensors
from vllm_companion_plugin.tree.live import LiveModule, LiveSlot, Place, Tree, full_name, named_modules, plain_tensors
from vllm_companion_plugin.tree.parity import (
    compare_modules,
    compare_tensor_attributes,
    compare_values,
    is_like,
    set_measured,
    tensor_difference,
)
from vllm_companion_plugin.tree.values import loaded_class


class Strategy(Enum):
    """How a module's post-processing is run without its weights."""

    HIDE = "hide"
    REPLAY = "replay"


_ATTRIBUTE, _REPLAY = TensorKind.ATTRIBUTE, Strategy.REPLAY
_NOTHING: dict[str, str] = {}
_ALONE_BYTES = 1 << 20
"""Larger storages are cloned one by one, when they are needed."""


class Source:
    """Published tensors, made on demand: shared ones view the arena, private ones are clones.

    Args:
        manifest: describes them.
        views: of the arena that holds them.
        device: of the model.
        copy: clone the shared ones too.

    Attributes:
        clones: what was cloned at once so far: the first byte in the arena, and the clone, of dtype uint8.
    """

    def __init__(self, manifest: Manifest, views: ArenaViews, device: torch.device, *, copy: bool) -> None:
        self.manifest = manifest
        self._views = views
        self._device = device
        self._copy = copy
        self._clones: dict[int, torch.UntypedStorage] = {}
        self.clones: list[tuple[int, torch.Tensor]] = []

    def tensor(self, index: int) -> torch.Tensor:
        """Tensor `index` of the manifest. Ties between private tensors survive the cloning."""
        info = self.manifest.tensors[index]
        if info.storage < 0:
            return without_storage(info, self._device)
        storage = self.manifest.storages[info.storage]
        if not (info.private or self._copy):
            return self._views.tensor(info, storage)
        tensor = view(self._clone(info.storage), info, self._device)
        tensor = tensor.conj() if info.conj else tensor
        return torch._neg_view(tensor) if info.neg else tensor

    def _clone(self, index: int) -> torch.UntypedStorage:
        if index not in self._clones:
            indexes = self._neighbours.get(index, range(index, index + 1))
            # Kernels choose by alignment: it stays what it was.
            start = self._place(indexes[0])[0] // ALIGNMENT * ALIGNMENT
            end = sum(self._place(indexes[-1]))
            run = self._bytes(start, end - start).clone()
            self.clones.append((start, run))
            whole = run.untyped_storage()
            for each in indexes:
                offset, size = self._place(each)
                self._clones[each] = whole[offset - start : offset - start + size]
        return self._clones[index]

    @functools.cached_property
    def _neighbours(self) -> dict[int, range]:
        """The small storages beside each one in the arena that are cloned together with it.

        Cloned one by one, thousands of scales would take as many launches, twice.
        """
        found: dict[int, range] = {}
        first = size = end = 0
        for index in sorted({info.storage for info in self.manifest.tensors if info.private and info.storage >= 0}):
            offset, size = self._place(index)
            if size > _ALONE_BYTES:
                continue
            if index - 1 not in found or offset - end > ALIGNMENT:
                first = index
            end = offset + size
            found[index] = range(first, index + 1)
        last = None
        for index in reversed(found):
            if last is None or found[index].start != last.start:
                last = found[index]
            found[index] = last
        return found

    def _place(self, index: int) -> tuple[int, int]:
        storage = self.manifest.storages[index]
        return storage.offset_bytes, storage.size_bytes

    def addresses(self) -> set[int]:
        """The addresses of all storages under the tensors made so far."""
        return {clone.data_ptr() for clone in self._clones.values()} | self._views.addresses()

    def renew(self) -> None:
        """Give all clones their published bytes again."""
        self._views.renew(self.clones)

    def _bytes(self, start: int, size: int) -> torch.Tensor:
        return self._views.bytes_at(start, size)


class Restorer:
    """Binds one model to one published manifest.

    Args:
        built: what was left out when the model was built; None if it was built in another way.
        besides: tensors that belong to a model and never have data.

    Attributes:
        ways: modules whose post-processing ran, by strategy.
        own: values that are this engine's own and differ from the publisher's, by their full name.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        device: torch.device,
        built: WithoutWeights | None = None,
        besides: Callable[[nn.Module], Iterable[torch.Tensor]] = lambda model: (),
    ) -> None:
        self._model = model
        self._source = source
        self._device = device
        self._built = built
        self._besides = besides
        self.ways: Counter[Strategy] = Counter()
        self.own: dict[str, str] = {}
        self._modules = {module.path: module for module in source.manifest.modules}
        self._paths: dict[int, str] = {}
        # By id of the tensor object: its index, its address, and the object itself, which keeps the id valid.
        self._bound: dict[int, tuple[int, int, torch.Tensor]] = {}
        # By address: memory of placeholders that published tensors took the place of.
        self._displaced: dict[int, StorageWeakRef] = {}

    def bind_early(self, strategy: Callable[[nn.Module], Strategy]) -> None:
        """Do what loading did. Bind all that exists already and that post-processing will not make again."""
        with plain_tensors():
            unwritten = {} if self._built is None else {"is_unwritten": self._built.has_no_value}
            apply_loading(self._model, self._source.manifest, **unwritten)
            self._leave_on_meta()
            for path, module in named_modules(self._model):
                if id(module) in self._paths:
                    continue
                self._paths[id(module)] = path
                own = module.__dict__
                parameters, buffers = own["_parameters"], own["_buffers"]
                if parameters or buffers:
                    is_remade = bool(parameters) and strategy(module) is _REPLAY
                    self._bind_all(path, ({} if is_remade else parameters, buffers))

    def _leave_on_meta(self) -> None:
        """Give each slot that has no data in the publisher's model a tensor of its own without data.

        vLLM moves such parameters to meta itself, which makes new ones in a normal load, tied to nothing and with
        nothing hung on them. Here they may have been on meta already, and are what they were.
        """
        manifest = self._source.manifest
        if not any(info.meta for info in manifest.tensors):
            return
        meta = {
            (module.path, slot.name): manifest.tensors[slot.tensor]
            for module in manifest.modules
            for slot in module.slots
            if manifest.tensors[slot.tensor].meta
        }
        tree = capture(self._model)
        for slot in tree.slots():
            info = meta.get((tree.modules[slot.module].path, slot.name))
            cls = loaded_class(info.class_name) if info is not None else None
            if info is not None and cls is not None and issubclass(cls, torch.Tensor):
                data = torch.empty_strided(info.shape, info.stride, dtype=dtype_of(info.dtype), device="meta")
                twin = torch.Tensor._make_subclass(cls, data, info.requires_grad)
                Place(((slot.holder, slot.key),), slot.tensor).set(twin)

    def bind_module(self, module: nn.Module) -> None:
        """Bind one module's own parameters, just after its post-processing ran."""
        self._bind_all(self._paths[id(module)], (module._parameters,))

    def _bind_all(self, path: str, tables: Iterable[Mapping[str, torch.Tensor | None]]) -> None:
        """Bind the tensors of a module whose forms are those of the published tensors with their names."""
        published = self._modules.get(path)
        if published is None:  # post-processing may still rename or retie it
            return
        tensors = self._source.manifest.tensors
        for table in tables:
            for want in published.slots if table else ():
                tensor, info = table.get(want.name), tensors[want.tensor]
                if tensor is None or info.own or want.kind is _ATTRIBUTE or id(tensor) in self._bound:
                    continue
                if is_like(tensor, info):
                    self._bind(tensor, want.tensor, want.name)

    @contextmanager
    def hiding(self, module: nn.Module) -> Iterator[None]:
        """While open, meta tensors stand in for the module's own parameters, which are bound already."""
        self.ways[Strategy.HIDE] += 1
        with meta_parameters(module):
            yield

    @contextmanager
    def replaying(self, module: nn.Module) -> Iterator[None]:
        """While open, the module's own tensors are real and private, and those that loading fills have benign values.

        At the end they are bound.
        """
        self.ways[Strategy.REPLAY] += 1
        info = self._modules.get(self._name(module))
        untouched = info.observed.untouched if info is not None else ()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            to_load = isinstance(tensor, nn.Parameter) and name not in untouched and tensor.device == self._device
            if tensor.is_meta and name in untouched:
                self._check_has_no_value(tensor, full_name(self._name(module), name))
            if tensor.is_meta or to_load:
                _replace(tensor, _benign(tensor, self._device), self._name(module))
        yield
        self.bind_module(module)

    def finish(self) -> None:
        """Bind all that is left, set measured values, and prove the tree equal.

        Raises:
            ParityError: the tree differs; the model must not be used.
            NotShareableError: the model keeps views that cannot be restored; it must not be used.
        """
        with plain_tensors():
            self._finish()

    def _finish(self) -> None:
        # Post-processing may have written to what was bound before, on a guess: KV cache scales are.
        self._source.renew()
        manifest = self._source.manifest
        tree = capture(self._model)
        compare_modules(tree, manifest)
        carriers: dict[int, torch.Tensor] = {}
        indexes: dict[int, int] = {}
        tensors, hung = manifest.tensors, tree.hung
        for live, published in zip(tree.modules, manifest.modules, strict=True):
            for slot, want in self._pairs(live, published):
                index, tensor = want.tensor, slot.tensor
                info = tensors[index]
                if info.own:
                    self._keep_own(slot, info, live.path)
                    continue
                if info.attributes != hung.get(id(tensor), _NOTHING):
                    compare_tensor_attributes(slot, info, live.path, published.observed)
                if difference := tensor_difference(tensor, info):
                    name = full_name(live.path, slot.name)
                    raise ParityError(f"{name}: {difference}.", name)
                carrier = carriers.setdefault(index, tensor)
                if carrier is not tensor or indexes.setdefault(id(tensor), index) != index:
                    name = full_name(live.path, slot.name)
                    raise ParityError(f"{name} is not tied to the same tensors here as in the published model.", name)
                self._ensure_bound(tensor, index, live.path, slot.name)
        set_measured(self._model, tree, manifest)
        self.own = compare_values(tree, manifest)
        self._check_placeholders_are_gone(tree)
        self._check_nothing_is_deferred(tree)

    def _pairs(self, live: LiveModule, published: ModuleInfo) -> Iterable[tuple[LiveSlot, SlotInfo]]:
        """The slots of a module, each with the published one.

        Raises:
            ParityError: naming the first slot that only one of both has.
        """
        here, there = live.slots, published.slots
        if len(here) == len(there):
            for slot, want in zip(here, there, strict=True):
                if slot.name != want.name or slot.kind is not want.kind:
                    break
            else:  # nearly all have the same order
                return zip(here, there, strict=True)
        pairs = []
        wanted = {(slot.kind, slot.name): slot for slot in there}
        for slot in live.slots:
            if (slot.kind, slot.name) not in wanted:
                name = full_name(live.path, slot.name)
                raise ParityError(f"{name} ({slot.kind.value}) exists here but was not published.", name)
            pairs.append((slot, wanted.pop((slot.kind, slot.name))))
        self._check_missing(published.path, wanted.values())
        for table in (live.module._parameters, live.module._buffers):
            arrange(table, [slot.name for slot in there])
        return pairs

    def _keep_own(self, slot: LiveSlot, info: TensorInfo, path: str) -> None:
        """Leave a slot the tensor that building this model made, whatever the publisher's constructor made of it."""
        if slot.tensor.is_meta and not info.meta:
            name = full_name(path, slot.name)
            self._check_has_no_value(slot.tensor, name)
            _replace(slot.tensor, torch.empty_like(slot.tensor, device=self._device), name)

    def _check_has_no_value(self, tensor: torch.Tensor, name: str) -> None:
        """Raise `ParityError` if building this model gave a value to a tensor that was deferred."""
        if self._built is None or not self._built.has_no_value(tensor):
            raise ParityError(f"{name} was left without data.", name)

    def _check_missing(self, path: str, missing: Iterable[SlotInfo]) -> None:
        """Raise `ParityError` unless all that is missing is an engine's own: flags may decide whether it is made."""
        for slot in missing:
            if not self._source.manifest.tensors[slot.tensor].own:
                name = full_name(path, slot.name)
                raise ParityError(f"{name} ({slot.kind.value}) was published but does not exist here.", name)

    def _check_placeholders_are_gone(self, tree: Tree) -> None:
        """Raise `NotShareableError` if the model still views memory that a published tensor took the place of.

        A function that captured a view of a weight does, where `capture` cannot see it: it would compute
        with the values of the replay, and no comparison would show it.
        """
        if not self._placeholders():
            return
        # What was made while the collector was paused is young: garbage goes without a walk over all of vLLM.
        gc.collect(0)
        if left := self._placeholders():
            # Whatever else uses it (a cache of the process) computes nothing for this model.
            held = hidden_tensors(self._model, Known.of(tree), self._device.type, among=left)
            if held:
                raise NotShareableError(
                    f"{len(held)} views of weights are kept where they cannot be restored, the first is {held[0]}"
                )

    def _check_nothing_is_deferred(self, tree: Tree) -> None:
        """Raise `NotShareableError` if the model can reach a tensor whose memory was left out when it was built."""
        if self._built is None or not self._built.is_left(self._besides(self._model)):
            return
        left = hidden_tensors(self._model, Known.of(tree), "meta")
        if left:
            raise NotShareableError(f"{len(left)} tensors are left without data, the first is {left[0]}")

    def _placeholders(self) -> set[int]:
        """The addresses of displaced memory that is still in use."""
        in_use = {address for address, storage in self._displaced.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        return in_use - self._source.addresses() if in_use else in_use

    def _ensure_bound(self, tensor: torch.Tensor, index: int, path: str, name: str) -> None:
        bound, address, _ = self._bound.get(id(tensor), (-1, -1, None))
        if bound != index or address != tensor.data_ptr():
            self._bind(tensor, index, full_name(path, name))
        elif self._source.manifest.tensors[index].storage < 0:
            tensor.data.copy_(self._source.tensor(index))

    def _bind(self, tensor: torch.Tensor, index: int, name: str) -> None:
        if not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            self._displaced[storage.data_ptr()] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            del storage
        bound = self._source.tensor(index)
        self._bound[id(tensor)] = index, bound.data_ptr(), tensor
        try:
            _replace(tensor, bound, name)
        except NotShareableError:
            if not self._bind_views(tensor):
                raise
            _replace(tensor, bound, name)

    def _bind_views(self, base: torch.Tensor) -> bool:
        """Bind the published views of `base` in the model, which keep it from being replaced. Returns whether any was.

        A constructor may keep parts of a parameter, or of one flat memory, under names of their own.
        """
        found = False
        for path, name, tensor in self._views.get(id(base), ()):
            published = self._modules.get(path)
            slots = published.slots if published is not None else ()
            index = next((want.tensor for want in slots if want.name == name), None)
            if index is not None and tensor._is_view() and is_like(tensor, self._source.manifest.tensors[index]):
                self._bind(tensor, index, full_name(path, name))
                found = True
        return found

    @functools.cached_property
    def _views(self) -> dict[int, list[tuple[str, str, torch.Tensor]]]:
        """By id of a tensor: its views that the constructor left in the model, with path of the module and name."""
        found: dict[int, list[tuple[str, str, torch.Tensor]]] = {}
        tree = capture(self._model)
        for slot in tree.slots():
            if slot.tensor._is_view():
                views = found.setdefault(id(slot.tensor._base), [])
                views.append((tree.modules[slot.module].path, slot.name, slot.tensor))
        return found

    def _name(self, module: nn.Module) -> str:
        return self._paths[id(module)]


@contextmanager
def meta_parameters(module: nn.Module) -> Iterator[None]:
    """While open, meta tensors stand in for the module's own parameters."""
    kept = dict(module._parameters)
    for name, parameter in kept.items():
        if isinstance(parameter, nn.Parameter):
            twin = _with_data(parameter, parameter.detach().to("meta"))
            assert isinstance(twin, nn.Parameter)
            module._parameters[name] = twin
    try:
        yield
    finally:
        module._parameters.update(kept)


def _with_data(like: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """A tensor on `data` that has the class and the attributes of `like`."""
    if type(like) is not torch.Tensor:
        data = torch.Tensor._make_subclass(type(like), data, like.requires_grad)
    data.__dict__.update(like.__dict__)
    return data


def _replace(tensor: torch.Tensor, data: torch.Tensor, name: str) -> None:
    """Let the object `tensor` carry `data` from now on, so that all that hold the object see the new data.

    `torch.utils.swap_tensors` does the same in four times the time, because its tensors may differ in class, in
    attributes and in slots. What `swap_tensors` refuses is left to it, so its words are in the error. But weak
    references, of which it cannot know whose they are meant to be: they stay with the object.
    """
    kind = type(tensor)
    twin = data if kind is torch.Tensor else torch.Tensor._make_subclass(kind, data, tensor.requires_grad)
    if tensor._use_count() == twin._use_count() == 1:  # type: ignore[attr-defined]
        torch._C._swap_tensor_impl(tensor, twin)
        return
    try:
        torch.utils.swap_tensors(tensor, _with_data(tensor, data))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise NotShareableError(f"{name} cannot be replaced in place: {error}.") from error


def _benign(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor like `tensor` of ones, which suit scales and norms, or of zeros if it has integers, which index."""
    fill = 1 if tensor.is_floating_point() else 0
    out = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.element_size() == 1:
        out.view(torch.uint8).fill_(0x38 if tensor.is_floating_point() else 0)  # 1.0 in float8_e4m3
        return out
    return out.fill_(fill)
