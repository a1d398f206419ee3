"""A trainer: write the weights of a checkpoint as the next generation of an entry. Prints how many tensors it wrote.

Arguments: the entry's model, the directory of the checkpoint, and its version. A companion on CPU holds vLLM's own
parameters, as they are before post-processing: those that vLLM fuses are fused here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_companion_plugin import CompanionClient

FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def fuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a Llama under vLLM's names."""
    found = dict(weights)
    layers = {name.partition(".self_attn.")[0] for name in weights if ".self_attn." in name}
    for layer in layers:
        for fused, parts in FUSED.items():
            block = fused.partition(".")[0]
            names = [f"{layer}.{block}.{part}.weight" for part in parts]
            found[f"{layer}.{fused}.weight"] = torch.cat([found.pop(name) for name in names])
    return found


def main() -> None:
    model, directory, version = sys.argv[1:]
    weights = fuse(load_file(Path(directory, "model.safetensors")))
    with CompanionClient("cpu").update(model, version) as new:
        count = new.load(weights)
    print(count)


if __name__ == "__main__":
    main()
