"""What the registry tells its observers: every step of a generation or a lease, and what becomes of the companion.

Observers are called in the midst of a transition, in order of subscription. They must not call the registry and must
not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.holder.registry.entries import Entry, Generation, Lease
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState, LeaseEvent


@dataclass(frozen=True)
class GenerationMoved:
    """A generation of `entry` has moved; `generation.state` is where to.

    Attributes:
        loaded_s: of a publication, seconds since the election.
    """

    entry: Entry
    generation: Generation
    event: GenerationEvent
    before: GenerationState | None
    loaded_s: float | None = None


@dataclass(frozen=True)
class LeaseMoved:
    """A lease has moved; `lease.state` is where to.

    Attributes:
        waited_s: seconds that it waited for another client, if this move has ended that.
        error: what the client is told.
        reason: of a decline, the client's.
    """

    lease: Lease
    event: LeaseEvent
    before: LeaseState | None
    waited_s: float | None = None
    error: CompanionError | None = None
    reason: str = ""


@dataclass(frozen=True)
class CurrentChanged:
    """Clients get another generation from now on.

    Attributes:
        generation: what they get.
        before: the number of the one that they got until now; 0: none.
        is_latest: whether no generation of this key has a higher number, also of those that have gone.
    """

    entry: Entry
    generation: Generation
    before: int
    is_latest: bool


@dataclass(frozen=True)
class Lingering:
    """Nobody uses anything: in `left_s` seconds the companion will end, and `held_bytes` be free."""

    left_s: float
    held_bytes: int


@dataclass(frozen=True)
class LingerOver:
    """Nobody has used anything for `linger_s` seconds: the companion should end."""

    linger_s: float


@dataclass(frozen=True)
class Owned:
    """The companion has an owner from now on, and stays until that ends: what `Lingering` said counts no more.

    Attributes:
        linger_s: seconds that it stays while nobody uses anything; negative: as long as the owner does.
    """

    pid: int
    linger_s: float


@dataclass(frozen=True)
class OwnerGone:
    """The owner has gone, and the companion stays for its own linger time."""

    pid: int


Move = GenerationMoved | LeaseMoved | CurrentChanged | Lingering | LingerOver | Owned | OwnerGone
Observer = Callable[[Move], None]
