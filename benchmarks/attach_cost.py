"""What publishing and attaching cost in Python, by step, on a CPU: a model of many small layers, without an engine.

    python -m benchmarks.attach_cost [--layers 1250] [--repeat 5] [--profile STEP]

vLLM's own Llama is built, loaded and published once. `watch` and `loaded` are what the publisher does before and after
it loads, `prepare` describes the model, `copy` fills the arena, `write` makes bytes of the manifest and `read` makes a
manifest of the bytes. Then the model is built again without weights and bound to the published arena, as often as is
asked for. The least of all turns is what Python needs. The first turn has what happens once in a process.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints.architectures import llama_config, llama_stack
from tests.support.checkpoints.formats import Weights
from tests.support.loading import load_observed

STEPS = ("watch", "loaded", "prepare", "copy", "write", "read", "build", "early", "process", "finish")


class Clock:
    """Seconds of this process in each step, and profiles of some: what else the machine does counts little."""

    def __init__(self, profiled: Iterable[str]) -> None:
        self.profiles = {step: cProfile.Profile() for step in profiled}
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        profile = self.profiles.get(step)
        started = time.process_time()
        if profile is not None:
            profile.enable()
        yield
        if profile is not None:
            profile.disable()
        self.seconds[step].append(time.process_time() - started)


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

    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 64}
    arguments["compilation_config"] = {"custom_ops": ["all"]}  # as on a GPU, where no constructor compiles anything
    return EngineArgs(model=str(path), enforce_eager=True, **arguments).create_engine_config()


def publish(path: Path, clock: Clock, repeat: int) -> tuple[Any, Any, int]:
    """Manifest and arena of the model at `path`, loaded by vLLM and watched as a publisher watches it.

    The third is the size of the manifest in bytes.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_companion_plugin import memory as arenas
    from vllm_companion_plugin.core.module_tree import Stage
    from vllm_companion_plugin.core.process import collector_paused
    from vllm_companion_plugin.tree import pack
    from vllm_companion_plugin.tree.capture import capture
    from vllm_companion_plugin.tree.live import plain_tensors
    from vllm_companion_plugin.tree.observe import Observation
    from vllm_companion_plugin.wire.manifest import manifest_from_bytes, manifest_to_bytes

    cpu, config = torch.device("cpu"), config_of(path)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        with clock.timed("watch"), collector_paused():
            observation = Observation(model)
        load_observed(model, config, observation)
        with clock.timed("loaded"), collector_paused():
            observation.end_loading(model)
    with plain_tensors(), collector_paused():
        with clock.timed("prepare"):
            packed = pack.prepare(capture(model), Stage.UNPROCESSED, arenas.MEMFD, cpu, observation)
        with clock.timed("copy"):
            arena = pack.copy(packed, arenas.MEMFD, cpu, rebind=True, release=lambda: None)
    for _ in range(repeat):
        with clock.timed("write"):
            data = manifest_to_bytes(packed.manifest)
        with clock.timed("read"):
            manifest = manifest_from_bytes(data)
    return manifest, arena, len(data)


def attach(path: Path, manifest: Any, arena: Any, clock: Clock) -> None:
    """Build the model at `path` without weights, and bind it to what was published."""
    from vllm.config import set_current_vllm_config

    from vllm_companion_plugin.core.process import collector_paused
    from vllm_companion_plugin.engine.vllm import building, processing, reload_notes
    from vllm_companion_plugin.memory.tensors.views import ArenaViews
    from vllm_companion_plugin.tree.building import WithoutWeights
    from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy, meta_parameters

    cpu, config = torch.device("cpu"), config_of(path)

    @contextmanager
    def hidden(module: Any) -> Iterator[None]:
        with meta_parameters(module):
            yield

    gc.collect()
    with collector_paused(), set_current_vllm_config(config):
        built = WithoutWeights(cpu)
        without_weights = building.model_without_weights(config, config.model_config, "", built)
        with clock.timed("build"):
            model = without_weights.__enter__()
        source = Source(manifest, ArenaViews(arena, arena.info.size_bytes, cpu), cpu, copy=False)
        restorer = Restorer(model, source, cpu, built=built, besides=reload_notes.noted)
        with clock.timed("early"):
            restorer.bind_early(lambda module: Strategy.HIDE)
        with clock.timed("finish"):
            restorer.finish()
        with clock.timed("process"), processing.around_post_processing(model, hidden):
            processing.post_process(model, config.model_config, cpu)
        without_weights.__exit__(None, None, None)


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
            clock = Clock(args.profile)
            manifest, arena, size_bytes = publish(path, clock, args.repeat)
            for _ in range(args.repeat):
                attach(path, manifest, arena, clock)
            arena.close()
    count, seconds = len(manifest.tensors), clock.seconds
    print(f"{args.layers} layers, {len(manifest.modules)} modules, {count} tensors, {args.repeat} turns")
    print(f"manifest: {size_bytes / 2**20:.2f} MiB")
    for step, taken in seconds.items():
        print(f"  {step:8} first {1e3 * taken[0]:8.1f} ms, least {1e3 * min(taken):8.1f} ms")
    bound = min(map(sum, zip(seconds["early"], seconds["finish"], strict=True)))
    print(f"  binding: {1e6 * bound / count:.1f} microseconds a tensor")
    for step, profile in clock.profiles.items():
        print(f"\n{step}, in all turns:")
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)


if __name__ == "__main__":
    main()
