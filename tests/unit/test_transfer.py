"""Several engines as one: what vLLM's calls do to each when one of them fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_companion_plugin.engine.vllm.answers import _Counted
from vllm_companion_plugin.engine.vllm.transfer.engines import Engines
from vllm_companion_plugin.engine.vllm.transfer.worker import CompanionInitInfo, CompanionTransferEngine
from vllm_companion_plugin.errors import NotShareableError, UpdateRefusedError


class Engine:
    """vLLM's rules for the order of calls, on a worker that fails in `failing`."""

    def __init__(self, name: str, failing: str = "") -> None:
        self.base_url = name
        self.failing = failing
        self.active = False
        self.prepared: dict[str, Any] | None = None
        self.serves: tuple[Any, str | None] = ({}, None)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._fail("init")

    def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("already active")
        self._fail("start")
        self.active = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if not self.active:
            raise RuntimeError("not started")
        self.prepared = None
        if not update_info.get("forget"):
            self.active = False
            self._fail("update")
            self.active = True
            self.prepared = update_info

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self.active:
            raise RuntimeError("not started")
        if self.prepared is not None:
            prepared, self.prepared = self.prepared, None
            self._fail("finish")
            self.serves = (prepared, weight_version)
        self.active = False

    def _fail(self, step: str) -> None:
        if step == self.failing:
            error = RuntimeError(f"500 in {step}")
            error.response = SimpleNamespace(text="no room")  # type: ignore[attr-defined]
            raise error


class OldEngine(Engine):
    """As of vLLM 0.26."""

    def finish_weight_update(self) -> None:  # type: ignore[override]
        super().finish_weight_update()


NEW = {"generations": {"cpu": {"key": 2}}}


def send(engines: Engines) -> None:
    engines.init_weight_transfer_engine({})
    engines.start_weight_update()
    engines.update_weights(NEW)
    engines.finish_weight_update("step-1")


class TestEngines:
    def test_all(self) -> None:
        """Those that know versions are told the version."""
        engines = [Engine("a"), OldEngine("b")]
        send(Engines(engines))
        assert [engine.serves for engine in engines] == [(NEW, "step-1"), (NEW, None)]

    @pytest.mark.parametrize("step", ["init", "start", "update", "finish"])
    def test_one_fails(self, step: str) -> None:
        """Nothing is left open, and the next update goes through. Only an error at the end finds others switched."""
        engines = [Engine("a"), Engine("b", failing=step), Engine("c")]
        with pytest.raises(UpdateRefusedError, match=rf"Of 3 engines 1 refused. b .*500 in {step} no room"):
            send(Engines(engines))
        assert [engine.active for engine in engines] == [False] * 3
        assert [bool(engine.serves[0]) for engine in engines] == [step == "finish", False, step == "finish"]
        engines[1].failing = ""
        send(Engines(engines))
        assert {engine.serves[1] for engine in engines} == {"step-1"}

    def test_left_open(self) -> None:
        """A trainer died between two calls: the next update takes the place of its own."""
        engine = Engine("a")
        engine.start_weight_update()
        engine.update_weights({"generations": "of the dead"})
        send(Engines([engine]))
        assert engine.serves == (NEW, "step-1")


def test_an_engine_with_weights_of_its_own_takes_none() -> None:
    config = SimpleNamespace(
        parallel_config=None, model_config=SimpleNamespace(model="org/m"), device_config=SimpleNamespace()
    )
    worker = CompanionTransferEngine(None, config, torch.device("cpu"), torch.nn.Linear(1, 1))
    with pytest.raises(
        NotShareableError, match=r"org/m has weights of its own in this engine.*--load-format companion"
    ):
        worker.init_transfer_engine(CompanionInitInfo())


def test_a_queue_whose_answers_are_counted_is_that_queue_in_all_else() -> None:
    """vLLM ends it when a worker has died in the middle of a call."""
    counted = _Counted(SimpleNamespace(dequeue=lambda timeout: timeout, shutdown=lambda: "ended"))
    assert (counted.dequeue(timeout=3), counted.count, counted.shutdown()) == (3, 1, "ended")
