"""A LoRA adapter as PEFT has it, made such that every version of vLLM computes the same with it.

Versions of vLLM differ in what they read of PEFT's configuration: some know nothing of ranks and scalings that differ
between modules, and take another scaling without saying so. So the scaling of each module is folded into a copy of its
B, and the configuration says that there is nothing to scale. What no LoRA of vLLM computes is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import BadRequestError

T = TypeVar("T")

AT_ONCE_BYTES = 64 << 20
"""Of copies that are needed for a moment only."""
_SHOWN = 8
"""Most problems in an error."""
_MARKS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B"
_TENSOR = re.compile(rf"(?P<module>.+)\.(?P<mark>{_MARKS})(\.(?P<adapter>[^.]+))??(?P<weight>\.weight)?")
_OF_ADAPTER = r"(lora_\w+|modules_to_save|trainable_tokens_\w+|\w*_lora_\w+)"
_PREFIX = "base_model.model."
_WRAPPED = re.compile(r"(^module\.)|(?<![^.])_orig_mod\.")
"""What DDP and `torch.compile` put into names."""
_OF_BASE = ".base_layer.weight"
"""PEFT saves an embedding's own weight beside the adapter of it. vLLM leaves it alone, too."""
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_ORDINARY_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Values of `init_lora_weights` that leave the base model as it is."""
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of LoRA (lora_bias)",
    "modules_to_save": "modules_to_save",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
    "arrow_config": "Arrow (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter whose scaling is 1.

    Attributes:
        tensors: by PEFT's name without the adapter's. A and B of one module; those that were scaled are copies.
        config: as PEFT writes it.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


@dataclass
class _Module:
    """Both tensors of one module, as far as they were given, and PEFT's own scaling if that is known."""

    sides: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    scaling: float | None = None


def canonical(weights: nn.Module | Mapping[str, torch.Tensor], config: Any = None, *, check_finite: bool) -> Adapter:
    """The adapter of a PEFT model, or of its tensors by name. Nothing that is given is written to.

    Args:
        weights: a `PeftModel`, whose active adapter is taken; or tensors as `get_peft_model_state_dict` or a saved
            adapter has them. Of FSDP, all ranks take part.
        config: a `LoraConfig`, or a dict of its fields; of a `PeftModel`, None.
        check_finite: refuse tensors with NaN or infinity.

    Raises:
        BadRequestError: what vLLM's LoRA cannot compute, or tensors that are not those of an adapter; all of it.
    """
    scalings: dict[str, float] = {}
    if isinstance(weights, nn.Module):
        weights, own, scalings = _of_model(weights)
        config = own if config is None else config
    fields = _fields_of(config)
    problems = list(_problems_of(fields))
    modules = _modules_of(weights, scalings, problems)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    factors: dict[str, float] = {}
    for name, module in modules.items():
        rank, scaling = _rank_and_scaling(fields, name)
        problem = _misfit(name, module, rank, check_finite)
        if problem:
            problems.append(problem)
            continue
        [(a_name, a), (b_name, b)] = [module.sides[mark] for mark in sorted(module.sides)]
        ranks[name] = rank
        tensors[a_name], tensors[b_name] = a, b
        factors[b_name] = scaling if module.scaling is None else module.scaling
        if not math.isfinite(factors[b_name]):
            problems.append(f"{name} has a scaling of {factors[b_name]}")
        if _is_fused(name) and _other_experts(name) not in modules:
            problems.append(f"{name} without {_other_experts(name)}: vLLM takes both projections of experts, or none")
    if not modules and not problems:
        problems.append("it has no tensors of LoRA")
    if any(_is_fused(name) and rank != max(ranks.values()) for name, rank in ranks.items()):
        problems.append("experts of one tensor have another rank than other modules")
    _refuse(problems)
    scaled = _scaled({name: tensors[name] for name, factor in factors.items() if factor != 1}, factors)
    if check_finite:  # what was finite may be no more
        _refuse([f"{name} has values that are not finite" for name, each in scaled.items() if not _is_finite(each)])
    tensors |= scaled
    rank = max(ranks.values())
    plain = {
        "peft_type": "LORA",
        "task_type": fields.get("task_type"),
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return Adapter(tensors, plain)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise BadRequestError(
            f"The adapter cannot be served by vLLM as LoRA: {several(problems, _SHOWN, '; ')}.",
            remedy="Train it without, or convert it to plain LoRA with PEFT.",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _of_model(model: nn.Module) -> tuple[dict[str, torch.Tensor], Any, dict[str, float]]:
    """Tensors, configuration and scalings of a PEFT model's active adapter."""
    configs = getattr(model, "peft_config", None)
    adapter = getattr(model, "active_adapter", None)
    adapter = adapter() if callable(adapter) else adapter
    if not isinstance(configs, Mapping) or not isinstance(adapter, str) or adapter not in configs:
        raise BadRequestError(
            f"{type(model).__name__} is no PEFT model with one active adapter.",
            remedy="Give a PeftModel after set_adapter(NAME), or the tensors and the configuration.",
        )
    its = re.compile(rf".+\.{_OF_ADAPTER}\.{re.escape(adapter)}(\..+)?")
    tensors: dict[str, torch.Tensor] = {}
    scalings: dict[str, float] = {}
    has_hooks = False
    # A loop of our own: `named_modules` takes ten times as long for thousands, of which few are the adapter's.
    waiting: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    while waiting:
        path, module, is_inside = waiting.pop()
        fields = module.__dict__
        scaling = fields.get("scaling")
        if scaling is not None and isinstance(scaling, Mapping) and adapter in scaling:
            scalings[path] = float(scaling[adapter])
            active = list(getattr(module, "active_adapters", (adapter,)))
            if active != [adapter]:
                raise BadRequestError(
                    f"{path} computes with the adapters {active}, and the model says that {adapter} is active.",
                    remedy="Choose the one to publish by set_adapter(NAME) of the PeftModel.",
                )
        if fields["_state_dict_hooks"] or fields["_state_dict_pre_hooks"]:
            has_hooks = True
        for kind in ("_parameters", "_buffers"):
            kept = fields[kind]
            if not kept or not (is_inside or adapter in kept):
                continue
            for key, tensor in kept.items():
                is_kept = tensor is not None and key not in fields["_non_persistent_buffers_set"]
                if is_kept and its.fullmatch(name := f"{path}.{key}"):
                    tensors[name] = tensor
        for key, child in fields["_modules"].items():
            if child is not None:
                waiting.append((f"{path}.{key}" if path else key, child, is_inside or key == adapter))
    if has_hooks:  # as of FSDP, which then says what the tensors are, and wraps what has their scaling
        tensors = {name: tensor for name, tensor in model.state_dict().items() if its.fullmatch(name)}
        for path, module in model.named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, Mapping) and adapter in scaling:
                scalings[path] = float(scaling[adapter])
    return tensors, configs[adapter], scalings


def _fields_of(config: Any) -> Mapping[str, Any]:
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping) or not isinstance(fields.get("r"), int) or fields["r"] < 1:
        raise BadRequestError(
            "An adapter's tensors say nothing of its scaling without PEFT's configuration, with r and lora_alpha.",
            remedy="Give the LoraConfig, or the fields of adapter_config.json, as `config`.",
        )
    return fields


def _problems_of(fields: Mapping[str, Any]) -> Iterator[str]:
    kind = getattr(fields.get("peft_type"), "value", fields.get("peft_type")) or "LORA"
    if kind != "LORA":
        yield f"it is no LoRA but {kind}"
    for name, what in _REFUSED.items():
        if fields.get(name):
            yield what
    if fields.get("bias", "none") != "none":
        yield f"trained biases (bias={fields['bias']!r})"
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _ORDINARY_STARTS:
        yield f"init_lora_weights={start!r}, which has changed the base model's weights"


def _modules_of(
    weights: Mapping[str, torch.Tensor], scalings: Mapping[str, float], problems: list[str]
) -> dict[str, _Module]:
    """The tensors by module, with names that say nothing of the adapter's name. What is none goes to `problems`."""
    modules: dict[str, _Module] = {}
    adapters: set[str] = set()
    for raw, shard in weights.items():
        name = _WRAPPED.sub("", raw)
        found = _TENSOR.fullmatch(name)
        if found is None and f"{raw.removesuffix(_OF_BASE)}.lora_embedding_A" in weights:
            continue
        is_embedding = found is not None and "embedding" in found["mark"]
        if found is None or is_embedding == bool(found["weight"]) or not isinstance(shard, torch.Tensor):
            problems.append(f"{name}, which is no tensor of LoRA")
            continue
        gather = getattr(shard, "full_tensor", None)
        tensor = (shard if gather is None else gather()).detach()
        ending = "" if is_embedding else ".weight"
        module = modules.setdefault(found["module"].removeprefix(_PREFIX), _Module())
        if found["mark"] in module.sides:
            problems.append(f"{name}, which is there twice")
        module.sides[found["mark"]] = f"{found['module']}.{found['mark']}{ending}", tensor
        module.scaling = scalings.get(raw[: len(raw) - (len(name) - len(found["module"]))])
        adapters.add(found["adapter"] or "")
    if len(adapters) > 1:
        problems.append(f"tensors of {len(adapters)} adapters: {several(sorted(adapters), _SHOWN)}")
    return modules


def _misfit(name: str, module: _Module, rank: int, check_finite: bool) -> str:
    """What is wrong with a module's tensors, which the configuration says are of this rank; empty if nothing is."""
    marks = sorted(module.sides)
    if len(marks) != 2 or _PAIRS.get(marks[0]) != marks[1]:
        return f"{name} has {' and '.join(marks)} alone"
    [a, b] = [module.sides[mark][1] for mark in marks]
    if a.ndim != 2 or b.ndim != 2:
        return f"{name} has tensors of {a.ndim} and {b.ndim} dimensions, as no linear layer and no embedding has"
    there = a.shape[0], b.shape[1]
    if there[0] != there[1] or not there[0] or (there[0] % rank if _is_fused(name) else there[0] != rank):
        return f"{name} has A of rank {there[0]} and B of rank {there[1]}, and its configuration says {rank}"
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"{name} has tensors of {a.dtype} and {b.dtype}"
    if check_finite and not (_is_finite(a) and _is_finite(b)):
        return f"{name} has values that are not finite"
    return ""


def _is_fused(module: str) -> bool:
    """Whether PEFT has all experts of a layer in one tensor of this module, one rank after the other."""
    return module.endswith((".experts", ".experts.base_layer"))


def _other_experts(module: str) -> str:
    """Where PEFT has the other projection of the experts that are fused in `module`."""
    return module.removesuffix(".base_layer") if module.endswith(".base_layer") else f"{module}.base_layer"


def _rank_and_scaling(fields: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What PEFT takes for a module: the first pattern that its name ends with counts."""
    # PEFT matches the names of the experts' parameters, which it calls otherwise when it saves them.
    if module.endswith(".experts.base_layer"):
        module = module.removesuffix(".base_layer") + ".gate_up_proj"
    elif module.endswith(".experts"):
        module += ".down_proj"
    rank = int(_matching(fields.get("rank_pattern"), module, fields["r"]))
    alpha = float(_matching(fields.get("alpha_pattern"), module, fields.get("lora_alpha", 8)))
    return rank, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module) is not None:
            return value
    return otherwise


def _scaled(tensors: Mapping[str, torch.Tensor], factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Copies, multiplied in float32. By few kernels: one for each of hundreds takes milliseconds.

    Takes `AT_ONCE_BYTES`, or as much as the largest tensor, besides the copies.
    """
    scaled: dict[str, torch.Tensor] = {}
    by_kind: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(name)
    for names in by_kind.values():
        for some in in_groups(names, lambda name: tensors[name].numel() * 4, AT_ONCE_BYTES):
            copies = [tensors[name].to(torch.float32, copy=True) for name in some]
            torch._foreach_mul_(copies, [factors[name] for name in some])
            scaled.update((name, each.to(tensors[name].dtype)) for name, each in zip(some, copies, strict=True))
    return scaled


def in_groups(each: Sequence[T], size_of: Callable[[T], int], most: int) -> Iterator[Sequence[T]]:
    """Parts of a sequence, each of at most that size in all, or one."""
    begin = size = 0
    for number, one in enumerate(each):
        size += size_of(one)
        if size > most and number > begin:
            yield each[begin:number]
            begin, size = number, size_of(one)
    if begin < len(each):
        yield each[begin:]
