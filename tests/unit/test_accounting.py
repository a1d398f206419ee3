"""The memory budget of an engine whose weights a companion holds: the same from every vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.v1.worker.utils import request_memory

from vllm_companion_plugin.engine import session
from vllm_companion_plugin.engine.loader import CompanionModelLoader
from vllm_companion_plugin.engine.vllm import accounting, budget

pytestmark = pytest.mark.core

GIB = 1 << 30
CACHE: Any = SimpleNamespace(gpu_memory_utilization=0.5)


def budget(held: int, free: int, load_format: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What this vLLM, with our patch if it needs it, allows an engine on a device of 100 GiB."""
    config = VllmConfig(load_config=LoadConfig(load_format=load_format))
    monkeypatch.setattr(session, "external_bytes", lambda vllm_config, settings: held)
    # What other processes hold shows up in what is free only when it is measured again.
    snapshot: Any = SimpleNamespace(total_memory=100 * GIB, free_memory=free, device_="cpu", measure=lambda: None)
    if budget.has_external_memory_hook(request_memory):
        companion = load_format == "companion"
        external = CompanionModelLoader(config.load_config).get_external_weight_memory(config) if companion else 0
        return int(request_memory(snapshot, CACHE, external))
    module = ModuleType("utils")
    module.request_memory = request_memory  # type: ignore[attr-defined]
    accounting.install_request_memory(module)
    with set_current_vllm_config(config):
        return int(module.request_memory(snapshot, CACHE))


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
    assert budget(held * GIB, free * GIB, load_format, monkeypatch) == expected * GIB


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
        budget(held * GIB, free * GIB, load_format, monkeypatch)
    assert said in str(raised.value).replace("\n", " ")


REGISTERED = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
print(type(get_model_loader(LoadConfig(load_format="companion"))).__name__)
from vllm.v1.worker import gpu_worker
from vllm_companion_plugin.engine.vllm import budget
if budget.has_external_memory_hook(gpu_worker.request_memory):
    print("asked by vLLM")
else:
    print(gpu_worker.request_memory.__module__)
"""


def test_vllm_finds_the_loader_and_its_workers_the_budget() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    loader, hook = done.stdout.splitlines()[-2:]
    assert loader == "CompanionModelLoader"
    assert hook in ("asked by vLLM", accounting.__name__)
