"""vllm-companion: a GPU's model weights, loaded once, owned by nobody who can crash.

Importing this package imports neither torch nor vLLM nor grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_companion_plugin import errors
from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    FleetError,
    IntegrityError,
    SettingsError,
    WaitTimeoutError,
)

__all__ = [
    "Attachment",
    "CompanionClient",
    "CompanionError",
    "CompanionStatus",
    "CompanionUnavailableError",
    "EntryNotFoundError",
    "EntryStatus",
    "FleetError",
    "IntegrityError",
    "SettingsError",
    "WaitTimeoutError",
    "__version__",
    "errors",
]

if TYPE_CHECKING:
    from vllm_companion_plugin.client.api import Attachment, CompanionClient, CompanionStatus, EntryStatus

_OF_API = ("Attachment", "CompanionClient", "CompanionStatus", "EntryStatus")


def __getattr__(name: str) -> Any:
    if name in _OF_API:
        from vllm_companion_plugin.client import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
