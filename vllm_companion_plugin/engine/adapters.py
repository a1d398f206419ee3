"""Which generation of an adapter the requests of an engine's front end are computed with, and how long it is held.

Each request is bound to one generation when it comes: the current one, unless it asks for another. A generation has
one lease, which lives as long as a request that is bound to it: whoever keeps a `Served` keeps the lease.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_companion_plugin.client.adapter_leases import AdapterLease, AdapterLeases
from vllm_companion_plugin.core.adapters import Asked, Bound
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.adapter_file import config_in

MAX_NUMBERS = 1 << 16
"""Numbers of adapters that are remembered, so that no two have the same."""
LOOKED_FOR = 4
"""Idle adapters that companions are asked for when the engine is given another one; a millisecond each."""


class Served:
    """One generation of an adapter, with its lease.

    Attributes:
        number: by which the engine knows it.
    """

    def __init__(self, lease: AdapterLease, number: int) -> None:
        self.lease = lease
        self.number = number
        weakref.finalize(self, lease.release).atexit = False

    @property
    def bound(self) -> Bound:
        return self.lease.bound

    @property
    def is_gone(self) -> bool:
        """Whether companions need not have it any more: it was removed, or its companion has died."""
        return self.lease.is_gone

    def config(self) -> dict[str, Any]:
        """PEFT's configuration. Works once, within 30 s; raises `CompanionError` otherwise."""
        with self.lease.ready.redeem() as fds:
            return config_in(fds[0], str(self.bound))


@dataclass(frozen=True)
class Sent:
    """An adapter that the engine was given, and may have yet."""

    name: str
    served: weakref.ref[Served]


class FrontEnd:
    """The adapters of one engine, as its front end sees them. Methods may block; they may be called in any thread."""

    def __init__(self, settings: Settings) -> None:
        self._leases = AdapterLeases(settings, "engine")
        self._mutex = threading.Lock()
        self._current: weakref.WeakValueDictionary[str, Served] = weakref.WeakValueDictionary()
        self._pinned: weakref.WeakValueDictionary[Asked, Served] = weakref.WeakValueDictionary()
        self._numbers: dict[int, Bound] = {}
        self._sent: dict[int, Sent] = {}
        self._gone: set[str] = set()

    def serve(self, asked: Asked) -> Served:
        """What a request that comes now is bound to. Raises as `AdapterLeases.lease`."""
        known = self._pinned.get(asked) if asked.generation else self._current.get(asked.name)
        if known is not None and asked.content and (self.is_sent(known) or not known.is_gone):
            return known
        # A number alone says nothing of the content: companions are asked whether they have that yet.
        found = None if asked.content else self._leases.where(asked.name)
        if known is not None and found is not None:
            is_it = not known.is_gone if asked.generation else self._leases.is_current(known.lease, found)
            if is_it and found:
                return known
        self._look_for_gone(asked.name)
        lease = self._leases.lease(asked, found)
        with self._mutex:
            # Another request may have been quicker: a generation has one lease.
            served = self._pinned.get(lease.bound)
            if served is None or served.is_gone:
                served = Served(lease, self._number(lease.bound))
            else:
                lease.release()
            self._pinned[served.bound] = served
            if asked.generation:
                self._pinned[asked] = served
            else:
                self._current[asked.name] = served
        return served

    def is_held(self, name: str) -> bool:
        """Whether a companion has an adapter of this name. Raises as `AdapterLeases.where`."""
        return bool(self._leases.where(name))

    def is_sent(self, served: Served) -> bool:
        """Whether the engine was given it by this very lease, and so has it or what it takes to have it again."""
        sent = self._sent.get(served.number)
        return sent is not None and sent.served() is served

    def sent(self, served: Served) -> list[int]:
        """The engine has it. The numbers of others that no request is bound to any more, with this name or one that no
        companion has: it may forget them."""
        with self._mutex:
            self._sent[served.number] = Sent(served.bound.name, weakref.ref(served))
            gone, self._gone = self._gone - {served.bound.name}, set()
            unused = [number for name in gone for number in self._unused(name, 0)]
            return unused + self._unused(served.bound.name, served.number)

    def removed(self, asked: Asked) -> list[int]:
        """No companion has this any more: the numbers, if it is a whole adapter, that no request is bound to."""
        if asked.generation:
            return []
        with self._mutex:
            return self._unused(asked.name, 0)

    def _look_for_gone(self, but: str) -> None:
        """Ask companions for a few adapters that the engine may have and no request is bound to, each in its turn.

        Nobody asks for what was removed, and each process of the engine keeps the memory of what it has not forgotten.
        """
        with self._mutex:
            idle = {sent.name: number for number, sent in self._sent.items() if sent.served() is None}
            idle.pop(but, None)
            names = [*idle][:LOOKED_FOR]
            for name in names:
                self._sent[idle[name]] = self._sent.pop(idle[name])
        with suppress(CompanionError):  # another request looks again
            gone = {name for name in names if not self._leases.where(name)}
            with self._mutex:
                self._gone |= gone

    def _unused(self, name: str, but: int) -> list[int]:
        unused = [
            number
            for number, sent in self._sent.items()
            if sent.name == name and number != but and sent.served() is None
        ]
        for number in unused:
            del self._sent[number]
        return unused

    def _number(self, bound: Bound) -> int:
        attempt = 0
        while self._numbers.get(number := bound.number(attempt), bound) != bound:
            attempt += 1
        self._numbers.pop(number, None)
        self._numbers[number] = bound
        while len(self._numbers) > MAX_NUMBERS:
            del self._numbers[next(iter(self._numbers))]
        return number
