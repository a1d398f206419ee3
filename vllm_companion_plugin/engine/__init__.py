"""vLLM's side: the load format, what to do with each model, publishing and attaching.

May import: core, host, wire, memory, tree, keeper, client, settings, errors.
Of other packages: torch, numpy, vllm, tqdm, huggingface_hub, blake3, filelock, PIL.
"""
