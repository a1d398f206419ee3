"""Training on the bytes that engines serve: a Transformers model whose parameters view an entry.

May import: client, core, host, memory, wire, settings, errors.
Of other packages: torch, transformers, safetensors, typing_extensions.
"""

from __future__ import annotations

from vllm_companion_plugin.training.base import from_companion
from vllm_companion_plugin.training.sharing import Sharing, sharing_of

__all__ = ["Sharing", "from_companion", "sharing_of"]
