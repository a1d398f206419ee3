"""The process that makes memory for CUDA IPC, which ends with its maker, and how it is asked.

May import: core, host, memory, settings, errors.
"""
