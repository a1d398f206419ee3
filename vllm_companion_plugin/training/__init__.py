"""Training on the bytes that engines serve: a Transformers model whose parameters view an entry.

`from_companion` makes one that is frozen, for adapters; `trained` one whose parameters are written in place.

May import: client, core, fleet, host, memory, wire, settings, errors.
Of other packages: torch, transformers, safetensors, typing_extensions.
"""

from __future__ import annotations

from vllm_companion_plugin.training.base import from_companion
from vllm_companion_plugin.training.sharing import Sharing, sharing_of
from vllm_companion_plugin.training.trained import Trained, trained

__all__ = ["Sharing", "Trained", "from_companion", "sharing_of", "trained"]
