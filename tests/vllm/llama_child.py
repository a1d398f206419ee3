"""Save a random Llama: the arguments are a path, and a JSON object of what its configuration has besides."""

from __future__ import annotations

import json
import sys


def main() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256}
    torch.manual_seed(1)
    config = LlamaConfig(**options | json.loads(sys.argv[2]))
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
