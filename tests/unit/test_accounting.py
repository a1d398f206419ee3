"""The memory budget of an engine whose weights a companion holds: the same from every vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.v1.worker import gpu_worker as gpu_worker
from vllm.v1.worker import utils
from vllm.v1.worker.utils import request_memory

from vllm_companion_plugin.engine import loading, register
from vllm_companion_plugin.engine.loader import CompanionModelLoader
from vllm_companion_plugin.engine.vllm import budget, patches, patching

pytestmark = pytest.mark.core

GIB = 1 << 30
CACHE: Any = SimpleNamespace(gpu_memory_utilization=0.5)


class Snapshot:
    """What vLLM has measured on a device of 100 GiB."""

    total_memory = 100 * GIB
    device_ = "cpu"

    def __init__(self, free: int) -> None:
        self.free_memory = free
        self.measured = 0

    def measure(self) -> None:
        """What other processes hold shows up in what is free only when it is measured again."""
        self.measured += 1


def allowed(held: int, free: int, load_format: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What this vLLM, with our patch if it needs it, allows an engine."""
    config = VllmConfig(load_config=LoadConfig(load_format=load_format))
    monkeypatch.setattr(loading, "external_bytes", lambda vllm_config, settings: held)
    snapshot: Any = Snapshot(free)
    if budget.has_external_memory_hook(request_memory):
        companion = load_format == "companion"
        external = CompanionModelLoader(config.load_config).get_external_weight_memory(config) if companion else 0
        return int(request_memory(snapshot, CACHE, external))
    with set_current_vllm_config(config):
        return int(budget.with_external(request_memory, register._external_bytes)(snapshot, CACHE))


@pytest.mark.parametrize(
    ("held", "free", "load_format", "expected"),
    [
        (0, 60, "companion", 50),
        (20, 60, "companion", 30),
        (20, 35, "companion", 30),  # less is free than the whole share, but enough without the weights
        (20, 60, "auto", 50),
    ],
)
def test_weights_that_a_companion_holds_are_part_of_the_engines_share(
    held: int, free: int, load_format: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allowed(held * GIB, free * GIB, load_format, monkeypatch) == expected * GIB


@pytest.mark.parametrize(
    ("held", "free", "load_format", "said"),
    [
        (0, 40, "companion", "Free memory"),
        (20, 25, "companion", "Free memory"),
        (50, 60, "companion", "exceed the desired GPU memory utilization"),
        (20, 40, "auto", "Free memory"),
    ],
)
def test_a_share_that_is_not_there_is_refused(
    held: int, free: int, load_format: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        allowed(held * GIB, free * GIB, load_format, monkeypatch)
    assert said in str(raised.value).replace("\n", " ")


class TestBeforeTheHook:
    """`request_memory` of a vLLM that asks no loader, whatever version this is."""

    @pytest.mark.parametrize(
        ("external", "expected", "measured"), [(None, 50, 0), (0, 50, 1), (20 * GIB, 30, 1), (50 * GIB, None, 1)]
    )
    def test_budget(self, external: int | None, expected: int | None, measured: int) -> None:
        """vLLM's own answer where a companion holds nothing; otherwise that less what is held."""
        snapshot: Any = Snapshot(60 * GIB)
        count = budget.with_external(lambda init_snapshot, cache_config: 50 * GIB, lambda: external)
        if expected is None:
            with pytest.raises(ValueError, match="exceed the desired GPU memory utilization"):
                count(snapshot, CACHE)
        else:
            assert count(snapshot, CACHE) == expected * GIB
        assert snapshot.measured == measured

    def test_both_names_are_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The worker's module has a name of its own for it, if that was imported before."""

        def old(init_snapshot: Any, cache_config: Any) -> int:
            return 50 * GIB

        rows = [patches.REQUEST_MEMORY, patches.REQUEST_MEMORY_OF_WORKER]
        monkeypatch.setattr(patching, "_applied", {})
        for row in rows:
            monkeypatch.setattr(row.find_owner(), "request_memory", old)
        budget.replace_request_memory(utils, lambda: 20 * GIB)
        budget.replace_request_memory(utils, lambda: 20 * GIB)
        replaced = [row.find_owner().request_memory for row in rows]
        assert [function(Snapshot(60 * GIB), CACHE) for function in replaced] == [30 * GIB] * 2
        assert [function.__wrapped__ for function in replaced] == [old] * 2
