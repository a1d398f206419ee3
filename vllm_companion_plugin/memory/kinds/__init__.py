"""The kinds of memory that an arena can be made of: a file each, and a line in the table below.

May import: core, memory, errors.
"""

from __future__ import annotations

from vllm_companion_plugin.memory.kind import Kind
from vllm_companion_plugin.memory.kinds.cuda_ipc import CudaIpc
from vllm_companion_plugin.memory.kinds.cuda_vmm import CudaVmm
from vllm_companion_plugin.memory.kinds.memfd import Memfd

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Memfd(),
        CudaVmm(),
        CudaIpc(),
    )
}
"""By name; of one type of device the better ones first."""


def names(device_type: str) -> tuple[str, ...]:
    """The kinds of memory of "cpu" or "cuda" devices, the better ones first."""
    return tuple(name for name, kind in KINDS.items() if kind.device_type == device_type)
