"""A LoRA adapter as PEFT has it, made such that every version of vLLM computes the same with it.

Versions of vLLM differ in what they read of PEFT's configuration: some know nothing of ranks and scalings that differ
between modules, and take another scaling without saying so. So the scaling of each module is folded into a copy of its
B, and the configuration says that there is nothing to scale. What no LoRA of vLLM computes is refused by name.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import nn

from vllm_companion_plugin.core.text import printable, several
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
_OUTPUT = "lm_head"
"""What PEFT and vLLM take for an output embedding."""
_PATTERN = r"(.*\.)?({})$"
"""How PEFT matches a key of its patterns with a module's name."""
_ALPHA = 8
"""`lora_alpha` where PEFT's configuration says nothing."""
_COMPUTED_IN = (torch.bfloat16, torch.float16)
"""Narrow types that engines compute adapters in; a base may be packed in others."""
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
        dtype: narrower than its tensors: that of a base on the memory that engines serve from, so they compute in it;
            None: nothing says what they compute in, or it is not narrower.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    dtype: torch.dtype | None = None


@dataclass
class _Module:
    """Both tensors of one module, as far as they were given, and PEFT's own scaling if that is known."""

    sides: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    scaling: float | None = None


def canonical(
    weights: nn.Module | Mapping[str, torch.Tensor], config: Any = None, *, label: str = "The adapter"
) -> Adapter:
    """The adapter of a PEFT model, or of its tensors by name. Nothing that is given is written to.

    Args:
        weights: a `PeftModel`, whose active adapter is taken; or tensors as `get_peft_model_state_dict` or a saved
            adapter has them. Of FSDP, all ranks take part.
        config: a `LoraConfig`, or a dict of its fields; of a `PeftModel`, None.
        label: of the adapter, for errors.

    Raises:
        BadRequestError: what vLLM's LoRA cannot compute, tensors that are not those of an adapter, or fields that say
            nothing; all of it.
    """
    scalings: dict[str, float] = {}
    dtype = None
    if isinstance(weights, nn.Module):
        weights, own, scalings, dtype = _of_model(weights, label)
        config = own if config is None else config
    if not isinstance(weights, Mapping):
        raise BadRequestError(
            f"{label} is given as {type(weights).__name__}.", remedy="Give a PeftModel, or its tensors by their names."
        )
    fields = _fields_of(config, label)
    problems = list(_problems_of(fields))
    modules = _modules_of(weights, scalings, problems)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    factors: dict[str, float] = {}
    for name, module in modules.items():
        rank, scaling = _rank_and_scaling(fields, name)
        problem = _misfit(name, module, rank)
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
    if problems:
        raise _refused(problems, label)
    tensors |= _scaled({name: tensors[name] for name, factor in factors.items() if factor != 1}, factors)
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
    is_narrower = dtype is not None and all(each.itemsize > dtype.itemsize for each in tensors.values())
    return Adapter(tensors, plain, dtype if is_narrower else None)


def check_config(config: Any, label: str) -> None:
    """Raise `BadRequestError` if no adapter of this configuration can be published, as of `canonical`."""
    if problems := list(_problems_of(_fields_of(config, label))):
        raise _refused(problems, label)


def _refused(problems: Sequence[str], label: str) -> BadRequestError:
    return BadRequestError(
        f"{label} cannot be served by vLLM as LoRA: {several(problems, _SHOWN, '; ')}.",
        remedy="Train it without, or convert it to plain LoRA with PEFT. Of a model's whole state, give what "
        "get_peft_model_state_dict takes of it.",
    )


def _of_model(
    model: nn.Module, label: str
) -> tuple[dict[str, torch.Tensor], Any, dict[str, float], torch.dtype | None]:
    """Tensors, configuration and scalings of a PEFT model's active adapter, and the dtype as of `Adapter`."""
    configs = getattr(model, "peft_config", None)
    adapter = getattr(model, "active_adapter", None)
    adapter = adapter() if callable(adapter) else adapter
    if not isinstance(configs, Mapping) or not isinstance(adapter, str) or adapter not in configs:
        raise BadRequestError(
            f"{label}: {type(model).__name__} is no PEFT model with one active adapter.",
            remedy="Give a PeftModel after set_adapter(NAME), or the tensors and the configuration.",
        )
    its = re.compile(rf".+\.{_OF_ADAPTER}\.{re.escape(adapter)}(\..+)?")
    tensors: dict[str, torch.Tensor] = {}
    scalings: dict[str, float] = {}
    dtypes: set[torch.dtype | None] = set()
    has_hooks = False
    # A loop of our own: `named_modules` takes ten times as long for thousands, of which few are the adapter's.
    waiting: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    while waiting:
        path, module, is_inside = waiting.pop()
        fields = module.__dict__
        scaling = fields.get("scaling")
        if scaling is not None and isinstance(scaling, Mapping) and adapter in scaling:
            scalings[path] = float(scaling[adapter])
            dtypes.add(_served_dtype(fields["_modules"].get("base_layer")))
            active = list(getattr(module, "active_adapters", (adapter,)))
            if active != [adapter]:
                raise BadRequestError(
                    f"{label}: {path} computes with the adapters {active}, and the model says that "
                    f"{adapter} is active.",
                    remedy="Choose the one to publish by set_adapter(NAME) of the PeftModel.",
                )
            if (variant := getattr(module, "lora_variant", {}).get(adapter)) is not None:
                raise BadRequestError(
                    f"{label}: {path} computes it in PEFT's way of {type(variant).__name__}, which vLLM does not.",
                    remedy="Train plain LoRA.",
                )
        if fields["_state_dict_hooks"] or fields["_state_dict_pre_hooks"]:
            has_hooks = True
        for kept in (fields["_parameters"], fields["_buffers"]):
            if kept and (is_inside or adapter in kept):
                passing = fields["_non_persistent_buffers_set"]
                for key, tensor in kept.items():
                    if tensor is not None and key not in passing and its.fullmatch(name := f"{path}.{key}"):
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
    return tensors, configs[adapter], scalings, dtypes.pop() if len(dtypes) == 1 else None


def _served_dtype(base: nn.Module | None) -> torch.dtype | None:
    """Of a layer whose parameters view the memory that engines serve from; None of others."""
    parameters = base._parameters.values() if base is not None else ()
    # As `training.from_companion` makes them.
    found = next((each.dtype for each in parameters if each is not None and hasattr(each, "companion_name")), None)
    return found if found in _COMPUTED_IN else None


def _fields_of(config: Any, label: str) -> Mapping[str, Any]:
    """The fields of PEFT's configuration. A scaling follows from them."""
    fields = config.to_dict() if hasattr(config, "to_dict") and not isinstance(config, type) else config
    if fields is None:
        raise BadRequestError(
            f"{label}: its tensors say nothing of its scaling without PEFT's configuration, with r and lora_alpha.",
            remedy="Give the LoraConfig, or the fields of adapter_config.json, as `config`.",
        )
    problems = (
        list(_malformed(fields)) if isinstance(fields, Mapping) else [f"it is {_shown(fields)}, which has no fields"]
    )
    if problems:
        raise BadRequestError(
            f"{label} has a configuration from which no scaling of LoRA follows: {several(problems, _SHOWN, '; ')}.",
            remedy="Correct PEFT's LoraConfig, or adapter_config.json.",
        )
    found: Mapping[str, Any] = fields
    return found


def _malformed(fields: Mapping[str, Any]) -> Iterator[str]:
    kind = getattr(fields.get("peft_type"), "value", fields.get("peft_type")) or "LORA"
    if kind != "LORA":
        yield f"it is no LoRA but {_shown(kind)}"
        return
    if not _is_rank(rank := fields.get("r")):
        yield f"r is {_shown(rank)}, and not a positive integer"
    if not _is_factor(alpha := fields.get("lora_alpha", _ALPHA)):
        yield f"lora_alpha is {_shown(alpha)}, and not a finite number"
    if not isinstance(by_root := fields.get("use_rslora"), bool | None):
        yield f"use_rslora is {_shown(by_root)}, and neither true nor false"
    for name, is_right, what in (
        ("rank_pattern", _is_rank, "a positive integer"),
        ("alpha_pattern", _is_factor, "a finite number"),
    ):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, Mapping):
            yield f"{name} is {_shown(patterns)}, and not an object of patterns"
            continue
        for pattern, value in patterns.items():
            if not is_right(value):
                yield f"{name} has {_shown(value)} for {_shown(pattern)}, and not {what}"
            try:
                re.compile(_PATTERN.format(pattern))
            except re.error as error:
                yield f"{name} has {_shown(pattern)}, which is no regular expression ({error})"


def _is_rank(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 < int(value) <= sys.maxsize


def _is_factor(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer above all floats
        return False


def _shown(value: Any) -> str:
    return printable(repr(value)[:80])


def _problems_of(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, what in _REFUSED.items():
        if fields.get(name):
            yield what
    if fields.get("bias", "none") != "none":
        yield f"trained biases (bias={fields['bias']!r})"
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and str(start).lower() not in _ORDINARY_STARTS:
        yield f"init_lora_weights={start!r}, which has changed the base model's weights"


def _modules_of(
    weights: Mapping[str, torch.Tensor], scalings: Mapping[str, float], problems: list[str]
) -> dict[str, _Module]:
    """The tensors by module, with names that say nothing of the adapter's name. What is none goes to `problems`."""
    modules: dict[str, _Module] = {}
    adapters: set[str] = set()
    for raw, shard in weights.items():
        name, found = _parsed(str(raw))
        if found is None and _is_of_base(str(raw), weights):
            continue
        is_embedding = found is not None and "embedding" in found["mark"]
        if found is None or is_embedding == bool(found["weight"]) or not isinstance(shard, torch.Tensor):
            problems.append(f"{name}, which is no tensor of LoRA")
            continue
        gather = getattr(shard, "full_tensor", None)
        tensor = (shard if gather is None else gather()).detach()
        ending = "" if is_embedding else ".weight"
        # Once for each PEFT model around another one. vLLM drops all of them, too.
        path = found["module"]
        while path.startswith(_PREFIX):
            path = path.removeprefix(_PREFIX)
        module = modules.setdefault(path, _Module())
        if found["mark"] in module.sides:
            problems.append(f"{name}, which is there twice")
        begins = _PREFIX if found["module"].startswith(_PREFIX) else ""
        module.sides[found["mark"]] = f"{begins}{path}.{found['mark']}{ending}", tensor
        module.scaling = scalings.get(raw[: len(raw) - (len(name) - len(found["module"]))])
        adapters.add(found["adapter"] or "")
    if len(adapters) > 1:
        problems.append(f"tensors of {len(adapters)} adapters: {several(sorted(adapters), _SHOWN)}")
    return modules


@functools.lru_cache(maxsize=1 << 14)
def _parsed(raw: str) -> tuple[str, re.Match[str] | None]:
    """A tensor's name without what wrappers put into it, and its parts. All generations have the same names."""
    name = _WRAPPED.sub("", raw)
    return name, _TENSOR.fullmatch(name)


def _is_of_base(name: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether this is an embedding's own weight, beside the adapter of it."""
    if not name.endswith(_OF_BASE):
        return False
    path = name.removesuffix(_OF_BASE)
    is_output = path.rpartition(".")[2] == _OUTPUT and f"{path}.lora_A.weight" in weights
    return is_output or f"{path}.lora_embedding_A" in weights


def _misfit(name: str, module: _Module, rank: int) -> str:
    """What is wrong with a module's tensors, which the configuration says are of this rank; empty if nothing is."""
    marks = sorted(module.sides)
    if len(marks) != 2 or _PAIRS.get(marks[0]) != marks[1]:
        return f"{name} has {' and '.join(marks)} alone"
    [a, b] = [module.sides[mark][1] for mark in marks]
    if a.ndim != 2 or b.ndim != 2:
        return f"{name} has tensors of {a.ndim} and {b.ndim} dimensions, as no linear layer and no embedding has"
    there = a.shape[0], b.shape[1]
    if not a.numel() or not b.numel():
        return f"{name} has tensors of {list(a.shape)} and {list(b.shape)}, without any values"
    if there[0] != there[1] or (there[0] % rank if _is_fused(name) else there[0] != rank):
        return f"{name} has A of rank {there[0]} and B of rank {there[1]}, and its configuration says {rank}"
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"{name} has tensors of {a.dtype} and {b.dtype}"
    if a.is_meta or b.is_meta or a.layout != torch.strided or b.layout != torch.strided:
        return f"{name} has tensors without values of their own, on the meta device or sparse"
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
    else:
        module += _parameter_of(module, fields.get("target_parameters") or ())
    rank = int(_matching(fields.get("rank_pattern"), module, fields["r"]))
    alpha = float(_matching(fields.get("alpha_pattern"), module, fields.get("lora_alpha", _ALPHA)))
    return rank, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _parameter_of(module: str, target_parameters: Sequence[str]) -> str:
    """What PEFT adds to a module's name where it adapts a parameter by that parameter's own name."""
    for name in target_parameters:
        owner, dot, parameter = name.rpartition(".")
        if f".{module}".endswith(f".{owner}"):
            return dot + parameter
    return ""


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(_PATTERN.format(key), module) is not None:
            return value
    return otherwise


@torch.no_grad()
def _scaled(tensors: Mapping[str, torch.Tensor], factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Copies, multiplied in float32. By few kernels: one for each of hundreds takes milliseconds.

    Takes `AT_ONCE_BYTES`, or as much as the largest tensor, besides the copies.
    """
    scaled: dict[str, torch.Tensor] = {}
    by_kind: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(name)
    for (_, dtype), names in by_kind.items():
        for some in in_groups(names, lambda name: tensors[name].numel() * 4, AT_ONCE_BYTES):
            sizes = [tensors[name].numel() for name in some]
            joined = torch.cat([tensors[name].reshape(-1) for name in some]).to(torch.float32)
            torch._foreach_mul_(list(torch.split(joined, sizes)), [factors[name] for name in some])
            parts = torch.split(joined.to(dtype), sizes)
            scaled.update((name, part.view(tensors[name].shape)) for name, part in zip(some, parts, strict=True))
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
