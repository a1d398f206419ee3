"""Where vLLM falls asleep and wakes (adr/0014): its allocator on a GPU, where all ways lead; its worker on a CPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_companion_plugin.engine import live
from vllm_companion_plugin.engine.session import client_name, current
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.imports import when_imported
from vllm_companion_plugin.errors import CompanionUnavailableError, LeaseLostError, TicketError

logger = init_logger("vllm.companion")

WEIGHTS = "weights"
"""vLLM's name of the memory in which models are loaded."""


def let_sleep(device: torch.device) -> None:
    """From now on what this process maps sleeps and wakes with vLLM. Idempotent.

    vLLM's allocator is asked at every level, by every framework, and also without `--enable-sleep-mode`.
    """
    if device.type == "cuda":
        _let_the_allocator()
        patches.SLEEP_OF_WORKER.apply(_sleep_of_worker)
        patches.WAKE_OF_WORKER.apply(_wake_of_worker)
    elif "vllm.v1.worker.cpu_worker" in sys.modules:
        patches.SLEEP_OF_CPU_WORKER.apply(_sleep_of_cpu_worker)
        patches.WAKE_OF_CPU_WORKER.apply(_wake_of_cpu_worker)


@functools.cache
def _let_the_allocator() -> None:
    """Patch vLLM's allocator as soon as it is imported.

    It is not imported for that: the import takes 16 ms of an attach, and without sleep mode vLLM does it when it falls
    asleep for the first time.
    """

    def patch(_: ModuleType) -> None:
        patches.SLEEP.apply(_sleep)
        patches.WAKE.apply(_wake)

    when_imported("vllm.device_allocator.cumem", patch)


def _sleep(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def sleep(self: Any, offload_tags: Sequence[str] | str | None = None) -> None:
        models = current().models()
        if not models:
            inner(self, offload_tags)
            return
        tags = (self.default_tag,) if offload_tags is None else offload_tags
        kept = (tags,) if isinstance(tags, str) else tuple(tags)
        level = 1 if WEIGHTS in kept else 2
        current().forget_switch()  # which keeps memory
        with live.falling_asleep(models, level, client_name()) as asleep:
            # What is left in vLLM's memory for weights is this engine's own: buffers, scales, work space. At level 2
            # vLLM would bring back those that are buffers, and nothing else.
            inner(self, (*kept, WEIGHTS) if asleep and level == 2 else offload_tags)

    return sleep


def _wake(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def wake_up(self: Any, tags: Sequence[str] | None = None) -> None:
        models = [model for model in current().models() if model.attachment.asleep]
        if not models or not (tags is None or WEIGHTS in tags):
            inner(self, tags)
            return
        device = models[0].attachment.device
        own = _asleep_bytes(self, tags)
        live.check_room(own, _free_bytes(device), "vLLM's own memory")
        awake = _wake_models(models)
        try:
            live.check_room(own, _free_bytes(device), f"vLLM's own memory, beside {awake[0].attachment.label},")
            inner(self, tags)
        except BaseException:
            live.sleep_again(awake, client_name())
            raise
        live.renew_stale(awake)

    return wake_up


def _sleep_of_worker(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def sleep(self: Any, *args: Any, **kwargs: Any) -> None:
        engine = live.engine_of(self.vllm_config)
        try:
            with current().acting(engine):
                inner(self, *args, **kwargs)
        except AssertionError as error:
            # vLLM measures the whole device, at the end. Others may have taken memory meanwhile, and the engine would
            # be taken for awake.
            if not any(model.attachment.asleep for model in current().models(engine)):
                raise
            logger.debug("The engine sleeps, whatever others do on the device: %s", error)

    return sleep


def _wake_of_worker(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = live.engine_of(self.vllm_config)
        with current().acting(engine):
            result = inner(self, *args, **kwargs)
        if hasattr(self.model_runner, "post_kv_cache_wake_up"):
            live.renew([model for model in current().models(engine) if not model.attachment.is_private])
        return result

    return wake_up


def _asleep_bytes(allocator: Any, tags: Sequence[str] | None) -> int:
    """What the allocator will map for `tags`."""
    deferrable = getattr(sys.modules[type(allocator).__module__], "DEFERRABLE_TAGS", None)
    sizes = 0
    for data in allocator.pointer_to_data.values():
        wanted = tags is None or data.tag in tags or (deferrable is not None and data.tag not in deferrable)
        if wanted and getattr(data, "is_asleep", False):
            sizes += data.handle[1]
    return sizes


def _free_bytes(device: torch.device) -> int:
    # What torch keeps for itself vLLM gives back before it maps.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + kept


def _wake_models(models: list[live.LiveModel]) -> list[live.LiveModel]:
    """As `live.wake`; what ends with a companion is asked for once more."""
    session = current()
    try:
        return live.wake(models, session.connection, client_name())
    except (CompanionUnavailableError, LeaseLostError, TicketError) as error:
        logger.info("The companion went away (%s); asking again.", error)
        for device_id, settings in {model.attachment.device_id: model.settings for model in models}.items():
            session.drop_connection(device_id)
            session.connection(device_id, settings, ask=True)
        return live.wake(models, session.connection, client_name())


def _sleep_of_cpu_worker(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def sleep(self: Any, level: int = 1) -> None:
        if level:
            current().forget_switch()  # which keeps memory
        models = current().models(live.engine_of(self.vllm_config)) if level else []
        with live.falling_asleep(models, level, client_name()) as asleep:
            if not asleep:  # vLLM says that it does nothing
                inner(self, level)

    return sleep


def _wake_of_cpu_worker(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def wake_up(self: Any, tags: Sequence[str] | None = None) -> None:
        wanted = current().models(live.engine_of(self.vllm_config)) if tags is None or WEIGHTS in tags else []
        awake = _wake_models(wanted)
        if not awake:
            inner(self, tags)
        live.renew_stale(awake)

    return wake_up
