"""Engines that a fleet is made of, each with a fault of its own: servers, actors, and objects of this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.place import until
from vllm_companion_plugin.core.plans import Plan, done_answer, error_answer, plans_answer
from vllm_companion_plugin.errors import FleetError, LayoutError, SettingsError
from vllm_companion_plugin.fleet import FleetReport, advance, advance_async

TITLE = "org/model (target)"
PLAN = Plan(generation=7, version="step-7", before=6, version_before="step-6")


class Rollout:
    """An engine with two ranks and the methods of an `LLM`: it notes what it is told, and fails where a test wants it.

    Args:
        faults: by the name of a call: what it raises, or what it answers in place of the truth.
    """

    def __init__(self, plan: Plan = PLAN, title: str = TITLE, **faults: Any) -> None:
        self.plan, self.title, self.faults, self.told = plan, title, faults, list[str]()
        self.is_paused = False
        self.label = ""

    def __repr__(self) -> str:
        return "rollout"

    def _do(self, name: str, answer: Any = None) -> Any:
        self.told.append(name)
        fault = self.faults.get(name, answer)
        if isinstance(fault, BaseException):
            raise fault
        return fault

    def collective_rpc(self, method: str, timeout: float | None = None, kwargs: Any = None) -> Any:
        assert timeout is None
        truth = plans_answer({self.title: self.plan}) if method == "companion_prepare" else done_answer()
        return self._do(method.removeprefix("companion_"), [truth, truth])

    def sleep(self, level: int, mode: str) -> None:
        assert (level, mode) == (0, "keep")
        self.is_paused = True
        self._do("pause")

    def wake_up(self, tags: list[str]) -> None:
        assert tags == ["scheduling"]
        self._do("resume")
        self.is_paused = False

    def reset_prefix_cache(self, reset_running_requests: bool, reset_connector: bool) -> Any:
        assert reset_running_requests
        assert reset_connector
        return self._do("reset_prefix_cache", True)

    def reset_mm_cache(self) -> None:
        self._do("reset_mm_cache")

    def reset_encoder_cache(self) -> None:
        self._do("reset_encoder_cache")

    def update_weight_version(self, version: str) -> None:
        self.label = version
        self._do("label")


RESETS = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]


def failed(*engines: Any, **options: Any) -> FleetReport:
    with pytest.raises(FleetError) as caught:
        advance(list(engines), **options)
    report = caught.value.report
    assert isinstance(report, FleetReport)
    assert str(report) in str(caught.value)
    return report


class TestObjects:
    """Engines of this process."""

    def test_all(self) -> None:
        """All steps are taken, and the report says what each has."""
        fleet = [Rollout(), Rollout()]
        report = advance(fleet)
        for engine in fleet:
            assert engine.told == ["prepare", "pause", *RESETS, "switch", "label", "resume", "forget"]
            assert (engine.label, engine.is_paused) == ("step-7", False)
        assert report.has_advanced
        assert report.is_uniform
        assert [(e.version, e.generations) for e in report.engines] == [("step-7", {TITLE: 7})] * 2
        assert str(report.engines[0]).startswith("rollout has step-7 (generation 7), after a pause of ")

    def test_checkpoint(self) -> None:
        """Weights of a checkpoint have vLLM's own name for them."""
        engine = Rollout(Plan(1, "", 6, "step-6"))
        assert str(advance([engine]).engines[0]).startswith("rollout has the checkpoint (generation 1)")
        assert engine.label == "default"

    def test_caches_kept(self) -> None:
        """Nothing is reset that the caller wants to keep."""
        engine = Rollout()
        advance([engine], clear_caches=False)
        assert engine.told == ["prepare", "pause", "switch", "label", "resume", "forget"]

    def test_without_labels(self) -> None:
        """vLLM 0.26 has no weight version."""

        class Old(Rollout):
            @property
            def update_weight_version(self) -> Any:  # type: ignore[override]
                raise AttributeError

        engine = Old()
        assert advance([engine]).has_advanced
        assert "label" not in engine.told

    def test_refused(self) -> None:
        """A rank that cannot prepare: nobody is paused, and the text of its error arrives."""
        error = error_answer(LayoutError("its kernels use other copies"))
        good, bad = Rollout(), Rollout(prepare=[plans_answer({TITLE: PLAN}), error])
        report = failed(good, bad)
        assert [e.state for e in report.engines] == ["old", "old"]
        assert report.engines[0].version == "step-6"
        assert "its kernels use other copies" in report.engines[1].failures[0]
        assert good.told == bad.told == ["prepare", "forget"]

    def test_another_version(self) -> None:
        """A trainer has written the next weights between the answers of two engines: nobody switches."""
        good, late = Rollout(), Rollout(Plan(8, "step-8", 6, "step-6"))
        report = failed(good, late)
        assert report.is_uniform
        assert "it would have step-8 of org/model (target), and rollout step-7" in report.engines[1].failures
        assert "switch" not in good.told + late.told

    def test_cache_in_use(self) -> None:
        """A cache that cannot be reset would answer for the new weights: nobody switches, and nobody stays paused."""
        good, busy = Rollout(), Rollout(reset_prefix_cache=False)
        report = failed(good, busy)
        assert "its prefix cache was not reset" in report.engines[1].failures[0]
        assert not good.is_paused
        assert not busy.is_paused
        assert "switch" not in good.told + busy.told

    def test_torn(self) -> None:
        """A rank does not switch: all ranks of all engines go back."""
        error = [done_answer(), error_answer(LayoutError("no"))]
        good, bad = Rollout(), Rollout(switch=error)
        report = failed(good, bad)
        assert report.is_uniform
        assert [e.version for e in report.engines] == ["step-6", "step-6"]
        for engine in (good, bad):
            assert engine.told[-4:] == ["switch", "back", "resume", "forget"]
            assert not engine.is_paused
            assert engine.label == ""

    def test_stays_torn(self) -> None:
        """An engine that does not come back, either, is named, and has weights that nobody knows."""
        error = [error_answer(LayoutError("no"))] * 2
        report = failed(Rollout(), Rollout(switch=error, back=error))
        assert [e.state for e in report.engines] == ["old", "unknown"]
        assert not report.is_uniform

    def test_dead(self) -> None:
        """vLLM's own error says that an engine has died; the others have the new weights."""
        died = type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue.")
        good, dead = Rollout(), Rollout(switch=died, resume=died)
        report = failed(good, dead)
        assert [e.state for e in report.engines] == ["new", "gone"]
        assert str(report.engines[1]).startswith("rollout is gone, or cannot be reached, and may be paused: it could")
        assert report.is_uniform
        assert good.label == "step-7"
        assert dead.told[-4:] == ["switch", *["resume"] * 3]

    def test_out_of_reach(self) -> None:
        """One that seemed to have died in the pause and lives answers requests again, and the report says with what."""
        away = type("ActorUnavailableError", (Exception,), {})("The actor is temporarily unavailable.")
        for step, state in (("pause", "old"), ("switch", "unknown")):
            good, lost = Rollout(), Rollout(**{step: away})
            report = failed(good, lost)
            assert not lost.is_paused
            assert [e.state for e in report.engines] == ["new", state]
            assert not report.is_uniform
            assert "temporarily unavailable" in report.engines[1].failures[0]
            assert lost.told[-2:] == ["resume", "forget"]

    def test_interrupted(self) -> None:
        """Ctrl-C in the pause: engines go back and resume before the caller hears of it."""
        good, held = Rollout(), Rollout(switch=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            advance([good, held])
        for engine in (good, held):
            assert engine.told[-3:] == ["back", "resume", "forget"]
            assert not engine.is_paused

    def test_odd_answers(self) -> None:
        """What no rank of ours answers is refused."""
        for odd in (None, [], [None], [{}], [{"plans": {}}], [{"plans": {TITLE: {"generation": 1}}}], [{"error": 1}]):
            report = failed(Rollout(prepare=odd))
            assert report.engines[0].failures, odd

    @pytest.mark.parametrize("engines", [[], "http://127.0.0.1:1", [None], ["127.0.0.1:8000"], ["http://"]])
    def test_no_engines(self, engines: Any) -> None:
        """What is no engine is refused before anything is told to anybody."""
        with pytest.raises(SettingsError):
            advance(engines)

    def test_twice(self) -> None:
        """One engine under two names would prepare twice, and neither would be the way back."""
        engine = Rollout()
        for engines in ([engine, Rollout(), engine], ["http://127.0.0.1:1", "http://127.0.0.1:1/"]):
            with pytest.raises(SettingsError, match="is given twice"):
                advance(engines)
        assert engine.told == []


class Remote:
    """A method of an actor, as Ray has them: what it returns has a future."""

    def __init__(self, threads: ThreadPoolExecutor, method: Callable[..., Any]) -> None:
        self._threads, self._method = threads, method

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._threads.submit(self._method, *args, **kwargs)
        return type("ObjectRef", (), {"future": lambda _: answer})()


class Actor:
    """A handle of an actor that runs an engine in a thread of its own."""

    def __init__(self, engine: Any) -> None:
        self.threads = ThreadPoolExecutor(1)
        self._engine = engine

    def __getattr__(self, name: str) -> Remote:
        return Remote(self.threads, getattr(self._engine, name))


class Paused(Rollout):
    """With the methods of an `AsyncLLM` where these differ."""

    def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert mode == "keep"
        self.is_paused = True
        self._do("pause")
        if clear_cache:
            self.reset_mm_cache()
            self.reset_encoder_cache()

    def resume_generation(self) -> None:
        self._do("resume")
        self.is_paused = False


class TestActors:
    """Handles whose methods have `remote`."""

    def test_all(self) -> None:
        """An actor takes all steps, beside a local engine."""
        engine, local = Paused(), Rollout()
        assert advance([Actor(engine), local]).has_advanced
        steps = ["pause", "reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"]
        assert engine.told == ["prepare", *steps, "switch", "label", "resume", "forget"]

    def test_silent(self) -> None:
        """One that does not answer in time keeps nobody from going back and serving."""
        release = threading.Event()

        class Slow(Paused):
            def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
                release.wait(100)

        local, actor = Rollout(), Actor(Slow())
        try:
            began = time.monotonic()
            report = failed(actor, local, timeout_s=1)
            assert time.monotonic() - began < 60
        finally:
            release.set()
            actor.threads.shutdown()
        assert "no answer to pause_generation within 1 s" in report.engines[0].failures[0]
        assert report.engines[0].may_be_paused
        assert not local.is_paused
        assert "switch" not in local.told


class Asynchronous:
    """An engine whose methods are coroutines of one event loop."""

    def __init__(self, engine: Rollout) -> None:
        self._engine, self.loops = engine, set[int]()

    async def collective_rpc(self, method: str, timeout: Any = None, kwargs: Any = None) -> Any:
        self.loops.add(id(asyncio.get_running_loop()))
        return self._engine.collective_rpc(method, timeout, kwargs)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self._engine.sleep(level=0, mode=mode)

    async def resume_generation(self) -> None:
        self._engine.wake_up(["scheduling"])

    async def reset_prefix_cache(self, *both: bool) -> bool:
        return bool(self._engine.reset_prefix_cache(*both))


class TestAsynchronous:
    """Engines with coroutines."""

    def test_all(self) -> None:
        """They run in the caller's loop, which stays free."""
        engine = Asynchronous(Rollout())

        async def work() -> set[int]:
            assert (await advance_async([engine])).has_advanced
            return {id(asyncio.get_running_loop())}

        assert asyncio.run(work()) == engine.loops

    def test_without_loop(self) -> None:
        """Whoever would wait for ever is told what to call."""
        with pytest.raises(SettingsError, match="advance_async"):
            advance([Asynchronous(Rollout())])


class Server:
    """A server that answers `routes`: by path, a status and what is sent; or None and a function that answers."""

    def __init__(self, **routes: Any) -> None:
        self.routes, self.asked = routes, list[str]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                route = self.path.partition("?")[0].strip("/")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                method = json.loads(body).get("method", "") if body else ""
                server.asked.append(self.path.strip("/") + (f":{method}" if method else ""))
                status, answer = server.routes.get(method or route, (404, {"detail": "Not Found"}))
                if callable(answer):
                    answer(self)
                    return
                if status is None:
                    self.connection.close()
                    return
                sent = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answers(answer: Any) -> tuple[int, Any]:
    return 200, {"results": [answer]}


WELL = {
    "health": (200, ""),
    "companion_prepare": answers(plans_answer({TITLE: PLAN})),
    "pause": (200, {"status": "paused"}),
    "reset_prefix_cache": (200, {"success": True}),
    "companion_switch": answers(done_answer()),
    "companion_back": answers(done_answer()),
    "resume": (200, {"status": "resumed"}),
    "companion_forget": answers(done_answer()),
}
"""What a server answers that has no weight versions."""


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(**changed: Any) -> Server:
        made.append(Server(**(WELL | changed)))
        return made[-1]

    yield start
    for server in made:
        server.close()


class TestServers:
    """What servers answer that are not well; tests/vllm/test_fleet.py has real ones."""

    def test_without_labels(self, serving: Callable[..., Server]) -> None:
        """vLLM 0.26 has no route for the weight version, and all others."""
        server = serving()
        report = advance([server.url])
        assert report.engines[0].engine == server.url.rstrip("/")
        assert server.asked == [
            "collective_rpc:companion_prepare",
            "pause?mode=keep&clear_cache=true",
            "reset_prefix_cache?reset_running_requests=true&reset_external=true",
            "collective_rpc:companion_switch",
            "update_weight_version",
            "resume",
            "collective_rpc:companion_forget",
        ]

    @pytest.mark.parametrize(
        ("changed", "state", "text"),
        [
            ({"companion_prepare": (404, "")}, "old", "Start it with VLLM_SERVER_DEV_MODE=1"),
            ({"companion_prepare": (500, {"error": {"message": "CUDA error"}})}, "old", "/collective_rpc: CUDA error"),
            (
                {"companion_prepare": (500, {"error": {"message": "CPUWorker has no attribute companion_prepare"}})},
                "old",
                "was it started with --load-format companion?",
            ),
            ({"companion_prepare": (200, "text")}, "old", "collective_rpc returned 'text'"),
            ({"pause": (500, {"error": "a request waits"})}, "old", "a request waits"),
            ({"reset_prefix_cache": (200, {"success": False})}, "old", "its prefix cache was not reset"),
            ({"companion_switch": (None, "")}, "old", "/collective_rpc: "),
            ({"companion_switch": (500, ""), "health": (503, ""), "resume": (500, "")}, "gone", "/collective_rpc: "),
            ({"companion_switch": (500, ""), "health": (503, "")}, "unknown", "/collective_rpc: "),
            ({"pause": (500, ""), "health": (503, "")}, "old", "/pause"),
        ],
    )
    def test_faults(self, serving: Callable[..., Server], changed: dict[str, Any], state: str, text: str) -> None:
        """Each fault is named, nobody mixes weights, and whoever lives is told to resume and to forget."""
        server = serving(**changed)
        (report,) = failed(server.url).engines
        assert report.state == state
        assert text in report.failures[0]
        if state != "gone":
            assert server.asked[-1] == "collective_rpc:companion_forget"
            assert ("resume" in server.asked) == any(asked.startswith("pause") for asked in server.asked)

    @pytest.mark.parametrize("part", ["status", "headers", "body"])
    def test_drips(self, serving: Callable[..., Server], part: str) -> None:
        """One that sends its answer byte by byte, and never all of it, has no more time than one that is silent."""

        def drip(handler: BaseHTTPRequestHandler) -> None:
            begun = {
                "status": b"HTTP/1.0 ",
                "headers": b"HTTP/1.0 200 OK\r\nX-Long: ",
                "body": b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n",
            }
            with contextlib.suppress(OSError):
                handler.wfile.write(begun[part])
                for _ in range(1000):
                    handler.wfile.write(b"1")
                    time.sleep(0.05)

        server, threads, began = serving(companion_switch=(None, drip)), threading.active_count(), time.monotonic()
        (report,) = failed(server.url, timeout_s=1).engines
        assert time.monotonic() - began < 30
        assert report.state == "old"
        assert "no answer to /collective_rpc within 1 s" in report.failures[0]
        until(lambda: threading.active_count() <= threads, 2, "nobody waits any more")

    def test_nobody_listens(self, serving: Callable[..., Server]) -> None:
        """A server that has ended is gone, and its fleet stays with what it had."""
        ended, well = serving(), serving()
        url = ended.url
        ended.close()
        ended.close = lambda: None  # type: ignore[method-assign]
        report = failed(url, well.url)
        assert [e.state for e in report.engines] == ["gone", "old"]
        assert well.asked == ["collective_rpc:companion_prepare", "collective_rpc:companion_forget"]
