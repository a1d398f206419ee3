"""What a companion can hold, and what follows from the kind of an entry for whoever keeps it.

A new kind is a row, and another version of the protocol: clients refuse keys of a kind that they do not know.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EntryKind:
    """The rules for entries of one kind.

    Attributes:
        name: as keys have it; part of the protocol.
        has_layout: all generations are laid out as the first one, so that clients map one in the place of another.
        is_on_device: its bytes are in the memory of the companion's device; otherwise they are in host memory.
        is_reloadable: a checkpoint brings its bytes back, unless a client has written them.
        has_ranks: an entry is the part of one role and one rank; otherwise it is all there is of its name.
    """

    name: str
    has_layout: bool
    is_on_device: bool
    is_reloadable: bool
    has_ranks: bool


WEIGHTS = "weights"
"""A model's weights."""
ADAPTER = "adapter"
"""A LoRA adapter, which `core/adapters.py` names."""

ENTRY_KINDS = {
    kind.name: kind
    for kind in (
        EntryKind(WEIGHTS, has_layout=True, is_on_device=True, is_reloadable=True, has_ranks=True),
        EntryKind(ADAPTER, has_layout=False, is_on_device=False, is_reloadable=False, has_ranks=False),
    )
}
