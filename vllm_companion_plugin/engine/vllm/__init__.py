"""Everything that depends on vLLM's inside or on its version.

May import: core, host, wire, memory, tree, client, settings, errors.
Of other packages: torch, vllm.
"""
