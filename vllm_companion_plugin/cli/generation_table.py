"""Pure functions that write the generations of entries as text for people and as JSON for programs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_companion_plugin.cli import table
from vllm_companion_plugin.core.status import EntryState, EntryStatus, GenerationStatus
from vllm_companion_plugin.core.text import cut_to, duration, encodable

HEADINGS = ("GEN", "VERSION", "STATE", "SIZE", "USED BY", "AGE")
"""Columns of `generations`; docs/guide/cli.md explains them."""
_LEAST = {"USED BY": 10, "VERSION": 12}
NOTHING = "Nothing is held."

Found = Sequence[tuple[str, EntryStatus]]
"""Entries, each with the device of its companion."""


def to_text(
    found: Found, ids: Mapping[str, str], names: Mapping[str, str], now: float, *, columns: int, encoding: str
) -> str:
    """Write a line for each entry with a row for each of its generations below it, the oldest first.

    What clients map though the companion does not hold it comes last.

    Args:
        ids: as of `table.short_ids`.
        names: as of `table.short_names`.
        now: Unix time, in seconds, from which ages are computed.
        columns: of the terminal.
        encoding: of the stream that will show the text.
    """
    if not found:
        return NOTHING
    rows_of = [[*(_row(entry, each, now) for each in shown(entry)), *_rows_not_held(entry)] for _, entry in found]
    rows = [HEADINGS, *itertools.chain(*rows_of)]
    cells = [tuple(encodable(cell, encoding) for cell in row) for row in rows]
    fitted = table.aligned(table.fit(cells, columns, _LEAST)).splitlines()
    lines, below = fitted[:1] if len(fitted) > 1 else [], iter(fitted[1:])
    for (device, entry), its_rows in zip(found, rows_of, strict=True):
        state = "" if entry.state is EntryState.READY else f", {entry.state.value}"
        name = encodable(f"{ids[entry.key.id]} {table.with_rank(entry.key, names)} on {device}{state}", encoding)
        lines.append(cut_to(name, columns))
        lines += [next(below) for _ in its_rows]
    return "\n".join(lines)


def shown(entry: EntryStatus) -> tuple[GenerationStatus, ...]:
    """Return the generations of an entry, also the one that is parked in host memory."""
    if entry.state is not EntryState.PARKED:
        return entry.generations
    return (GenerationStatus(entry.generation, entry.version, entry.ready_unix_s, entry.host_bytes, True, ()),)


def _row(entry: EntryStatus, generation: GenerationStatus, now: float) -> tuple[str, ...]:
    return (
        str(generation.number),
        generation.version or "-",
        _state(entry, generation),
        table.size_text(generation.size_bytes),
        " ".join(map(str, generation.pids)) or "-",
        duration(now - generation.ready_unix_s),
    )


def _rows_not_held(entry: EntryStatus) -> list[tuple[str, ...]]:
    """Rows of what only clients have, of which the companion knows no more than the number."""
    return [
        (str(number), "-", "not held", "-", " ".join(map(str, pids)), "-") for number, pids in entry.not_held.items()
    ]


def _state(entry: EntryStatus, generation: GenerationStatus) -> str:
    """Say what a generation is for clients: what they get, what a rollback would give them, or neither.

    What they get is "trained" if its owner goes on writing it.
    """
    if generation.is_current:
        return "trained" if generation.trained else "current"
    return "before" if generation.number == current_of(entry).follows else "held"


def current_of(entry: EntryStatus) -> GenerationStatus:
    """Return the current generation of an entry that is ready."""
    return next(each for each in entry.generations if each.is_current)


def to_json(found: Found) -> list[dict[str, Any]]:
    """Return entries in the stable schema of `generations --json`: fields may be added, but none is renamed."""
    return [
        {
            "device": device,
            "model": entry.key.model,
            "role": entry.key.role,
            "rank": entry.key.rank,
            "variant": entry.key.variant,
            "key_id": entry.key.id,
            "state": entry.state.value,
            "generations": [table.generation_json(each) for each in shown(entry)],
            "not_held": [{"number": number, "pids": list(pids)} for number, pids in entry.not_held.items()],
        }
        for device, entry in found
    ]
