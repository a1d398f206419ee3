"""What the companion checks about deposited descriptors before it vouches for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError, BadRequestError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import KINDS

CLOSING = "companion-close"


def check_descriptors(arena: ArenaInfo, fds: Sequence[int]) -> None:
    """Raise `BadRequestError` unless there is one fit descriptor for each block.

    Host memory must be sealed. Device memory is opaque here, but for whether its keeper lives; its importers check it.
    """
    try:
        KINDS[arena.kind].check(arena, fds)
    except ArenaError as error:
        raise BadRequestError(str(error)) from error
    if memory_is_lost(arena, fds):
        raise BadRequestError("The keeper of the arena's memory has ended.")


def close_aside(fds: Sequence[int]) -> None:
    """Close what clients gave us in a thread: closing may block (SO_LINGER, a file system that hangs)."""
    if not fds:
        return
    owned = Descriptors(fds)
    try:
        threading.Thread(target=owned.close, name=CLOSING, daemon=True).start()
    except RuntimeError:  # no more threads
        owned.close()


def memory_is_lost(arena: ArenaInfo, fds: Sequence[int]) -> bool:
    """Whether nobody can map the arena any more: the process that its memory depends on has ended."""
    return KINDS[arena.kind].is_lost(fds)
