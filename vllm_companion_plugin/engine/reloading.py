"""Having vLLM load new weights into the generation that this process writes: the headless process's part (adr/0016).

vLLM reloads the model that this process has, or, where that would lose something, loads a second one.
"""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.update import updating
from vllm_companion_plugin.core.module_tree import Manifest, Stage, TensorKind
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.engine.vllm import building, rehearsal, reload_notes, sources
from vllm_companion_plugin.engine.vllm.naming import named_as_source
from vllm_companion_plugin.errors import CompanionError, LayoutError, ParityError, UpdateError
from vllm_companion_plugin.memory.tensors.views import dtype_of, without_storage
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.live import Tree, full_name, named_modules, plain_tensors
from vllm_companion_plugin.tree.parity import compare_modules, compare_values, tensor_difference
from vllm_companion_plugin.wire.manifest import sources_from_bytes

logger = init_logger("vllm.companion")


def write_generation(
    worker: Any,
    live: LiveModel,
    model: nn.Module,
    version: str,
    base: int,
    weights: Iterator[tuple[str, torch.Tensor]],
    *,
    anew: bool,
) -> int:
    """Have `worker` load `weights` as the next generation of what `model` is bound to; its number.

    The model is bound to that generation afterwards. If this raises, nothing of the generation stays, and the model
    is of no use unless nothing came of `weights`.

    Args:
        version, base: as of `updating`.
        weights: all tensors of a checkpoint that loading uses, as the checkpoint has them. The first one is asked for
            once this process is the entry's writer; after the last one nothing else is.
        anew: load them into a second model, because of what `why_anew` says.

    Raises:
        StaleError: another generation than `base` is current.
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it, or this kind of memory cannot be replaced at its addresses.
        LayoutError: what vLLM made of the weights is laid out differently.
        UpdateError: vLLM loaded nothing into a parameter, and said nothing or only warned.
        Exception: of vLLM, which cannot load them.
    """
    attachment = live.attachment
    with updating(attachment, version, live.settings, base=base) as update:
        update.complete()  # what loading leaves alone is what it was
        weights = _begun(weights)
        with attachment.written_through(update.writer):
            if anew:
                _load_anew(worker.vllm_config, attachment, weights)
            else:
                _reload(worker, attachment.manifest, model, weights)
                deque(weights, maxlen=0)  # vLLM may leave the last ones
                _collect(model, attachment)
    known = replace(live.settings, verify="off")  # the sums that came with it are those of what was just written
    try:
        attachment.advance(attachment.prepare(update.generation, known))
    except CompanionError as error:  # it is committed; the next update begins with what is current then
        logger.warning("%s maps generation %d still: %s", attachment.label, attachment.generation, error)
    if anew:
        gc.collect()  # modules refer to each other, and have memory of their own
    if attachment.device.type == "cuda":
        torch.cuda.empty_cache()  # until the next update, the memory is the engines'
    return update.generation


def why_anew(vllm_config: Any, attachment: Attachment) -> str:
    """Why vLLM's reload would not load this model right; empty if it would.

    Weights come once, so this is known before the first of them: loading is rehearsed without memory.
    """
    manifest = attachment.manifest
    if manifest.stage is Stage.UNPROCESSED:
        return ""  # it is not reloaded, but loaded once more
    added = [full_name(module.path, slot.name) for module in manifest.modules for slot in module.observed.added]
    if added := [*manifest.added_modules, *added]:
        return f"loading makes {several(added, 3)}"
    weights = (
        (name, torch.empty(source.shape, dtype=dtype_of(source.dtype), device="meta"))
        for name, source in sources_from_bytes(manifest.sources).items()
    )
    try:
        rehearsed = rehearsal.rehearse(vllm_config, weights, attachment.device)
    except Exception as error:  # a second model can be loaded in any case
        logger.debug("Rehearsing failed", exc_info=True)
        return f"it cannot be rehearsed ({type(error).__name__}: {error})"
    if rehearsed.by_hand:
        return f"code of the model itself writes or reads {several(rehearsed.by_hand, 3)}"
    if left := _not_loaded(rehearsed.model, manifest, rehearsed.left):
        return f"nothing is loaded into {several(left, 3)}"
    return ""


def _begun(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, of which the first one has been asked for. None is kept: it may be a GiB of the device."""
    begun = list(itertools.islice(weights, 1))

    def every() -> Iterator[tuple[str, torch.Tensor]]:
        while begun:
            yield begun.pop()
        yield from weights

    return every()


def _reload(worker: Any, manifest: Manifest, model: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """As vLLM does it: layer by layer into memory of its own, processed, and copied to where the tensors were.

    Weights that are shared unprocessed are just loaded once more.
    """
    if manifest.stage is Stage.PROCESSED:
        with reload_notes.seeing_what_is_left() as left:
            worker.reload_weights(weights_iterator=weights)
        if lost := _not_loaded(model, manifest, left):
            raise UpdateError(
                f"When vLLM reloads this model, it loads nothing into {several(lost, 3)}.",
                remedy='Write with mode="direct" if that is possible, or start engines anew with the new checkpoint.',
            )
        return
    config = worker.vllm_config
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.no_grad():
        load: Callable[[Iterator[tuple[str, torch.Tensor]]], object] = model.load_weights  # type: ignore[assignment]
        load(weights)


def _load_anew(vllm_config: Any, attachment: Attachment, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """As vLLM does it when it starts: a second model is built, loaded and processed, and copied to its place."""
    with (
        building.beside(vllm_config, is_draft=False) as config,
        named_as_source(config.load_config),
        set_current_vllm_config(config),
    ):
        loader = sources.GivenWeights(config.load_config, weights)
        model = loader.load_model(vllm_config=config, model_config=config.model_config, prefix="")
    deque(weights, maxlen=0)
    _collect(model, attachment, anew=True)


def _not_loaded(model: nn.Module, manifest: Manifest, left: Mapping[nn.Module, Collection[str]]) -> list[str]:
    """The parameters that the publisher loaded, and into which nothing was loaded now.

    Args:
        left: the tensors that nothing was loaded into, by module and name.
    """
    published = {module.path: module for module in manifest.modules}
    filled: set[tuple[int, int]] = set()
    missing: dict[str, tuple[int, int]] = {}
    for path, module in named_modules(model):
        info, names = published.get(path), left.get(module, ())
        for slot in info.slots if info is not None else ():
            if slot.kind is TensorKind.PARAMETER:
                tensor = manifest.tensors[slot.tensor]
                place = tensor.storage, (tensor.storage_offset if tensor.storage >= 0 else slot.tensor)
                if slot.name not in names:
                    filled.add(place)
                elif info is not None and slot.name not in info.observed.untouched:
                    missing[full_name(path, slot.name)] = place
    return [name for name, place in missing.items() if place not in filled]  # others are tied to what was loaded


def _collect(model: nn.Module, attachment: Attachment, *, anew: bool = False) -> None:
    """Copy to the arena what vLLM has put elsewhere: in what is private to an engine, or in tensors that it made anew.

    Args:
        anew: the model is another one than that which views the arena.

    Raises:
        LayoutError: the model is not what was published, its tensors' bytes aside.
    """
    manifest = attachment.manifest
    with plain_tensors(), torch.no_grad():
        tree = capture(model)
        try:
            compare_modules(tree, manifest)
            compare_values(tree, manifest)
        except ParityError as error:
            raise LayoutError(
                f"With these weights, {attachment.label} is laid out differently: {error.what}"
            ) from error
        if anew:
            _check_ties(tree, manifest, attachment.label)
        views = attachment.views()
        for index, (name, tensor) in _carriers(tree, manifest).items():
            info = manifest.tensors[index]
            if difference := tensor_difference(tensor, info):
                raise LayoutError(f"With these weights, {name} of {attachment.label} is other: {difference}.")
            if info.storage >= 0:
                place = views.tensor(info, manifest.storages[info.storage])
                if place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)
            elif info.inline and not torch.equal(tensor.detach().cpu(), without_storage(info, attachment.device)):
                raise LayoutError(f"With these weights, {name} of {attachment.label} has another value.")


def _check_ties(tree: Tree, manifest: Manifest, label: str) -> None:
    """Raise `LayoutError` if tensors that share a place in the arena do not share memory: each has bytes of its own."""
    found: dict[int, tuple[int, str]] = {}
    for live, published in zip(tree.modules, manifest.modules, strict=True):
        slots = {(slot.kind, slot.name): slot.tensor for slot in live.slots}
        for want in published.slots:
            storage, tensor = manifest.tensors[want.tensor].storage, slots.get((want.kind, want.name))
            if storage < 0 or tensor is None:
                continue
            here = tensor.untyped_storage().data_ptr(), full_name(live.path, want.name)
            address, name = found.setdefault(storage, here)
            if address != here[0]:
                raise LayoutError(f"With these weights, {here[1]} of {label} does not share the memory of {name}.")


def _carriers(tree: Tree, manifest: Manifest) -> dict[int, tuple[str, torch.Tensor]]:
    """The live tensor of each published one, by index, with its name; its parameter or buffer if it has one.

    What else refers to a tensor (helpers of kernels) may still refer to one of before.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    registered: set[int] = set()
    for live, published in zip(tree.modules, manifest.modules, strict=True):
        slots = {(slot.kind, slot.name): slot.tensor for slot in live.slots}
        for want in published.slots:
            info, tensor = manifest.tensors[want.tensor], slots.get((want.kind, want.name))
            if info.own or info.meta:
                continue
            name = full_name(live.path, want.name)
            if tensor is None:
                raise LayoutError(f"With these weights, {name} does not exist.")
            is_registered = want.kind is not TensorKind.ATTRIBUTE
            if want.tensor not in found or (is_registered and want.tensor not in registered):
                found[want.tensor] = name, tensor
            if is_registered:
                registered.add(want.tensor)
    return found
