"""What a companion says of its entries and clients, and clients of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from vllm_companion_plugin.core.identity import EntryKey

GENERATIONS = range(1, 1 << 53)
"""All that an entry can have; one that came from outside must leave room to count on."""


class EntryState(Enum):
    """Life of an entry: LOADING, then READY, then RETIRED until its last lease ends."""

    LOADING = "loading"
    READY = "ready"
    RETIRED = "retired"


class LeaseState(Enum):
    """Life of a lease: WAITING for a loader, LOADING as the elected one, or ATTACHED."""

    WAITING = "waiting"
    LOADING = "loading"
    ATTACHED = "attached"


@dataclass(frozen=True)
class Progress:
    """How far a loader is. `total_bytes` 0 means unknown."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class LoaderInfo:
    """Who loads, how far and since when; what waiters are shown.

    Attributes:
        changed_unix_s: when it last reported something new; 0 if the companion does not say.
    """

    pid: int
    client: str
    since_unix_s: float
    progress: Progress
    changed_unix_s: float = 0.0


@dataclass(frozen=True)
class LeaseStatus:
    """One attached, waiting or loading client."""

    pid: int
    client: str
    state: LeaseState
    since_unix_s: float


@dataclass(frozen=True)
class Published:
    """What the status shows of a publication.

    Attributes:
        ways: modules by the way in which engines restore them; empty if each processes its own.
        ready_unix_s: when it was published; 0 lets the companion say.
        load_s: from the election to the publication.
        layout: `layout_digest` of what was published; empty if the publisher did not say.
    """

    tensor_count: int
    ways: Mapping[str, int] = field(default_factory=dict)
    ready_unix_s: float = 0.0
    load_s: float = 0.0
    layout: str = ""


@dataclass(frozen=True)
class EntryStatus:
    """One entry as `status` shows it.

    Attributes:
        ready_unix_s: 0 while it loads.
        load_s: from the election to the publication, 0 while it loads.
        ways: modules by the way in which engines restore them; empty if each processes its own.
        expires_at_unix_s: when it will be dropped if nobody attaches; 0 while somebody uses it, or if it stays.
        layout: as of `Published`; empty while it loads.
    """

    key: EntryKey
    state: EntryState
    generation: int
    size_bytes: int
    tensor_count: int
    arena_kind: str
    ready_unix_s: float
    load_s: float
    loader: LoaderInfo | None
    leases: tuple[LeaseStatus, ...]
    ways: Mapping[str, int] = field(default_factory=dict)
    expires_at_unix_s: float = 0.0
    layout: str = ""


@dataclass(frozen=True)
class Report:
    """What a client tells of itself, to be counted. Empty fields say nothing.

    Attributes:
        key_id: of the entry that it is about.
        outcome: "attached", "copied", "published" or "alone".
        seconds: that attaching or copying took.
        failure: code of the error that prevented sharing.
        verify: how checksums were compared: "full" or "sample".
        verified: "equal" or "different".
        verify_seconds: that comparing took.
    """

    key_id: str = ""
    outcome: str = ""
    seconds: float = 0.0
    failure: str = ""
    verify: str = ""
    verified: str = ""
    verify_seconds: float = 0.0


@dataclass(frozen=True)
class CompanionStatus:
    """One companion as `status` shows it.

    Attributes:
        device: GPU UUID, or "cpu".
        version: of the package that the companion runs.
        linger_s: seconds it stays with nobody attached; negative: until it is stopped.
        exits_at_unix_s: when it will exit if nobody comes; 0 if nothing is due.
        owner_pid: of the `serve` that it belongs to, which gives it its linger time; 0: nobody's.
    """

    device: str
    pid: int
    version: str
    protocol_version: int
    started_unix_s: float
    linger_s: float
    exits_at_unix_s: float
    entries: tuple[EntryStatus, ...]
    owner_pid: int = 0
