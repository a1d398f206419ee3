"""The part of vLLM's configuration that decides the bytes of weights: all but the fields listed here with a reason.

vLLM gets new fields with every release. The key holds each unknown field, so engines that differ in such a field do not
share. A field listed here was found to leave the bytes alone. What such a field puts into attributes of a model belongs
to each engine (`tree`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from vllm_companion_plugin.errors import NotShareableError

_LONGEST = 100
_MOST_NAMES = 64
_DEEPEST = 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# Names of configurations ("scheduler") and of their fields ("model.seed") that the key leaves out, by the reason.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "it is what the key has by itself": (
        *("model.hf_config", "model.hf_text_config", "model.hf_overrides", "model.model_arch_config"),
        *("model.runner", "model.convert", "model.multimodal_config", "model.config_updated", "model.revision"),
        *("model.trust_remote_code", "quant", "device", "load.load_format", "load.model_loader_extra_config"),
        *("parallel.pipeline_parallel_size", "parallel.tensor_parallel_size", "parallel.world_size", "parallel.rank"),
        *("parallel.prefill_context_parallel_size", "parallel.decode_context_parallel_size"),
        *("parallel.data_parallel_size", "parallel.data_parallel_rank", "parallel.data_parallel_index"),
        *("lora", "speculative"),
    ),
    "it says where files are, of which the key has the content": (
        *("model.model", "model.model_weights", "model.hf_config_path", "model.tokenizer", "model.tokenizer_revision"),
        "load.download_dir",
    ),
    "it limits requests, memory or time": (
        *("scheduler", "model.max_model_len", "model.spec_target_max_model_len", "model.original_max_model_len"),
        *("cache.block_size", "cache.user_specified_block_size", "cache.gpu_memory_utilization", "cache.swap_space"),
        *("cache.num_gpu_blocks", "cache.num_cpu_blocks", "cache.num_gpu_blocks_override", "cache.cpu_offload_gb"),
        *("cache.kv_cache_memory_bytes", "cache.kv_cache_size_tokens", "cache.kv_cache_max_concurrency"),
        *("cache.effective_attention_block_size", "cache.hash_block_size", "cache.cache_hit_alignment_tokens"),
        *("cache.mamba_block_size", "cache.user_specified_mamba_block_size", "cache.mamba_page_size_padded"),
        *("cache.skip_page_size_padded", "cache.replayssm_buffer_len", "shutdown_timeout", "performance_mode"),
        *("model.pooler_config.max_embed_len", "model.pooler_config.enable_chunked_processing", "model.max_logprobs"),
        *("attention.flash_attn_max_num_splits_for_cuda_graph", "attention.tq_max_kv_splits_for_cuda_graph"),
        *("attention.sparse_mla_prefill_workspace_factor", "attention.tokenspeed_mla_min_split_kv"),
        *("parallel.distributed_timeout_seconds", "parallel.cpu_distributed_timeout_seconds"),
        *("parallel.dbo_decode_token_threshold", "parallel.dbo_prefill_token_threshold"),
        *("parallel.max_parallel_loading_workers", "parallel.dp_sync_interval", "parallel.elastic_ep_max_dp_size"),
        *("lora.max_lora_rank", "lora.max_loras", "lora.max_cpu_loras", "lora.default_mm_loras"),
    ),
    "it is about caches of keys and values and what they are for": (
        *("cache.kv_cache_layout", "cache.prefix_match_unit", "cache.enable_prefix_caching"),
        *("cache.prefix_caching_hash_algo", "cache.prefix_cache_retention_interval", "cache.mamba_cache_mode"),
        *("cache.enable_mamba_shared_prefix_checkpoint", "cache.use_replayssm", "cache.use_kda_recoverssm"),
        "cache.swa_bounded_replay",
        *("cache.kv_offloading_size", "cache.kv_offloading_backend", "kv_transfer", "kv_events", "ec_transfer"),
        *("ec_manager", "parallel.dcp_kv_cache_interleave_size", "parallel.cp_kv_cache_interleave_size"),
    ),
    "it is about requests, their answers and what is told about them": (
        *("observability", "logging", "profiler", "structured_outputs", "reasoning", "watermark", "aux_output"),
        *("model.seed", "model.served_model_name", "model.logprobs_mode", "model.return_sampling_mask"),
        *("model.generation_config", "model.override_generation_config", "model.logits_processors"),
        *("model.io_processor_plugin", "model.renderer_num_workers", "model.use_fp64_gumbel", "model.tokenizer_mode"),
        *("model.skip_tokenizer_init", "model.allowed_local_media_path", "model.allowed_media_domains"),
        *("model.enable_return_routed_experts", "model.enable_trace_replay", "model.hf_image_processor_config"),
        *("multimodal.media_io_kwargs", "multimodal.mm_processor_kwargs", "multimodal.mm_device_do_normalize"),
        *("multimodal.mm_processor_cache_gb", "multimodal.mm_processor_cache_type", "multimodal.mm_hasher_algorithm"),
        *("multimodal.mm_shm_cache_max_object_size_mb", "multimodal.interleave_mm_strings", "multimodal.mm_tensor_ipc"),
        *("multimodal.skip_mm_profiling", "multimodal.video_pruning_rate", "multimodal.video_pruning_method"),
        *("multimodal.mm_encoder_fp8_scale_save_path", "multimodal.mm_encoder_fp8_scale_save_margin"),
        *("multimodal.allow_missing_mm_embeddings", "multimodal.mm_ipc_gpu_memory_gb"),
    ),
    "it names this engine, its processes and what they talk through": (
        *("instance_id", "model.hf_token", "parallel.master_addr", "parallel.master_port"),
        *("parallel.data_parallel_size_local", "parallel.data_parallel_rank_local", "parallel.data_parallel_backend"),
        *("parallel.data_parallel_master_ip", "parallel.data_parallel_master_port", "parallel.data_parallel_rpc_port"),
        *("parallel.data_parallel_external_lb", "parallel.data_parallel_hybrid_lb", "parallel.node_rank"),
        *("parallel.nnodes", "parallel.numa_bind", "parallel.numa_bind_nodes", "parallel.numa_bind_cpus"),
        *("parallel.assigned_physical_gpu_ids", "parallel.distributed_executor_backend", "parallel.placement_group"),
        *("parallel.ray_workers_use_nsight", "parallel.ray_runtime_env", "parallel.disable_custom_all_reduce"),
        *("parallel.enable_shm_tensor_arena", "parallel.disable_nccl_for_dp_synchronization"),
        *("parallel.dcp_comm_backend", "parallel.enable_fault_tolerance", "parallel.fault_tolerance_config"),
    ),
    "it says how code is compiled, warmed up and captured": (
        *("compilation", "optimization_level", "model.enforce_eager", "model.disable_cascade_attn"),
        *("kernel.ir_op_priority", "kernel.enable_flashinfer_autotune", "kernel.enable_rocm_segmented_attn_autotune"),
        *("kernel.enable_cutedsl_warmup", "kernel.enable_jit_warmup", "attention.flex_attn_block_m"),
        *("attention.flex_attn_block_n", "attention.flex_attn_q_block_size", "attention.flex_attn_kv_block_size"),
    ),
    "it says how the same bytes are read": (
        *("load.safetensors_load_strategy", "load.safetensors_prefetch_num_threads", "load.use_tqdm_on_load"),
        *("load.safetensors_prefetch_block_size", "load.pt_load_map_location"),
    ),
    "an engine that writes to its weights has copies of them": (
        *("weight_transfer", "parallel.enable_eplb", "parallel.enable_elastic_ep", "model.enable_sleep_mode"),
        *("model.sleep_preserve_parameter_names", "model.sleep_mode_backend", "model.sleep_mode_offload_cudagraph"),
        *("model.enable_nccl_comm_suspend", "model.enable_cumem_allocator", "parallel.eplb_config.window_size"),
        *("parallel.eplb_config.step_interval", "parallel.eplb_config.log_balancedness"),
        *("parallel.eplb_config.log_balancedness_interval", "parallel.eplb_config.use_async"),
        *("parallel.eplb_config.policy", "parallel.eplb_config.communicator"),
        "parallel.eplb_config.enable_migration_batching",
    ),
    "it is about drawing and checking a draft's tokens": (
        *("speculative.target_model_config", "speculative.target_parallel_config", "speculative.draft_model_config"),
        *("speculative.draft_parallel_config", "speculative.draft_load_config", "speculative.model"),
        *("speculative.revision", "speculative.max_model_len", "speculative.enforce_eager"),
        *("speculative.disable_padded_drafter_batch", "speculative.disable_eagle_block_drop"),
        *("speculative.use_local_argmax_reduction", "speculative.prompt_lookup_max", "speculative.prompt_lookup_min"),
        *("speculative.num_speculative_tokens_per_batch_size", "speculative.rejection_sample_method"),
        *("speculative.synthetic_acceptance_rates", "speculative.synthetic_acceptance_length"),
        *("speculative.enable_adaptive_verification", "speculative.draft_sample_method"),
        *("speculative.suffix_decoding_max_tree_depth", "speculative.suffix_decoding_max_cached_requests"),
        *("speculative.suffix_decoding_max_spec_factor", "speculative.suffix_decoding_min_token_prob"),
    ),
}
_LEFT_OUT = {name for names in LEFT_OUT.values() for name in names}
_ELSEWHERE = ("it is what the key has by itself", "it names this engine, its processes and what they talk through")
_LEFT_TO_ENGINES = _LEFT_OUT - {name for reason in _ELSEWHERE for name in LEFT_OUT[reason]}

# Environment variables that begin with VLLM_ are in the key, except these. Our own variables begin with COMPANION_.
ENVIRONMENT_LEFT_OUT: dict[str, str] = {
    "secrets": r"API_KEY|.*_TOKEN|.*SECRET.*|.*PASSWORD.*",
    "links of Kubernetes to its services": r".*SERVICE_(HOST|PORT)(_.*)?|(.*_)?PORT(_\d+_(TCP|UDP|SCTP)(_.+)?)?",
    "places and addresses": r"(CONFIG|CACHE)_ROOT|(HOST|LOOPBACK)_IP|RPC_BASE_PATH|IMAGE_TAG|BUILD_.*"
    r"|DOCKER_BUILD_CONTEXT|USE_PRECOMPILED(_RUST)?|SKIP_(PRECOMPILED_)?VERSION_SUFFIX"
    r"|(NCCL_SO|NCCL_INCLUDE|CUDART_SO|MODEL_REDIRECT|XLA_CACHE|CUDA_COMPATIBILITY|RUST_FRONTEND)_PATH"
    r"|FLASHINFER_AUTOTUNE_CACHE_DIR|TUNED_CONFIG_FOLDER"
    r"|OBJECT_STORAGE_SHM_BUFFER_NAME|PROCESS_NAME_PREFIX|GPU_NIC_PCIE_MAPPING|NIC_SELECTION_VARS",
    "logs, statistics and debugging": r"LOGGING_.*|CONFIGURE_LOGGING|(DISABLE_)?LOG_.*|DEBUG_.*|USAGE_.*|NO_USAGE_STATS"
    r"|DO_NOT_TRACK|TRACE_FUNCTION|.*_FOR_PROFILING|GC_DEBUG|PATTERN_MATCH_DEBUG|RINGBUFFER_.*|.*_TIER_LOG"
    r"|COMPUTE_NANS_IN_LOGITS|RAISE_ON_LOGIT_NANS|GPU_SYNC_CHECK",
    "times and limits": r".*TIMEOUT(_S|_SECONDS)?|HTTP_.*|MAX_(?!TOKENS_PER_EXPERT).*|.*_MAX_SIZE_(BYTES_)?MB"
    r"|ALLOW_LONG_MAX_MODEL_LEN|V1_OUTPUT_PROC_CHUNK_SIZE|MQ_MAX_CHUNK_BYTES_MB|MSGPACK_.*"
    r"|SPARSE_INDEXER_MAX_LOGITS_MB"
    r"|KEEP_ALIVE_ON_ENGINE_DEATH|MEMORY_PROFILER_.*|XGRAMMAR_CACHE_MB|FASTSAFETENSORS_QUEUE_SIZE|DEEPEP_BUFFER_SIZE_MB",
    "processes and their ranks": r"DIST_IDENT|WORKER_MULTIPROC_METHOD|ENABLE_V1_MULTIPROCESSING|RAY_.*|USE_RAY_.*|DP_.*"
    r"|NIXL_.*|P2P_.*"
    r"|EC_.*|MOONCAKE_.*|USE_RUST_.*|SERVER_DEV_MODE|ALLOW_INSECURE_SERIALIZATION|USE_V2_MODEL_RUNNER|SKIP_P2P_CHECK"
    r"|DISTRIBUTED_USE_SPLIT_GROUP|CPU_OMP_THREADS_BIND|CPU_KVCACHE_SPACE|CPU_NUM_OF_RESERVED_CPU|CPU_CI_ENV"
    r"|ELASTIC_EP_.*|RANDOMIZE_DP_DUMMY_INPUTS|DISABLE_PYNCCL|USE_SPINLOOP_EXT",
    "plugins, which are named by their code": r"PLUGINS",
    "requests and their media": r"MEDIA_.*|ASSETS_.*|VIDEO_LOADER_BACKEND|ENABLE_RESPONSES_API_STORE"
    r"|GPT_OSS_.*"
    r"|SYSTEM_START_DATE|TOOL_.*|ENFORCE_STRICT_TOOL_CALLING|LORA_RESOLVER_.*|ALLOW_RUNTIME_LORA_UPDATING|USE_FASTOKENS"
    r"|DISABLE_REQUEST_ID_RANDOMIZATION|USE_FLASHINFER_SAMPLER|SKIP_MODEL_NAME_VALIDATION|ENABLE_COHERE_API",
    "caches of keys and values": r"KV_(CACHE|EVENTS|OFFLOAD)_.*|PREFIX_CACHE_.*|USE_SIMPLE_KV_OFFLOAD",
    "compiling and capturing": r"USE_(STANDALONE|AOT)_COMPILE|(DISABLE_)?COMPILE_CACHE.*|USE_BYTECODE_HOOK"
    r"|FORCE_AOT_LOAD|USE_MEGA_AOT_ARTIFACT|ENABLE_PREGRAD_PASSES|USE_BREAKABLE_CUDAGRAPH|ENABLE_CUDAGRAPH_GC"
    r"|ENABLE_INDUCTOR_.*|TRITON_JIT_WARMUP_NUM_THREADS|DEEP_GEMM_WARMUP|ENABLE_STARTUP_PLAN",
    "between ranks": r"(CUSTOM_)?ALLREDUCE_.*|FLASHINFER_ALLREDUCE_BACKEND|USE_NCCL_SYMM_MEM|DBO_COMM_SMS",
}
_ENVIRONMENT_LEFT_OUT = re.compile("VLLM_(" + "|".join(ENVIRONMENT_LEFT_OUT.values()) + ")")


def engine_fields(vllm_config: Any) -> dict[str, str]:
    """Return the fields of an engine's configurations, except its models', and of its environment."""
    fields: dict[str, str] = {}
    for name, value in _attributes(vllm_config):
        kind = name.removesuffix("_config")
        if kind not in {"model", *_LEFT_OUT}:
            fields |= _flat(kind, value)
    fields |= {
        f"env.{name}": value
        for name, value in sorted(os.environ.items())
        if name.startswith("VLLM_") and not _ENVIRONMENT_LEFT_OUT.fullmatch(name)
    }
    return fields


def model_fields(model_config: Any) -> dict[str, str]:
    """Return the fields of one model's configuration. Its `hf_config` is the checkpoint's, as flags changed it."""
    fields = _flat("model", model_config)
    for name, value in model_config.hf_config.to_dict().items():
        fields |= _flat(f"hf.{name}", value) if name not in _HF else {}
    multimodal = getattr(model_config, "multimodal_config", None)
    return fields if multimodal is None else fields | multimodal_fields(multimodal)


def multimodal_fields(config: Any) -> dict[str, str]:
    """Return the fields of a model that takes pictures or sound."""
    fields = _flat("multimodal", config)
    # Only a limit of 0 removes an encoder; other limits change no weights.
    limits = canonical(getattr(config, "limit_per_prompt", {}))
    none = [kind for kind, limit in limits.items() if (limit["count"] if isinstance(limit, dict) else limit) == 0]
    flattened = [name for name in fields if name.startswith("multimodal.limit_per_prompt")]
    return {name: value for name, value in fields.items() if name not in flattened} | {
        "multimodal.limit_per_prompt": text(dict.fromkeys(none, 0))
    }


def all_fields(kind: str, config: Any) -> dict[str, str]:
    """Return all fields of the configuration `kind`, except those left out by name."""
    return _flat(kind, config) if config is not None else {}


# The place of a checkpoint says nothing about its content.
_HF = ("_name_or_path", "transformers_version", "_commit_hash")


def _flat(name: str, value: Any) -> dict[str, str]:
    """Flatten `value` by the names of its fields, and a nested configuration by the names of its own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, str] = {}
        for key, part in _attributes(value):
            if f"{name}.{key}" not in _LEFT_OUT:
                found |= _flat(f"{name}.{key}", part)
        return found
    try:
        whole = text(value)
    except TypeError as error:
        raise NotShareableError(f"{name} cannot be compared: {error}") from None
    if isinstance(value, Mapping) and len(whole) > _LONGEST and 0 < len(value) <= _MOST_NAMES:
        return {k: v for key, part in value.items() for k, v in _flat(f"{name}.{key}", part).items()}
    return {name: shortened(whole)}


def _attributes(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields and other attributes. Skips names with an underscore, which are vLLM's own notes."""
    names = {field.name for field in dataclasses.fields(config)} | getattr(config, "__dict__", {}).keys()
    for name in sorted(names):
        if not name.startswith("_") and hasattr(config, name):
            yield name, getattr(config, name)


def is_left_to_engines(name: str) -> bool:
    """Whether the key leaves out a field ("model.seed") that says how an engine runs, and not which one it is."""
    kind, _, field = name.partition(".")
    return name in _LEFT_TO_ENGINES or (kind in _LEFT_TO_ENGINES and not field.startswith("_"))


def text(value: Any) -> str:
    """Return the canonical text: JSON of `canonical`. Raises TypeError if equal values could have different texts."""
    return json.dumps(canonical(value), sort_keys=True)


def shortened(whole: str) -> str:
    """Shorten the text of a field for a message; a digest identifies the whole text."""
    if len(whole) <= _LONGEST:
        return whole
    return f"{whole[: _LONGEST // 2]}... (sha256 {hashlib.sha256(whole.encode()).hexdigest()})"


def canonical(value: Any, depth: int = 0) -> Any:
    """Convert `value` to JSON's types; equal values are equal in all processes. Raises TypeError if it cannot."""
    if depth > _DEEPEST:
        raise TypeError("it is nested too deeply")
    inner = partial(canonical, depth=depth + 1)
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else text(key): inner(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((inner(one) for one in value), key=lambda one: json.dumps(one, sort_keys=True))
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), inner(content)]
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if isinstance(value, partial):
        return [inner(value.func), inner(value.args), inner(value.keywords)]
    return _object(value, inner)


def _object(value: Any, inner: Any) -> Any:
    for name in ("to_dict", "model_dump"):  # methods of transformers and pydantic
        method = getattr(type(value), name, None)
        if method is not None:
            return inner(method(value))
    kind = type(value)
    if hasattr(kind, "tobytes"):  # NumPy cuts the texts of arrays short
        shape, content = [*getattr(value, "shape", ())], hashlib.sha256(value.tobytes()).hexdigest()
        return [inner(kind), str(getattr(value, "dtype", "")), shape, content]
    if dataclasses.is_dataclass(value):
        return {field.name: inner(getattr(value, field.name, None)) for field in dataclasses.fields(value)}
    if hasattr(kind, "compute_hash"):
        return [inner(kind), str(value.compute_hash())]
    if attributes := getattr(value, "__dict__", None):
        return [inner(kind), {name: inner(one) for name, one in attributes.items()}]
    described = repr(value)
    if _ADDRESS.search(described):
        raise TypeError(f"an object of {kind.__module__}.{kind.__qualname__} does not say what it is")
    return described
