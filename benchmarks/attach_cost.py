"""What an attach costs in Python, by step, on a CPU: a model of many small layers, without an engine around it.

    python -m benchmarks.attach_cost [--layers 1250] [--repeat 5] [--profile STEP]

vLLM's own Llama is built, loaded and published once. Then it is built again without weights, and bound to the published
arena, as often as is asked for: the least of all turns is what Python needs, the first has what happens once a process.
Times on a GPU come from gpu_acceptance.py.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints.architectures import llama_config, llama_stack
from tests.support.checkpoints.formats import Weights

STEPS = ("build", "early", "process", "finish")


def write_model(path: Path, layers: int) -> None:
    """A Llama of `layers` layers with hidden size 64; 9 tensors a layer."""
    config = llama_config(True, False) | {"num_hidden_layers": layers}
    weights = Weights("attach-cost", True)
    llama_stack(weights, config)
    weights.dtype = torch.bfloat16  # what vLLM makes of it
    weights.tensors = {name: tensor.bfloat16() for name, tensor in weights.tensors.items()}
    weights.save(path, config)


@contextmanager
def one_rank() -> Iterator[None]:
    """The parallel groups of a single worker."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as place, set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{place}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def config_of(path: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), skip_tokenizer_init=True, max_model_len=64).create_engine_config()


def publish(path: Path) -> tuple[Any, Any]:
    """Manifest and arena of the model at `path`, loaded by vLLM and watched as a publisher watches it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_companion_plugin import memory as arenas
    from vllm_companion_plugin.core.module_tree import Stage
    from vllm_companion_plugin.tree import pack
    from vllm_companion_plugin.tree.capture import capture, plain_tensors
    from vllm_companion_plugin.tree.observe import Observation
    from vllm_companion_plugin.wire.manifest import manifest_from_bytes, manifest_to_bytes

    cpu, config = torch.device("cpu"), config_of(path)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        observation = Observation(model)
        take: Callable[..., object] = model.load_weights

        def noting(weights: Iterable[tuple[str, torch.Tensor]]) -> object:
            return take((name, observation.note_read(tensor) or tensor) for name, tensor in weights)

        vars(model)["load_weights"] = noting
        with observation.watching():
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        del vars(model)["load_weights"]
        observation.end_loading(model)
    with plain_tensors():
        packed = pack.prepare(capture(model), Stage.UNPROCESSED, arenas.MEMFD, cpu, observation)
        arena = pack.copy(packed, arenas.MEMFD, cpu, rebind=False, release=lambda: None)
    return manifest_from_bytes(manifest_to_bytes(packed.manifest)), arena


def attach(path: Path, manifest: Any, arena: Any, profiles: dict[str, cProfile.Profile]) -> dict[str, float]:
    """Seconds of this process in each step of one attach: what else the machine does counts little."""
    from vllm.config import set_current_vllm_config

    from vllm_companion_plugin.core.process import collector_paused
    from vllm_companion_plugin.engine.vllm import compat
    from vllm_companion_plugin.memory.tensors.views import ArenaViews
    from vllm_companion_plugin.tree.building import WithoutWeights
    from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy, meta_parameters

    cpu, config, seconds = torch.device("cpu"), config_of(path), {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        profile = profiles.get(step)
        started = time.process_time()
        if profile is not None:
            profile.enable()
        yield
        if profile is not None:
            profile.disable()
        seconds[step] = time.process_time() - started

    @contextmanager
    def hidden(module: Any) -> Iterator[None]:
        with meta_parameters(module):
            yield

    gc.collect()
    with collector_paused(), set_current_vllm_config(config):
        built = WithoutWeights(cpu)
        building = compat.model_without_weights(config, config.model_config, "", built)
        with timed("build"):
            model = building.__enter__()
        source = Source(manifest, ArenaViews(arena, arena.info.size_bytes, cpu), cpu, copy=False)
        restorer = Restorer(model, source, cpu, built=built, besides=compat.noted_for_reloads)
        with timed("early"):
            restorer.bind_early(lambda module: Strategy.HIDE)
        with timed("finish"):
            restorer.finish()
        with timed("process"), compat.around_post_processing(model, hidden):
            compat.post_process(model, config.model_config, cpu)
        building.__exit__(None, None, None)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1250)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--profile", choices=STEPS, action="append", default=[])
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="attach-cost-") as place:
        path = Path(place) / "model"
        write_model(path, args.layers)
        with one_rank():
            manifest, arena = publish(path)
            profiles = {step: cProfile.Profile() for step in args.profile}
            turns = [attach(path, manifest, arena, profiles) for _ in range(args.repeat)]
            arena.close()
    count = len(manifest.tensors)
    print(f"{args.layers} layers, {len(manifest.modules)} modules, {count} tensors, {args.repeat} turns")
    for step in STEPS:
        taken = [turn[step] for turn in turns]
        print(f"  {step:8} first {1e3 * taken[0]:8.1f} ms, least {1e3 * min(taken):8.1f} ms")
    bound = min(turn["early"] + turn["finish"] for turn in turns)
    print(f"  binding: {1e6 * bound / count:.1f} microseconds a tensor")
    for step, profile in profiles.items():
        print(f"\n{step}, in all turns:")
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)


if __name__ == "__main__":
    main()
