"""vllm-companion: a GPU's model weights, loaded once, owned by nobody who can crash.

Importing this package imports neither torch nor vLLM nor grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_companion_plugin._version import __version__

__all__ = ["CompanionClient", "__version__"]

if TYPE_CHECKING:
    from vllm_companion_plugin.client.api import CompanionClient


def __getattr__(name: str) -> Any:
    if name == "CompanionClient":
        from vllm_companion_plugin.client.api import CompanionClient

        return CompanionClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
