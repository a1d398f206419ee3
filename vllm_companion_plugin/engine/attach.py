"""Restore a published model inside this engine, and prove it equal."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.logger import init_logger

from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.process import collector_paused
from vllm_companion_plugin.core.status import Report
from vllm_companion_plugin.engine import draft
from vllm_companion_plugin.engine.decisions import Attach, Outcome
from vllm_companion_plugin.engine.identity import flag_reads, reading
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import building, processing, reload_notes
from vllm_companion_plugin.errors import CompanionError, IntegrityError, NotShareableError, ParityError
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.tree import constants, uses
from vllm_companion_plugin.tree.building import WithoutWeights, left_by_loading
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy, meta_parameters
from vllm_companion_plugin.tree.values import class_name

logger = init_logger("vllm.companion")

NOTABLE_WAIT_S = 0.1
"""What an answer takes that nobody had to be waited for is part of attaching."""


@collector_paused()
def attach_model(decision: Attach, vllm_config: Any, model_config: Any, prefix: str, settings: Settings) -> nn.Module:
    """The model, bound to the companion's copy of the weights.

    Raises:
        CompanionError: it could not be built or is not provably equal; nothing of it is left.
    """
    started = time.perf_counter()
    device, attachment = decision.device.torch_device, decision.attachment
    copy = settings.share == "copy"
    targets: dict[str, nn.Module] = {}
    processed = Processed()
    _check_files(decision)
    flag_reads.check(attachment.manifest.flags, vllm_config, model_config)
    undrawn = _random_states()
    try:
        views = attachment.views()
        # The device compares while the model is built here.
        verification = attachment.verification(views, settings.verify)
        without_weights = WithoutWeights(device, left_by_loading(attachment.manifest))
        with (
            building.model_without_weights(vllm_config, model_config, prefix, without_weights) as model,
            ExitStack() as without,
        ):
            uses.check(attachment.manifest, model)
            if decision.key.role == "draft":
                draft.set_flags(model, attachment.manifest)
                if (target := current().target()) is not None:
                    targets = draft.taken_from_target(attachment.manifest, vllm_config, model, target)
                without.enter_context(draft.taken_out(model, targets))
            built = time.perf_counter()
            without.enter_context(constants.as_loaded(attachment.manifest.common_values, class_name(type(model))))
            source = Source(attachment.manifest, views, device, copy=copy)
            restorer = Restorer(model, source, device, built=without_weights, besides=reload_notes.noted)
            if decision.device.stage is Stage.UNPROCESSED:
                restorer.bind_early(lambda module: Strategy.HIDE)
                restorer.finish()
                if current().written is None:  # which is to load weights once more, and never to run
                    clones = () if copy else source.clones
                    with process_privately(model, settings, source.addresses(), clones) as processed:
                        processing.post_process(model, model_config, device)
                model.eval()
            else:
                restorer.bind_early(processing.strategy)
                with processing.around_post_processing(model, around_restore(restorer)):
                    processing.post_process(model, model_config, device)
                model.eval()  # as loaders return it, and as it was published
                restorer.finish()
            with reported(decision, settings.verify if verification.pieces else ""):
                verified = verification.check(attachment.manifest, attachment.label)
    except CompanionError:
        _put_back(*undrawn)  # the model is built again
        raise
    except Exception as error:  # vLLM's own code ran where it never runs: on the meta device
        _put_back(*undrawn)
        logger.debug("Restoring failed", exc_info=True)
        raise NotShareableError(
            f"the model cannot be built without its weights: {type(error).__name__}: {error}"
        ) from error
    if not copy:
        attachment.keep_private(source.clones, processed.changed)
        attachment.fix(fixed_reason(decision.device.stage, processed, settings))
    draft.put_in(model, targets)
    if restorer.own:
        logger.debug("Values of this engine that differ from the publisher's: %s", restorer.own)
    if restorer.ways[Strategy.REPLAY] and device.type == "cuda":
        torch.cuda.empty_cache()
    finished = time.perf_counter()
    ways = {way.value: count for way, count in restorer.ways.items()}
    logger.info(
        "%s %s weights of %s in %.3f s%s (model built in %.3f s, bound in %.3f s): "
        "%.2f GiB, %d tensors, generation %d, %s%s",
        "Copied" if copy else "Attached to",
        "single-rank" if decision.key.rank == "single" else decision.key.rank,
        decision.key.short_title,
        decision.seconds - decision.waited_s + finished - started,
        f" after waiting {decision.waited_s:.1f} s" if decision.waited_s >= NOTABLE_WAIT_S else "",
        built - started,
        finished - built,
        attachment.size_bytes / 2**30,
        len(attachment.manifest.tensors),
        attachment.held.generation,
        verified,
        "".join(f", {count} modules by {way}" for way, count in ways.items()),
    )
    current().record(
        Outcome(
            "copied" if copy else "attached",
            decision.key.model,
            decision.key.role,
            decision.key.rank,
            size_bytes=attachment.size_bytes,
            seconds=decision.seconds + finished - started,
            ways=ways,
        ),
        device_id=decision.device.id,
        key_id=decision.key.id,
        attach_s=decision.seconds - decision.waited_s + finished - started,
    )
    return model


def _random_states() -> tuple[Any, Any, torch.Tensor, torch.Tensor | None]:
    is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state() if is_on_gpu else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _put_back(pythons: Any, numpys: Any, torchs: torch.Tensor, cuda: torch.Tensor | None) -> None:
    """A normal load after a failed attach draws the numbers that it would have drawn alone."""
    random.setstate(pythons)
    np.random.set_state(numpys)
    torch.set_rng_state(torchs)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _check_files(decision: Attach) -> None:
    """The small files that the publisher's model was made from are the same here.

    Raises:
        ParityError: naming them.
    """
    files = decision.attachment.manifest.files
    if decision.found.path is None or not files:
        return
    changed = reading.changed(files, decision.found.path)
    if changed:
        name, digest = next(iter(changed.items()))
        text = "; ".join(reading.differences({name: files[name] for name in changed}, decision.found.path))
        raise ParityError(f"files that were read to load it differ: {text}.", f"file {name}", (digest or "absent")[:16])


@contextmanager
def reported(decision: Attach, mode: str) -> Iterator[None]:
    """What goes on inside compares checksums, if there is a `mode`; the companion is told how it ends."""
    started, verified = time.perf_counter(), ""
    try:
        yield
        verified = "equal"
    except IntegrityError:
        verified = "different"
        raise
    finally:
        if mode and verified:
            took_s = time.perf_counter() - started
            current().report(
                decision.device.id, Report(decision.key.id, verify=mode, verified=verified, verify_seconds=took_s)
            )


def around_restore(restorer: Restorer) -> Callable[[nn.Module], AbstractContextManager[None]]:
    """What surrounds each module's post-processing on the way to the processed state."""

    @contextmanager
    def around(module: nn.Module) -> Iterator[None]:
        if processing.strategy(module) is Strategy.HIDE:
            with restorer.hiding(module):
                yield
            return
        processing.end_online_loading(module)
        with restorer.replaying(module):
            yield

    return around


@dataclass
class Processed:
    """What an engine has processed for itself, of weights that are shared unprocessed.

    Attributes:
        sizes: bytes of each copy, and of each tensor in `changed`.
        changed: clones of published bytes that processing has changed, of dtype uint8.
    """

    sizes: list[int] = field(default_factory=list)
    changed: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def process_privately(
    model: nn.Module,
    settings: Settings,
    published: Collection[int] = (),
    clones: Sequence[tuple[int, torch.Tensor]] = (),
) -> Iterator[Processed]:
    """Keep post-processing away from shared memory that holds unprocessed weights.

    Methods that would only pack a private copy see meta tensors and leave the shared weights
    in use, unless `cpu_prepack` asks for the packed kernel. All others get a copy of the
    module's weights first, because nothing says that they do not write to them.

    Args:
        published: addresses of the storages that were published. Buffers and attributes on them are weights, too.
        clones: as of `Attachment.keep_private`, with the bytes that were published.

    Yields:
        What this engine has processed for itself, complete at the end of `with`.
    """
    processed = Processed()
    before = [clone.clone() for _, clone in clones]
    views: dict[int, list[torch.Tensor]] = {}
    # By address, which nothing else gets as long as they are here.
    private: dict[int, torch.UntypedStorage] = {}
    weights: dict[nn.Module, list[torch.Tensor]] = {}

    def is_published(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in published

    @functools.cache
    def look() -> None:
        for live in capture(model).modules:
            tensors = [slot.tensor for slot in live.slots if not slot.tensor.is_meta]
            weights[live.module] = [*filter(is_published, tensors)]
            for each in tensors:
                views.setdefault(each.untyped_storage()._cdata, []).append(each)

    def weights_of(module: nn.Module) -> list[torch.Tensor]:
        look()
        built = weights.pop(module, None)
        found = {id(each): each for each in (*module.parameters(recurse=False), *(built or ()))}.values()
        if built is None and published:  # its method was here before, and may have made parameters or adopted some
            return [*filter(is_published, found)]
        return [*found]

    def make_private(weight: torch.Tensor) -> None:
        """Give the storage of `weight`, and all that views it, memory of this engine's own."""
        storage = weight.untyped_storage()
        if storage._cdata in private:
            return
        mine = storage.clone()  # type: ignore[no-untyped-call]
        private[mine._cdata] = mine
        for tensor in views.pop(storage._cdata, [weight]):
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.data = empty.set_(mine, tensor.storage_offset(), tensor.shape, tensor.stride())
        processed.sizes.append(mine.nbytes())

    @contextmanager
    def around(module: nn.Module) -> Iterator[None]:
        if settings.share == "copy" or (settings.cpu_prepack and processing.strategy(module) is Strategy.HIDE):
            yield
        elif processing.strategy(module) is Strategy.HIDE:
            with meta_parameters(module):
                yield
        else:
            for weight in weights_of(module):
                make_private(weight)
            yield

    with ExitStack() as stack:
        stack.enter_context(processing.around_post_processing(model, around))
        yield processed
    for (_, clone), bytes_before in zip(clones, before, strict=True):
        if not torch.equal(clone, bytes_before):
            processed.changed.append(clone)
            processed.sizes.append(clone.nbytes)
    if processed.sizes:
        logger.info(
            "%d tensors (%.2f GiB) are private: their kernels process them.",
            *(len(processed.sizes), sum(processed.sizes) / 2**30),
        )


def fixed_reason(stage: Stage, processed: Processed, settings: Settings) -> str:
    """Why an engine cannot take other weights at the same addresses; empty if it can.

    Args:
        stage: in which weights are shared.
        processed: as `process_privately` yields it; nothing if what is shared was processed before.
    """
    if stage is Stage.UNPROCESSED and settings.cpu_prepack:
        return "it has packed its weights (cpu_prepack)"
    count = len(processed.sizes)
    return f"its kernels use {count} tensors that it has processed for itself" if count else ""
