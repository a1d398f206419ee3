"""All differences between vLLM versions, found by looking, not by comparing versions.

Supports vLLM 0.26 to 0.33. Everything that reaches below vLLM's public surface is here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import (
    get_model_architecture,
    initialize_model,
    process_weights_after_loading,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine.vllm.naming import LOAD_FORMAT
from vllm_companion_plugin.errors import EngineVersionError, NotShareableError, SettingsError
from vllm_companion_plugin.settings import Settings, resolve_extra_config
from vllm_companion_plugin.tree.building import WithoutWeights
from vllm_companion_plugin.tree.restore import Strategy

# Their post-processing changes no tensor on CUDA, and on CPU only packs a private copy of a matrix.
_LEAVES_TENSORS_ALONE = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


@dataclasses.dataclass(frozen=True)
class EngineDevice:
    """Where this worker runs.

    Attributes:
        id: GPU UUID, or "cpu": the name of its companion.
        arena_kind: what its companion holds.
        stage: which state of the tensors is shared there.
    """

    id: str
    torch_device: torch.device
    arena_kind: str
    stage: Stage


def engine_device(vllm_config: Any, arena: str = "auto") -> EngineDevice:
    """The device of this worker.

    Args:
        arena: the setting: how memory of a GPU is shared, or "auto".

    Raises:
        NotShareableError: a platform that has no arenas here.
    """
    if current_platform.is_cpu():
        return EngineDevice("cpu", torch.device("cpu"), arenas.best_kind("cpu"), Stage.UNPROCESSED)
    if current_platform.is_cuda():
        index = torch.cuda.current_device()
        kind = arenas.best_kind("cuda", index) if arena == "auto" else arena
        # Not vLLM's `get_device_uuid`: it takes the number of a local rank, and knows no MIG instances.
        return EngineDevice(arenas.cuda_device(index), torch.device("cuda", index), kind, Stage.PROCESSED)
    raise NotShareableError(f"platform {current_platform.device_name} is not supported; CUDA and CPU are.")


def requested_bytes(device: EngineDevice) -> int:
    """What this process has asked PyTorch for on `device`, and not returned; 0 on a CPU."""
    if device.torch_device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device.torch_device).get("requested_bytes.all.current", 0))


def memory(device: EngineDevice) -> tuple[int, int]:
    """Bytes of `device` that are free, and all that it has, as vLLM is about to find them."""
    if device.torch_device.type == "cuda" and not _has_host_memory(device):
        free, total = torch.cuda.mem_get_info(device.torch_device)
        return free, total
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(rows[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal"))
    if device.torch_device.type == "cuda":
        return free, torch.cuda.mem_get_info(device.torch_device)[1]
    # vLLM before 0.32 does not look at the limit of a container.
    cgroup: Any = sys.modules.get("vllm.utils.cpu_resource_utils")
    limit = getattr(cgroup, "get_cgroup_memory_limit", lambda: None)()
    if limit is not None and limit < total:
        return max(0, min(free, limit - (cgroup.get_cgroup_memory_usage() or 0))), limit
    return free, total


def _has_host_memory(device: EngineDevice) -> bool:
    """Whether this is a GPU without memory of its own, of which CUDA knows less than the host does."""
    is_integrated = getattr(current_platform, "is_integrated_gpu", lambda index: False)
    return bool(is_integrated(device.torch_device.index))


def resident_bytes() -> int:
    """Host memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# All ranks of an engine read together, each a part for all.
_COLLECTIVE_FORMATS = ("fastsafetensors", "instanttensor")


def source_format(wanted: str, vllm_config: Any) -> str:
    """`wanted`, unless all ranks would have to read together: with a companion, some may attach."""
    return "auto" if wanted in _COLLECTIVE_FORMATS and vllm_config.parallel_config.world_size > 1 else wanted


def source_loader(load_config: Any, source_format: str) -> BaseModelLoader:
    """vLLM's own loader of `source_format`, with its options: `source_extra_config` if the load config is ours.

    Raises:
        SettingsError: that loader refuses its options, or there is no such format.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if source_format == LOAD_FORMAT:
        raise EngineVersionError("source_format is how the checkpoint is read; it cannot be 'companion' itself.")
    extra = load_config.model_loader_extra_config
    if load_config.load_format == LOAD_FORMAT:
        extra = resolve_extra_config(extra).source_extra_config
    config = dataclasses.replace(load_config, load_format=source_format, model_loader_extra_config=extra)
    try:
        return get_model_loader(config)
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"vLLM has no loader for source_format {source_format!r} with source_extra_config {extra}: {error}"
        ) from error


# How fast a loader reads, and not what.
_PACE = frozenset(
    {"concurrency", "distributed", "enable_multithread_load", "enable_weights_track", "memory_limit", "num_threads"}
)


def source_text(settings: Settings) -> str:
    """The source format and those of its options that may decide what is read, for the key."""
    options = {name: value for name, value in settings.source_extra_config.items() if name not in _PACE}
    return settings.source_format + (f" {json.dumps(options, sort_keys=True)}" if options else "")


def elsewhere_reason(model_config: Any, settings: Settings) -> str | None:
    """Why what is read has no identity that is known here, or None."""
    name = getattr(model_config, "model_weights", "") or model_config.model
    if re.match(r"[a-z0-9]+://", name, re.IGNORECASE):
        return (
            f"the weights are read from {name}, an object store, where files cannot be told apart; copy them to a disk"
        )
    if uri := settings.source_extra_config.get("tensorizer_uri"):
        return f"the weights are read from {uri}, by an option of their loader, instead of from the model's directory"
    return None


def other_checkpoints(model: nn.Module, model_config: Any) -> list[str]:
    """Models whose weights vLLM loads into this one besides its own (Ultravox names two)."""
    names = (source.model_or_path for source in getattr(model, "secondary_weights", ()))
    return sorted({name for name in names if name not in (model_config.model, model_config.model_weights)})


def unshareable_reason(vllm_config: Any) -> str | None:
    """Why weights of this configuration can neither be shared nor copied, or None."""
    offload = getattr(vllm_config, "offload_config", None)
    if offload is not None and offload != type(offload)():
        return "weight offloading moves weights between host and device"
    if getattr(vllm_config.load_config, "device", None) not in (None, vllm_config.device_config.device_type):
        return "weights are loaded on another device than the engine's"
    return None


def must_own_reason(vllm_config: Any) -> str | None:
    """Why an engine of this configuration needs weights that it may write to, or None."""
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        return "weight transfer writes new weights in place"
    # A draft may be loaded with a parallel config of its own, in the same engine.
    target = getattr(vllm_config.speculative_config, "target_parallel_config", None)
    for parallel in (vllm_config.parallel_config, target):
        if getattr(parallel, "enable_eplb", False):
            return "EPLB moves expert weights in place"
        if getattr(parallel, "enable_elastic_ep", False):
            return "elastic expert parallelism rewrites expert weights"
    return None


def draft_config(vllm_config: Any) -> Any | None:
    """The model config of the engine's draft; None if it has none, as with n-grams, whose "draft" is the target."""
    speculative = vllm_config.speculative_config
    config = speculative.draft_model_config if speculative is not None else None
    return None if config is None or config is speculative.target_model_config else config


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    return model_config is draft_config(vllm_config)


def loads_draft_alike(vllm_config: Any) -> bool:
    """Whether this worker is about to load a draft, with the target's load config."""
    from vllm.distributed.parallel_state import get_pp_group

    return (
        draft_config(vllm_config) is not None
        and has_draft_weights(vllm_config)
        and vllm_config.speculative_config.draft_load_config is None
        and get_pp_group().is_last_rank
    )


def has_draft_weights(vllm_config: Any) -> bool:
    """Whether the draft is a model with weights: `extract_hidden_states` only looks like one."""
    return bool(vllm_config.speculative_config.method != "extract_hidden_states")


# Set by vLLM while a draft's checkpoint is read.
DRAFT_FLAGS = ("has_own_embed_tokens", "has_own_lm_head")


def replaced_by_target(vllm_config: Any, draft: nn.Module, target: nn.Module) -> dict[str, nn.Module]:
    """Modules of a draft that vLLM replaces by the target's after loading, by path, with the target's.

    Those that the draft `owns` are replaced if they are equal, the others always.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if vllm_config.speculative_config.method not in ("eagle", "eagle3", "mtp") or get_pp_group().world_size > 1:
        return {}
    get_language_model: Any = getattr(target, "get_language_model", None)
    language = get_language_model() if get_language_model is not None else target
    inner, layers = getattr(language, "model", None), getattr(getattr(draft, "model", None), "layers", None)
    head = getattr(language, "lm_head", None)
    embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "embedding", None)
    found = {"model.embed_tokens": embedding, "lm_head": head}
    named = [name for name, _ in layers.named_children()] if isinstance(layers, nn.Module) else []
    if getattr(vllm_config.speculative_config, "use_step3p5_mtp", lambda: False)():
        named, head = [], None  # it keeps its own
    found |= {f"model.layers.{name}.shared_head.head": head for name in named}
    there = dict(draft.named_modules(remove_duplicate=False))
    return {path: module for path, module in found.items() if isinstance(module, nn.Module) and path in there}


def owns(draft: nn.Module, path: str) -> bool:
    """Whether the draft's checkpoint has the module at `path`. Of MTP models, which are not asked, it counts as not."""
    return bool(getattr(draft, DRAFT_FLAGS[0] if path.endswith("embed_tokens") else DRAFT_FLAGS[1], False))


def running_draft(runner: Any) -> nn.Module | None:
    """The draft of a model runner, of either generation."""
    model: Any = getattr(_proposer(runner), "model", None)
    model = model.unwrap() if hasattr(model, "unwrap") else model  # from what replays CUDA graphs
    return model if isinstance(model, nn.Module) else None


def _proposer(runner: Any) -> Any:
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def draft_recipe(runner: Any) -> tuple[Any, Any, str]:
    """With which vLLM config, model config and prefix `runner` built its draft."""
    create = getattr(_proposer(runner), "_create_draft_vllm_config", None)
    config = create() if create is not None else getattr(_proposer(runner), "_draft_vllm_config", runner.vllm_config)
    alone = runner.speculative_config.method == "draft_model"
    return config, runner.speculative_config.draft_model_config, "draft_model" if alone else ""


class _Registered:
    """What modules register in the compilation config when they are built, as it was."""

    def __init__(self, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        self._layers: dict[str, Any] = compilation.static_forward_context
        self._moe_layers: list[Any] = getattr(compilation, "static_all_moe_layers", [])
        self._kept = dict(self._layers), list(self._moe_layers)

    def clear(self) -> None:
        self._layers.clear()
        self._moe_layers.clear()

    def restore(self) -> None:
        self.clear()
        self._layers.update(self._kept[0])
        self._moe_layers.extend(self._kept[1])


@contextmanager
def model_without_weights(
    vllm_config: Any, model_config: Any, prefix: str, built: WithoutWeights
) -> Iterator[nn.Module]:
    """Build the model without memory for its weights, and undo every trace of it if the body fails.

    A build leaves traces: modules register themselves in the compilation config, and rope modules in a cache of
    the process.
    """
    registered = _Registered(vllm_config)
    ropes = set(_rope_cache())
    try:
        with set_default_torch_dtype(model_config.dtype):
            with built.building(), _noting_for_reloads(built):
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            yield model
    except BaseException:
        registered.restore()
        for key in set(_rope_cache()) - ropes:
            del _rope_cache()[key]
        raise


@contextmanager
def _noting_for_reloads(built: WithoutWeights) -> Iterator[None]:
    """While open, what vLLM notes of parameters for a later reload is no use of them."""
    record = loader_utils.record_metadata_for_reloading

    def noting(model: nn.Module) -> None:
        with built.paused():
            record(model)

    loader_utils.record_metadata_for_reloading = noting
    try:
        yield
    finally:
        loader_utils.record_metadata_for_reloading = record


def noted_for_reloads(model: nn.Module) -> Iterator[torch.Tensor]:
    """What vLLM keeps of the parameters of `model`, without data, for a later reload."""
    from vllm.model_executor.model_loader.reload import layerwise

    for module in model.modules():
        if module in layerwise.LAYERWISE_INFO:
            for noted in layerwise.LAYERWISE_INFO[module].restore_metadata:
                yield from noted.values()


@contextmanager
def second_model(vllm_config: Any, model_config: Any, prefix: str, device: torch.device) -> Iterator[nn.Module]:
    """Another, empty model of an engine that has one already and keeps it."""
    registered = _Registered(vllm_config)
    registered.clear()
    try:
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(model_config.dtype):
            with device:
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            yield model
    finally:
        registered.restore()


def model_class(vllm_config: Any, model_config: Any) -> type[nn.Module] | None:
    """The class that is built for `model_config`; None for what looks like a draft and has no weights.

    It is imported as in a normal load: what its module makes on import is on the engine's device.
    """
    if is_draft(vllm_config, model_config) and not has_draft_weights(vllm_config):
        return None
    with torch.device(vllm_config.device_config.device_type):
        found: type[nn.Module] = get_model_architecture(model_config)[0]
        return found


def quantization_classes(vllm_config: Any) -> tuple[type, ...]:
    """Classes that say how this engine's weights are quantized."""
    config = getattr(vllm_config, "quant_config", None)
    return (type(config),) if config is not None else ()


def _rope_cache() -> dict[Any, nn.Module]:
    """vLLM's cache of rope modules; empty until a model imports it, which is not ours to time."""
    module = sys.modules.get("vllm.model_executor.layers.rotary_embedding")
    return module._ROPE_DICT if module is not None else {}


def strategy(module: nn.Module) -> Strategy:
    """How to run this module's post-processing without its unprocessed weights."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and type(method).__name__ not in _LEAVES_TENSORS_ALONE:
        return Strategy.REPLAY
    if current_platform.is_cpu() and getattr(getattr(module, "weight", None), "ndim", 2) > 2:
        return Strategy.REPLAY  # a convolution: packed in place, for kernels that take no other weights
    return Strategy.HIDE


def ways(modules: Iterable[nn.Module]) -> dict[str, int]:
    """How many of `modules` will be processed in which way."""
    processed = (module for module in modules if isinstance(vars(module).get("quant_method"), QuantizeMethodBase))
    return dict(Counter(strategy(module).value for module in processed))


def post_process(model: nn.Module, model_config: Any, device: torch.device) -> None:
    """vLLM's own post-processing of all modules."""
    process_weights_after_loading(model, model_config, device)


@contextmanager
def around_post_processing(
    model: nn.Module, around: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[None]:
    """While open, each quantization method of `model` processes a module inside `around(module)`.

    Hooked on the method objects, so that vLLM's own loop, which differs between versions,
    drives it.
    """
    hooked: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and id(method) not in hooked:
            hooked[id(method)] = method, vars(method).get("process_weights_after_loading")
            _wrap(method, around)
    try:
        yield
    finally:
        for method, before in hooked.values():
            if before is None:
                del method.process_weights_after_loading
            else:
                method.process_weights_after_loading = before


def _wrap(method: Any, around: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    process = method.process_weights_after_loading

    def wrapped(layer: nn.Module) -> None:
        with around(layer):
            process(layer)

    method.process_weights_after_loading = wrapped


def end_online_loading(module: nn.Module) -> None:
    """Leave a module of an online quantization method as loading would have left it.

    Such modules wrap their weight loaders to be processed as soon as they are loaded; a replay
    never loads, so the wrappers have to go.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.LAYERWISE_INFO.get(module)
    if info is None or not info.can_load():
        return
    for tensor in layerwise.get_layer_tensors(module).values():
        tensor.weight_loader = layerwise._get_original_loader(tensor)
    info.reset()


def adjust_budget(by_bytes: int, resident_since: float = 0.0) -> None:
    """Change the worker's memory budget: what it may use besides the weights that it maps.

    For an engine that announced shared weights and then has to load its own, or maps weights that it
    did not announce. No hook hands the worker to a loader, but the worker is a caller of it.

    Args:
        by_bytes: more than zero to give back, less than zero to set aside.
        resident_since: Unix time; weights that came after the worker had measured its memory are
            seen by its next measurement, and must not count twice.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        worker: Any = frame.f_locals.get("self")
        if hasattr(worker, "requested_memory") and hasattr(worker, "model_runner"):
            snapshot = getattr(worker, "init_snapshot", None)
            if resident_since <= getattr(snapshot, "timestamp", resident_since):
                worker.requested_memory += by_bytes
            return
        frame = frame.f_back


def has_external_memory_hook(request_memory: Callable[..., int]) -> bool:
    """Whether this vLLM asks loaders for weights held outside (0.32 and later)."""
    return "external_weight_memory" in inspect.signature(request_memory).parameters


def versions() -> dict[str, str]:
    """Versions that decide how weights are laid out."""
    return {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def device_kind(device: EngineDevice) -> str:
    """What two devices must have in common for one layout to fit both."""
    if device.torch_device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device.torch_device)
        return f"sm_{major}{minor} {torch.cuda.get_device_name(device.torch_device)}"
    return f"{current_platform.get_cpu_architecture()} {torch.backends.cpu.get_cpu_capability()}"


def ranks() -> dict[str, str]:
    """ "rank/size" of this worker in each parallel group that splits weights.

    Data parallelism does: mixtures of experts are split over all its ranks, also without expert parallelism.
    vLLM makes no such group for replicas of a dense model.
    """
    from vllm.distributed import parallel_state

    groups = {name: getattr(parallel_state, f"get_{name}_group")() for name in ("tp", "pp", "dp")}
    for name in ("pcp", "dcp"):
        get = getattr(parallel_state, f"get_{name}_group", None)
        if get is not None:
            groups[name] = get()
    return {name: f"{group.rank_in_group}/{group.world_size}" for name, group in groups.items()}
