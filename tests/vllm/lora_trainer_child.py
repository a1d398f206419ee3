"""A trainer in a process of its own: an adapter on the memory that engines serve, published after every step.

Arguments: the model and the adapter's name. For each line of standard input one answer: after a step, or "save" and a
directory for PEFT's files.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.support.lora import TARGETS
from tests.vllm.results import tell
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.training import from_companion, sharing_of

MARGIN = 0.02


def main() -> None:
    path, name = sys.argv[1:]
    torch.manual_seed(0)
    base = from_companion(path, device="cpu", flags=["--dtype", "float32", "--enable-lora"])
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    sharing = sharing_of(model)
    assert sharing is not None
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-2)
    client = CompanionClient("cpu")
    random = torch.Generator().manual_seed(0)
    tell({"pid": os.getpid(), "copied": sharing.copied, "shared": sharing.shared_bytes})
    for line in sys.stdin:
        prompt = json.loads(line)
        if isinstance(prompt, str):
            model.save_pretrained(prompt)
            tell({})
            continue
        tokens = torch.randint(1, 100, (2, 32), generator=random)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        generation = client.publish_adapter(name, model)
        tell({"tokens": sure(model, prompt), "generation": generation})


def sure(model: Any, prompt: list[int], count: int = 12) -> list[int]:
    """What the model says, up to where two tokens are so alike that another order of sums chooses between them."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < count:
            first, second = model(torch.tensor([prompt + tokens])).logits[0, -1].topk(2)
            if first[0] - first[1] < MARGIN:
                break
            tokens.append(int(second[0]))
    return tokens


if __name__ == "__main__":
    main()
