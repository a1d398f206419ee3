"""The matrix: vLLM models, quantizations, speculative methods and parallel layouts, each with its checkpoint.

    python -m tests.support.checkpoints.models CASE PATH [--tiny]

`make(name, path)` writes a checkpoint with random weights: real layer shapes with few layers, or `tiny=True` for a
CPU. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.support.checkpoints.architectures import (
    bert,
    deepseek_v3,
    gemma3,
    gpt_oss,
    granite_hybrid,
    idefics3,
    jina_v5,
    llama,
    llama_drafted,
    llama_lora,
    llama_plugin,
    mamba2,
    mimo,
    mixtral,
    nemotron_h,
    phi3,
    qwen3,
    qwen3_dense,
    qwen3_moe,
    qwen3_next,
    qwen3_vl,
    qwen25_vl,
    whisper,
)
from tests.support.checkpoints.formats import QUANTS, Config
from tests.support.checkpoints.transformers_models import TABLE, from_transformers

MARKER = ".complete"


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Path, bool], None]
    flags: dict[str, object] = field(default_factory=dict)
    kind: Literal["generate", "pooling", "transcribe", "multimodal"] = "generate"
    on_cpu: bool = False
    only_tiny: bool = False
    gpus: int = 1
    tiny_flags: dict[str, object] = field(default_factory=dict)
    cpu_flags: dict[str, object] = field(default_factory=dict)
    publisher_flags: dict[str, object] = field(default_factory=dict)
    """What the engine that publishes has differently."""
    environment: dict[str, str] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def add(name: str, build: Callable[..., None], *, options: Config | None = None, **fields: Any) -> None:
    def write(path: Path, tiny: bool) -> None:
        build(path, tiny, name=name, **(options or {}))

    CASES[name] = Case(name, write, **fields)


add("llama", llama, on_cpu=True)
add("llama-tied", llama, options={"tied": True}, on_cpu=True)
add("qwen3", qwen3, on_cpu=True)
add("phi3", phi3, on_cpu=True)
add("qwen3-moe", qwen3_moe, on_cpu=True)
add("mixtral", mixtral, on_cpu=True)
# vLLM's gated delta net for CPU takes bfloat16 only, and on Hopper it would need FlashInfer.
add("qwen3-next", qwen3_next, flags={"gdn_prefill_backend": "triton"})
add("deepseek-v3", deepseek_v3, on_cpu=True)
add("mamba", mamba2, on_cpu=True)
add("nemotron-h", nemotron_h, on_cpu=True)
add("hybrid", granite_hybrid, on_cpu=True)
add("gemma3", gemma3, on_cpu=True)
reads: dict[str, object] = {"skip_tokenizer_init": False}
whole: dict[str, object] = {"max_num_batched_tokens": 256}  # encoders and means over all tokens read a prompt at once
pools: dict[str, object] = reads | {"runner": "pooling"}
add("bert", bert, flags=pools, kind="pooling", on_cpu=True, tiny_flags=whole)
add("idefics3", idefics3, flags=reads, kind="multimodal", on_cpu=True)
sentences = pools | {"max_model_len": 256}  # as sentence_bert_config.json has it
add("dense", qwen3_dense, flags=sentences, kind="pooling", on_cpu=True, tiny_flags=whole)
add(
    "embedding-gemma",
    gemma3,
    options={"embeds": True},
    flags=sentences,
    kind="pooling",
    on_cpu=True,
    tiny_flags=whole,
)
add("jina-v5", jina_v5, flags=pools, kind="pooling", on_cpu=True)
score = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
add(
    "reranker",
    qwen3,
    options={"words": ("no", "yes")},
    flags=pools | {"hf_overrides": score},
    kind="pooling",
    on_cpu=True,
)
for behaviour in ("Plain", "Tree", "Values"):
    add(
        f"plugin-{behaviour.lower()}",
        llama_plugin,
        options={"kind": behaviour},
        on_cpu=True,
        environment={"PYTHONPATH": str(Path(__file__).with_name("plugin_model"))},
    )
# The processors of these need torchvision.
add(
    "qwen3-vl",
    qwen3_vl,
    flags=reads | {"limit_mm_per_prompt": {"image": 1, "video": 0}},
    kind="multimodal",
    on_cpu=True,
    # A buffer of 4 MiB.
    tiny_flags={"max_model_len": 1024, "max_num_batched_tokens": 2048},
)
add("qwen2.5-vl", qwen25_vl, flags=reads | {"limit_mm_per_prompt": {"image": 1, "video": 0}}, kind="multimodal")
add(
    "whisper",
    whisper,
    flags=reads | {"max_model_len": 128, "max_num_batched_tokens": 2048},
    kind="transcribe",
    on_cpu=True,
)

# What else an engine may have: limits follow from flags, and are not the model.
add(
    "qwen3-moe-limits",
    qwen3_moe,
    on_cpu=True,
    publisher_flags={"max_num_batched_tokens": 512, "max_model_len": 512, "max_num_seqs": 16},
)
add(
    "qwen3-vl-limits",
    qwen3_vl,
    flags=reads | {"limit_mm_per_prompt": {"image": 1, "video": 0}},
    kind="multimodal",
    on_cpu=True,
    tiny_flags={"max_model_len": 1024, "max_num_batched_tokens": 1024},
    publisher_flags={"max_model_len": 512, "max_num_batched_tokens": 2048},
)
for kind, (_, _, call) in TABLE.items():
    embeds: dict[str, Any] = {"kind": "pooling", "flags": pools, "tiny_flags": whole}
    add(kind, from_transformers, options={"kind": kind}, only_tiny=True, **(embeds if call == "AutoModel" else {}))

# As vLLM does it, but for what compiles the graph to machine code, which takes a minute.
compiles: dict[str, object] = {"compilation_config": {"backend": "eager"}}
add(
    "llama-compiled",
    llama,
    on_cpu=True,
    flags={"enforce_eager": False},
    cpu_flags=compiles,
    environment={"TORCH_COMPILE_DISABLE": "0"},
)
add("llama-lora", llama_lora, flags={"enable_lora": True, "max_lora_rank": 8}, on_cpu=True)
add("fp8-online", llama, flags={"quantization": "fp8_per_tensor"})
add("fp8-kv-scales", llama, flags={"kv_cache_dtype": "fp8", "calculate_kv_scales": True})
add("fp8-kv-checkpoint", llama, options={"quant": "fp8-static", "kv_scales": True}, flags={"kv_cache_dtype": "fp8"})
# Gone from vLLM 0.29 on; the row says so.
add("bnb-4bit", llama, flags={"quantization": "bitsandbytes"})
for form in QUANTS:
    add(form, llama, options={"quant": form})

add("qwen3-moe-fp8-online", qwen3_moe, flags={"quantization": "fp8_per_tensor"})
for form in ("fp8-block", "awq", "gptq"):
    add(f"qwen3-moe-{form}", qwen3_moe, options={"quant": form})
add("deepseek-v3.2", deepseek_v3, options={"sparse": True})
add("deepseek-v3-fp8-block", deepseek_v3, options={"quant": "fp8-block"})
add("gpt-oss-mxfp4", gpt_oss)
add("gpt-oss", gpt_oss, options={"quantized": False})
mtp: dict[str, object] = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
add("deepseek-v3-mtp", deepseek_v3, options={"mtp": True}, flags=mtp)
add("mimo-mtp", mimo, flags=mtp, on_cpu=True)
for method in ("eagle", "eagle3", "draft_model"):
    speculative: dict[str, object] = {"method": method, "model": "{path}-draft", "num_speculative_tokens": 2}
    add(
        f"llama-{method.replace('_', '-')}",
        llama_drafted,
        options={"method": method},
        flags={"speculative_config": speculative},
        on_cpu=True,
    )

experts: dict[str, object] = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
add("llama-tp2", llama, flags={"tensor_parallel_size": 2}, gpus=2)
add("llama-pp2", llama, flags={"pipeline_parallel_size": 2}, gpus=2)
add("awq-tp2", llama, options={"quant": "awq"}, flags={"tensor_parallel_size": 2}, gpus=2)
add("qwen3-moe-ep2", qwen3_moe, flags=experts, gpus=2)
owned: dict[str, object] = {"enable_eplb": True, "model_loader_extra_config": {"share": "copy"}}
add("qwen3-moe-eplb2", qwen3_moe, flags=experts | owned, gpus=2)
add("deepseek-v3-fp8-block-ep2", deepseek_v3, options={"quant": "fp8-block"}, flags=experts, gpus=2)
add("gpt-oss-mxfp4-tp2", gpt_oss, flags={"tensor_parallel_size": 2}, gpus=2)
replicas: dict[str, object] = {"data_parallel_size": 2}
add("llama-dp2", llama, flags=replicas, gpus=2)
add("qwen3-moe-dp2", qwen3_moe, flags=replicas, gpus=2)
add("qwen3-moe-dp2-ep", qwen3_moe, flags=replicas | {"enable_expert_parallel": True}, gpus=2)


def make(name: str, path: Path | str, *, tiny: bool = False) -> None:
    """Write the checkpoint of a case, unless it is already there whole."""
    path = Path(path)
    if (path / "config.json").exists() and (path / MARKER).exists():
        return
    CASES[name].make(path, tiny)
    (path / MARKER).touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(CASES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, float32")
    args = parser.parse_args()
    make(args.name, args.path, tiny=args.tiny)


if __name__ == "__main__":
    main()
