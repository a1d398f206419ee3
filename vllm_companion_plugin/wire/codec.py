"""Types to protobuf messages and back. The only module that knows both sides.

Reading is strict where a value decides something (states, kinds, ids) and raises
`BadRequestError`; text is taken as it is. Manifests have a module of their own.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
from dataclasses import asdict, fields

from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, ArenaInfo, Checksums, piece_count
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import Series
from vllm_companion_plugin.core.status import (
    GENERATIONS,
    CompanionStatus,
    EntryState,
    EntryStatus,
    GenerationStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
    Published,
    Report,
)
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.kinds import KINDS
from vllm_companion_plugin.wire import messages
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes, manifest_to_bytes

__all__ = [
    "MAX_BLOCKS",
    "arena_from_message",
    "arena_to_message",
    "check_manifest_fits",
    "companion_status_from_message",
    "companion_status_to_message",
    "entry_status_from_message",
    "entry_status_to_message",
    "generation_from_message",
    "generation_to_message",
    "key_from_message",
    "key_to_message",
    "loader_from_message",
    "loader_to_message",
    "manifest_from_bytes",
    "manifest_to_bytes",
    "progress_from_message",
    "progress_to_message",
    "published_from_message",
    "published_to_message",
    "report_from_message",
    "report_to_message",
    "series_from_message",
    "series_to_message",
]

MAX_BLOCKS = 4096
"""Most allocations, so descriptors, of one arena."""
MAX_ARENA_BYTES = 1 << 50
MAX_WAYS = 100
MAX_VERSION = 200
MAX_SECONDS = 1e9
_PAGE_BYTES = 4096
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")
_SENT = re.compile("\0([0-9a-f]{4})")


def _path_to_text(path: str) -> str:
    """A path as a text that a message can carry: a byte that is no UTF-8 becomes NUL, which no path has, and digits.

    The same in every locale.
    """
    with contextlib.suppress(UnicodeEncodeError):  # no name of a file
        path = os.fsencode(path).decode("utf-8", "surrogateescape")
    return _UNSENDABLE.sub(lambda match: f"\0{ord(match[0]):04x}", path)


def _path_from_text(text: str) -> str:
    path = _SENT.sub(lambda match: chr(int(match[1], 16)), text)
    with contextlib.suppress(UnicodeEncodeError):
        path = os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return path


def key_to_message(key: EntryKey) -> messages.EntryKey:
    return messages.EntryKey(
        id=key.id,
        model=key.model,
        role=key.role,
        rank=key.rank,
        fields=dict(key.fields),
        source=_path_to_text(key.source),
        files={_path_to_text(name): identity for name, identity in key.files.items()},
        kind=key.kind,
    )


def key_from_message(message: messages.EntryKey) -> EntryKey:
    """Raises `BadRequestError` unless it is one that can be kept, shown, and be part of a file name."""
    key = EntryKey(
        id=message.id,
        model=message.model,
        role=message.role,
        rank=message.rank,
        fields=dict(message.fields),
        source=_path_from_text(message.source),
        files={_path_from_text(name): identity for name, identity in message.files.items()},
        kind=message.kind,
    )
    if problem := key.problem():
        raise BadRequestError(f"Entry key: {problem}.")
    return key


def generation_from_message(generation: int) -> int:
    """0 stands for none. Raises `BadRequestError` for one that nothing can have."""
    if generation and generation not in GENERATIONS:
        raise BadRequestError(f"Generation {generation} is out of range.")
    return generation


def generation_to_message(generation: object) -> int:
    """0 stands for none, or for whichever is current. Raises `BadRequestError` for what is no such number."""
    with contextlib.suppress(TypeError):
        number = operator.index(generation)  # type: ignore[arg-type]
        if number == 0 or number in GENERATIONS:
            return number
    raise BadRequestError(f"{printable(repr(generation)[:80])} is no number of a generation.")


def _time(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise BadRequestError(f"A time of {seconds} seconds.")
    return seconds


def arena_to_message(arena: ArenaInfo, handle: bytes = b"") -> messages.ArenaDescriptor:
    """`handle` is what gives access to the arena, e.g. a ticket of the fd socket."""
    checksums = messages.Checksums(algorithm=arena.checksums.algorithm, values=arena.checksums.values)
    return messages.ArenaDescriptor(
        kind=arena.kind, block_sizes=arena.block_sizes, handle=handle, checksums=checksums, trained=arena.trained
    )


def arena_from_message(message: messages.ArenaDescriptor) -> tuple[ArenaInfo, bytes]:
    """Arena and handle. Raises `BadRequestError` for unknown kinds and impossible sizes."""
    if message.kind not in KINDS:
        raise BadRequestError(f"Arena kind {message.kind[:100]!r} is unknown; known: {', '.join(sorted(KINDS))}.")
    sizes = tuple(message.block_sizes)
    if not 1 <= len(sizes) <= MAX_BLOCKS:
        raise BadRequestError(f"Arena of {len(sizes)} blocks; 1 to {MAX_BLOCKS} are allowed.")
    if min(sizes) == 0 or sum(sizes) > MAX_ARENA_BYTES:
        raise BadRequestError(f"Arena with impossible block sizes: smallest {min(sizes)}, sum {sum(sizes)} bytes.")
    checksums = Checksums(printable(message.checksums.algorithm[:100]), tuple(message.checksums.values))
    # What is summed are rows of whole pages.
    if checksums.algorithm == ARENA_CHECKSUM and (
        len(checksums.values) != piece_count(sum(sizes)) or sum(sizes) % _PAGE_BYTES
    ):
        raise BadRequestError(f"Arena of {sum(sizes)} bytes with {len(checksums.values)} checksums.")
    if message.trained and checksums != Checksums():
        raise BadRequestError("An arena that is trained has no checksums.")
    return ArenaInfo(message.kind, sizes, checksums, message.trained), message.handle


def progress_to_message(progress: Progress) -> messages.Progress:
    return messages.Progress(phase=progress.phase, done_bytes=progress.done_bytes, total_bytes=progress.total_bytes)


def progress_from_message(message: messages.Progress) -> Progress:
    return Progress(printable(message.phase[:200]), message.done_bytes, message.total_bytes)


def loader_to_message(loader: LoaderInfo) -> messages.LoaderInfo:
    return messages.LoaderInfo(
        pid=loader.pid,
        client=loader.client,
        since_unix_s=loader.since_unix_s,
        progress=progress_to_message(loader.progress),
        changed_unix_s=loader.changed_unix_s,
    )


def loader_from_message(message: messages.LoaderInfo) -> LoaderInfo:
    """Raises `BadRequestError` for a time that is none."""
    return LoaderInfo(
        message.pid,
        message.client,
        _time(message.since_unix_s),
        progress_from_message(message.progress),
        _time(message.changed_unix_s),
    )


def published_to_message(published: Published) -> messages.Published:
    return messages.Published(
        tensor_count=published.tensor_count,
        ways=dict(published.ways),
        ready_unix_s=published.ready_unix_s,
        load_s=published.load_s,
        layout=published.layout,
        version=published.version,
    )


def published_from_message(message: messages.Published) -> Published:
    """Raises `BadRequestError` for a time or a layout that is none, or too many ways to restore a module."""
    if len(message.ways) > MAX_WAYS:
        raise BadRequestError(f"A publication with {len(message.ways)} ways to restore a module.")
    if message.layout and not _DIGEST.fullmatch(message.layout):
        raise BadRequestError(f"A layout is no digest but {message.layout[:80]!r}.")
    ways = {printable(way[:100]): count for way, count in message.ways.items()}
    return Published(
        *(message.tensor_count, ways, _time(message.ready_unix_s), _time(message.load_s), message.layout),
        version_from_message(message.version),
    )


def version_from_message(version: str) -> str:
    """The user's name for weights. Raises `BadRequestError` for one that cannot be shown."""
    if not isinstance(version, str):
        raise BadRequestError(f"A version is a text, unlike {printable(repr(version)[:80])}.")
    if len(version) > MAX_VERSION or printable(version) != version:
        raise BadRequestError(f"A version has at most {MAX_VERSION} printable characters, unlike {version[:80]!r}.")
    return version


def entry_status_to_message(entry: EntryStatus) -> messages.EntryStatus:
    return messages.EntryStatus(
        key=key_to_message(entry.key),
        state=entry.state.value,
        generation=entry.generation,
        size_bytes=entry.size_bytes,
        tensor_count=entry.tensor_count,
        arena_kind=entry.arena_kind,
        ready_unix_s=entry.ready_unix_s,
        load_s=entry.load_s,
        loader=loader_to_message(entry.loader) if entry.loader else None,
        leases=[
            messages.LeaseStatus(
                pid=lease.pid,
                client=lease.client,
                state=lease.state.value,
                since_unix_s=lease.since_unix_s,
                generation=lease.generation,
            )
            for lease in entry.leases
        ],
        ways=dict(entry.ways),
        expires_at_unix_s=entry.expires_at_unix_s,
        layout=entry.layout,
        host_bytes=entry.host_bytes,
        version=entry.version,
        generations=[
            messages.GenerationStatus(
                number=each.number,
                version=each.version,
                ready_unix_s=each.ready_unix_s,
                size_bytes=each.size_bytes,
                is_current=each.is_current,
                pids=each.pids,
                follows=each.follows,
                trained=each.trained,
            )
            for each in entry.generations
        ],
    )


def entry_status_from_message(message: messages.EntryStatus) -> EntryStatus:
    """Raises `BadRequestError` for a state that this version does not know, or a time that is none."""
    try:
        return EntryStatus(
            key=key_from_message(message.key),
            state=EntryState(message.state),
            generation=message.generation,
            size_bytes=message.size_bytes,
            tensor_count=message.tensor_count,
            arena_kind=message.arena_kind,
            ready_unix_s=_time(message.ready_unix_s),
            load_s=_time(message.load_s),
            loader=loader_from_message(message.loader) if message.HasField("loader") else None,
            leases=tuple(
                LeaseStatus(
                    lease.pid, lease.client, LeaseState(lease.state), _time(lease.since_unix_s), lease.generation
                )
                for lease in message.leases
            ),
            ways=dict(message.ways),
            expires_at_unix_s=_time(message.expires_at_unix_s),
            layout=message.layout,
            host_bytes=message.host_bytes,
            version=message.version,
            generations=tuple(
                GenerationStatus(
                    each.number,
                    each.version,
                    _time(each.ready_unix_s),
                    each.size_bytes,
                    each.is_current,
                    tuple(each.pids),
                    each.follows,
                    each.trained,
                )
                for each in message.generations
            ),
        )
    except ValueError as error:
        raise BadRequestError(f"Status of entry {message.key.model!r}: {error}.") from error


def companion_status_to_message(status: CompanionStatus) -> messages.CompanionStatus:
    return messages.CompanionStatus(
        device=status.device,
        pid=status.pid,
        version=status.version,
        protocol_version=status.protocol_version,
        started_unix_s=status.started_unix_s,
        linger_s=status.linger_s,
        exits_at_unix_s=status.exits_at_unix_s,
        entries=[entry_status_to_message(entry) for entry in status.entries],
        owner_pid=status.owner_pid,
    )


def companion_status_from_message(message: messages.CompanionStatus) -> CompanionStatus:
    """Raises `BadRequestError` for a state that this version does not know, or a time that is none."""
    return CompanionStatus(
        device=message.device,
        pid=message.pid,
        version=message.version,
        protocol_version=message.protocol_version,
        started_unix_s=_time(message.started_unix_s),
        linger_s=_time(message.linger_s),
        exits_at_unix_s=_time(message.exits_at_unix_s),
        entries=tuple(entry_status_from_message(entry) for entry in message.entries),
        owner_pid=message.owner_pid,
    )


def report_to_message(report: Report) -> messages.ReportRequest:
    return messages.ReportRequest(**asdict(report))


def report_from_message(message: messages.ReportRequest) -> Report:
    """Raises `BadRequestError` for seconds that no clock shows. The texts are the reader's to judge."""
    for seconds in (message.seconds, message.verify_seconds):
        if not 0 <= seconds < MAX_SECONDS:
            raise BadRequestError(f"A report of {seconds!r} seconds.")
    return Report(**{field.name: getattr(message, field.name) for field in fields(Report)})


def series_to_message(series: Series) -> messages.Series:
    return messages.Series(name=series.name, labels=dict(series.labels), value=series.value, counts=series.counts)


def series_from_message(message: messages.Series) -> Series:
    return Series(message.name, dict(message.labels), message.value, list(message.counts))
