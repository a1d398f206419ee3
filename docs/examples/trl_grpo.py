"""GRPO with TRL's trainer, whose weights reach a running engine through the companion of the device that they share.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --load-format companion --logprobs-mode processed_logprobs --max-logprobs -1
    python trl_grpo.py MODEL http://127.0.0.1:8000

With --gpu-memory-utilization 0.4 a server leaves the trainer room on its GPU. The reward is the share of vowels.
Prints TRL's log.
"""

import os
import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from vllm_companion_plugin.trainers.trl import vllm_client

model, url = sys.argv[1:]
vllm_generation.VLLMClient = vllm_client(model)  # the one line


def vowels(completions: list[str], **_: object) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=vowels,
    args=GRPOConfig(
        output_dir="trl_grpo",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        max_steps=10,
        learning_rate=float(os.environ.get("LEARNING_RATE", "1e-3")),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"prompt": ["a word: ", "say it: ", "one more: ", "and then: "] * 20}),
)
trainer.train()
for line in trainer.state.log_history:
    print({name: line[name] for name in line if name in ("step", "reward") or "sampling" in name})
