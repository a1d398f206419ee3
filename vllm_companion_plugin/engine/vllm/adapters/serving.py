"""Over HTTP, an adapter that a companion holds is a model of its name.

vLLM looks up the name of each request's model before anything else, so an adapter that this engine cannot serve is an
answer with a status here, also where what follows would be streamed. What vLLM knows by a name itself, it answers with:
an adapter of that name is never asked for here, which the log says.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.engine.vllm import naming, patches
from vllm_companion_plugin.engine.vllm.adapters import requests
from vllm_companion_plugin.errors import BadRequestError, CompanionError

if TYPE_CHECKING:
    from vllm_companion_plugin.engine.adapters import FrontEnd

logger = logging.getLogger("vllm.companion.adapters")

LOOK_S = 60.0
"""How often a name that vLLM knows itself is looked for among adapters, at most."""
_NUMBER = (1 << 31) - 1
"""Of a `LoRARequest` that names no generation: each request of it has another one."""
_next_look: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()
"""When, by the engine and by such a name."""


def name_adapters() -> None:
    """Of `vllm.entrypoints.serve.engine.serving`, which has just been imported."""
    patches.NAMES_OF_MODELS.apply(_checking)
    if hasattr(patches.KINDS_OF_MESSAGES.find_owner(), patches.KINDS_OF_MESSAGES.attribute):
        patches.KINDS_OF_MESSAGES.apply(_without_ours)


def name_pooling_adapters() -> None:
    """Of `vllm.entrypoints.pooling.base.serving`, which has just been imported."""
    patches.NAMES_OF_POOLING_MODELS.apply(_checking)


def _checking(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    async def _check_model(self: Any, request: Any) -> Any:
        await _look_up(self.models, request.model)
        return await inner(self, request)

    return _check_model


def _without_ours(inner: Callable[..., set[str]]) -> Callable[..., set[str]]:
    @functools.wraps(inner)
    def _get_message_types(self: Any, request: Any) -> set[str]:
        known = self.models.lora_requests
        ours = {name for name, each in known.items() if adapters.is_path(each.lora_path)}
        return inner(self, request) - ours

    return _get_message_types


async def _look_up(models: Any, name: str | None) -> None:
    """Have vLLM know an adapter by its name if a companion has it. Names of other models are left to vLLM.

    Raises:
        AdapterRefusedError: this engine cannot serve it.
        AdapterNotFoundError: it was served before, and no companion has it any more.
        CompanionError: a companion does not answer.
    """
    engine = getattr(models, "engine_client", None)
    config = getattr(engine, "vllm_config", None)
    if not name or config is None or config.lora_config is None:
        return
    from vllm_companion_plugin.engine.vllm.adapters.refusals import AdapterNotFoundError

    is_ours = config.load_config.load_format == naming.LOAD_FORMAT
    known = models.lora_requests.get(name)
    if models.is_base_model(name) or (known is not None and not adapters.is_path(known.lora_path)):
        if is_ours:
            _look_behind(engine, name)
    elif known is None:
        if is_ours and _is_name(name):
            with suppress(AdapterNotFoundError):  # vLLM says that it has no such model
                models.lora_requests[name] = await _served_request(engine, name)
    else:
        try:
            await requests.serve_async(engine, known.lora_path)
        except AdapterNotFoundError:
            models.lora_requests.pop(name, None)
            raise


def _look_behind(engine: Any, name: str) -> None:
    """Have the log say it if a companion has an adapter of this name. The request that came does not wait for that."""
    next_look, now = _next_look.setdefault(engine, {}), time.monotonic()
    if next_look.get(name, now) <= now:
        next_look[name] = now + LOOK_S
        asyncio.get_running_loop().run_in_executor(None, _tell_if_held, requests.front_end_of(engine), name)


def _tell_if_held(front: FrontEnd, name: str) -> None:
    with suppress(CompanionError):
        if front.is_held(name):
            logger.warning(
                "Requests of %s are answered with what this server has by that name, and not with the adapter %s "
                "that a companion holds. Publish it under another name.",
                *(name, name),
            )


async def _served_request(engine: Any, name: str) -> Any:
    """What vLLM keeps for all requests of an adapter. Raises as `requests.serve_async`."""
    from vllm.lora.request import LoRARequest

    path = f"{adapters.SCHEME}{name}"
    await requests.serve_async(engine, path)
    return LoRARequest(name, _NUMBER, path)


def _is_name(name: str) -> bool:
    try:
        adapters.check_name(name)
    except BadRequestError:
        return False
    return True
