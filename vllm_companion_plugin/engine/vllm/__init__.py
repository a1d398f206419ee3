"""Everything that depends on vLLM's inside or on its version: 0.26 to 0.33, told apart by looking, not by number.

May import: core, host, wire, memory, tree, client, settings, errors.
Of other packages: torch, vllm.
"""
