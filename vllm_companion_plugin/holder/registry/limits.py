"""How much a companion takes on: the most of each thing, and the time that handing back may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_companion_plugin.errors import LimitError

MAX_ENTRIES = 512
MAX_KEYS_CHARACTERS = 32 << 20
"""Of the keys of all entries together: a status, which shows them, can be read by any client."""
MAX_LEASES = 4096
MAX_WATCHES = 256
MAX_PUBLICATIONS = 256
MAX_MANIFESTS_BYTES = 1 << 30
"""All manifests together, published or on their way."""
MAX_REMEMBERED = 10_000
"""Keys whose latest generation is known though nothing is held."""
HAND_BACK_S = 5.0
"""Clients need about a second to hand back what the companion before held. Clients that want an entry wait so long."""


UNLOAD = "Unload some: vllm-companion unload"
"""What to do if too much is held."""


class Places:
    """A number of conversations that may be open at a time."""

    def __init__(self, limit: int, refusal: str) -> None:
        """`refusal` is the text of the error when all places are taken."""
        self._free, self._refusal = limit, refusal

    @contextmanager
    def one(self) -> Iterator[None]:
        """Take a place while open. Raises `LimitError` if there is none."""
        if self._free <= 0:
            raise LimitError(self._refusal, remedy="Try again when some have ended.")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
