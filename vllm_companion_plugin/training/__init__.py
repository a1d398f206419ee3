"""Training on the bytes that engines serve: a Transformers model whose parameters view an entry, and adapters on it.

`from_companion` makes one that is frozen, for adapters; `trained` one whose parameters are written in place. Only
`colocated` needs vLLM and PEFT.

May import: client, core, fleet, host, memory, wire, settings, errors.
Of other packages: torch, numpy, transformers, safetensors, typing_extensions, vllm, peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_companion_plugin.training.base import from_companion
from vllm_companion_plugin.training.sharing import Sharing, sharing_of
from vllm_companion_plugin.training.trained import Trained, trained

__all__ = ["Colocated", "Sharing", "Trained", "colocated", "from_companion", "sharing_of", "trained"]

if TYPE_CHECKING:
    from vllm_companion_plugin.training.together import Colocated, colocated


def __getattr__(name: str) -> Any:
    if name in ("Colocated", "colocated"):
        from vllm_companion_plugin.training import together

        return getattr(together, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
