"""What vLLM's front ends do with a request whose adapter a companion holds.

The path `companion:NAME` of its `LoRARequest` becomes that of one generation, before vLLM makes anything of it. The
engine is given that generation first, so that one which it cannot serve is an error of this request: what fails in a
worker in the middle of a step ends the engine.

Every process of vLLM imports this, so what talks to companions is imported with the first such request.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.engine.vllm import naming, patches
from vllm_companion_plugin.errors import CompanionError, EntryNotFoundError
from vllm_companion_plugin.settings import Settings, resolve, resolve_extra_config

if TYPE_CHECKING:
    from vllm_companion_plugin.engine.adapters import FrontEnd, Served

_AFTER_PARAMS = 1
"""The place of `lora_request` among the arguments of `add_request` behind request id, prompt and parameters."""

_front_ends: weakref.WeakKeyDictionary[Any, FrontEnd] = weakref.WeakKeyDictionary()
_served: weakref.WeakValueDictionary[str, Served] = weakref.WeakValueDictionary()
"""By the path that their requests have."""
_unfinished: weakref.WeakKeyDictionary[Any, Served] = weakref.WeakKeyDictionary()
"""By what vLLM keeps of a request until it is finished."""


def bind_requests_of_servers() -> None:
    """Of `vllm.v1.engine.async_llm`, which has just been imported."""
    patches.REQUESTS_OF_SERVERS.apply(_binding_async)
    patches.ADAPTERS_OF_SERVERS.apply(_adding_async)


def bind_requests() -> None:
    """Of `vllm.v1.engine.llm_engine`, which has just been imported."""
    patches.REQUESTS.apply(_binding)
    patches.ADAPTERS.apply(_adding)


def keep_while_unfinished() -> None:
    """Of `vllm.v1.engine.output_processor`, which has just been imported."""
    patches.UNFINISHED.apply(_keeping)


def front_end_of(engine: Any) -> FrontEnd:
    """What an engine (`AsyncLLM` or `LLMEngine`) knows of adapters."""
    from vllm_companion_plugin.engine.adapters import FrontEnd

    if engine not in _front_ends:
        _front_ends[engine] = FrontEnd(settings_of(engine.vllm_config))
    return _front_ends[engine]


def settings_of(vllm_config: Any) -> Settings:
    """Of an engine; without the load format, those of the environment."""
    load_config = vllm_config.load_config
    if load_config.load_format == naming.LOAD_FORMAT:
        return resolve_extra_config(load_config.model_loader_extra_config)
    return resolve()


async def serve_async(engine: Any, path: str) -> Served:
    """The generation of an adapter that a request which comes now is bound to; the engine has it.

    Raises:
        AdapterNotFoundError: no companion has it.
        AdapterRefusedError: this engine cannot serve it; why is said.
        CompanionError: a companion does not answer.
    """
    front = front_end_of(engine)
    served = await _found_async(engine, front, path)
    while not front.is_sent(served):
        try:
            with _refusing_misfit(served):
                await asyncio.to_thread(_check_legal, engine.vllm_config.lora_config, served)
                await engine.engine_core.add_lora_async(_bound_request(_blank(served), served))
        except CompanionError:
            before, served = served, await _found_async(engine, front, path)
            if served is before:  # else workers did not find what has gone meanwhile, of which we may not be told yet
                raise
        else:
            await _forget_async(engine, front.sent(served))
    return served


async def _found_async(engine: Any, front: FrontEnd, path: str) -> Served:
    found: list[Served] = []  # not the thread's result: asyncio's futures keep that until a collection finds them
    with _refusing():
        asked = adapters.asked_by(path)
        try:
            await asyncio.to_thread(lambda: found.append(front.serve(asked)))
        except EntryNotFoundError:
            await _forget_async(engine, front.removed(asked))
            raise
    return found.pop()


def serve(engine: Any, path: str) -> Served:
    """As `serve_async`, of an engine without an event loop."""
    front = front_end_of(engine)
    served = _found(engine, front, path)
    while not front.is_sent(served):
        try:
            with _refusing_misfit(served):
                _check_legal(engine.vllm_config.lora_config, served)
                engine.engine_core.add_lora(_bound_request(_blank(served), served))
        except CompanionError:
            before, served = served, _found(engine, front, path)
            if served is before:
                raise
        else:
            _forget(engine, front.sent(served))
    return served


def _found(engine: Any, front: FrontEnd, path: str) -> Served:
    with _refusing():
        asked = adapters.asked_by(path)
        try:
            return front.serve(asked)
        except EntryNotFoundError:
            _forget(engine, front.removed(asked))
            raise


def _forget(engine: Any, numbers: list[int]) -> None:
    for number in numbers:
        engine.engine_core.remove_lora(number)


def _check_legal(lora_config: Any, served: Served) -> None:
    """Have vLLM check the configuration here: a worker that refuses it writes a page into the log each time."""
    from vllm.lora.peft_helper import PEFTHelper

    if lora_config is None:  # which the engine says itself
        return
    with contextlib.suppress(CompanionError):  # then the workers alone check it
        config = served.config()
        PEFTHelper.from_dict(config).validate_legal(lora_config)


async def _forget_async(engine: Any, numbers: list[int]) -> None:
    for number in numbers:
        await engine.engine_core.remove_lora_async(number)


@contextmanager
def _refusing() -> Iterator[None]:
    from vllm_companion_plugin.engine.vllm.adapters.refusals import refusal_of

    try:
        yield
    except CompanionError as error:
        raise refusal_of(error) from error


@contextmanager
def _refusing_misfit(served: Served) -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    from vllm_companion_plugin.engine.vllm.adapters.refusals import AdapterRefusedError

    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:  # a worker's, by whatever way vLLM hands it on
        raise AdapterRefusedError(f"This engine cannot serve {served.bound}: {str(error) or repr(error)}") from error


def _blank(served: Served) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(served.bound.label, served.number, served.bound.path)


def _bound_request(request: Any, served: Served) -> Any:
    """A copy of a `LoRARequest` that names one generation."""
    bound = copy.copy(request)
    bound.lora_name = served.bound.label
    bound.lora_int_id = served.number
    bound.lora_path = served.bound.path
    bound.load_inplace = False  # it would be loaded in every step
    return bound


def _path_of(request: Any) -> str:
    """The path of an adapter that a companion holds; empty if there is none."""
    path = request.lora_path if request is not None else ""
    return path if adapters.is_path(path) else ""


class _Asking:
    """The `LoRARequest` among the arguments of `add_request`, wherever it is: older vLLM has it in the prompt, too."""

    def __init__(self, prompt: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._prompt, self._rest, self._named = prompt, rest, named
        given = rest[_AFTER_PARAMS] if len(rest) > _AFTER_PARAMS else named.get("lora_request")
        self._inner = getattr(prompt, "lora_request", None)
        self.request = given if self._inner is None else self._inner
        self.path = _path_of(self.request)

    def bound_to(self, served: Served) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The same arguments, with one generation."""
        _served[served.bound.path] = served
        bound = _bound_request(self.request, served)
        prompt, rest, named = self._prompt, list(self._rest), dict(self._named)
        if self._inner is not None:
            prompt = copy.copy(prompt)
            prompt.lora_request = bound
        if len(rest) > _AFTER_PARAMS:
            rest[_AFTER_PARAMS] = bound
        else:
            named["lora_request"] = bound
        return prompt, tuple(rest), named


def _binding_async(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    async def add_request(self: Any, request_id: Any, prompt: Any, params: Any, *rest: Any, **named: Any) -> Any:
        asking = _Asking(prompt, rest, named)
        if not asking.path:
            return await inner(self, request_id, prompt, params, *rest, **named)
        served = await serve_async(self, asking.path)  # kept until vLLM knows the request
        prompt, rest, named = asking.bound_to(served)
        return await inner(self, request_id, prompt, params, *rest, **named)

    return add_request


def _binding(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def add_request(self: Any, request_id: Any, prompt: Any, params: Any, *rest: Any, **named: Any) -> Any:
        asking = _Asking(prompt, rest, named)
        if not asking.path:
            return inner(self, request_id, prompt, params, *rest, **named)
        served = serve(self, asking.path)
        prompt, rest, named = asking.bound_to(served)
        return inner(self, request_id, prompt, params, *rest, **named)

    return add_request


def _adding_async(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    async def add_lora(self: Any, lora_request: Any) -> Any:
        if not _path_of(lora_request):
            return await inner(self, lora_request)
        await serve_async(self, lora_request.lora_path)
        return True

    return add_lora


def _adding(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def add_lora(self: Any, lora_request: Any) -> Any:
        if not _path_of(lora_request):
            return inner(self, lora_request)
        serve(self, lora_request.lora_path)
        return True

    return add_lora


def _keeping(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def add_request(self: Any, request: Any, *rest: Any, **named: Any) -> Any:
        result = inner(self, request, *rest, **named)
        path = _path_of(getattr(request, "lora_request", None))
        served, state = _served.get(path), self.request_states.get(request.request_id)
        if served is not None and state is not None:
            _unfinished[state] = served
        return result

    return add_request
