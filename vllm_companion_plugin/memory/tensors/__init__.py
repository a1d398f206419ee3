"""Arenas as PyTorch sees them: views, and checksums on the device.

May import: core, memory, errors.
Of other packages: torch, numpy, cuda.
"""
