"""What the registry is made of: entries, leases, and what a client is told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.residency import Residence, WhenAsleep
from vllm_companion_plugin.core.status import (
    EntryState,
    EntryStatus,
    GenerationStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
    Published,
)
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.holder.registry.table import GenerationState

STARTING = Progress("starting")
EXPECTED = LoaderInfo(0, "an engine of the companion before", 0.0, Progress("about to hand it back"))


@dataclass(frozen=True)
class StoredManifest:
    """A manifest that the companion keeps and never reads, in the chunks it came in: joining them doubles the peak."""

    chunks: tuple[bytes, ...]
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class WaitingEvent:
    """Another client loads the entry."""

    loader: LoaderInfo


@dataclass(frozen=True)
class GrantedEvent:
    """The client is elected: what it publishes will have this generation.

    Attributes:
        brings_back: it copies the entry from host memory to the device, and loads nothing.
    """

    generation: int
    brings_back: bool = False


@dataclass(frozen=True)
class ReadyEvent:
    """The entry can be mapped."""


@dataclass(frozen=True)
class RetiredEvent:
    """The entry was dropped. What is mapped stays valid; nobody may hand it back."""


@dataclass(frozen=True)
class FailedEvent:
    """The lease has ended with this error."""

    error: CompanionError


@dataclass(frozen=True)
class CurrentEvent:
    """Clients that attach get this generation from now on. What this client maps stays."""

    generation: int
    version: str


Event = WaitingEvent | GrantedEvent | ReadyEvent | CurrentEvent | RetiredEvent | FailedEvent


@dataclass(eq=False)
class Lease:
    """One client's claim on one entry. A lease that has ended takes part in nothing any more.

    Attributes:
        holds: the generation that this client maps and may hand back; 0: none.
        passive: it uses nothing, and only holds the entry for the next companion: nobody is kept waiting for it.
        state: None before the lease begins, and after it has ended.
        waiting_since: monotonic time since which it waits for another client; None if it does not.
        overtaken: it was elected to load, another client hands the entry back, and it has done nothing since.
        announced: number of descriptors that it is about to deposit, or has deposited.
        deposited: descriptors of the publication that it is making; the registry owns them.
        level: at which it sleeps, as vLLM counts.
        maps: the generation that it maps, which may be one that this companion never had; 0: none.
        to_be_told: it will map what is current when it is told, and has not been told yet.
        events: what the client has not been told yet.
    """

    id: int
    pid: int
    client: str
    may_load: bool
    since_unix_s: float
    entry: Entry
    holds: int = 0
    passive: bool = False
    state: LeaseState | None = None
    waiting_since: float | None = None
    overtaken: bool = False
    announced: int = 0
    deposited: tuple[int, ...] = ()
    level: int = 0
    maps: int = 0
    to_be_told: bool = False
    events: deque[Event] = field(default_factory=deque)

    def __str__(self) -> str:
        return f"The lease of {self.who}"

    @property
    def who(self) -> str:
        """The client in a few words."""
        return f"{self.client} (pid {self.pid})"

    @property
    def ended(self) -> bool:
        return self.state is None


@dataclass(eq=False)
class Generation:
    """One set of bytes of an entry, from the first client that asks for them until they are dropped.

    Attributes:
        state: None before it is there, and after it has gone.
        number: 0 until a loader has published it.
        follows: the number of the one that was current when it was written; 0: none, or none that is known.
        load_since: monotonic time of the election; `load_since_unix_s` the same by the wall clock.
        arena, manifest: since it is READY, until it is dropped.
        fds: descriptors of the arena while it is READY; the registry owns them.
        host, host_fds: its copy in host memory, if there is one, and the copy's descriptors; the registry owns them.
    """

    state: GenerationState | None = None
    number: int = 0
    follows: int = 0
    progress: Progress = STARTING
    progress_unix_s: float = 0.0
    load_since_unix_s: float = 0.0
    load_since: float = 0.0
    published: Published = field(default_factory=lambda: Published(0))
    arena: ArenaInfo | None = None
    manifest: StoredManifest | None = None
    fds: tuple[int, ...] = ()
    host: ArenaInfo | None = None
    host_fds: tuple[int, ...] = ()

    @property
    def shown(self) -> EntryState:
        """The state as clients see it: an expected generation is loading, by whoever will hand it back."""
        assert self.state is not None
        return EntryState.LOADING if self.state is GenerationState.EXPECTED else EntryState(self.state.value)

    @property
    def written(self) -> bool:
        """Whether a client wrote it: no checkpoint has its bytes."""
        return bool(self.published.version)

    @property
    def residence(self) -> Residence:
        """Where its bytes are, as far as the registry has them."""
        if self.fds:
            return Residence.DEVICE
        return Residence.HOST if self.host_fds else Residence.NOWHERE

    @property
    def size_bytes(self) -> int:
        return self.arena.size_bytes if self.arena else 0


@dataclass(eq=False)
class Entry:
    """One model of one rank: its key, its leases in order of arrival, how long it is idle, and its generation.

    Attributes:
        idle_since: monotonic time since which nobody uses it; None while somebody does, and until it is READY.
        idle_since_unix_s: the same by the wall clock, to be shown.
        current: what clients that ask for the key get, or wait for.
        others: READY ones besides it, in the order in which they were current.
        wish: of the client that fell asleep last; AUTO until one has.
        noted: generations that processes mapped when this companion began, whether or not they have come since.
    """

    key: EntryKey
    leases: list[Lease] = field(default_factory=list)
    idle_since: float | None = None
    idle_since_unix_s: float = 0.0
    current: Generation = field(default_factory=Generation)
    others: list[Generation] = field(default_factory=list)
    wish: WhenAsleep = WhenAsleep.AUTO
    noted: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        return f"Generation {self.current.number} of {self.key.title}"

    @property
    def can_be_asked_for(self) -> bool:
        """Whether a client that asks for the key gets this entry."""
        return self.current.state not in (None, GenerationState.RETIRED)

    @property
    def size_bytes(self) -> int:
        return self.current.size_bytes

    @property
    def device_bytes(self) -> int:
        """Of the device's memory that would be free without it, if nobody maps it."""
        held = (each.size_bytes for each in (self.current, *self.others) if each.fds)
        return sum(held) if self.key.rules.is_on_device else 0

    @property
    def is_reloadable(self) -> bool:
        """Whether a checkpoint has the bytes of its current generation."""
        return self.key.rules.is_reloadable and not self.current.written

    @property
    def users(self) -> list[Lease]:
        return [lease for lease in self.leases if not lease.passive]

    @property
    def writer(self) -> Lease | None:
        return next((lease for lease in self.leases if lease.state is LeaseState.WRITING), None)

    @property
    def sleepers(self) -> list[Lease]:
        return [lease for lease in self.leases if lease.state is LeaseState.ASLEEP]

    @property
    def is_awake(self) -> bool:
        """Whether a client uses it that does not sleep."""
        return any(lease.state is not LeaseState.ASLEEP for lease in self.users)

    @property
    def loading_lease(self) -> Lease | None:
        return next((lease for lease in self.leases if lease.state is LeaseState.LOADING), None)

    def loader_info(self) -> LoaderInfo | None:
        """The client that loads, or hands back; a text in its place while none has come to hand back."""
        lease = self.loading_lease
        if lease is not None:
            return LoaderInfo(
                lease.pid,
                lease.client,
                self.current.load_since_unix_s,
                self.current.progress,
                self.current.progress_unix_s,
            )
        if self.current.state is GenerationState.EXPECTED:
            return replace(EXPECTED, since_unix_s=self.current.load_since_unix_s)
        return None

    def status(self, linger_s: float) -> EntryStatus:
        """The entry as it is shown; `linger_s` is how long it stays with nobody attached, negative: for ever."""
        expires = self.idle_since is not None and linger_s >= 0
        return EntryStatus(
            key=self.key,
            state=self.current.shown,
            generation=self.current.number,
            size_bytes=self.size_bytes,
            tensor_count=self.current.published.tensor_count,
            arena_kind=self.current.arena.kind if self.current.arena else "",
            ready_unix_s=self.current.published.ready_unix_s,
            load_s=self.current.published.load_s,
            loader=self.loader_info(),
            leases=tuple(LeaseStatus(x.pid, x.client, x.state, x.since_unix_s, x.maps) for x in self.users if x.state),
            ways=self.current.published.ways,
            expires_at_unix_s=self.idle_since_unix_s + linger_s if expires else 0.0,
            layout=self.current.published.layout,
            host_bytes=self.current.host.size_bytes if self.current.host else 0,
            version=self.current.published.version,
            generations=self._generations(),
        )

    def _generations(self) -> tuple[GenerationStatus, ...]:
        there = [each for each in (*self.others, self.current) if each.fds]
        return tuple(
            GenerationStatus(
                each.number,
                each.published.version,
                each.published.ready_unix_s,
                each.size_bytes,
                each is self.current,
                tuple(lease.pid for lease in self.users if lease.maps == each.number),
                each.follows,
                each.arena is not None and each.arena.trained,
            )
            for each in sorted(there, key=lambda each: each.number)
        )
