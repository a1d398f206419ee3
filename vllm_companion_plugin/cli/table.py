"""Pure functions that write statuses as text for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    GenerationStatus,
    LeaseState,
    LoaderInfo,
)
from vllm_companion_plugin.core.text import columns_of, cut_to, duration, encodable, percent, wrapped

GIB = 1 << 30
HEADINGS = ("ID", "MODEL", "SIZE", "USED BY", "STATE", "UNTIL")
"""Columns of `status`; docs/guide/cli.md explains them."""
WIDE = (
    *("DEVICE", "PID", "ID", "MODEL", "RANK", "GiB", "TENSORS", "WAYS", "LOAD", "GEN", "STATE", "LEASES", "LINGER"),
)
"""Columns of `status --wide`."""
_RIGHT = {"PID", "SIZE", "GiB", "TENSORS", "LOAD", "GEN"}
_LEAST = {"USED BY": 10, "MODEL": 14}
NOBODY = "No companion is running."
ID_DIGITS = 8


def to_text(
    statuses: Sequence[CompanionStatus], now: float, *, columns: int | None = None, encoding: str = "utf-8"
) -> str:
    """Write a line for each companion with a row for each of its entries below it, and then what needs a sentence.

    Args:
        now: Unix time, in seconds, from which ages are computed.
        columns: of the terminal. None: all columns, each as wide as its longest cell, as `--wide` shows them.
        encoding: of the stream that will show the text.
    """
    if not statuses:
        return NOBODY
    ids, names = short_ids(statuses), short_names(entry.key.model for _, entry in _entries(statuses))
    if columns is None:
        rows: list[tuple[str, ...]] = [WIDE]
        for status in statuses:
            for entry in status.entries or (None,):
                rows.append(_wide_row(status, entry, ids, now))
        shown = [tuple(encodable(cell, encoding) for cell in row) for row in rows]
        return "\n".join([aligned(shown), *_notes(statuses, ids, names, now, None, encoding)])
    rows = [HEADINGS]
    rows += [_row(status, entry, ids, names, now) for status, entry in _entries(statuses)]
    shown = [tuple(encodable(cell, encoding) for cell in row) for row in rows]
    fitted = aligned(fit(shown, columns, _LEAST)).splitlines()
    lines, below = fitted[:1] if len(fitted) > 1 else [], iter(fitted[1:])
    for status in statuses:
        lines.append(cut_to(_companion(status, now), columns))
        lines += [next(below) for _ in status.entries]
    return "\n".join(lines + _notes(statuses, ids, names, now, columns, encoding))


def _entries(statuses: Sequence[CompanionStatus]) -> list[tuple[CompanionStatus, EntryStatus]]:
    return [(status, entry) for status in statuses for entry in status.entries]


def ids_text(statuses: Sequence[CompanionStatus]) -> str:
    """Write the id of each entry in a line of its own, each id once."""
    return "\n".join(dict.fromkeys(short_ids(statuses).values()))


def short_ids(statuses: Sequence[CompanionStatus]) -> dict[str, str]:
    """Return the first digits of each entry's key, by key: as many as tell all of them apart, but at least 8."""
    ids = dict.fromkeys(entry.key.id for _, entry in _entries(statuses))
    digits = ID_DIGITS
    while len({id[:digits] for id in ids}) < len(ids):
        digits += 1
    return {id: id[:digits] for id in ids}


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return the last parts of each model's name, by name: as many parts as tell all models apart."""
    names = set(models)
    return {name: _shortest_end(name, names) for name in names}


def _shortest_end(name: str, names: set[str]) -> str:
    parts = name.split("/")
    for count in range(1, len(parts)):
        end = "/".join(parts[-count:])
        if end and not any(other != name and ends_with(other, end) for other in names):
            return end
    return name


def ends_with(model: str, end: str) -> bool:
    """Tell whether `end` is the name `model`, or the last parts of it."""
    return model == end or model.endswith(f"/{end.strip('/')}")


def _companion(status: CompanionStatus, now: float) -> str:
    if status.linger_s < 0:
        until = "until stopped"
    elif status.exits_at_unix_s:
        until = f"ends in {duration(status.exits_at_unix_s - now)}"
    else:
        until = f"until {duration(status.linger_s)} idle"
    return f"{status.device}: pid {status.pid}, {until}{'' if status.entries else ', holds nothing'}"


def _row(
    status: CompanionStatus, entry: EntryStatus, ids: Mapping[str, str], names: Mapping[str, str], now: float
) -> tuple[str, ...]:
    awake = [str(lease.pid) for lease in entry.leases if lease.state.is_attached]
    asleep = [f"({lease.pid})" for lease in entry.leases if lease.state is LeaseState.ASLEEP]
    users = " ".join(awake + asleep)
    return (
        ids[entry.key.id],
        with_rank(entry.key, names),
        size_text(entry.size_bytes) if entry.size_bytes else "-",
        users or "-",
        _short_state(entry),
        _until(status, entry, now),
    )


def size_text(size_bytes: int) -> str:
    """Write a size for people, e.g. "15.27 GiB" or "310 MiB"."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.{2 if size_bytes < 100 * GIB else 0}f} GiB"
    return f"{-(-size_bytes >> 20)} MiB" if size_bytes >= 1 << 20 else f"{-(-size_bytes >> 10)} KiB"


def with_rank(key: EntryKey, names: Mapping[str, str]) -> str:
    name = key.titled(names[key.model])
    return name if key.rank == "single" else f"{name} {key.rank}"


def _short_state(entry: EntryStatus) -> str:
    progress = entry.loader.progress if entry.state is EntryState.LOADING and entry.loader else None
    if progress and progress.total_bytes:
        return f"loading {percent(progress.done_bytes, progress.total_bytes)}%"
    return entry.state.value


def _until(status: CompanionStatus, entry: EntryStatus, now: float) -> str:
    """Say in a word or two when an entry goes: a time from now, or what has to happen first."""
    if entry.state is EntryState.RETIRED:
        return "unused"
    if entry.state in (EntryState.LOADING, EntryState.DROPPED):
        return "-"
    if status.linger_s < 0:
        return "stopped"
    if ends := [at for at in (entry.expires_at_unix_s, status.exits_at_unix_s) if at]:
        return duration(min(ends) - now)
    return f"{duration(status.linger_s)} idle"


def fit(rows: list[tuple[str, ...]], columns: int, leasts: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Cut cells until the table is no wider than the terminal.

    Args:
        leasts: the columns that give way, in this order, and how narrow they may become. Ids and sizes stay whole.
    """
    for heading, least in leasts.items():
        widths = _widths(rows)
        over = sum(widths) + 2 * (len(widths) - 1) - columns
        if over <= 0:
            break
        at = rows[0].index(heading)
        most = max(widths[at] - over, least)
        cut = _cut_pids if heading == "USED BY" else cut_to
        rows = [rows[0], *((*row[:at], cut(row[at], most), *row[at + 1 :]) for row in rows[1:])]
    return rows


def _cut_pids(text: str, columns: int) -> str:
    pids = text.split()
    shown = len(pids)
    while shown and len(text) > columns:
        shown -= 1
        text = " ".join([*pids[:shown], f"+{len(pids) - shown}"]) if shown else f"{len(pids)} clients"
    return text


def _notes(
    statuses: Sequence[CompanionStatus],
    ids: Mapping[str, str],
    names: Mapping[str, str],
    now: float,
    columns: int | None,
    encoding: str,
) -> list[str]:
    """Say what a table cannot: who loads, and why companions hold a model more than once."""
    notes = []
    first: dict[tuple[str, ...], EntryKey] = {}
    for _, entry in _entries(statuses):
        key, id = entry.key, ids[entry.key.id]
        name = key.title if columns is None else with_rank(key, names)
        if entry.state is EntryState.LOADING and entry.loader is not None:
            waiting = sum(lease.state is LeaseState.WAITING for lease in entry.leases)
            since = duration(now - entry.loader.since_unix_s)
            waits = f"; {waiting} {'waits' if waiting == 1 else 'wait'} for it" if waiting else ""
            notes.append(f"{id} {name}: {progress_text(entry.loader)}, for {since}{waits}.")
        if text := _generations_text(entry):
            notes.append(f"{id} {name}: {text}")
        if key.variant:
            notes.append(f"{id} {name} is held as a variant: {key.variant}.")
            continue
        other = first.setdefault((key.kind, key.model, key.role, key.rank), key)
        if other.id != key.id:
            notes.append(f"{id} {name} is loaded otherwise than {ids[other.id]}: {key.nearest_text([other])}.")
    shown = [encodable(note, encoding) for note in notes]
    if columns is None:
        return shown
    return [line for note in shown for line in wrapped(note, columns)]


def _generations_text(entry: EntryStatus) -> str:
    """Say which generation is current, and who uses others; empty if there is only a checkpoint's."""
    others = [each for each in entry.generations if not each.is_current]
    writers = [str(lease.pid) for lease in entry.leases if lease.state is LeaseState.WRITING]
    known = others or writers or entry.version or entry.not_held
    if entry.state in (EntryState.LOADING, EntryState.RETIRED) or not known:
        return ""
    trained = " and trained in place" if any(each.is_current and each.trained for each in entry.generations) else ""
    texts = [f"generation {generation_name(entry.generation, entry.version)} is current{trained}"]
    for each in others:
        pids = f"used by {' '.join(map(str, each.pids))}" if each.pids else "kept"
        texts.append(f"{generation_name(each.number, each.version)} is {pids}")
    texts += [f"{number} is used by {' '.join(map(str, pids))} and not held" for number, pids in entry.not_held.items()]
    if writers:
        texts.append(f"{writers[0]} writes the next one")
    return f"{', '.join(texts)}."


def generation_name(number: int, version: str) -> str:
    """Write a generation as sentences name it, e.g. "5 (step-4)"; one without a version is a checkpoint's."""
    return f"{number} ({version})" if version else str(number)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, numbers to the right. The first row holds the headings."""
    headings, widths = rows[0], _widths(rows)
    lines = []
    for row in rows:
        cells = []
        for heading, cell, width in zip(headings, row, widths, strict=True):
            blank = " " * (width - columns_of(cell))
            cells.append(blank + cell if heading in _RIGHT else cell + blank)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(columns_of(row[column]) for row in rows) for column in range(len(rows[0]))]


def _wide_row(
    status: CompanionStatus, entry: EntryStatus | None, ids: Mapping[str, str], now: float
) -> tuple[str, ...]:
    head, tail = (status.device, str(status.pid)), linger_text(status, now, entry)
    if entry is None:
        return (*head, "-", "-", "-", "0.00", "0", "-", "-", "-", "empty", "-", tail)
    leases = ", ".join(f"{lease.pid} ({duration(now - lease.since_unix_s)})" for lease in entry.leases) or "-"
    return (
        *head,
        ids[entry.key.id],
        entry.key.title,
        entry.key.rank,
        f"{entry.size_bytes / GIB:.2f}",
        str(entry.tensor_count),
        ", ".join(f"{count} {way}" for way, count in sorted(entry.ways.items())) or "-",
        f"{entry.load_s:.1f} s" if entry.state is EntryState.READY else "-",
        str(entry.generation),
        entry.state.value,
        leases,
        tail,
    )


def progress_text(loader: LoaderInfo) -> str:
    """Describe a loader's progress, e.g. "pid 4242 is loading 1.50/15.27 GiB (10%)"."""
    progress = loader.progress
    done = progress.done_bytes / GIB
    if progress.total_bytes:
        share = percent(progress.done_bytes, progress.total_bytes)
        size = f" {done:.2f}/{progress.total_bytes / GIB:.2f} GiB ({share}%)"
    else:
        size = f" {done:.2f} GiB" if progress.done_bytes else ""
    who = f"pid {loader.pid}" if loader.pid else loader.client  # nobody yet, while a companion expects what was mapped
    return f"{who} is {progress.phase or 'starting'}{size}"


def linger_text(status: CompanionStatus, now: float, entry: EntryStatus | None = None) -> str:
    """Say how long a companion stays, or one of its entries, which may go earlier."""
    if status.linger_s < 0:
        return "until stopped"
    if entry is not None and 0 < entry.expires_at_unix_s < (status.exits_at_unix_s or math.inf) - 1:
        return f"dropped in {max(0.0, entry.expires_at_unix_s - now):.0f} s"
    if status.exits_at_unix_s:
        return f"exits in {max(0.0, status.exits_at_unix_s - now):.0f} s"
    return f"{status.linger_s:g} s after the last"


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
        "key_fields": dict(sorted(entry.key.fields.items())),
        "checkpoint": entry.key.source or None,
        "state": entry.state.value,
        "generation": entry.generation,
        "version": entry.version or None,
        "generations": [generation_json(each) for each in entry.generations],
        "layout": entry.layout or None,
        "size_bytes": entry.size_bytes,
        "host_bytes": entry.host_bytes,
        "tensor_count": entry.tensor_count,
        "arena_kind": entry.arena_kind,
        "ready_unix_s": entry.ready_unix_s or None,
        "load_s": entry.load_s,
        "expires_at_unix_s": entry.expires_at_unix_s or None,
        "ways": dict(sorted(entry.ways.items())),
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
            {
                "pid": x.pid,
                "client": x.client,
                "state": x.state.value,
                "since_unix_s": x.since_unix_s,
                "generation": x.generation or None,
            }
            for x in entry.leases
        ],
    }


def generation_json(generation: GenerationStatus) -> dict[str, Any]:
    """Return a generation in the schema of `status --json` and `generations --json`."""
    return {
        "number": generation.number,
        "version": generation.version or None,
        "is_current": generation.is_current,
        "follows": generation.follows or None,
        "trained": generation.trained,
        "size_bytes": generation.size_bytes,
        "ready_unix_s": generation.ready_unix_s or None,
        "pids": list(generation.pids),
    }
