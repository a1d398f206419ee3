"""Whether all of an adapter has a place in a worker's model, and fits it.

vLLM does not ask: it looks at the ends of modules' names, drops what the model does not have, and copies tensors that
are too small into a part of their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import FusedMoEWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_companion_plugin.core.adapters import Bound
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import BadRequestError

try:
    from vllm.model_executor.models.utils import StageMissingLayer
except ImportError:  # vLLM that builds all parts of every model
    StageMissingLayer = PPMissingLayer

_SHOWN = 8
"""Most modules in an error."""
_GATE_UP = ".base_layer"
"""What PEFT adds to the name of a layer's experts in one tensor for the first of their two projections."""


@dataclass(frozen=True)
class _Place:
    """Where one module of adapters goes: how wide its input and its output are, on all ranks together.

    Attributes:
        count: of experts whose A and B are in one tensor, one rank after the other; 0: no experts.
        output: None: vLLM finds out to how many of a module's parts it belongs, and raises if it is none.
    """

    input: int
    output: int | None
    count: int = 0


def check_fits(manager: Any, lora: Any, bound: Bound) -> None:
    """Raise `BadRequestError` unless all of an adapter has a place in the model, and fits there.

    What is dropped and would change nothing is passed over: modules that another rank has, or that this engine was told
    to do without, and those that were never trained, whose B is zero.

    Args:
        manager: vLLM's `LoRAModelManager`.
        lora: vLLM's `LoRAModel`, as it was read.
    """
    places = _places(manager)
    lost = [name for name, each in lora.loras.items() if name not in places and each.lora_b.any()]
    if lost:
        lost = list(_not_elsewhere(manager, lost))
    if lost:
        raise BadRequestError(
            f"{bound}: {len(lost)} of its {len(lora.loras)} modules have no place in this engine's model, and it would "
            f"be served without them: {several(lost, _SHOWN)}.",
            remedy=(
                "Publish the adapter with the names that PEFT gives for this model's checkpoint, and without modules "
                "that vLLM does not adapt. Other parts than the language model take --enable-tower-connector-lora."
            ),
        )
    passed_by = [name for name in _passed_by(manager) if name in lora.loras and lora.loras[name].lora_b.any()]
    if passed_by:
        raise BadRequestError(
            f"{bound}: attention of this engine's model computes with weights that it has made of "
            f"{several(passed_by, _SHOWN)}, so the adapter would be served without these.",
            remedy="Train the adapter without these modules.",
        )
    found = (_misfit(name, each, places.get(name), lora.rank) for name, each in lora.loras.items())
    wrong = [text for text in (*found, *_incomplete(manager, lora.loras)) if text]
    if wrong:
        raise BadRequestError(
            f"{bound} does not fit this engine's model: {several(wrong, _SHOWN, '; ')}.",
            remedy="Ask an engine of its base model for it, or train it for what this one takes.",
        )


def _places(manager: Any) -> dict[str, _Place | None]:
    """Of every module that adapters of this model may have, by the name that vLLM gives it; None: of unknown width."""
    places: dict[str, _Place | None] = {}
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, ())
        if isinstance(module, FusedMoEWithLoRA) and getattr(manager, "_enable_moe_shared_loras", False):
            places.update(dict.fromkeys(parts))  # vLLM's own form: of some tensors all experts have the same one
        elif isinstance(module, FusedMoEWithLoRA):
            places.update(_places_of_experts(name, module, parts))
        else:
            places.update(zip(parts or (name,), _places_of(module, len(parts) or 1), strict=True))
    if getattr(manager, "is_pooling_model", False):  # vLLM takes such names without the first part, too
        places |= {name.removeprefix("model."): place for name, place in places.items()}
    return places


def _passed_by(manager: Any) -> Iterator[str]:
    """Modules that belong to another one with post-processing, which makes weights of its own of theirs (MLA)."""
    used = {
        id(part)
        for module in manager.model.modules()
        if hasattr(type(module), "process_weights_after_loading")
        for part in module.children()
    }
    for name, module in manager.modules.items():
        if id(module) in used or id(getattr(module, "base_layer", None)) in used:
            yield from manager.packed_modules.get(name) or (name,)


def _places_of(module: Any, count: int) -> Sequence[_Place | None]:
    """Of the parts that a checkpoint has of a module."""
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return [_Place(module.lora_a_stacked.shape[1], module.lora_b_stacked.shape[2])]
    if isinstance(module, LogitsProcessorWithLoRA):
        return [_Place(module.lora_a_stacked.shape[-1], module.lora_b_stacked.shape[-2])]
    base = module.base_layer
    if not hasattr(base, "input_size"):  # no layer that vLLM knows as linear
        return [None] * count
    if hasattr(base, "total_num_kv_heads"):  # of which ranks may have copies
        head, value = base.head_size, getattr(base, "v_head_size", base.head_size)
        outputs = [base.total_num_heads * head, base.total_num_kv_heads * head, base.total_num_kv_heads * value]
    else:
        outputs = list(base.output_sizes) if hasattr(base, "output_sizes") else [base.output_size]
    if count == 1:
        return [_Place(base.input_size, sum(outputs))]
    if count == len(outputs):
        return [_Place(base.input_size, output) for output in outputs]
    return [_Place(base.input_size, None)] * count


def _places_of_experts(name: str, module: Any, parts: Any) -> Iterator[tuple[str, _Place]]:
    """Of a layer's experts: one by one, or all in one tensor for each projection."""
    config = module.base_layer.moe_config
    hidden = getattr(config, "hidden_dim_unpadded", None) or config.hidden_dim
    width = getattr(config, "intermediate_size_per_partition_unpadded", None) or config.intermediate_size_per_partition
    width *= module.tp_size
    up, down = _Place(hidden, width), _Place(width, hidden)
    # vLLM has one expert after the other: gate, down, up; or up, down where there is no gate.
    kinds = (up, down) if module._w13_slices == 1 and len(parts) == 2 * config.num_experts else (up, down, up)
    yield from zip(parts, itertools.cycle(kinds), strict=False)
    yield name + _GATE_UP, _Place(hidden, 2 * width, config.num_experts)
    yield name, _Place(width, hidden, config.num_experts)


def _not_elsewhere(manager: Any, names: list[str]) -> Iterator[str]:
    """Those that no other rank has, and that the engine's flags do not leave out."""
    there: set[str] = set()
    elsewhere: set[str] = set()
    for path, module in manager.model.named_modules(remove_duplicate=False):
        (elsewhere if isinstance(module, (PPMissingLayer, StageMissingLayer)) else there).add(path)
        parent, _, last = path.rpartition(".")
        there.update(f"{parent}.{part}".lstrip(".") for part in manager.packed_modules_mapping.get(last, ()))
    restricted = getattr(manager.lora_config, "target_modules", None) is not None
    for name in names:
        is_left_out = restricted and name in there and not manager._match_target_modules(name)
        if not is_left_out and not elsewhere & _parents(name):
            yield name


def _parents(name: str) -> set[str]:
    """The module itself, and all that it is in."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _misfit(name: str, weights: Any, place: _Place | None, rank: int) -> str:
    """How the tensors of one module differ from its place; empty if they do not."""
    if place is None:
        return ""
    a, b = weights.lora_a, weights.lora_b
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return f"{name} has tensors of {_shape(a)} and {_shape(b)}"
    if a.shape[1] != place.input or (place.output is not None and b.shape[0] != place.output):
        return (
            f"{name} has {a.shape[1]} inputs and {b.shape[0]} outputs, and the model {place.input} and {place.output}"
        )
    if a.dtype == torch.float16 and not all(bound.isfinite() for each in (a, b) for bound in each.aminmax()):
        return f"{name} has values that are infinite in {a.dtype}, in which this engine computes adapters"
    if place.count and a.shape[0] != rank * place.count:
        return f"{name} has {a.shape[0]} ranks, and the model {place.count} experts with {rank} each"
    return ""


def _incomplete(manager: Any, names: Collection[str]) -> Iterator[str]:
    """Layers of which some projections of experts are there, and not all, which vLLM asserts."""
    for name, module in manager.modules.items():
        if not isinstance(module, FusedMoEWithLoRA) or module.base_layer.moe_config.moe_parallel_config.use_ep:
            continue  # where experts are spread over ranks, each rank has read those of its own
        parts = manager.packed_modules.get(name, ())
        missing = [part for part in parts if part not in names]
        if 0 < len(missing) < len(parts):
            yield f"{several(missing, 3)} is missing of {name}, and vLLM adapts all projections of all experts, or none"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
