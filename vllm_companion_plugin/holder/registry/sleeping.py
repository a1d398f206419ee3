"""Where the bytes of an entry go whose clients sleep, as `core/residency.py` says.

The last client that falls asleep decides, by its wish and the levels of all who sleep. For host memory it leaves a copy
first, because the companion cannot make one. What takes a copy and has none stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.residency import LEVELS, Residence, WhenAsleep, residence
from vllm_companion_plugin.core.status import LeaseState, Published
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.holder.registry.entries import CurrentEvent, Entry, Lease, RetiredEvent
from vllm_companion_plugin.holder.registry.lifetime import Lifetime
from vllm_companion_plugin.holder.registry.steps import Steps
from vllm_companion_plugin.holder.registry.table import GenerationEvent, GenerationState, LeaseEvent
from vllm_companion_plugin.holder.registry.updates import Updates


class Sleeping:
    """What may become of an entry whose clients sleep. Its methods raise and change nothing, or do all that they say.

    Args:
        changed: the status has changed.
    """

    def __init__(self, steps: Steps, updates: Updates, lifetime: Lifetime, changed: Callable[[], None]) -> None:
        self._steps = steps
        self._updates = updates
        self._lifetime = lifetime
        self._changed = changed

    def sleep(self, lease: Lease, level: int, wish: WhenAsleep, host: ArenaInfo | None = None, copied: int = 0) -> bool:
        """The client falls asleep: it maps nothing from now on. Where the bytes stay is decided here.

        Args:
            level: as vLLM counts.
            wish: where the bytes shall stay if it is the last one.
            host: the copy in host memory whose descriptors it has deposited, if it was asked for one.
            copied: of which generation that is.

        Returns:
            False: it has to leave a copy of the current generation in host memory first, and to ask again with that.

        Raises:
            BadRequestError: the client does not map the entry, or only holds it; a level that there is not; or what it
                deposited is no copy of the entry.
        """
        self._steps.check(lease, LeaseEvent.SLEEP)
        entry = lease.entry
        check_sleeper(level, lease.passive)
        if lease.state not in (LeaseState.ATTACHED, LeaseState.PARKING):
            raise BadRequestError("Only a client that maps the entry can fall asleep.")
        if host is not None and copied == entry.current.number:
            self._keep_copy(lease, host)
        elif host is not None:  # another generation has become the current one meanwhile
            self._steps.release(lease)
        last = all(other is lease or other.state is LeaseState.ASLEEP for other in entry.users)
        lacks_copy = entry.current.state is GenerationState.READY and entry.current.host is None
        if last and lacks_copy and self._residence(entry, wish, level) is Residence.HOST:
            if lease.state is LeaseState.ATTACHED:
                self._steps.move_lease(lease, LeaseEvent.COPY)
                self._changed()
            return False
        self._steps.release(lease)  # of a copy that it had begun
        self.fall_asleep(lease, level, wish)
        self._changed()
        return True

    def sleep_on(self, lease: Lease, level: int) -> None:
        """The client has woken, and could not map the entry. What was wished stays, and nobody is asked for a copy.

        Nothing changes if it sleeps: it may not know whether it was woken.

        Raises:
            BadRequestError: as `sleep`.
        """
        check_sleeper(level, lease.passive)
        if lease.state is LeaseState.ASLEEP:
            return
        self._steps.check(lease, LeaseEvent.SLEEP)
        if lease.state is not LeaseState.ATTACHED:
            raise BadRequestError("Only a client that has woken can sleep on.")
        self.fall_asleep(lease, level, lease.entry.wish)
        self._changed()

    def stay_awake(self, lease: Lease) -> None:
        """The client could not leave a copy, and goes on. Raises `BadRequestError` unless it was asked for one."""
        self._steps.move_lease(lease, LeaseEvent.STAY_AWAKE)
        self._steps.release(lease)
        self._changed()

    def wake(self, lease: Lease, known_manifest: bytes) -> bool:
        """The client maps the entry's current generation from now on.

        Args:
            known_manifest: the sha256 of the manifest of what it mapped.

        Returns:
            False: that is not on the device, or has another manifest, and the client sleeps on. It has to attach.

        Raises:
            BadRequestError: the client does not sleep.
        """
        self._steps.check(lease, LeaseEvent.WAKE)
        current = lease.entry.current
        known = current.manifest is not None and current.manifest.sha256 == known_manifest
        if current.state is not GenerationState.READY or not known:
            return False
        self._steps.move_lease(lease, LeaseEvent.WAKE)
        lease.level, lease.maps = 0, current.number
        self._steps.tell(lease, CurrentEvent(current.number, current.published.version))  # it was told of none
        self._changed()
        return True

    def _keep_copy(self, lease: Lease, host: ArenaInfo) -> None:
        entry = lease.entry
        if not lease.deposited:
            raise BadRequestError("No copy was deposited.")
        if len(lease.deposited) != len(host.block_sizes) or host.size_bytes != entry.size_bytes:
            raise BadRequestError(
                f"A copy of {host.size_bytes} bytes in {len(lease.deposited)} descriptors, of {entry.size_bytes} bytes."
            )
        entry.current.host, entry.current.host_fds = host, lease.deposited
        lease.deposited, lease.announced = (), 0

    def _residence(self, entry: Entry, wish: WhenAsleep, *levels: int) -> Residence:
        """`levels`: of those who are about to sleep, beside those who do."""
        lasting = bool(self._lifetime.owner_pid) or not entry.is_reloadable
        return residence(wish, (*levels, *(x.level for x in entry.sleepers)), is_owned=lasting)

    def fall_asleep(self, lease: Lease, level: int, wish: WhenAsleep = WhenAsleep.STAY) -> None:
        self._steps.move_lease(lease, LeaseEvent.SLEEP)
        lease.level, lease.holds, lease.maps, lease.entry.wish = level, 0, 0, wish
        self._updates.prune(lease.entry)
        self.settle(lease.entry)

    def settle(self, entry: Entry) -> None:
        """Nobody may be awake any more: put the bytes where they shall stay. What takes a copy stays without one."""
        if entry.current.state is not GenerationState.READY or entry.is_awake or not entry.sleepers:
            return
        where = self._residence(entry, entry.wish)
        if where is Residence.HOST and entry.current.host is not None:
            self._steps.move_entry(entry, GenerationEvent.PARK)
            self._steps.release_device(entry)
        elif where is Residence.NOWHERE:
            self._steps.move_entry(entry, GenerationEvent.DROP)
            self._steps.release(entry)
            self._forget(entry)
        else:
            return
        for lease in [lease for lease in entry.leases if lease.passive]:  # what they hold would not be free
            self._steps.tell(lease, RetiredEvent())
            self._steps.end_lease(lease, LeaseEvent.RELEASE)

    @staticmethod
    def _forget(entry: Entry) -> None:
        entry.current.number, entry.current.arena, entry.current.manifest = 0, None, None
        entry.current.published = Published(0)


def check_sleeper(level: int, passive: bool) -> None:
    if level not in LEVELS or passive:
        raise BadRequestError(f"A sleep of level {level}{', by a client that only holds the entry' * passive}.")
