"""The keeper, a process that makes memory for CUDA IPC, and its client. Such memory ends with the process that made it.

May import: core, host, memory, settings, errors.
"""
