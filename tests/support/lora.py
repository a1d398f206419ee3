"""LoRA adapters of a tiny Llama, as PEFT makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_peft(seed: int = 0, **options: Any) -> PeftModel:
    """An adapter of a Llama that no engine has, for what needs none."""
    return adapted(LlamaForCausalLM(TINY), seed, **options)


def peft_of(path: Path, seed: int = 0, **options: Any) -> PeftModel:
    """An adapter of the model in a directory, in float32."""
    return adapted(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), seed, **options)


def adapted(model: Any, seed: int, **options: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    made = get_peft_model(model, LoraConfig(**options))
    train(made, seed)
    return made


def train(model: PeftModel, seed: int) -> None:
    """Give the adapter other weights, strong enough to change every answer."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            width = parameter.shape[1] if "lora_A" in name else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * width**-0.5)


def greedy(model: PeftModel, prompt: list[int], count: int = 12) -> list[int]:
    """What the model says, by its own forward pass."""
    said: list[int] = []
    new, cache = torch.tensor([prompt]), None
    with torch.no_grad():
        for _ in range(count):
            output = model(new, past_key_values=cache, use_cache=True)
            new, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            said.append(int(new))
    return said
