"""What a process of vLLM has in which the plugin is installed, before it loads anything."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

PROCESS = """
import json, sys
from importlib.metadata import entry_points
from vllm_companion_plugin.engine.register import register
register(); register()
light = [name for name in ("vllm", "torch", "grpc") if name in sys.modules]
waiting = sorted(finder._name for finder in sys.meta_path if type(finder).__module__.startswith("vllm_companion"))

from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm.engine.arg_utils, vllm.v1.executor.multiproc_executor, vllm.v1.engine.async_llm, vllm.v1.engine.llm_engine
import vllm.lora.worker_manager, vllm.entrypoints.serve.engine.serving, vllm.entrypoints.pooling.base.serving
from vllm.config import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.worker import gpu_worker, utils
of_adapters = ("vllm_companion_plugin.client.adapter_leases", "vllm_companion_plugin.engine.adapters")
imported = [name for name in of_adapters if name in sys.modules]
what_loads = ("vllm_companion_plugin.engine.loading", "vllm_companion_plugin.client.connection")
serving = "vllm_companion_plugin.engine.vllm.adapters.serving" in sys.modules

from tests import patched
from vllm_companion_plugin.engine.vllm import budget
from vllm_companion_plugin.engine.vllm.patching import Lifetime
counts = {one.request_memory.__code__.co_filename for one in (utils, gpu_worker)}
print("RESULT", json.dumps({
    "light": light,
    "plugin": [each.load() is register for each in entry_points(group="vllm.general_plugins", name="companion")],
    "waiting": len(waiting),
    "differences": patched.differences([Lifetime.IMPORT, Lifetime.EXECUTOR]),
    "on objects": sorted(set(patched.on_objects().values())),
    "loader": type(get_model_loader(LoadConfig(load_format="companion"))).__name__,
    "what loads": [name for name in what_loads if name in sys.modules],
    "budget": budget.has_external_memory_hook(gpu_worker.request_memory) or counts == {budget.__file__},
    "of adapters": [serving, imported],
}))
"""


def test_in_a_process_that_loads_nothing() -> None:
    """Nothing is patched but what the table says; vLLM finds the loader, and its workers the budget.

    What finds adapters is not imported: with gRPC it takes 0.2 s. Nor is what loads, which takes as long.
    """
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.partition("RESULT ")[2]) == {
        "light": [],
        "plugin": [True],
        "waiting": 12,
        "differences": {"stray": [], "missing": []},
        "on objects": [],
        "loader": "CompanionModelLoader",
        "what loads": [],
        "budget": True,
        "of adapters": [True, []],
    }


ALLOCATOR = """
import json, sys
from vllm_companion_plugin.engine.vllm import sleep
from vllm.v1.worker import gpu_worker
for _ in range(2):
    sleep._let_the_allocator()
before = "vllm.device_allocator.cumem" in sys.modules
from vllm.device_allocator.cumem import CuMemAllocator
inner = [method.__wrapped__ for method in (CuMemAllocator.sleep, CuMemAllocator.wake_up)]
print("RESULT", json.dumps([before, [hasattr(each, "__wrapped__") for each in inner]]))
"""


def test_the_allocator_is_not_imported_for_nothing() -> None:
    """Who falls asleep imports it; it sleeps and wakes with what this process maps, and once."""
    done = subprocess.run([sys.executable, "-c", ALLOCATOR], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.partition("RESULT ")[2]) == [False, [False, False]]
