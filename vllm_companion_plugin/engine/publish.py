"""Load a model as vLLM does, hand its weights to the companion, and keep using that copy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.core.layout import layout_digest
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.process import collector_paused, quick_switches
from vllm_companion_plugin.core.status import Progress
from vllm_companion_plugin.engine import draft
from vllm_companion_plugin.engine.attach import Processed, fixed_reason, process_privately
from vllm_companion_plugin.engine.decisions import Load, Outcome
from vllm_companion_plugin.engine.identity import checkpoint
from vllm_companion_plugin.engine.identity.flag_reads import FlagReads
from vllm_companion_plugin.engine.identity.reading import Reading, observed_reading
from vllm_companion_plugin.engine.progress import ProgressBar
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import building, devices, patches, processing, sources
from vllm_companion_plugin.engine.vllm.clocks import marked_times
from vllm_companion_plugin.engine.vllm.imports import around_imports
from vllm_companion_plugin.engine.vllm.threads import Threads
from vllm_companion_plugin.errors import (
    ArenaError,
    CompanionError,
    CompanionUnavailableError,
    NotShareableError,
    OvertakenError,
)
from vllm_companion_plugin.keeper import client
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.hidden import Known, hidden_tensors, storage_bytes
from vllm_companion_plugin.tree.live import Tree, plain_tensors
from vllm_companion_plugin.tree.observe import Observation
from vllm_companion_plugin.tree.pack import copy, prepare, private_bytes, published_addresses, sources_of
from vllm_companion_plugin.tree.uses import Uses
from vllm_companion_plugin.wire.manifest import manifest_to_bytes, sources_to_bytes

logger = init_logger("vllm.companion")

SIGN_OF_LIFE_S = 1.0
LOST_S = 2.0
"""Until a companion that has ended is known to have."""
REPORT_AFTER_S = 0.25
"""Packing is usually over before anybody could read about it."""


def load_and_publish(
    decision: Load,
    source: BaseModelLoader,
    vllm_config: Any,
    model_config: Any,
    prefix: str,
    settings: Settings,
    keep: Callable[[Attachment], None],
) -> nn.Module:
    """Load through `source`, publish, and return the model bound to the published copy.

    Args:
        keep: takes over what the model is bound to then.

    Raises:
        CompanionError: the weights could not be shared and `fallback` is off.
    """
    publisher = _Publisher(decision, settings, vllm_config, model_config, keep)
    with (
        checkpoint.pinned(model_config, decision.found.path),
        around_imports(publisher.importing),
        ExitStack() as after_processing,
    ):
        if decision.found.path is not None:
            publisher.reading = after_processing.enter_context(observed_reading(decision.found.path))
        after_processing.enter_context(publisher.followed)
        publisher.followed.enter_context(publisher.threads.followed())
        after_processing.enter_context(publisher.flag_reads.watching(publisher.threads))
        after_processing.enter_context(patches.LOADERS_WEIGHTS.on(source, _watched(publisher, after_processing)))
        with devices.own_pool(decision.device):
            model: nn.Module = source.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
    if decision.device.stage is Stage.PROCESSED:
        publisher.publish(model)
    publisher.finish()
    return model


class _Publisher:
    """Publishes once, and turns what prevents it into a log line or an error, as configured."""

    def __init__(
        self,
        decision: Load,
        settings: Settings,
        vllm_config: Any,
        model_config: Any,
        keep: Callable[[Attachment], None],
    ) -> None:
        self._decision = decision
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._settings = settings
        self._keep = keep
        self._publication = decision.granted.publication
        self._held: Held | None = None
        self._arena: arenas.Arena | None = None
        self._manifest: Manifest | None = None
        self._next_sign = 0.0
        self.checkpoint_bytes = decision.checkpoint_bytes
        self._reason: CompanionError | None = None
        self._constants: list[torch.Tensor] = []
        self._observation: Observation | None = None
        self._uses = self._begin_uses(_class_of(vllm_config, model_config))
        self._uses_noted = ExitStack()
        self._environment: dict[str, str] = {}
        self.reading: Reading | None = None
        self.flag_reads = FlagReads()
        self.processed = Processed()
        self.threads = Threads()
        self.followed = ExitStack()  # until loading ends: what compilers begin then lives long
        self._private: list[tuple[int, torch.Tensor]] = []
        self.published: set[int] = set()
        self._bytes_before = devices.requested_bytes(decision.device)

    def _begin_uses(self, model: type[nn.Module] | None) -> Uses:
        try:
            return Uses(model)
        except Exception as error:  # it can be loaded all the same
            self._reason = _unwatched(error)
            return Uses(None)

    def report(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        self._publication.report(Progress(phase, done_bytes, total_bytes))
        if time.monotonic() >= self._next_sign:
            self._next_sign = time.monotonic() + SIGN_OF_LIFE_S
            self._decision.election.sign_of_life()

    @property
    def is_bound(self) -> bool:
        """Whether the model views the arena, published or not: nobody may write to it."""
        return self._arena is not None and self._settings.share == "readonly"

    def begin(self, model: nn.Module, until: ExitStack) -> None:
        """The model was built: watch what becomes of it, until `until` closes."""
        self._environment = dict(os.environ)
        self.flag_reads.begin_loading()
        try:
            self._observation = Observation(model, self._uses)
        except Exception as error:  # it can be loaded all the same
            self._reason = _unwatched(error)
            return
        until.enter_context(processing.around_post_processing(model, self._observation.processing))
        until.enter_context(self._observation.watching())
        self.threads.surround(self._observation.watching_beside)
        until.enter_context(marked_times())
        if self._uses.are_looked_for:
            until.enter_context(self._uses_noted)
            self._uses_noted.enter_context(patches.READS_OF_VALUES.on(nn.Module, self._uses.noting))
            self._uses_noted.enter_context(patches.READS_OF_TENSORS.on(torch.Tensor, self._uses.noting))

    def read(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the checkpoint comes."""
        if self._observation is not None:
            self._observation.note_read(name, tensor)

    def loaded(self, model: nn.Module) -> None:
        """The model was loaded, and will be post-processed."""
        self.flag_reads.end_loading()
        self.followed.close()
        self._uses_noted.close()
        if self._observation is None:
            return
        try:
            self._observation.end_loading(model)
            self._check_environment()
        except NotShareableError as error:
            self._reason = error
        except Exception as error:  # the model is loaded, so this is no reason to end the engine
            self._reason = _unwatched(error)

    def _check_environment(self) -> None:
        """Raises `NotShareableError` if the model's code has left another value in a variable of this process."""
        before, now = self._environment, os.environ
        names = self.reading.variables if self.reading is not None else ()
        if changed := [name for name in sorted(names) if before.get(name) != now.get(name)]:
            raise NotShareableError(f"loading set the variable {changed[0]}, which all of this process sees")

    @contextmanager
    def importing(self, module: ModuleType) -> Iterator[None]:
        """While open, `module` is executed. The constants that it makes are none of the model's tensors."""
        device = self._decision.device
        before = devices.requested_bytes(device)
        yield
        if self._observation is not None:
            try:
                self._observation.note_import(module)
            except Exception as error:  # the module is imported all the same
                self._reason = _unwatched(error)
        known = set(map(id, self._constants))
        found = [
            value
            for value in list(vars(module).values())
            if type(value) is torch.Tensor
            and value.layout is torch.strided
            and id(value) not in known
            and value.device.type == device.torch_device.type
        ]
        if found and sum(value.nbytes for value in found) <= devices.requested_bytes(device) - before:
            self._constants += found  # else some are of somebody else, and of before

    def publish(self, model: nn.Module) -> None:
        """Pack and publish `model`; it is bound to the arena afterwards."""
        if self._reason is not None:
            return
        try:
            if self._observation is None:
                raise NotShareableError(
                    f"source format {self._settings.source_format!r} loads in a way that cannot be watched"
                )
            with plain_tensors(), self._observation.paused():
                self._publish(model, self._observation)
        except CompanionError as error:
            self._reason = error
        except Exception as error:  # the model is loaded, so this is no reason to end the engine
            logger.debug("Publishing failed", exc_info=True)
            self._reason = NotShareableError(f"it could not be published: {type(error).__name__}: {error}")

    @collector_paused()
    def _publish(self, model: nn.Module, observation: Observation) -> None:
        self._decision.check_unchanged()
        if foreign := sources.other_checkpoints(model, self._model_config):
            raise NotShareableError(f"it takes weights from {', '.join(foreign)} too, which its key does not name")
        device = self._decision.device
        started = time.perf_counter()
        target = current().target() if self._decision.key.role == "draft" else None
        left = draft.left_to_target(self._vllm_config, model, target) if target is not None else []
        besides = [] if target is None else [target, *map(model.get_submodule, left)]
        with (
            draft.taken_out(model, left),
            ThreadPoolExecutor(1) as executor,
            quick_switches(),
            ProgressBar("Packing weights") as bar,
        ):
            tree = capture(model)
            packed = prepare(tree, device.stage, device.arena_kind, device.torch_device, observation)
            packed.manifest = replace(packed.manifest, sources=sources_to_bytes(sources_of(packed, observation)))
            if self.reading is not None:
                packed.manifest = replace(packed.manifest, files=self.reading.files())
            flags = self.flag_reads.flags(packed.manifest, self._vllm_config, self._model_config)
            packed.manifest = replace(packed.manifest, flags=flags)
            # While the device copies and the driver frees.
            search = executor.submit(self._search(model, tree, besides))
            manifest = executor.submit(manifest_to_bytes, packed.manifest)
            blocks = [chunk.size_bytes for chunk in packed.placement.chunks]
            layout = executor.submit(layout_digest, packed.manifest, device.arena_kind, blocks)

            def report(done: int, total: int) -> None:
                bar.update(done, total)
                if time.perf_counter() - started > REPORT_AFTER_S:
                    self.report("packing", done, total)

            arena = copy(
                packed,
                device.arena_kind,
                device.torch_device,
                rebind=self._settings.share == "readonly",
                release=_release(device.torch_device),
                keeper=partial(client.allocate, device.id, settings=self._settings),
                report=report,
                before_rebinding=lambda: _refuse(search.result()),
            )
            self._arena, self._manifest = arena, packed.manifest  # the model views it, published or not
            self._private = private_bytes(packed)
            self.published = published_addresses(packed)
        copied = time.perf_counter()
        tensor_count = len(packed.manifest.tensors)
        ways = processing.ways(live.module for live in tree.modules) if device.stage is Stage.PROCESSED else {}
        try:
            generation = self._publication.publish(
                arena.info, arena.fds, manifest.result(), tensor_count, ways, layout.result()
            )
        except OvertakenError:
            raise
        except CompanionError as error:  # which one depends on whether another companion answers already
            lease = self._decision.lease
            died = self.is_bound and lease.lost.wait(LOST_S) and isinstance(lease.error, CompanionUnavailableError)
            if not died:  # it refuses, or was told to forget the entry
                raise
            logger.info("%s It goes to the next companion.", error)
            generation = self._publication.generation
        self._held = Held(
            self._decision.key, generation, arena.info, arena.fds, manifest.result(), self._publication.published
        )
        logger.info(
            "Published weights of %s: %.2f GiB, %d tensors, generation %d; packed in %.3f s, handed over in %.3f s",
            self._decision.key.short_title,
            arena.info.size_bytes / 2**30,
            tensor_count,
            generation,
            copied - started,
            time.perf_counter() - copied,
        )

    def _search(self, model: nn.Module, tree: Tree, besides: Sequence[nn.Module]) -> Callable[[], list[str]]:
        """How to find tensors that the model uses and that are neither in `tree` nor in `besides`.

        Whether any is left over is known at once; what it is, and whether it belongs to the model
        or to everybody (workspaces), takes a search.
        """
        device = self._decision.device
        if device.stage is not Stage.PROCESSED:
            return list
        asked_for = devices.requested_bytes(device) - self._bytes_before
        left_over = asked_for - storage_bytes(tree, device.torch_device.type, besides=self._constants)
        logger.debug("%d bytes were asked for that are not in the module tree", left_over)
        if not left_over:
            return list
        known = Known.of(tree, *(capture(other) for other in besides))
        return partial(hidden_tensors, model, known, device.torch_device.type)

    def finish(self) -> None:
        """Account for a model that was loaded, published or not."""
        size_bytes = 0
        if self._arena is not None:
            size_bytes = self._arena.info.size_bytes
            if not self.is_bound:
                self._arena.close()
        if self._held is not None:
            key = self._decision.key
            why = f"it is a variant of its own: {key.variant}" if key.variant else ""
            published = Outcome("published", key.model, key.role, key.rank, why, size_bytes)
            current().record(published, device_id=self._decision.device.id, key_id=key.id)
            if self.is_bound and self._arena is not None and self._manifest is not None:
                device, lease = self._decision.device, self._decision.lease
                attachment = Attachment(device.id, device.torch_device, lease, self._held, self._arena, self._manifest)
                attachment.keep_private(self._private, self.processed.changed)
                attachment.fix(fixed_reason(device.stage, self.processed, self._settings))
                self._keep(attachment)
                self._decision.election.release()
            else:
                self._decision.close()
            return
        reason = self._reason or NotShareableError(
            f"source format {self._settings.source_format!r} loads in a way that cannot be shared on this device"
        )
        if not isinstance(reason, OvertakenError):  # others get it from who hands it back
            try:
                self._publication.decline(str(reason))
            except CompanionError as error:  # it may be what failed before; the model is loaded all the same
                logger.debug("The companion was not told: %s", error)
        self._decision.close()
        if not self._settings.fallback:
            raise reason
        current().not_shared(self._decision.key.model, self._decision.key.role, str(reason), reason.code)
        if self.is_bound and self._arena is not None and self._manifest is not None:
            self._keep_alone(self._arena, self._manifest)

    def _keep_alone(self, arena: arenas.Arena, manifest: Manifest) -> None:
        """The model views memory that was sealed for others: from now on it is this engine's own, which may write."""
        device, key = self._decision.device, self._decision.key
        if not arenas.KINDS[arena.info.kind].can_remap:
            return  # its own as it is
        held = Held(key, self._publication.generation, arena.info, arena.fds, b"", self._publication.published)
        attachment = Attachment(device.id, device.torch_device, self._decision.lease, held, arena, manifest)
        try:
            attachment.privatize(None)
        except ArenaError as error:
            logger.warning("%s stays as it is, and nothing can write to it: %s", attachment.label, error)
            return
        self._keep(attachment)


def _unwatched(error: Exception) -> NotShareableError:
    logger.debug("Watching failed", exc_info=True)
    return NotShareableError(f"its loading cannot be watched: {type(error).__name__}: {error}")


def _refuse(hidden: list[str]) -> None:
    if hidden:
        raise NotShareableError(
            f"{len(hidden)} tensors are kept where they cannot be restored, the first is {hidden[0]}"
        )


def _release(device: torch.device) -> Any:
    return torch.cuda.empty_cache if device.type == "cuda" else lambda: None


def _class_of(vllm_config: Any, model_config: Any) -> type[nn.Module] | None:
    """The class that will be built; None if it cannot be found now: vLLM says that when it builds."""
    try:
        return building.model_class(vllm_config, model_config)
    except Exception:
        logger.debug("The class of the model is not known before it is built", exc_info=True)
        return None


def _watched(
    publisher: _Publisher, after_processing: ExitStack
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A loader's `load_weights` that is watched, and publishes before post-processing where that is what is shared."""

    def wrap(inner: Callable[..., None]) -> Callable[..., None]:
        def load_weights(model: nn.Module, model_config: Any) -> None:
            publisher.begin(model, after_processing)
            with _counted(model, publisher):
                inner(model, model_config)
            publisher.loaded(model)
            if publisher._decision.device.stage is Stage.UNPROCESSED:
                publisher.publish(model)
                if publisher.is_bound:
                    privately = process_privately(model, publisher._settings, publisher.published, publisher._private)
                    publisher.processed = after_processing.enter_context(privately)

        return load_weights

    return wrap


def _counted(model: nn.Module, publisher: _Publisher) -> AbstractContextManager[None]:
    """While open, the bytes of checkpoint tensors are reported as the model takes them."""

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            return inner(_count(weights, publisher), *args, **kwargs)

        return load_weights

    return patches.MODELS_WEIGHTS.on(model, wrap) if hasattr(model, "load_weights") else nullcontext()


def _count(weights: Iterable[tuple[str, torch.Tensor]], publisher: _Publisher) -> Iterator[tuple[str, torch.Tensor]]:
    done = 0
    for name, tensor in weights:
        publisher.read(name, tensor)
        yield name, tensor
        done += tensor.nbytes
        publisher.report("loading", done, publisher.checkpoint_bytes)
