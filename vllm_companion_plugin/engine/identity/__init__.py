"""The identity of a load: the configuration, the code, and the files that loading reads.

May import: core, host, wire, memory, tree, client, settings, errors, engine.vllm.
Of other packages: torch, numpy, transformers, vllm, tqdm, huggingface_hub, blake3, filelock.
"""
