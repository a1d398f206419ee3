"""Keeping processes running: the companions of `vllm-companion serve`, and child processes that get our signals.

May import: core, host, client, settings, errors.
"""
