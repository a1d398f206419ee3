"""Read the weights of a published model from a program that is not vLLM.

Usage: python attach.py MODEL [DEVICE]
"""

import sys

from vllm_companion_plugin import CompanionClient

model = sys.argv[1]
client = CompanionClient(sys.argv[2] if len(sys.argv) > 2 else None)

client.wait_ready(model, timeout_s=60)
with client.attach(model) as weights:
    print(f"{weights.model} ({weights.rank}), generation {weights.generation}, on {client.device}")
    for name, tensor in weights.tensors.items():
        print(f"{name}: {tensor.dtype} {tuple(tensor.shape)}")
    # The tensors view the companion's memory. What must outlive this block is cloned.
    largest = max(weights.tensors.values(), key=lambda tensor: tensor.nbytes).clone()
print(f"the largest has {largest.nbytes} bytes")
