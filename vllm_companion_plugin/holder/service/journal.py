"""What is written down of the registry's moves: the log of the companion, and notes for the next one.

A note tells those who map a generation not to hand it back to the companion that follows, or tells that companion which
one was current. The log says what happened to which entry, and by whom.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionError, RuntimeDirError
from vllm_companion_plugin.holder.registry import limits
from vllm_companion_plugin.holder.registry.entries import Entry
from vllm_companion_plugin.holder.registry.moves import (
    CurrentChanged,
    GenerationMoved,
    LeaseMoved,
    Lingering,
    LingerOver,
    Move,
    Owned,
    OwnerGone,
)
from vllm_companion_plugin.holder.registry.table import DISMISSING, GenerationEvent, LeaseEvent

logger = logging.getLogger("vllm.companion.service")


def level_of(error: CompanionError) -> int:
    """At which level a refusal is logged."""
    return logging.INFO if error.expected else logging.WARNING


Note = Callable[[EntryKey, int], None]


class Journal:
    """An observer of a registry.

    Args:
        dismiss: notes that no client shall hand back this generation of the entry. May raise `OSError`.
        roll_back: notes that this generation is current, though it is not the latest; 0: the latest is. May raise
            `OSError`.
        clear: removes the note of those who held this generation, which nobody has any more. May raise `OSError`.
    """

    def __init__(self, dismiss: Note, roll_back: Note, clear: Note) -> None:
        self._dismiss = dismiss
        self._roll_back = roll_back
        self._clear = clear

    def observe(self, move: Move) -> None:
        """Write down one move."""
        if isinstance(move, GenerationMoved):
            if move.event in DISMISSING:
                self._note(move.entry)
            elif move.event is GenerationEvent.FORGET:
                with contextlib.suppress(OSError):  # the next companion looks through what is left
                    self._clear(move.entry.key, move.generation.number)
            _log_generation(move)
        elif isinstance(move, LeaseMoved):
            _log_lease(move)
        elif isinstance(move, CurrentChanged):
            self._note_current(move)
            _log_current(move)
        elif isinstance(move, Lingering):
            until = time.strftime("%m-%d %H:%M:%S", time.localtime(time.time() + move.left_s))
            held_gib = move.held_bytes / (1 << 30)
            held = f"{held_gib:.2f} GiB are held" if move.held_bytes else "Nothing is held"
            logger.info("Nobody is attached. %s. If nobody comes until %s the companion exits.", held, until)
        elif isinstance(move, LingerOver):
            logger.info("Nobody was attached for %g s: ending.", move.linger_s)
        elif isinstance(move, Owned):
            idle = "" if move.linger_s < 0 else f", or until nobody was attached for {move.linger_s:g} s"
            logger.info("The owner is pid %d: this companion stays until that process ends%s.", move.pid, idle)
        elif isinstance(move, OwnerGone):
            logger.warning(
                "The owner (pid %d) has gone: this companion stays as if an engine had started it.", move.pid
            )

    def _note(self, entry: Entry) -> None:
        try:
            for number in {entry.current.number, *entry.noted, *(lease.maps for lease in entry.leases)}:
                self._dismiss(entry.key, number)
            self._roll_back(entry.key, 0)
        except (OSError, RuntimeDirError) as error:
            logger.warning("Those who map %s may hand it back: %s", entry.key.title, error)

    def _note_current(self, move: CurrentChanged) -> None:
        key = move.entry.key
        try:
            self._roll_back(key, 0 if move.is_latest else move.generation.number)
        except (OSError, RuntimeDirError) as error:
            logger.warning("The next companion may take another generation of %s: %s", key.title, error)


def _log_current(move: CurrentChanged) -> None:
    current, key = move.generation, move.entry.key
    if move.before:
        version = f" ({current.published.version})" if current.published.version else ""
        logger.info(
            "Generation %d%s of %s (%s) is current, in place of %d.",
            *(current.number, version, key.title, key.rank, move.before),
        )


def _log_generation(move: GenerationMoved) -> None:
    entry, event = move.entry, move.event
    title, rank, held_gib = entry.key.title, entry.key.rank, entry.size_bytes / (1 << 30)
    if event is GenerationEvent.EXPECT:
        logger.info("Expecting %s (%s) from those who map it.", title, rank)
    elif event is GenerationEvent.GIVE_UP:
        logger.warning("Nobody handed back %s within %g s.", title, limits.HAND_BACK_S)
    elif event is GenerationEvent.EXPIRE:
        logger.info("Nobody used %s (%s) for its linger time: dropped, %.2f GiB are free.", title, rank, held_gib)
    elif event is GenerationEvent.MAKE_ROOM:
        logger.info(
            "Dropped %s (%s), which nobody uses, because somebody needs its %.2f GiB.", *(title, rank, held_gib)
        )
    elif event is GenerationEvent.UNLOAD:
        logger.info("Unloaded %s, generation %d.", entry.key.model, entry.current.number)
    elif event is GenerationEvent.LOSE:
        logger.warning(
            "Nobody can map generation %d of %s any more, because its keeper has ended.",
            *(move.generation.number, entry.key.model),
        )


def _log_lease(move: LeaseMoved) -> None:
    lease, entry = move.lease, move.lease.entry
    if move.event is LeaseEvent.COMMIT and entry.current.arena is not None:
        logger.info(
            "%s %s %s (%s, %s), generation %d: %.2f GiB of %s, loaded in %.1f s.",
            *(lease.who, "handed back" if lease.holds else "published"),
            *(entry.key.model, entry.key.role, entry.key.rank, entry.current.number),
            *(entry.size_bytes / (1 << 30), entry.current.arena.kind, entry.current.published.load_s),
        )
    elif move.event is LeaseEvent.DECLINE:
        logger.info("%s keeps %s: %s", lease.who, entry.key.model, move.reason)
    elif move.event is LeaseEvent.OVERDUE:
        logger.warning(
            "%s was elected to hand back %s and did not within %g s: the next one may.",
            *(lease.who, entry.key.title, limits.HAND_BACK_S),
        )
