"""What the registry is made of: entries, leases, and what a client is told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    EntryState,
    EntryStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
    Published,
)
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.holder.service.incoming import StoredManifest

STARTING = Progress("starting")
EXPECTED = LoaderInfo(0, "an engine of the companion before", 0.0, Progress("about to hand it back"))


@dataclass(frozen=True)
class WaitingEvent:
    loader: LoaderInfo


@dataclass(frozen=True)
class GrantedEvent:
    generation: int


@dataclass(frozen=True)
class ReadyEvent:
    pass


@dataclass(frozen=True)
class RetiredEvent:
    pass


@dataclass(frozen=True)
class FailedEvent:
    error: CompanionError


Event = WaitingEvent | GrantedEvent | ReadyEvent | RetiredEvent | FailedEvent


@dataclass(eq=False)
class Lease:
    """One client's claim on one entry. `ended` leases take part in nothing any more.

    Attributes:
        holds: the generation that this client maps and may hand back; 0: none.
        passive: it uses nothing, and only holds the entry for the next companion: nobody is kept waiting for it.
        waiting_since: monotonic time since which it waits for somebody else; None if it does not.
    """

    id: int
    pid: int
    client: str
    may_load: bool
    since_unix_s: float
    entry: Entry
    holds: int = 0
    passive: bool = False
    state: LeaseState = LeaseState.WAITING
    waiting_since: float | None = None
    ended: bool = False
    announced: int = 0
    deposited: tuple[int, ...] = ()
    events: deque[Event] = field(default_factory=deque)


@dataclass(eq=False)
class Entry:
    """One model of one rank. `leases` in order of arrival; manifest and arena since READY.

    Attributes:
        expected: processes map it since before this companion; one of them will hand it back.
        idle_since: monotonic time since which nobody uses it; None while somebody does, and until it is READY.
        idle_since_unix_s: the same by the wall clock, to be shown.
    """

    key: EntryKey
    state: EntryState = EntryState.LOADING
    generation: int = 0
    leases: list[Lease] = field(default_factory=list)
    progress: Progress = STARTING
    load_since_unix_s: float = 0.0
    load_since: float = 0.0
    progress_unix_s: float = 0.0
    expected: bool = False
    published: Published = field(default_factory=lambda: Published(0))
    arena: ArenaInfo | None = None
    manifest: StoredManifest | None = None
    fds: tuple[int, ...] = ()
    idle_since: float | None = None
    idle_since_unix_s: float = 0.0

    @property
    def size_bytes(self) -> int:
        return self.arena.size_bytes if self.arena else 0

    @property
    def users(self) -> list[Lease]:
        return [lease for lease in self.leases if not lease.passive]

    @property
    def loading_lease(self) -> Lease | None:
        return next((lease for lease in self.leases if lease.state is LeaseState.LOADING), None)

    def loader_info(self) -> LoaderInfo | None:
        lease = self.loading_lease
        if lease is None:
            return replace(EXPECTED, since_unix_s=self.load_since_unix_s) if self.expected else None
        return LoaderInfo(lease.pid, lease.client, self.load_since_unix_s, self.progress, self.progress_unix_s)

    def status(self, linger_s: float = -1.0) -> EntryStatus:
        """As it is shown; `linger_s` is how long it stays with nobody attached, negative: for ever."""
        expires = self.idle_since is not None and linger_s >= 0
        return EntryStatus(
            key=self.key,
            state=self.state,
            generation=self.generation,
            size_bytes=self.size_bytes,
            tensor_count=self.published.tensor_count,
            arena_kind=self.arena.kind if self.arena else "",
            ready_unix_s=self.published.ready_unix_s,
            load_s=self.published.load_s,
            loader=self.loader_info(),
            leases=tuple(LeaseStatus(x.pid, x.client, x.state, x.since_unix_s) for x in self.users),
            ways=self.published.ways,
            expires_at_unix_s=self.idle_since_unix_s + linger_s if expires else 0.0,
            layout=self.published.layout,
        )
