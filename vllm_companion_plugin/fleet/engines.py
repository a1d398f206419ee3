"""How an engine is told to take a step: by vLLM's routes, by the methods of an actor, or by those of an object.

What an engine has to have is vLLM's own; all that the companion adds is called through `collective_rpc`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

from vllm_companion_plugin.core.plans import Plan, read_answer
from vllm_companion_plugin.errors import CompanionError, SettingsError
from vllm_companion_plugin.fleet.course import Answer, Step
from vllm_companion_plugin.fleet.http import Http

NO_DEV_ROUTES = (
    "It has no route /{route}. Start it with VLLM_SERVER_DEV_MODE=1, on an address that only the trainer can reach."
)
RPCS = {
    Step.PREPARE: "companion_prepare",
    Step.SWITCH: "companion_switch",
    Step.BACK: "companion_back",
    Step.FORGET: "companion_forget",
}
DEAD = ("EngineDeadError", "RayActorError", "ActorDiedError", "ActorUnavailableError")
"""Names of what calls raise if the engine does not exist any more: vLLM's and Ray's, which need not be installed."""


class NotDone(Exception):
    """An engine has not done what it was told, as far as its caller knows."""

    def __init__(self, answer: Answer, why: str) -> None:
        super().__init__(why)
        self.answer = answer


class Engine(ABC):
    """An engine of a fleet.

    Attributes:
        name: for reports.
        is_local: its calls are carried out in the caller's thread, one after the other, and without a limit of time.
    """

    name: str
    is_local = False

    def prepare(self, generations: Mapping[str, int], timeout_s: float) -> list[dict[str, Plan]]:
        """The plans of each rank, by model and role. Raises `NotDone`."""
        try:
            plans = self._tell_ranks(Step.PREPARE, {"generations": dict(generations)}, timeout_s)
        except NotDone as error:
            if RPCS[Step.PREPARE] in str(error):  # workers get the method with their first model
                raise NotDone(error.answer, f"{error}; was it started with --load-format companion?") from error
            raise
        if not all(plans):
            raise NotDone(Answer.REFUSED, "a rank of it has prepared nothing")
        return plans

    def tell(self, step: Step, timeout_s: float) -> None:
        """Have the ranks take a step that is theirs alone. Raises `NotDone`."""
        self._tell_ranks(step, {}, timeout_s)

    @abstractmethod
    def pause(self, timeout_s: float, *, clear_caches: bool) -> None:
        """Let no step run, and requests stay. Raises `NotDone`; it may be paused nevertheless.

        Args:
            clear_caches: of prefixes, of encoders, and of connectors. Running requests compute theirs again.
        """

    @abstractmethod
    def resume(self, timeout_s: float) -> None:
        """Let steps run again. Raises `NotDone`."""

    @abstractmethod
    def label(self, version: str, timeout_s: float) -> None:
        """Let outputs say that they come from these weights; vLLM before 0.27 cannot, and nothing happens.

        Raises `NotDone`.
        """

    @abstractmethod
    def _rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> object:
        """What `collective_rpc` returns: an answer for each rank. Raises `NotDone`."""

    @functools.cached_property
    def _token(self) -> str:
        """Tells our steps from those of others who have the same engine switch."""
        return secrets.token_hex(8)

    def _tell_ranks(self, step: Step, kwargs: dict[str, Any], timeout_s: float) -> list[dict[str, Plan]]:
        answers = self._rpc(RPCS[step], {"token": self._token, **kwargs}, timeout_s)
        try:
            if not isinstance(answers, list) or not answers:
                raise NotDone(Answer.REFUSED, f"collective_rpc returned {str(answers)[:200]!r}")
            return [read_answer(answer) for answer in answers]
        except CompanionError as error:
            raise NotDone(Answer.REFUSED, str(error)) from error


class HttpEngine(Engine):
    """An engine behind `vllm serve`, with the routes that VLLM_SERVER_DEV_MODE=1 adds."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._http = Http(self.name)

    def _rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> object:
        answer = self._post("collective_rpc", timeout_s, body={"method": method, "kwargs": kwargs})
        return answer.get("results") if isinstance(answer, dict) else answer

    def pause(self, timeout_s: float, *, clear_caches: bool) -> None:
        self._post(f"pause?mode=keep&clear_cache={str(clear_caches).lower()}", timeout_s)
        if clear_caches:
            # vLLM 0.26 pauses as well if a connector has kept its cache.
            answer = self._post("reset_prefix_cache?reset_running_requests=true&reset_external=true", timeout_s)
            _check_reset(isinstance(answer, dict) and answer.get("success") is True)

    def resume(self, timeout_s: float) -> None:
        self._post("resume", timeout_s)

    def label(self, version: str, timeout_s: float) -> None:
        self._post("update_weight_version", timeout_s, body={"new_version": version}, optional=True)

    def _post(self, route: str, timeout_s: float, *, body: object = None, optional: bool = False) -> object:
        try:
            status, answer = self._http.ask("POST", f"/{route}", timeout_s, body)
        except TimeoutError as error:
            raise NotDone(Answer.SILENT, f"no answer to /{route} within {timeout_s:g} s") from error
        except OSError as error:
            # The request may have arrived, if somebody still listens.
            answer_kind = Answer.SILENT if self._lives() else Answer.GONE
            raise NotDone(answer_kind, f"/{route}: {error or type(error).__name__}") from error
        if status == 200 or (optional and status == 404):
            return answer
        if not self._lives():
            raise NotDone(Answer.GONE, f"/{route}: {_text(answer)}")
        if status == 404:
            raise NotDone(Answer.REFUSED, NO_DEV_ROUTES.format(route=route.partition("?")[0]))
        raise NotDone(Answer.REFUSED, f"/{route}: {_text(answer)}")

    def _lives(self) -> bool:
        try:
            return self._http.ask("GET", "/health", 5.0)[0] == 200
        except TimeoutError:
            return True
        except OSError:
            return False


class ObjectEngine(Engine):
    """An engine with the methods of vLLM's `LLM` or `AsyncLLM`: one of these, a subclass, or a Ray actor of one.

    Args:
        loop: in which coroutines of the engine run, and not the one that waits here; None: there is none.
    """

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        if not hasattr(engine, "collective_rpc"):
            raise SettingsError(
                f"{engine!r} is no engine: it has no collective_rpc.",
                remedy="Name the URL of a `vllm serve`, an LLM or AsyncLLM of vLLM, or a Ray actor of one.",
            )
        self._engine, self._loop = engine, loop
        self.name = _name_of(engine)
        method = engine.collective_rpc
        self._is_asynchronous = inspect.iscoroutinefunction(method)
        if self._is_asynchronous and loop is None:
            raise SettingsError(f"{self.name} is asynchronous.", remedy="Await `advance_async` in its event loop.")
        self.is_local = not self._is_asynchronous and not hasattr(method, "remote")

    def _rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> object:
        # A time limit of vLLM's would leave the late answers in its queues, for the next call.
        return self._call("collective_rpc", timeout_s, method, kwargs=kwargs)

    def pause(self, timeout_s: float, *, clear_caches: bool) -> None:
        if self._has("pause_generation"):
            self._call("pause_generation", timeout_s, mode="keep", clear_cache=clear_caches)
            resets = ["reset_prefix_cache"]
        else:  # an LLM, which clears nothing at level 0
            self._call("sleep", timeout_s, level=0, mode="keep")
            resets = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
        if clear_caches:
            for name in resets:
                arguments = (True, True) if name == "reset_prefix_cache" else ()
                answer = self._call(name, timeout_s, *arguments)
                _check_reset(answer is not False)

    def resume(self, timeout_s: float) -> None:
        if self._has("resume_generation"):
            self._call("resume_generation", timeout_s)
        else:
            self._call("wake_up", timeout_s, tags=["scheduling"])

    def label(self, version: str, timeout_s: float) -> None:
        if self._has("update_weight_version"):
            self._call("update_weight_version", timeout_s, version)

    def _has(self, name: str) -> bool:
        return hasattr(self._engine, name)

    def _method(self, name: str) -> Callable[..., Any]:
        found = getattr(self._engine, name, None)
        if found is None:  # an LLM resets its encoder's cache through the engine in it
            found = getattr(getattr(self._engine, "llm_engine", None), name, None)
        if found is None:
            raise NotDone(Answer.REFUSED, f"it has no method {name}; give it one, or let caches be kept")
        return found  # type: ignore[no-any-return]

    def _call(self, name: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        method = self._method(name)
        try:
            if (remote := getattr(method, "remote", None)) is not None:
                return remote(*args, **kwargs).future().result(timeout_s)
            answer = method(*args, **kwargs)
            if inspect.iscoroutine(answer):
                assert self._loop is not None
                return asyncio.run_coroutine_threadsafe(answer, self._loop).result(timeout_s)
            return answer
        except (TimeoutError, futures.TimeoutError) as error:
            raise NotDone(Answer.SILENT, f"no answer to {name} within {timeout_s:g} s") from error
        except Exception as error:
            is_dead = any(base.__name__ in DEAD for base in type(error).__mro__)
            why = f"{name}: {_text(str(error) or type(error).__name__)}"
            raise NotDone(Answer.GONE if is_dead else Answer.REFUSED, why) from error


def engine_of(named: Any, loop: asyncio.AbstractEventLoop | None) -> Engine:
    """An engine by its URL, or by an object. Raises `SettingsError` if it is neither."""
    if isinstance(named, Engine):
        return named
    return HttpEngine(named) if isinstance(named, str) else ObjectEngine(named, loop)


def _check_reset(is_reset: bool) -> None:
    if not is_reset:
        raise NotDone(Answer.REFUSED, "its prefix cache was not reset: a request or a transfer still uses it")


def _name_of(engine: Any) -> str:
    text = repr(engine)
    return text if len(text) <= 80 else f"{type(engine).__name__} at {id(engine):#x}"


def _text(answer: object) -> str:
    """What a server said, in a line."""
    match answer:
        case {"error": {"message": str(text)}} | {"error": str(text)} | {"detail": str(text)}:
            return text
    return " ".join(str(answer).split())[:500]
