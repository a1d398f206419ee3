"""Where vLLM and the frameworks around it write to the weights of a living model (adr/0014)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine import live
from vllm_companion_plugin.engine.attach import process_privately
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import ArenaError

logger = init_logger("vllm.companion")


def let_write(model: nn.Module) -> None:
    """From now on loading into `model`, or a part of it, bound to a companion's memory, has all of the engine's weights
    made private first. Idempotent.

    What reloads weights without others to write renews the model instead.
    """
    for name in ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker"):
        if name in sys.modules:
            patches.RELOAD.apply(_reload)
            break
    wrap = functools.partial(_load_weights, current().engine_of(model))
    for part in _parts_of(model):
        if "load_weights" not in vars(part) and hasattr(type(part), "load_weights"):
            patches.LIVE_WEIGHTS.on_for_good(part, wrap)


def _parts_of(model: nn.Module) -> list[nn.Module]:
    """The model, and all modules in it that have modules themselves: what somebody may load into besides the model."""
    found, seen = [model], {model}
    for part in found:
        inside = {each for each in part._modules.values() if each is not None and each._modules} - seen
        seen |= inside
        found += inside
    return found


def _load_weights(engine: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        about_to_write("load_weights", engine)
        return inner(*args, **kwargs)

    return load_weights


def about_to_write(by: str, engine: Any = None) -> None:
    """Make all that an engine maps its own, before it is written to.

    Args:
        engine: as `live.engine_of` says; None: whichever, so all that this process maps.

    Raises:
        ArenaError: one of its models sleeps, so there is no memory to write to; or as `live.privatize`.
        SharedWeightsError: `on_write` says so.
    """
    models = current().models(engine)
    for model in models:
        if model.attachment.asleep:
            raise ArenaError(
                f"{by} cannot write to weights of {model.attachment.label}: they sleep, and there is no memory at "
                "their addresses.",
                remedy="Wake the engine first, at least its weights: wake_up(tags=['weights']).",
            )
    for model in models:
        if model.attachment.is_private:
            continue
        live.privatize(model, current().known_connection(model.attachment.device_id), by, _free_bytes)


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _processed_as_before(model: nn.Module, models: list[live.LiveModel]) -> AbstractContextManager[object]:
    """While open, vLLM processes what it reloads as it was processed when it was shared, so that it has that form."""
    if any(each.attachment.manifest.stage is Stage.UNPROCESSED for each in models):
        return process_privately(model, models[0].settings)
    return nullcontext()


def _reload(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        engine = live.engine_of(self.vllm_config)
        models = current().shared_models(engine)
        # What an engine has written to memory of its own, only vLLM knows how to undo.
        is_private = any(model.attachment.is_private for model in models)
        others = args or kwargs.get("weights_iterator") is not None or kwargs.get("weights_path") is not None
        if others or is_private or not models:
            about_to_write("reload_weights", engine)
            # Also what nobody else was ever given is processed as it was bound.
            with _processed_as_before(self.model_runner.model, current().models(engine)):
                inner(self, *args, **kwargs)
            return
        live.renew(models)
        for name in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
            if (reset := getattr(self.model_runner, name, None)) is not None:
                reset()

    return reload_weights
