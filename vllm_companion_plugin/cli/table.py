"""Pure functions that write statuses as text for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vllm_companion_plugin.core.status import CompanionStatus, EntryState, EntryStatus, LoaderInfo
from vllm_companion_plugin.core.text import printable

GIB = 1 << 30
HEADINGS = ("DEVICE", "PID", "MODEL", "RANK", "GiB", "TENSORS", "WAYS", "LOAD", "GEN", "STATE", "LEASES", "LINGER")
_RIGHT = {"PID", "GiB", "TENSORS", "LOAD", "GEN"}
NOBODY = "No companion is running."


def to_text(statuses: Sequence[CompanionStatus], now: float) -> str:
    """Write one row for each entry, and one for a companion without entries.

    Args:
        now: Unix time, in seconds, from which ages are computed.
    """
    if not statuses:
        return NOBODY
    rows: list[tuple[str, ...]] = [HEADINGS]
    for status in statuses:
        for entry in status.entries or (None,):
            rows.append(_row(status, entry, now))
    return "\n".join([columns(rows), *_variants(statuses)])


def _variants(statuses: Sequence[CompanionStatus]) -> list[str]:
    """Say why companions hold a model more than once."""
    return [
        f"{entry.key.model} ({entry.key.rank}) is held as a variant: {printable(entry.key.variant)}."
        for status in statuses
        for entry in status.entries
        if entry.key.variant
    ]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, numbers to the right. The first row holds the headings."""
    headings = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if heading in _RIGHT else cell.ljust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(status: CompanionStatus, entry: EntryStatus | None, now: float) -> tuple[str, ...]:
    head, tail = (status.device, str(status.pid)), linger_text(status, now, entry)
    if entry is None:
        return (*head, "-", "-", "0.00", "0", "-", "-", "-", "empty", "-", tail)
    leases = ", ".join(f"{lease.pid} ({duration(now - lease.since_unix_s)})" for lease in entry.leases) or "-"
    model = entry.key.title
    size = f"{entry.size_bytes / GIB:.2f}"
    return (
        *head,
        model,
        entry.key.rank,
        size,
        str(entry.tensor_count),
        ", ".join(f"{count} {way}" for way, count in sorted(entry.ways.items())) or "-",
        f"{entry.load_s:.1f} s" if entry.state is EntryState.READY else "-",
        str(entry.generation),
        _state(entry),
        leases,
        tail,
    )


def _state(entry: EntryStatus) -> str:
    if entry.state is EntryState.LOADING and entry.loader is not None:
        return progress_text(entry.loader)
    return entry.state.value


def progress_text(loader: LoaderInfo) -> str:
    """Describe a loader's progress, e.g. "loading 1.50/15.27 GiB (10%) by 4242"."""
    progress = loader.progress
    done = progress.done_bytes / GIB
    if progress.total_bytes:
        share = 100 * progress.done_bytes // progress.total_bytes
        size = f" {done:.2f}/{progress.total_bytes / GIB:.2f} GiB ({share}%)"
    else:
        size = f" {done:.2f} GiB" if progress.done_bytes else ""
    return f"{progress.phase or 'starting'}{size} by {loader.pid}"


def linger_text(status: CompanionStatus, now: float, entry: EntryStatus | None = None) -> str:
    """Say how long a companion stays, or one of its entries, which may go earlier."""
    if status.linger_s < 0:
        return "until stopped"
    if entry is not None and 0 < entry.expires_at_unix_s < (status.exits_at_unix_s or math.inf) - 1:
        return f"dropped in {max(0.0, entry.expires_at_unix_s - now):.0f} s"
    if status.exits_at_unix_s:
        return f"exits in {max(0.0, status.exits_at_unix_s - now):.0f} s"
    return f"{status.linger_s:g} s after the last"


def duration(seconds: float) -> str:
    """Shorten a duration, e.g. "45s", "12m05s", "3h07m", "2d04h"."""
    whole = max(0, int(seconds))
    for unit, size, below, smaller in (("d", 86400, 3600, "h"), ("h", 3600, 60, "m"), ("m", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below:02d}{smaller}"
    return f"{whole}s"


def to_json(
    statuses: Sequence[CompanionStatus], keepers: Mapping[str, int] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Return statuses in the stable schema of `status --json`: fields may be added, but none is renamed or removed.

    Times are Unix seconds, or null if unknown or not due; `linger_s` is null for "until stopped".
    """
    return [
        {
            "device": status.device,
            "pid": status.pid,
            "version": status.version,
            "protocol_version": status.protocol_version,
            "started_unix_s": status.started_unix_s,
            "linger_s": status.linger_s if status.linger_s >= 0 else None,
            "exits_at_unix_s": status.exits_at_unix_s or None,
            "owner_pid": status.owner_pid or None,
            "keeper_pid": keepers.get(status.device) or None,
            "entries": [_entry_json(entry) for entry in status.entries],
        }
        for status in statuses
    ]


def _entry_json(entry: EntryStatus) -> dict[str, Any]:
    loader = entry.loader
    return {
        "model": entry.key.model,
        "kind": entry.key.kind,
        "role": entry.key.role,
        "rank": entry.key.rank,
        "variant": entry.key.variant,
        "key_id": entry.key.id,
        "key_fields": dict(entry.key.fields),
        "checkpoint": entry.key.source or None,
        "state": entry.state.value,
        "generation": entry.generation,
        "layout": entry.layout or None,
        "size_bytes": entry.size_bytes,
        "tensor_count": entry.tensor_count,
        "arena_kind": entry.arena_kind,
        "ready_unix_s": entry.ready_unix_s or None,
        "load_s": entry.load_s,
        "expires_at_unix_s": entry.expires_at_unix_s or None,
        "ways": dict(entry.ways),
        "loader": loader
        and {
            "pid": loader.pid,
            "client": loader.client,
            "since_unix_s": loader.since_unix_s,
            "phase": loader.progress.phase,
            "done_bytes": loader.progress.done_bytes,
            "total_bytes": loader.progress.total_bytes,
        },
        "leases": [
            {"pid": x.pid, "client": x.client, "state": x.state.value, "since_unix_s": x.since_unix_s}
            for x in entry.leases
        ],
    }
