"""Processes that are kept running: the companions of `vllm-companion serve`, and children whose signals are passed on.

May import: core, host, client, settings, errors.
"""
