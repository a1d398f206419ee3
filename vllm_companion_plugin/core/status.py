"""The status of a companion, its entries and its clients, and the reports that clients send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from vllm_companion_plugin.core.identity import EntryKey

GENERATIONS = range(1, 1 << 53)
"""All generations that an entry can have. A generation from another process must leave room for higher numbers."""


class EntryState(Enum):
    """The states of an entry: LOADING, then READY, then RETIRED until its last lease ends.

    While every client sleeps it may be PARKED in host memory, or DROPPED until one of them wakes.
    """

    LOADING = "loading"
    READY = "ready"
    PARKED = "parked"
    DROPPED = "dropped"
    RETIRED = "retired"


class LeaseState(Enum):
    """The states of a lease: WAITING for a loader, LOADING as the elected one, ATTACHED, or ASLEEP without memory.

    WRITING is an attached client that writes the next generation.
    PARKING is an attached client that copies the entry to host memory, before it falls asleep.
    """

    WAITING = "waiting"
    LOADING = "loading"
    ATTACHED = "attached"
    WRITING = "writing"
    PARKING = "parking"
    ASLEEP = "asleep"

    @property
    def is_attached(self) -> bool:
        """Whether the client maps the entry, whatever else it does."""
        return self in (LeaseState.ATTACHED, LeaseState.WRITING, LeaseState.PARKING)


@dataclass(frozen=True)
class Progress:
    """The progress of a loader. `total_bytes` 0 means unknown."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class LoaderInfo:
    """The loader of an entry, its progress and its start time. Waiting clients get this.

    Attributes:
        pid: 0 while nobody has come yet to hand back what the companion before held; `client` says so.
        changed_unix_s: when the loader last reported progress; 0 if the companion does not say.
    """

    pid: int
    client: str
    since_unix_s: float
    progress: Progress
    changed_unix_s: float = 0.0


@dataclass(frozen=True)
class LeaseStatus:
    """One attached, waiting or loading client.

    Attributes:
        generation: the number of what it maps, which the companion need not hold; 0: it maps nothing, or that is not
            known.
    """

    pid: int
    client: str
    state: LeaseState
    since_unix_s: float
    generation: int = 0


@dataclass(frozen=True)
class Published:
    """Facts about a publication that the status shows.

    Attributes:
        ways: number of modules by the way in which engines restore them; empty if each engine processes its own.
        ready_unix_s: when the loader published; 0 makes the companion fill in the time.
        load_s: seconds from the election to the publication.
        layout: `layout_digest` of what was published; empty if the publisher did not say.
        version: the user's name for these weights; empty for those of a checkpoint.
    """

    tensor_count: int
    ways: Mapping[str, int] = field(default_factory=dict)
    ready_unix_s: float = 0.0
    load_s: float = 0.0
    layout: str = ""
    version: str = ""


@dataclass(frozen=True)
class GenerationStatus:
    """One generation of an entry that is held.

    Attributes:
        version: as of `Published`.
        pids: of the clients that map it.
        follows: the number of the one that was current when it was written; 0: none, or none that is known.
        trained: whether its owner goes on writing it.
    """

    number: int
    version: str
    ready_unix_s: float
    size_bytes: int
    is_current: bool
    pids: tuple[int, ...]
    follows: int = 0
    trained: bool = False


@dataclass(frozen=True)
class EntryStatus:
    """One entry as `status` shows it.

    Attributes:
        size_bytes: of the arena, wherever its bytes are; 0 while the entry loads, or is dropped.
        ready_unix_s: when the entry was published; 0 while it loads.
        load_s: seconds from the election to the publication; 0 while the entry loads.
        ways: number of modules by the way in which engines restore them; empty if each engine processes its own.
        expires_at_unix_s: when the companion drops the entry if no client attaches; 0 while a client uses the entry,
            or if the entry stays.
        layout: as of `Published`; empty while the entry loads.
        host_bytes: of the copy in host memory; 0 if there is none.
        version: as of `Published`, of the current generation.
        generations: all that are on the device, oldest first.
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
    host_bytes: int = 0
    version: str = ""
    generations: tuple[GenerationStatus, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Bytes of all generations on the device. A retired one is only mapped: the companion has no descriptors."""
        if not self.key.rules.is_on_device:
            return 0
        held = sum(each.size_bytes for each in self.generations)
        return held or (self.size_bytes if self.state in (EntryState.READY, EntryState.RETIRED) else 0)

    @property
    def not_held(self) -> dict[int, tuple[int, ...]]:
        """Generations that clients map and the companion does not hold, with their pids: of a companion before it."""
        held = {0, *(each.number for each in self.generations)}
        numbers = sorted({lease.generation for lease in self.leases} - held)
        return {each: tuple(lease.pid for lease in self.leases if lease.generation == each) for each in numbers}


@dataclass(frozen=True)
class Report:
    """What a client reports of itself. The companion counts it; empty fields say nothing.

    Attributes:
        key_id: id of the key of the entry.
        outcome: "attached", "copied", "published" or "alone".
        seconds: how long attaching or copying took.
        failure: code of the error that prevented sharing.
        verify: how checksums were compared: "full" or "sample".
        verified: the result of the comparison: "equal" or "different".
        verify_seconds: how long the comparison took.
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
        version: version of the package that the companion runs.
        linger_s: seconds that the companion stays without a client; negative: until a user stops it.
        exits_at_unix_s: when the companion will exit if no client comes; 0 if no exit is due.
        owner_pid: pid of the `serve` that owns the companion and sets its linger time; 0 without an owner.
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
