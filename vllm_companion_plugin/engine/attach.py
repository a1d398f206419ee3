"""Restore a published model inside this engine, and prove it equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

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
from vllm_companion_plugin.tree.building import WithoutWeights
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
    copied: list[int] = []
    _check_files(decision)
    flag_reads.check(attachment.manifest.flags, vllm_config, model_config)
    try:
        views = attachment.views()
        # The device compares while the model is built here.
        verification = attachment.verification(views, settings.verify)
        without_weights = WithoutWeights(device)
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
                    with process_privately(model, settings) as copied:
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
        raise
    except Exception as error:  # vLLM's own code ran where it never runs: on the meta device
        logger.debug("Restoring failed", exc_info=True)
        raise NotShareableError(
            f"the model cannot be built without its weights: {type(error).__name__}: {error}"
        ) from error
    if not copy:
        attachment.keep_private(source.clones)
        attachment.fix(fixed_reason(decision.device.stage, copied, settings))
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


@contextmanager
def process_privately(model: nn.Module, settings: Settings) -> Iterator[list[int]]:
    """Keep post-processing away from shared memory that holds unprocessed weights.

    Methods that would only pack a private copy see meta tensors and leave the shared weights
    in use, unless `cpu_prepack` asks for the packed kernel. All others get a copy of the
    module's weights first, because nothing says that they do not write to them.

    Yields:
        Bytes of each copy, complete at the end of `with`.
    """
    copied: list[int] = []
    views: dict[int, list[torch.Tensor]] = {}

    def make_private(parameter: nn.Parameter) -> None:
        """Give the storage of `parameter`, and all that views it, memory of this engine's own."""
        if not views:
            for slot in capture(model).slots():
                if not slot.tensor.is_meta:
                    views.setdefault(slot.tensor.untyped_storage()._cdata, []).append(slot.tensor)
        storage = parameter.untyped_storage()
        mine = storage.clone()  # type: ignore[no-untyped-call]
        for tensor in views.pop(storage._cdata, [parameter]):
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.data = empty.set_(mine, tensor.storage_offset(), tensor.shape, tensor.stride())
        copied.append(mine.nbytes())

    @contextmanager
    def around(module: nn.Module) -> Iterator[None]:
        if settings.share == "copy" or (settings.cpu_prepack and processing.strategy(module) is Strategy.HIDE):
            yield
        elif processing.strategy(module) is Strategy.HIDE:
            with meta_parameters(module):
                yield
        else:
            for parameter in module.parameters(recurse=False):
                make_private(parameter)
            yield

    with ExitStack() as stack:
        stack.enter_context(processing.around_post_processing(model, around))
        yield copied
    if copied:
        logger.info("%d tensors (%.2f GiB) are private: their kernels process them.", len(copied), sum(copied) / 2**30)


def fixed_reason(stage: Stage, copied: Sequence[int], settings: Settings) -> str:
    """Why an engine cannot take other weights at the same addresses; empty if it can.

    Args:
        stage: in which weights are shared.
        copied: as `process_privately` yields it; nothing if what is shared was processed before.
    """
    if stage is Stage.UNPROCESSED and settings.cpu_prepack:
        return "it has packed its weights (cpu_prepack)"
    return f"its kernels use {len(copied)} tensors that it has processed for itself" if copied else ""
