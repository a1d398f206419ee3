"""GRPO with TRL's trainer and a LoRA adapter, where trainer and engine use one copy of the base model.

    python trl_lora_grpo.py MODEL           # an engine in this process; with torchrun: one on each GPU
    python trl_lora_grpo.py MODEL URL       # a server, started as:
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --load-format companion --enable-lora --logprobs-mode processed_logprobs

With --gpu-memory-utilization 0.4 a server leaves the trainer room on its GPU. The reward is the share of vowels.
Prints TRL's log.
"""

import json
import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from vllm_companion_plugin.trainers.trl_adapters import vllm_generation
from vllm_companion_plugin.training import colocated, from_companion

name, *url = sys.argv[1:]
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
engine = {"logprobs_mode": "processed_logprobs", "gpu_memory_utilization": 0.4}
engine |= json.loads(os.environ.get("ENGINE_ARGS", "{}"))
both = colocated(name, engine, lora=lora) if not url else None
model = from_companion(name) if both is None else both.model
grpo_trainer.VLLMGeneration = vllm_generation("vowels", both)  # the one line


def vowels(completions: list[str], **_: object) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=vowels,
    peft_config=lora,
    args=GRPOConfig(
        output_dir="trl_lora_grpo",
        use_vllm=True,
        vllm_mode="server" if url else "colocate",
        vllm_server_base_url=url[0] if url else None,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        max_steps=10,
        learning_rate=float(os.environ.get("LEARNING_RATE", "1e-2")),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"prompt": ["a word: ", "say it: ", "one more: ", "and then: "] * 20}),
)
trainer.train()
for line in trainer.state.log_history:
    print({key: line[key] for key in line if key in ("step", "reward") or "sampling" in key})
if both is not None:
    both.close()
