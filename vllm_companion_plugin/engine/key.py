"""The key of an entry: everything that decides the bytes of a rank's tensors.

Computed before the model is built, because building changes vLLM's config objects. What is
left out of the key (context length, batch limits, scheduling) cannot change shared tensors;
if it ever did, parity would refuse the entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vllm_companion_plugin.engine import compat
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.types import EntryKey, model_name

CHECKPOINT = "checkpoint"
"""The field that says which files were read; all others say what was made of them."""

VARIANT = "variant"
"""The field that says how a model differs from the one that was published first under an otherwise equal key."""

MAX_VARIANTS = 4
"""Differences that one key names; an engine that is refused once more loads alone."""

MANIFEST_VERSION = 4
"""Raised when capture or packing changes in a way that an older manifest would fail."""

# Switches that choose kernels or layouts.
_ENVIRONMENT = (
    "VLLM_BATCH_INVARIANT",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER",
    "VLLM_B12X_MOE_FP4_FORCE_A16",
    "VLLM_CPU_INT4_W4A8",
    "VLLM_CPU_SGL_KERNEL",
    "VLLM_DEEPEPLL_NVFP4_DISPATCH",
    "VLLM_DISABLED_KERNELS",
    "VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE",
    "VLLM_GDN_DECODE_KERNEL",
    "VLLM_MARLIN_INPUT_DTYPE",
    "VLLM_MOE_SKIP_PADDING",
    "VLLM_MOE_USE_DEEP_GEMM",
    "VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD",
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD",
    "VLLM_PP_LAYER_PARTITION",
    "VLLM_TEST_FORCE_FP8_MARLIN",
    "VLLM_USE_DEEP_GEMM",
    "VLLM_USE_DEEP_GEMM_E8M0",
    "VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES",
    "VLLM_USE_FLASHINFER_MOE_INT4",
    "VLLM_ZENTORCH_WEIGHT_PREPACK",
)
_ENVIRONMENT_PREFIXES = ("VLLM_HUMMING_",)

_MODEL_FIELDS = (
    "dtype",
    "quantization",
    "quantization_config",
    "model_impl",
    "runner_type",
    "convert_type",
    "config_format",
    "code_revision",
    "is_attention_free",
    "word_embeddings_untied_by_checkpoint",
    "pooler_config",
)
_MULTIMODAL_FIELDS = ("language_model_only", "limit_per_prompt", "mm_encoder_only", "mm_encoder_tp_mode")
_PARALLEL_FIELDS = (
    "enable_eplb",
    "enable_expert_parallel",
    "expert_placement_strategy",
    "all2all_backend",
    "enable_ep_weight_filter",
    "dcp_q_replicate",
    "enable_hc_sp",
)
_KERNEL_FIELDS = ("moe_backend", "linear_backend", "linear_backend_per_quant", "monokernel")
_CACHE_FIELDS = ("cache_dtype", "kv_cache_dtype_skip_layers", "mamba_cache_dtype", "mamba_ssm_cache_dtype")
_SPECULATIVE_FIELDS = (
    "method",
    "num_speculative_tokens",
    "quantization",
    "draft_tensor_parallel_size",
    "parallel_drafting",
    "use_heterogeneous_vocab",
    "attention_backend",
    "kv_cache_dtype",
    "moe_backend",
)
_LONGEST = 100
_LONGEST_DIFFERENCE = 400
# Where the checkpoint was found is not what it contains.
_HF_NAMES = ("_name_or_path", "transformers_version", "_commit_hash")


def compute(
    vllm_config: Any,
    model_config: Any,
    device: compat.EngineDevice,
    source_format: str,
    source: Path | None,
    content: dict[str, str],
) -> EntryKey:
    """The key of this rank's entry.

    Args:
        source: the checkpoint; None for a format that reads none.
        content: identity of each of its files.
    """
    ranks = compat.ranks()
    parallel = vllm_config.parallel_config
    fields = {
        "manifest": str(MANIFEST_VERSION),
        "source_format": source_format,
        CHECKPOINT: _digest(content),
        "stage": device.stage.value,
        "device": compat.device_kind(device),
        "lora": str(vllm_config.lora_config is not None),
        "attention_backend": _text(getattr(getattr(vllm_config, "attention_config", None), "backend", None)),
        "redundant_experts": _text(getattr(getattr(parallel, "eplb_config", None), "num_redundant_experts", None)),
    }
    fields |= _model_fields(model_config)
    fields |= {f"version.{name}": value for name, value in compat.versions().items()}
    fields |= {f"rank.{name}": value for name, value in ranks.items()}
    fields |= _pick("parallel", parallel, _PARALLEL_FIELDS)
    if getattr(model_config, "is_hybrid", False):  # gated delta nets keep the number, and decide no tensor by it
        fields |= _pick("speculative", vllm_config.speculative_config, ("num_speculative_tokens",))
    lora = dataclasses.asdict(vllm_config.lora_config) if vllm_config.lora_config is not None else {}
    # All of them: some are read when a model is built, and which ones changes between versions.
    fields |= {f"lora.{name}": _text(value) for name, value in lora.items()}
    fields |= _pick("kernel", getattr(vllm_config, "kernel_config", None), _KERNEL_FIELDS)
    fields |= _pick("cache", vllm_config.cache_config, _CACHE_FIELDS)
    fields |= {
        f"env.{name}": value
        for name, value in sorted(os.environ.items())
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    split = [f"{name}{value}" for name, value in ranks.items() if not value.endswith("/1")]
    rank = " ".join(split) or "single"
    return _key(model_config, "target", rank, fields, source, content)


def variant(refused: EntryKey, where: str, here: str) -> EntryKey:
    """The key of a model that was refused: its own value at one place sets it apart.

    Raises:
        NotShareableError: it was refused so often that there is no end to be seen.
    """
    before = refused.fields.get(VARIANT, "")
    if before.count("; ") + 1 >= MAX_VARIANTS:
        raise NotShareableError(f"it differs from {MAX_VARIANTS} published ones: {before}")
    difference = f"{where} is {here or 'different'}"[:_LONGEST_DIFFERENCE]
    fields = {**refused.fields, VARIANT: f"{before}; {difference}" if before else difference}
    return dataclasses.replace(refused, id=_digest(fields), fields=fields)


def draft_fields(vllm_config: Any, draft_config: Any) -> dict[str, str]:
    """What a draft's own configuration adds to its key. To be asked before the target is built."""
    return _pick("speculative", vllm_config.speculative_config, _SPECULATIVE_FIELDS) | _model_fields(draft_config)


def compute_draft(
    fields: dict[str, str],
    draft_config: Any,
    target: EntryKey,
    source_format: str,
    source: Path | None,
    content: dict[str, str],
) -> EntryKey:
    """The key of a draft's entry: `draft_fields`, its checkpoint (with MTP, the target's), and all of the target's.

    Which config reaches the draft's loader differs between methods and versions of vLLM; each is made of these.
    """
    fields = fields | {f"target.{name}": value for name, value in target.fields.items()}
    fields |= {"source_format": source_format, CHECKPOINT: _digest(content)}
    return _key(draft_config, "draft", target.rank, fields, source, content)


def _key(
    model_config: Any, role: str, rank: str, fields: dict[str, str], source: Path | None, content: dict[str, str]
) -> EntryKey:
    place = os.path.abspath(source) if source else ""
    return EntryKey(_digest(fields), model_name(model_config.model), role, rank, fields, place, content)


def _model_fields(model_config: Any) -> dict[str, str]:
    fields = {f"hf.{name}": _short(value) for name, value in _hf_config(model_config.hf_config).items()}
    fields |= _pick("model", model_config, _MODEL_FIELDS)
    return fields | _pick("multimodal", getattr(model_config, "multimodal_config", None), _MULTIMODAL_FIELDS)


def _hf_config(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    return {name: value for name, value in values.items() if name not in _HF_NAMES}


def _pick(prefix: str, config: Any, names: tuple[str, ...]) -> dict[str, str]:
    return {f"{prefix}.{name}": _text(getattr(config, name)) for name in names if hasattr(config, name)}


def _text(value: Any) -> str:
    """Canonical text: JSON where possible, so that dict order does not matter."""
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    """Canonical text that is short enough for a message."""
    text = _text(value)
    return text if len(text) <= _LONGEST else f"sha256 {_digest(value)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()
