"""The companion process: it holds descriptors of published weights, knows who uses them, and has neither CUDA nor
torch.

May import: core, host, wire, memory.descriptors, memory.kinds, settings, errors.
Of other packages: google, filelock.
"""
