"""Writers of checkpoints, one for each model architecture: real layer shapes with few layers, or tiny ones for a CPU.

An architecture takes the directory, whether to be `tiny`, and the `name` of the case, which seeds the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.checkpoints.formats import (
    QUANTS,
    Config,
    Weights,
    save_adapter,
    write_json,
    write_pooling,
    write_tokenizer,
)


def attention(
    weights: Weights, name: str, hidden: int, heads: int, kv_heads: int, head: int, *, bias: bool = False
) -> None:
    weights.linear(f"{name}.q_proj", heads * head, hidden, bias=bias)
    weights.linear(f"{name}.k_proj", kv_heads * head, hidden, bias=bias)
    weights.linear(f"{name}.v_proj", kv_heads * head, hidden, bias=bias)
    weights.linear(f"{name}.o_proj", hidden, heads * head)


def gated(
    weights: Weights,
    name: str,
    hidden: int,
    inner: int,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
) -> None:
    gate, up, down = names
    weights.linear(f"{name}.{gate}", inner, hidden, bias=bias)
    weights.linear(f"{name}.{up}", inner, hidden, bias=bias)
    weights.linear(f"{name}.{down}", hidden, inner, bias=bias)


def vocabulary(weights: Weights, size: int, hidden: int, *, tied: bool = False) -> None:
    # Small embeddings: with a tied head, larger ones would let each token predict itself, whatever the layers say.
    weights.normal("model.embed_tokens.weight", size, hidden)
    weights.norm("model.norm", hidden)
    if not tied:
        weights.linear("lm_head", size, hidden, quantize=False)


def llama_config(tiny: bool, quantized: bool) -> Config:
    if not tiny:
        hidden, heads, kv_heads, head, inner, layers, vocab = 4096, 32, 8, 128, 14336, 4, 32000
    elif quantized:  # groups and blocks of 128 must fit
        hidden, heads, kv_heads, head, inner, layers, vocab = 256, 4, 2, 64, 512, 2, 512
    else:
        hidden, heads, kv_heads, head, inner, layers, vocab = 64, 4, 2, 32, 128, 2, 512
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llama_layer(weights: Weights, name: str, c: Config, *, first_norm: bool = True, bias: bool = False) -> None:
    hidden, heads, kv_heads, head = (
        c[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if first_norm:
        weights.norm(f"{name}.input_layernorm", hidden)
    attention(weights, f"{name}.self_attn", hidden, heads, kv_heads, head, bias=bias)
    weights.norm(f"{name}.post_attention_layernorm", hidden)
    gated(weights, f"{name}.mlp", hidden, c["intermediate_size"])


def llama(
    path: Path, tiny: bool, *, name: str, quant: str | None = None, tied: bool = False, kv_scales: bool = False
) -> None:
    c = llama_config(tiny, quant is not None) | {"tie_word_embeddings": tied}
    weights = Weights(name, tiny, QUANTS[quant] if quant else None)
    llama_stack(weights, c)
    for layer in range(c["num_hidden_layers"] if kv_scales else 0):
        for part in ("k", "v"):
            weights.put(f"model.layers.{layer}.self_attn.{part}_scale", weights.uniform(1, low=0.02, high=0.05))
    weights.save(path, c)


def llama_stack(weights: Weights, c: Config, *, bias: bool = False) -> None:
    vocabulary(weights, c["vocab_size"], c["hidden_size"], tied=c["tie_word_embeddings"])
    for layer in range(c["num_hidden_layers"]):
        llama_layer(weights, f"model.layers.{layer}", c, bias=bias)


def llama_drafted(path: Path, tiny: bool, *, name: str, method: str) -> None:
    """A Llama, and beside it, in `path`-draft, a model that drafts for it."""
    llama(path, tiny, name=name)
    c = llama_config(tiny, False) | {"num_hidden_layers": 1}
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    weights = Weights(f"{name}-draft", tiny)
    if method == "draft_model":
        llama_stack(weights, c)
    elif method == "eagle":  # as most are: the embedding and the head are the target's
        llama_layer(weights, "layers.0", c, first_norm=False)
        weights.linear("fc", hidden, 2 * hidden)
    else:
        drafted = vocab // 2
        c |= {"draft_vocab_size": drafted, "eagle_aux_hidden_state_layer_ids": [0, 1], "num_aux_hidden_states": 2}
        heads = c["head_dim"] * c["num_attention_heads"], c["head_dim"] * c["num_key_value_heads"]
        llama_layer(weights, "midlayer", c)
        for part, rows in (("q", heads[0]), ("k", heads[1]), ("v", heads[1])):  # they see the embedding as well
            del weights.tensors[f"midlayer.self_attn.{part}_proj.weight"]
            weights.linear(f"midlayer.self_attn.{part}_proj", rows, 2 * hidden)
        weights.norm("midlayer.hidden_norm", hidden)
        weights.linear("fc", hidden, 2 * hidden)
        weights.norm("norm", hidden)
        weights.linear("lm_head", drafted, hidden)
        weights.put("d2t", torch.arange(drafted))
        weights.put("t2d", torch.arange(vocab) % 2 == 0)
        # As some repeat it; the head is its own.
        repeated = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        weights.put("embed_tokens.weight", repeated.to(weights.device))
    weights.save(Path(f"{path}-draft"), c)


def mimo(path: Path, tiny: bool, *, name: str) -> None:
    """A dense model with a layer that predicts one token more."""
    c = llama_config(tiny, True) | {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    c |= {"num_nextn_predict_layers": 1}
    weights, hidden = Weights(name, tiny), c["hidden_size"]
    llama_stack(weights, c, bias=True)
    layer = "model.mtp_layers.0"
    llama_layer(weights, layer, c, bias=True)
    for norm in ("token", "hidden", "final"):
        weights.norm(f"{layer}.{norm}_layernorm", hidden)
    weights.linear(f"{layer}.input_proj", hidden, 2 * hidden)
    weights.save(path, c)


def qwen3_config(tiny: bool) -> Config:
    c = llama_config(tiny, False)
    return c | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}


def qwen3_stack(weights: Weights, c: Config) -> None:
    llama_stack(weights, c)
    for layer in range(c["num_hidden_layers"]):
        for norm in ("q_norm", "k_norm"):
            weights.norm(f"model.layers.{layer}.self_attn.{norm}", c["head_dim"])


def qwen3(path: Path, tiny: bool, *, name: str, words: tuple[str, ...] = ()) -> None:
    """With `words`, it has a tokenizer that knows them, as a reranker whose score is that of a word needs it."""
    c, weights = qwen3_config(tiny), Weights(name, tiny)
    qwen3_stack(weights, c)
    if words:
        write_tokenizer(path, c["vocab_size"], list(words))
    weights.save(path, c)


def qwen3_dense(path: Path, tiny: bool, *, name: str) -> None:
    """A model of sentence-transformers: behind the pooling, two layers with files of their own."""
    c, weights = qwen3_config(tiny) | {"architectures": ["Qwen3Model"]}, Weights(name, tiny)
    qwen3_stack(weights, c)
    weights.rename("model.", "")
    write_tokenizer(path, c["vocab_size"], [])
    hidden = c["hidden_size"]
    write_pooling(path, name, hidden, [(3 * hidden // 2, "activation.Tanh"), (48, "linear.Identity")])
    weights.save(path, c)


def jina_v5(path: Path, tiny: bool, *, name: str) -> None:
    """An adapter that is merged into the weights while they are loaded; its config decides how strongly."""
    c, weights = qwen3_config(tiny) | {"architectures": ["JinaEmbeddingsV5Model"]}, Weights(name, tiny)
    qwen3_stack(weights, c)
    weights.rename("model.", "")
    write_tokenizer(path, c["vocab_size"], [])
    save_adapter(path / "adapters" / "retrieval", c, start="base_model.model.")
    weights.save(path, c)


def qwen3_vl(path: Path, tiny: bool, *, name: str) -> None:
    """What its vision tower says goes into a work buffer of the language model, from which several layers read."""
    hidden, heads, inner, layers, levels = (64, 2, 128, 3, [0, 1]) if tiny else (1152, 16, 4304, 4, [0, 1, 2])
    c = qwen3_config(tiny) | {"model_type": "qwen3_vl_text", "num_hidden_layers": len(levels) + 1}
    # Wide enough that this buffer would be worth sharing, if it were a weight.
    c |= {"hidden_size": 256} if tiny else {}
    head, out = c["head_dim"], c["hidden_size"]
    sections = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    c["rope_scaling"] = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True}
    weights = Weights(name, tiny)
    qwen3_stack(weights, c)
    weights.rename("model.", "model.language_model.")
    weights.normal("model.visual.patch_embed.proj.weight", hidden, 3, 2, 16, 16)
    weights.normal("model.visual.patch_embed.proj.bias", hidden)
    weights.normal("model.visual.pos_embed.weight", 256, hidden)
    for layer in range(layers):
        prefix = f"model.visual.blocks.{layer}"
        weights.norm(f"{prefix}.norm1", hidden, bias=True)
        weights.norm(f"{prefix}.norm2", hidden, bias=True)
        weights.linear(f"{prefix}.attn.qkv", 3 * hidden, hidden, bias=True)
        weights.linear(f"{prefix}.attn.proj", hidden, hidden, bias=True)
        weights.linear(f"{prefix}.mlp.linear_fc1", inner, hidden, bias=True)
        weights.linear(f"{prefix}.mlp.linear_fc2", hidden, inner, bias=True)
    mergers = {"merger": hidden} | {f"deepstack_merger_list.{level}": 4 * hidden for level in range(len(levels))}
    for merger, width in mergers.items():
        weights.norm(f"model.visual.{merger}.norm", width, bias=True)
        weights.linear(f"model.visual.{merger}.linear_fc1", 4 * hidden, 4 * hidden, bias=True)
        weights.linear(f"model.visual.{merger}.linear_fc2", out, 4 * hidden, bias=True)
    special = ["vision_start", "vision_end", "image_pad", "video_pad"]
    numbers = write_tokenizer(path, c["vocab_size"], [f"<|{token}|>" for token in special])
    image: Config = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64 if tiny else 512 * 512}}
    kinds = {"preprocessor": "image_processor_type", "video_preprocessor": "video_processor_type"}
    for (file, key), kind in zip(kinds.items(), ("Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor"), strict=True):
        write_json(path / f"{file}_config.json", {"processor_class": "Qwen3VLProcessor", key: kind, **image})
    weights.save(
        path,
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "vision_start_token_id": numbers["<|vision_start|>"],
            "vision_end_token_id": numbers["<|vision_end|>"],
            "image_token_id": numbers["<|image_pad|>"],
            "video_token_id": numbers["<|video_pad|>"],
            "tie_word_embeddings": True,
            "text_config": c,
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": layers,
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_heads": heads,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": out,
                "num_position_embeddings": 256,
                "deepstack_visual_indexes": levels,
                "in_channels": 3,
            },
        },
    )


def llama_lora(path: Path, tiny: bool, *, name: str) -> None:
    """A Llama, and beside it, in `path`-adapter, an adapter for it."""
    llama(path, tiny, name=name)
    save_adapter(Path(f"{path}-adapter"), llama_config(tiny, False))


def llama_plugin(path: Path, tiny: bool, *, name: str, kind: str) -> None:
    """A Llama whose class is one of plugin_model, which no vLLM knows."""
    c, weights = llama_config(tiny, False) | {"architectures": [f"{kind}PluginForCausalLM"]}, Weights(name, tiny)
    llama_stack(weights, c)
    weights.save(path, c)


def phi3(path: Path, tiny: bool, *, name: str) -> None:
    """Its checkpoint has the projections merged that vLLM merges in others."""
    c = llama_config(tiny, False) | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 8192,
        "pad_token_id": 0,
    }
    hidden, inner, width = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * c["head_dim"]
    weights = Weights(name, tiny)
    vocabulary(weights, c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden)
        weights.linear(f"{prefix}.self_attn.qkv_proj", width + 2 * c["num_key_value_heads"] * c["head_dim"], hidden)
        weights.linear(f"{prefix}.self_attn.o_proj", hidden, width)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden)
        weights.linear(f"{prefix}.mlp.gate_up_proj", 2 * inner, hidden)
        weights.linear(f"{prefix}.mlp.down_proj", hidden, inner)
    weights.save(path, c)


def qwen3_moe(path: Path, tiny: bool, *, name: str, quant: str | None = None) -> None:
    if not tiny:
        hidden, heads, kv_heads, head, inner, experts, top, layers, vocab = 2048, 32, 4, 128, 768, 32, 8, 4, 32000
    elif quant:
        hidden, heads, kv_heads, head, inner, experts, top, layers, vocab = 256, 4, 2, 64, 128, 8, 2, 2, 512
    else:
        hidden, heads, kv_heads, head, inner, experts, top, layers, vocab = 64, 4, 2, 32, 64, 8, 2, 2, 512
    weights = Weights(name, tiny, QUANTS[quant] if quant else None)
    vocabulary(weights, vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden)
        attention(weights, f"{prefix}.self_attn", hidden, heads, kv_heads, head)
        weights.norm(f"{prefix}.self_attn.q_norm", head)
        weights.norm(f"{prefix}.self_attn.k_norm", head)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden)
        weights.linear(f"{prefix}.mlp.gate", experts, hidden, quantize=False)
        for expert in range(experts):
            gated(weights, f"{prefix}.mlp.experts.{expert}", hidden, inner)
    weights.save(
        path,
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "intermediate_size": inner * top,
            "moe_intermediate_size": inner,
            "num_experts": experts,
            "num_experts_per_tok": top,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )


def qwen3_next(path: Path, tiny: bool, *, name: str) -> None:
    """Three gated delta nets, then attention whose output is gated too; experts and a shared one in each layer."""
    c: Config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 64 if tiny else 2048,
        "num_attention_heads": 4 if tiny else 16,
        "num_key_value_heads": 2,
        "head_dim": 32 if tiny else 256,
        "linear_num_key_heads": 2 if tiny else 16,
        "linear_num_value_heads": 4 if tiny else 32,
        "linear_key_head_dim": 64 if tiny else 128,
        "linear_value_head_dim": 64 if tiny else 128,
        "linear_conv_kernel_dim": 4,
        "intermediate_size": 128 if tiny else 5632,
        "moe_intermediate_size": 64 if tiny else 512,
        "shared_expert_intermediate_size": 64 if tiny else 512,
        "num_experts": 8 if tiny else 64,
        "num_experts_per_tok": 2 if tiny else 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "vocab_size": 512 if tiny else 32000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    weights = Weights(name, tiny)
    hidden, heads, head, kv_heads = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["num_key_value_heads"]
    values = c["linear_num_value_heads"] * c["linear_value_head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    # Its norms add one to their weights, but for those of the delta nets.
    weights.normal("model.embed_tokens.weight", c["vocab_size"], hidden)
    weights.norm("model.norm", hidden, centre=0.0)
    weights.linear("lm_head", c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden, centre=0.0)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden, centre=0.0)
        if (layer + 1) % c["full_attention_interval"]:
            net = f"{prefix}.linear_attn"
            weights.linear(f"{net}.in_proj_qkvz", 2 * (keys + values), hidden)
            weights.linear(f"{net}.in_proj_ba", 2 * c["linear_num_value_heads"], hidden)
            weights.normal(f"{net}.conv1d.weight", 2 * keys + values, 1, c["linear_conv_kernel_dim"], std=0.5)
            weights.normal(f"{net}.dt_bias", c["linear_num_value_heads"], std=0.5)
            weights.put(f"{net}.A_log", weights.uniform(c["linear_num_value_heads"], low=0.0, high=2.77))
            weights.norm(f"{net}.norm", c["linear_value_head_dim"])
            weights.linear(f"{net}.out_proj", hidden, values)
        else:
            attn = f"{prefix}.self_attn"
            weights.linear(f"{attn}.q_proj", 2 * heads * head, hidden)  # queries, and gates of the output
            weights.linear(f"{attn}.k_proj", kv_heads * head, hidden)
            weights.linear(f"{attn}.v_proj", kv_heads * head, hidden)
            weights.linear(f"{attn}.o_proj", hidden, heads * head)
            weights.norm(f"{attn}.q_norm", head, centre=0.0)
            weights.norm(f"{attn}.k_norm", head, centre=0.0)
        mlp = f"{prefix}.mlp"
        weights.linear(f"{mlp}.gate", c["num_experts"], hidden)
        weights.linear(f"{mlp}.shared_expert_gate", 1, hidden)
        gated(weights, f"{mlp}.shared_expert", hidden, c["shared_expert_intermediate_size"])
        for expert in range(c["num_experts"]):
            gated(weights, f"{mlp}.experts.{expert}", hidden, c["moe_intermediate_size"])
    weights.save(path, c)


def mixtral(path: Path, tiny: bool, *, name: str) -> None:
    if tiny:
        hidden, heads, kv_heads, head, inner, experts, layers, vocab = 64, 4, 2, 32, 128, 4, 2, 512
    else:
        hidden, heads, kv_heads, head, inner, experts, layers, vocab = 4096, 32, 8, 128, 14336, 4, 2, 8192
    weights = Weights(name, tiny)
    vocabulary(weights, vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden)
        attention(weights, f"{prefix}.self_attn", hidden, heads, kv_heads, head)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden)
        weights.linear(f"{prefix}.block_sparse_moe.gate", experts, hidden)
        for expert in range(experts):
            gated(weights, f"{prefix}.block_sparse_moe.experts.{expert}", hidden, inner, names=("w1", "w3", "w2"))
    weights.save(
        path,
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "intermediate_size": inner,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )


def deepseek_v3(
    path: Path, tiny: bool, *, name: str, quant: str | None = None, mtp: bool = False, sparse: bool = False
) -> None:
    """With `sparse`, an indexer in each layer chooses what is attended to, as in DeepSeek-V3.2."""
    c: Config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 256 if tiny else 7168,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 4 if tiny else 32,
        "q_lora_rank": 128 if tiny else 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "intermediate_size": 256 if tiny else 8192,
        "moe_intermediate_size": 128 if tiny else 1024,
        "n_routed_experts": 8 if tiny or mtp else 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2 if tiny else 4,
        "n_group": 2 if tiny else 4,
        "topk_group": 1 if tiny else 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1 if mtp else 0,
        "vocab_size": 512 if tiny else 8192 if mtp else 16384,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if sparse:
        c |= {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        c |= {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    weights = Weights(name, tiny, QUANTS[quant] if quant else None)
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    vocabulary(weights, vocab, hidden)
    for layer in range(c["num_hidden_layers"]):
        deepseek_layer(weights, f"model.layers.{layer}", c, dense=layer < c["first_k_dense_replace"])
    for layer in range(c["num_hidden_layers"], c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        deepseek_layer(weights, prefix, c, dense=False)
        weights.norm(f"{prefix}.enorm", hidden)
        weights.norm(f"{prefix}.hnorm", hidden)
        weights.linear(f"{prefix}.eh_proj", hidden, 2 * hidden, quantize=False)
        weights.norm(f"{prefix}.shared_head.norm", hidden)
        # The published layer repeats the model's own embedding and head.
        weights.put(f"{prefix}.embed_tokens.weight", weights.tensors["model.embed_tokens.weight"].clone())
        weights.put(f"{prefix}.shared_head.head.weight", weights.tensors["lm_head.weight"].clone())
    weights.save(path, c)


def deepseek_layer(weights: Weights, name: str, c: Config, *, dense: bool) -> None:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    query = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    attn = f"{name}.self_attn"
    weights.norm(f"{name}.input_layernorm", hidden)
    weights.linear(f"{attn}.q_a_proj", c["q_lora_rank"], hidden)
    weights.norm(f"{attn}.q_a_layernorm", c["q_lora_rank"])
    weights.linear(f"{attn}.q_b_proj", heads * query, c["q_lora_rank"])
    weights.linear(f"{attn}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
    weights.norm(f"{attn}.kv_a_layernorm", c["kv_lora_rank"])
    weights.linear(f"{attn}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
    weights.linear(f"{attn}.o_proj", hidden, heads * c["v_head_dim"])
    if "index_topk" in c:
        weights.linear(f"{attn}.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
        weights.linear(f"{attn}.indexer.wk", c["index_head_dim"], hidden)
        weights.norm(f"{attn}.indexer.k_norm", c["index_head_dim"], bias=True)
        weights.linear(f"{attn}.indexer.weights_proj", c["index_n_heads"], hidden, quantize=False)
    weights.norm(f"{name}.post_attention_layernorm", hidden)
    mlp = f"{name}.mlp"
    if dense:
        gated(weights, mlp, hidden, c["intermediate_size"])
        return
    weights.linear(f"{mlp}.gate", c["n_routed_experts"], hidden, quantize=False)
    weights.normal(f"{mlp}.gate.e_score_correction_bias", c["n_routed_experts"], dtype=torch.float32)
    gated(weights, f"{mlp}.shared_experts", hidden, c["moe_intermediate_size"] * c["n_shared_experts"])
    for expert in range(c["n_routed_experts"]):
        gated(weights, f"{mlp}.experts.{expert}", hidden, c["moe_intermediate_size"])


def mamba_mixer(
    weights: Weights, name: str, hidden: int, heads: int, head: int, groups: int, state: int, kernel: int
) -> None:
    inner = heads * head
    convolved = inner + 2 * groups * state
    weights.linear(f"{name}.in_proj", inner + convolved + heads, hidden)
    weights.normal(f"{name}.conv1d.weight", convolved, 1, kernel, std=0.5)
    weights.normal(f"{name}.conv1d.bias", convolved, std=0.05)
    weights.normal(f"{name}.dt_bias", heads, std=0.5)
    # A_log is log(1..16) in published models: a decay that neither forgets at once nor overflows.
    weights.put(f"{name}.A_log", weights.uniform(heads, low=0.0, high=2.77).to(weights.dtype))
    weights.put(f"{name}.D", weights.uniform(heads, low=0.5, high=1.5).to(weights.dtype))
    weights.norm(f"{name}.norm", inner)
    weights.linear(f"{name}.out_proj", hidden, inner)


def mamba2(path: Path, tiny: bool, *, name: str) -> None:
    if tiny:
        hidden, heads, head, groups, state, layers, vocab = 64, 4, 32, 1, 32, 2, 512
    else:
        hidden, heads, head, groups, state, layers, vocab = 4096, 128, 64, 8, 128, 4, 32768
    weights = Weights(name, tiny)
    weights.normal("backbone.embeddings.weight", vocab, hidden)
    for layer in range(layers):
        weights.norm(f"backbone.layers.{layer}.norm", hidden)
        mamba_mixer(weights, f"backbone.layers.{layer}.mixer", hidden, heads, head, groups, state, 4)
    weights.norm("backbone.norm_f", hidden)
    weights.linear("lm_head", vocab, hidden)
    weights.save(
        path,
        {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_size": hidden,
            "num_heads": heads,
            "head_dim": head,
            "n_groups": groups,
            "state_size": state,
            "expand": heads * head // hidden,
            "conv_kernel": 4,
            "use_conv_bias": True,
            "use_bias": False,
            "hidden_act": "silu",
            "rms_norm": True,
            "layer_norm_epsilon": 1e-5,
            "chunk_size": 256,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
    )


def nemotron_h(path: Path, tiny: bool, *, name: str) -> None:
    """Layers of one kind each: Mamba-2, attention, an MLP without gates, and on a GPU experts without gates."""
    c: Config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M*M" if tiny else "M-M*EM",
        "hidden_size": 64 if tiny else 2688,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2,
        "head_dim": 32 if tiny else 128,
        "intermediate_size": 128 if tiny else 8192,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 4 if tiny else 64,
        "mamba_head_dim": 32 if tiny else 64,
        "n_groups": 1 if tiny else 8,
        "ssm_state_size": 32 if tiny else 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "chunk_size": 128,
        "n_routed_experts": 8 if tiny else 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2 if tiny else 6,
        "moe_intermediate_size": 64 if tiny else 1856,
        "moe_shared_expert_intermediate_size": 64 if tiny else 3712,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_hidden_layers": 5 if tiny else 6,
        "vocab_size": 512 if tiny else 32000,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": 1e-5,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    hidden = c["hidden_size"]
    weights = Weights(name, tiny)
    weights.normal("backbone.embeddings.weight", c["vocab_size"], hidden)
    for layer, kind in enumerate(c["hybrid_override_pattern"]):
        mixer = f"backbone.layers.{layer}.mixer"
        weights.norm(f"backbone.layers.{layer}.norm", hidden)
        if kind == "M":
            sizes = (c[key] for key in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"))
            mamba_mixer(weights, mixer, hidden, *sizes, c["conv_kernel"])
            continue
        if kind == "*":
            attention(weights, mixer, hidden, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
            continue
        inners = {mixer: c["intermediate_size"]}
        if kind == "E":
            weights.linear(f"{mixer}.gate", c["n_routed_experts"], hidden)
            weights.normal(f"{mixer}.gate.e_score_correction_bias", c["n_routed_experts"], dtype=torch.float32)
            inners = {f"{mixer}.experts.{n}": c["moe_intermediate_size"] for n in range(c["n_routed_experts"])}
            inners[f"{mixer}.shared_experts"] = c["moe_shared_expert_intermediate_size"]
        for mlp, inner in inners.items():
            weights.linear(f"{mlp}.up_proj", inner, hidden)
            weights.linear(f"{mlp}.down_proj", hidden, inner)
    weights.norm("backbone.norm_f", hidden)
    weights.linear("lm_head", c["vocab_size"], hidden)
    weights.save(path, c)


def granite_hybrid(path: Path, tiny: bool, *, name: str) -> None:
    """Granite 4: Mamba-2 layers with an attention layer between them, and a dense ("shared") MLP in each."""
    if tiny:
        hidden, heads, kv_heads, mamba_heads, mamba_head, state, inner, vocab = 64, 2, 2, 4, 32, 32, 128, 512
    else:
        hidden, heads, kv_heads, mamba_heads, mamba_head, state, inner, vocab = 2048, 32, 8, 64, 64, 128, 8192, 32000
    kinds = ["mamba", "attention", "mamba", "mamba", "attention", "mamba"]
    weights = Weights(name, tiny)
    vocabulary(weights, vocab, hidden)
    for layer, kind in enumerate(kinds):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden)
        if kind == "mamba":
            mamba_mixer(weights, f"{prefix}.mamba", hidden, mamba_heads, mamba_head, 1, state, 4)
        else:
            attention(weights, f"{prefix}.self_attn", hidden, heads, kv_heads, hidden // heads)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden)
        weights.linear(f"{prefix}.shared_mlp.input_linear", 2 * inner, hidden)
        weights.linear(f"{prefix}.shared_mlp.output_linear", hidden, inner)
    weights.save(
        path,
        {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "shared_intermediate_size": inner,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": kinds,
            "num_hidden_layers": len(kinds),
            "mamba_n_heads": mamba_heads,
            "mamba_d_head": mamba_head,
            "mamba_n_groups": 1,
            "mamba_d_state": state,
            "mamba_d_conv": 4,
            "mamba_expand": mamba_heads * mamba_head // hidden,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "position_embedding_type": "rope",
            "rope_theta": 10000.0,
            "attention_multiplier": (hidden // heads) ** -0.5,
            "embedding_multiplier": 12.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 0.5,
            "normalization_function": "rmsnorm",
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "vocab_size": vocab,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )


def gemma3(path: Path, tiny: bool, *, name: str, embeds: bool = False) -> None:
    """With `embeds`, as EmbeddingGemma: attention in both directions, and two layers behind the pooling."""
    if tiny:
        hidden, heads, kv_heads, head, inner, window, vocab = 64, 4, 2, 32, 128, 16, 512
    else:
        hidden, heads, kv_heads, head, inner, window, vocab = 2560, 8, 4, 256, 10240, 1024, 32768
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (1 if tiny else 2)
    weights = Weights(name, tiny)
    # Gemma multiplies embeddings by sqrt(hidden), and its norms add one to their weights.
    weights.normal("model.embed_tokens.weight", vocab, hidden, std=0.02 * hidden**-0.5)
    weights.norm("model.norm", hidden, centre=0.0)
    for layer in range(len(kinds)):
        prefix = f"model.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            weights.norm(f"{prefix}.{norm}_layernorm", hidden, centre=0.0)
        attention(weights, f"{prefix}.self_attn", hidden, heads, kv_heads, head)
        weights.norm(f"{prefix}.self_attn.q_norm", head, centre=0.0)
        weights.norm(f"{prefix}.self_attn.k_norm", head, centre=0.0)
        gated(weights, f"{prefix}.mlp", hidden, inner)
    if embeds:
        weights.rename("model.", "")
        write_tokenizer(path, vocab, [])
        write_pooling(path, name, hidden, [(4 * hidden, "linear.Identity"), (hidden, "linear.Identity")], bias=False)
    weights.save(
        path,
        {
            "architectures": ["Gemma3TextModel" if embeds else "Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "use_bidirectional_attention": embeds,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "query_pre_attn_scalar": head,
            "intermediate_size": inner,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": window,
            "layer_types": kinds,
            "sliding_window_pattern": 3,
            "num_hidden_layers": len(kinds),
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "max_position_embeddings": 8192,
            "vocab_size": vocab,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
    )


def gpt_oss(path: Path, tiny: bool, *, name: str, quantized: bool = True) -> None:
    if tiny:
        hidden, heads, kv_heads, head, inner, experts, top, vocab = 256, 4, 2, 64, 256, 8, 2, 512
    else:
        hidden, heads, kv_heads, head, inner, experts, top, vocab = 2880, 64, 8, 64, 2880, 32, 4, 32768
    kinds = ["sliding_attention", "full_attention"] * (1 if tiny else 2)
    weights = Weights(name, tiny)
    vocabulary(weights, vocab, hidden)
    for layer in range(len(kinds)):
        prefix = f"model.layers.{layer}"
        weights.norm(f"{prefix}.input_layernorm", hidden)
        attention(weights, f"{prefix}.self_attn", hidden, heads, kv_heads, head, bias=True)
        weights.normal(f"{prefix}.self_attn.o_proj.bias", hidden)
        weights.normal(f"{prefix}.self_attn.sinks", heads, std=0.5)
        weights.norm(f"{prefix}.post_attention_layernorm", hidden)
        weights.linear(f"{prefix}.mlp.router", experts, hidden, bias=True)
        for part, out, width in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            # Two 4-bit floats a byte, 32 to a block; a block's scale is a power of two less its bias, 127.
            expert = f"{prefix}.mlp.experts.{part}"
            if quantized:
                weights.put(f"{expert}_blocks", weights.octets(experts, out, width // 32, 16))
                weights.put(f"{expert}_scales", weights.octets(experts, out, width // 32, low=118, high=121))
            else:
                weights.normal(expert, experts, width, out, std=width**-0.5)
            weights.normal(f"{expert}_bias", experts, out)
    format_config = {
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    }
    weights.save(
        path,
        (format_config if quantized else {})
        | {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "intermediate_size": inner,
            "num_local_experts": experts,
            "num_experts_per_tok": top,
            "experts_per_token": top,
            "layer_types": kinds,
            "num_hidden_layers": len(kinds),
            "sliding_window": 16 if tiny else 128,
            "swiglu_limit": 7.0,
            "hidden_act": "silu",
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "initial_context_length": 4096,
            "max_position_embeddings": 131072,
            "vocab_size": vocab,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )


def bert(path: Path, tiny: bool, *, name: str) -> None:
    hidden, heads, inner, layers, vocab = (64, 2, 128, 2, 512) if tiny else (384, 12, 1536, 6, 30522)
    weights = Weights(name, tiny)
    for part, size in (("word", vocab), ("position", 512), ("token_type", 2)):
        weights.normal(f"embeddings.{part}_embeddings.weight", size, hidden)
    weights.norm("embeddings.LayerNorm", hidden, bias=True)
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            weights.linear(f"{prefix}.attention.self.{part}", hidden, hidden, bias=True)
        weights.linear(f"{prefix}.attention.output.dense", hidden, hidden, bias=True)
        weights.norm(f"{prefix}.attention.output.LayerNorm", hidden, bias=True)
        weights.linear(f"{prefix}.intermediate.dense", inner, hidden, bias=True)
        weights.linear(f"{prefix}.output.dense", hidden, inner, bias=True)
        weights.norm(f"{prefix}.output.LayerNorm", hidden, bias=True)
    weights.linear("pooler.dense", hidden, hidden, bias=True)
    path.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(vocab - 5))]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 512})
    weights.save(
        path,
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "position_embedding_type": "absolute",
            "pad_token_id": 0,
        },
    )


def encoder_layer(weights: Weights, name: str, hidden: int, inner: int, *, whisper: bool = False) -> None:
    """A layer of SigLIP; Whisper's has other names, no bias of its keys, and a second attention in the decoder."""
    norms = ("self_attn_layer_norm", "final_layer_norm") if whisper else ("layer_norm1", "layer_norm2")
    blocks = ["self_attn"]
    if whisper and ".decoder." in name:
        norms, blocks = (*norms, "encoder_attn_layer_norm"), [*blocks, "encoder_attn"]
    for block in blocks:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{name}.{block}.{part}", hidden, hidden, bias=not (whisper and part == "k_proj"))
    for norm in norms:
        weights.norm(f"{name}.{norm}", hidden, bias=True)
    mlp = name if whisper else f"{name}.mlp"
    weights.linear(f"{mlp}.fc1", inner, hidden, bias=True)
    weights.linear(f"{mlp}.fc2", hidden, inner, bias=True)


def idefics3(path: Path, tiny: bool, *, name: str) -> None:
    """SigLIP, a projection and a Llama. In vLLM one of few that need no torchvision, which CPU environments lack."""
    hidden, heads, inner, layers, size, patch = (64, 2, 128, 2, 56, 14) if tiny else (1152, 16, 4304, 4, 364, 14)
    c = llama_config(tiny, False)
    weights = Weights(name, tiny)
    llama_stack(weights, c)
    weights.rename("model.", "model.text_model.")
    tower, patches = "model.vision_model", (size // patch) ** 2
    weights.normal(f"{tower}.embeddings.patch_embedding.weight", hidden, 3, patch, patch)
    weights.normal(f"{tower}.embeddings.patch_embedding.bias", hidden)
    weights.normal(f"{tower}.embeddings.position_embedding.weight", patches, hidden)
    for layer in range(layers):
        encoder_layer(weights, f"{tower}.encoder.layers.{layer}", hidden, inner)
    weights.norm(f"{tower}.post_layernorm", hidden, bias=True)
    weights.linear("model.connector.modality_projection.proj", c["hidden_size"], 4 * hidden)
    numbers = write_tokenizer(path, c["vocab_size"], ["<image>", "<fake_token_around_image>", "<global-img>"])
    edge = {"longest_edge": size}
    image = {"size": edge, "max_image_size": edge, "do_image_splitting": False}
    write_json(path / "preprocessor_config.json", {"image_processor_type": "Idefics3ImageProcessor", **image})
    write_json(path / "processor_config.json", {"processor_class": "Idefics3Processor", "image_seq_len": patches // 4})
    weights.save(
        path,
        {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": numbers["<image>"],
            "scale_factor": 2,
            "pad_token_id": 0,
            "text_config": c,
            "vision_config": {
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "image_size": size,
                "patch_size": patch,
            },
        },
    )


def qwen25_vl(path: Path, tiny: bool, *, name: str) -> None:
    hidden, heads, inner, layers = (64, 2, 128, 2) if tiny else (1280, 16, 3420, 4)
    c = llama_config(tiny, True)  # the heads are as wide as the hidden size allows, as Qwen2 wants it
    head, out = c["head_dim"], c["hidden_size"]
    c |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2_5_vl_text"}
    c["rope_scaling"] = {"type": "mrope", "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    weights = Weights(name, tiny)
    llama_stack(weights, c, bias=True)
    weights.normal("visual.patch_embed.proj.weight", hidden, 3, 2, 14, 14)
    for layer in range(layers):
        prefix = f"visual.blocks.{layer}"
        weights.norm(f"{prefix}.norm1", hidden)
        weights.norm(f"{prefix}.norm2", hidden)
        weights.linear(f"{prefix}.attn.qkv", 3 * hidden, hidden, bias=True)
        weights.linear(f"{prefix}.attn.proj", hidden, hidden, bias=True)
        gated(weights, f"{prefix}.mlp", hidden, inner, bias=True)
    weights.norm("visual.merger.ln_q", hidden)
    weights.linear("visual.merger.mlp.0", 4 * hidden, 4 * hidden, bias=True)
    weights.linear("visual.merger.mlp.2", out, 4 * hidden, bias=True)
    special = ["vision_start", "vision_end", "image_pad", "video_pad"]
    numbers = write_tokenizer(path, c["vocab_size"], [f"<|{token}|>" for token in special])
    image: Config = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    image |= {"min_pixels": 56 * 56, "max_pixels": 56 * 56 if tiny else 448 * 448}
    write_json(
        path / "preprocessor_config.json",
        {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor", **image},
    )
    weights.save(
        path,
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "vision_start_token_id": numbers["<|vision_start|>"],
            "vision_end_token_id": numbers["<|vision_end|>"],
            "image_token_id": numbers["<|image_pad|>"],
            "video_token_id": numbers["<|video_pad|>"],
            "tie_word_embeddings": False,
            "text_config": c,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "hidden_size": hidden,
                "num_heads": heads,
                "intermediate_size": inner,
                "depth": layers,
                "fullatt_block_indexes": [layers - 1],
                "window_size": 112,
                "out_hidden_size": out,
            },
        },
    )


def whisper(path: Path, tiny: bool, *, name: str) -> None:
    if tiny:
        hidden, heads, inner, layers, seconds, vocab = 64, 2, 128, 2, 2, 512
    else:
        hidden, heads, inner, layers, seconds, vocab = 768, 12, 3072, 4, 30, 8192
    mels, sources, targets = 80, seconds * 50, 448
    weights = Weights(name, tiny)
    for number, channels in ((1, mels), (2, hidden)):
        weights.normal(f"model.encoder.conv{number}.weight", hidden, channels, 3, std=(3 * channels) ** -0.5)
        weights.normal(f"model.encoder.conv{number}.bias", hidden)
    weights.normal("model.decoder.embed_tokens.weight", vocab, hidden)
    for stack, positions in (("encoder", sources), ("decoder", targets)):
        weights.normal(f"model.{stack}.embed_positions.weight", positions, hidden)
        for layer in range(layers):
            encoder_layer(weights, f"model.{stack}.layers.{layer}", hidden, inner, whisper=True)
        weights.norm(f"model.{stack}.layer_norm", hidden, bias=True)
    numbers = write_tokenizer(path, vocab, ["<|startoftranscript|>"])
    write_json(
        path / "preprocessor_config.json",
        {
            "processor_class": "WhisperProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": mels,
            "chunk_length": seconds,
        },
    )
    weights.save(
        path,
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "is_encoder_decoder": True,
            "d_model": hidden,
            "num_mel_bins": mels,
            "max_source_positions": sources,
            "max_target_positions": targets,
            "vocab_size": vocab,
            "decoder_start_token_id": numbers["<|startoftranscript|>"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **{f"{stack}_layers": layers for stack in ("encoder", "decoder")},
            **{f"{stack}_attention_heads": heads for stack in ("encoder", "decoder")},
            **{f"{stack}_ffn_dim": inner for stack in ("encoder", "decoder")},
        },
    )
