"""A model as data: capture its module tree, pack it into an arena, restore it, prove it equal.

Knows torch and nothing of vLLM; what a quantization method does to a module is passed in.
"""
