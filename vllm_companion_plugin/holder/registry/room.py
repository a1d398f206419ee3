"""Which entries go when their memory is wanted or their time is over. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_companion_plugin.holder.registry.entries import Entry


def expired(entries: Iterable[Entry], linger_s: float, now_s: float) -> tuple[list[Entry], float | None]:
    """The entries that nobody has used for `linger_s`; negative: none.

    Returns:
        These, and seconds until the next one will have expired; None: no other entry is idle.
    """
    left = [(since + linger_s - now_s, entry) for since, entry in _idle(entries, linger_s)]
    due = [entry for left_s, entry in left if left_s <= 0]
    return due, min((left_s for left_s, _ in left if left_s > 0), default=None)


def make(entries: Iterable[Entry], size_bytes: int, linger_s: float) -> list[Entry]:
    """The entries to drop so that `size_bytes` are free: the longest idle first, and no more than it takes.

    Returns none if all idle entries together would not do, because they would be lost in vain, and none if `linger_s`
    is negative: what never expires is not dropped for others either. An entry whose current generation no checkpoint
    brings back stays, too; what others keep to go back to goes with them.
    """
    chosen: list[Entry] = []
    for _, entry in sorted(_idle(entries, linger_s), key=lambda idle: idle[0]):
        if sum(e.device_bytes for e in chosen) >= size_bytes:
            break
        if entry.device_bytes and entry.is_reloadable:
            chosen.append(entry)
    return chosen if sum(e.device_bytes for e in chosen) >= size_bytes else []


def _idle(entries: Iterable[Entry], linger_s: float) -> list[tuple[float, Entry]]:
    """The entries that may be dropped, each with the time since which it is idle."""
    if linger_s < 0:
        return []
    # A client that holds an entry without using it wants to hand it to the next companion.
    return [(e.idle_since, e) for e in entries if e.idle_since is not None and not e.leases]
