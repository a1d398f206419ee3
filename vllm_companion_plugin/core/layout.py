"""What stays the same between the generations of an entry, as one digest.

Captured graphs, kernels' descriptors and views hold addresses. Another generation may take the place of the one that
is mapped only if every tensor is where it was, in the same form. Bytes and values may differ; they are the
generation's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from vllm_companion_plugin.core.module_tree import Manifest


def layout_digest(manifest: Manifest, memory: str, block_sizes: Sequence[int]) -> str:
    """Hex sha256 over the modules, the form and the place of every tensor, and the blocks of the arena.

    Args:
        memory: kind of the arena's memory.
        block_sizes: bytes of each block, in address order.
    """
    tensors = [
        (
            tensor.storage,
            tensor.storage_offset,
            tensor.dtype,
            tensor.shape,
            tensor.stride,
            tensor.class_name,
            tensor.requires_grad,
            tensor.private,
            tensor.own,
            tensor.meta,
            tensor.conj,
            tensor.neg,
            None if tensor.inline is None else len(tensor.inline),
        )
        for tensor in manifest.tensors
    ]
    modules = [
        (
            module.path,
            module.aliases,
            module.class_name,
            [(slot.name, slot.kind.value, slot.tensor) for slot in module.slots],
        )
        for module in manifest.modules
    ]
    storages = [(storage.offset_bytes, storage.size_bytes) for storage in manifest.storages]
    form = (manifest.stage.value, memory, list(block_sizes), storages, tensors, modules)
    return hashlib.sha256(json.dumps(form, separators=(",", ":")).encode()).hexdigest()
