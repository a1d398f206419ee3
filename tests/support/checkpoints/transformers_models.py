"""Tiny checkpoints of architectures that transformers can write itself: many, to see whether each is shared and equal.

The real formats are in architectures.py; here transformers' own model is saved with random weights.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints.formats import write_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_inner": 128}

# Name: (model type, what its config has besides SIZES, None for what it lacks, how transformers calls the model).
TABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("qwen2", {}, "AutoModelForCausalLM"),
    "gemma": ("gemma", {}, "AutoModelForCausalLM"),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 32}, "AutoModelForCausalLM"),
    "olmo": ("olmo", {}, "AutoModelForCausalLM"),
    "olmo2": ("olmo2", {}, "AutoModelForCausalLM"),
    "olmoe": ("olmoe", EXPERTS, "AutoModelForCausalLM"),
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}, "AutoModelForCausalLM"),
    "granitemoe": ("granitemoe", EXPERTS, "AutoModelForCausalLM"),
    "phi": ("phi", {}, "AutoModelForCausalLM"),
    "stablelm": ("stablelm", {}, "AutoModelForCausalLM"),
    "starcoder2": ("starcoder2", {}, "AutoModelForCausalLM"),
    "gpt2": ("gpt2", OLD, "AutoModelForCausalLM"),
    "gpt-neox": ("gpt_neox", {}, "AutoModelForCausalLM"),
    "gpt-j": ("gptj", OLD | {"rotary_dim": 16}, "AutoModelForCausalLM"),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True}, "AutoModelForCausalLM"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}, "AutoModelForCausalLM"),
    "falcon": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "head_dim": None},
        "AutoModelForCausalLM",
    ),
    "cohere": ("cohere", {}, "AutoModelForCausalLM"),
    "cohere2": ("cohere2", {"sliding_window": 32}, "AutoModelForCausalLM"),
    "glm4": ("glm4", {}, "AutoModelForCausalLM"),
    "exaone4": ("exaone4", {"sliding_window": 32}, "AutoModelForCausalLM"),
    "nemotron": ("nemotron", {}, "AutoModelForCausalLM"),
    "ernie4.5": ("ernie4_5", {}, "AutoModelForCausalLM"),
    "smollm3": ("smollm3", {}, "AutoModelForCausalLM"),
    "seed-oss": ("seed_oss", {}, "AutoModelForCausalLM"),
    "arcee": ("arcee", {}, "AutoModelForCausalLM"),
    "apertus": ("apertus", {}, "AutoModelForCausalLM"),
    "mistral": ("mistral", {"sliding_window": 32}, "AutoModelForCausalLM"),
    "qwen2-moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}, "AutoModelForCausalLM"),
    "falcon-h1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 128}, "AutoModelForCausalLM"),
    "lfm2": ("lfm2", {"full_attn_idxs": [1], "block_ff_dim": 128}, "AutoModelForCausalLM"),
    "gemma3n": (
        "gemma3n_text",
        {
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 0,
            "num_hidden_layers": 5,
            "laurel_rank": 8,
            "intermediate_size": [128] * 5,
            "layer_types": [*["sliding_attention"] * 4, "full_attention"],
            "activation_sparsity_pattern": [0.0] * 5,
            "sliding_window": 32,
        },
        "AutoModelForCausalLM",
    ),
    "gemma4": (
        "gemma4_text",
        {
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "global_head_dim": 32,
            "enable_moe_block": False,
        },
        "AutoModelForCausalLM",
    ),
    "roberta": ("roberta", {"type_vocab_size": 1}, "AutoModel"),
    "modernbert": ("modernbert", {}, "AutoModel"),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1}, "AutoModel"),
}


def from_transformers(path: Path, tiny: bool, *, name: str, kind: str) -> None:
    """Write the tiny model of that `kind` in TABLE, whatever is asked for."""
    import transformers

    model_type, more, call = TABLE[kind]
    options = {key: value for key, value in (SIZES | more).items() if value is not None}
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = getattr(transformers, call).from_config(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(path)
    if call == "AutoModel":
        write_tokenizer(path, SIZES["vocab_size"], [])
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"dtype": "float32", "torch_dtype": "float32"}))
