"""Two engines of two ranks each, started at once, in processes of their own: they decide, and then load.

As under vLLM's first Ray executor, no rank loads before all ranks of its engine have decided. Prints as JSON what each
rank decided, and how ranks are named if they are data parallel replicas instead.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine import decide, decisions
from vllm_companion_plugin.engine.vllm import deployment, devices
from vllm_companion_plugin.settings import resolve
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.wire.manifest import manifest_to_bytes

CPU = torch.device("cpu")


def join(config: Any, store: Path, rank: int) -> None:
    """Two workers' parallel groups, laid out as `config` says."""
    os.environ["VLLM_DIST_IDENT"] = store.name  # as vLLM's CPU workers have it
    parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
    with set_current_vllm_config(config):
        parallel_state.initialize_model_parallel(config.parallel_config.tensor_parallel_size, 1)
    distributed.barrier()


def run(config: Any, directory: Path, engine: int, rank: int, device_id: str, results: Any) -> None:
    device = devices.EngineDevice(device_id, CPU, arenas.MEMFD, Stage.UNPROCESSED)
    devices.engine_device = lambda arena: device
    join(config, directory / f"{os.getppid()}-{engine}", rank)
    # Crosswise: each engine is first on one device.
    time.sleep(0 if engine == rank else 1.5)
    decision = decide.decide(config, config.model_config, resolve({"fallback": False}))
    distributed.barrier()
    if isinstance(decision, decisions.Load):
        packed = prepare(capture(nn.Linear(2, 2)), Stage.UNPROCESSED, arenas.MEMFD, CPU)
        arena = copy(packed, arenas.MEMFD, CPU, rebind=False, release=lambda: None)
        decision.granted.publication.publish(
            arena.info, arena.fds, manifest_to_bytes(packed.manifest), len(packed.manifest.tensors)
        )
        decision.election.release()
    results.put((engine, rank, type(decision).__name__))
    distributed.barrier()


def name(config: Any, directory: Path, rank: int, results: Any) -> None:
    join(config, directory / f"{os.getppid()}-dp", rank)
    results.put((rank, deployment.ranks()["dp"]))
    distributed.barrier()


def main() -> None:
    model, directory, *devices = sys.argv[1:]

    def configured(**sizes: int) -> Any:
        flags: Any = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32", "load_format": "companion"}
        return EngineArgs(model=model, **flags, **sizes).create_engine_config()

    fork = multiprocessing.get_context("fork")  # vLLM is imported once
    decided, named = fork.SimpleQueue(), fork.SimpleQueue()
    split, replicated = configured(tensor_parallel_size=2), configured(data_parallel_size=2)
    ranks = [fork.Process(target=name, args=(replicated, Path(directory), rank, named)) for rank in range(2)]
    ranks += [
        fork.Process(target=run, args=(split, Path(directory), engine, rank, device, decided))
        for engine in range(2)
        for rank, device in enumerate(devices)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    failed = any(process.exitcode for process in ranks)
    print(
        json.dumps([] if failed else [sorted(queue.get() for _ in range(n)) for queue, n in ((decided, 4), (named, 2))])
    )


if __name__ == "__main__":
    main()
