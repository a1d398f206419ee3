"""Tickets: what a client shows on the fd socket. Random, single use, bound to a lease."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_companion_plugin.errors import TicketError
from vllm_companion_plugin.holder.registry.entries import Lease
from vllm_companion_plugin.wire.fd_channel import DEPOSIT, REDEEM, TICKET_BYTES

EXPIRY_S = 30.0


@dataclass(frozen=True)
class Ticket:
    """What a ticket was issued for.

    Attributes:
        generation: of the lease's entry; 0: the one that is being made.
        host: of that generation, the copy in host memory.
    """

    verb: bytes
    lease: Lease
    expires: float | None
    generation: int
    host: bool


class Tickets:
    """Open tickets. Redeem tickets expire; deposit tickets live as long as their lease, as loading takes minutes."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._open: dict[bytes, Ticket] = {}

    def issue(self, verb: bytes, lease: Lease, generation: int = 0, *, host: bool = False) -> bytes:
        """A new ticket for `verb` (fd_channel.REDEEM or DEPOSIT). Other arguments as of `Ticket`."""
        assert verb in (REDEEM, DEPOSIT)
        now = self._monotonic()
        self._open = {t: x for t, x in self._open.items() if not x.lease.ended and (x.expires or now) >= now}
        ticket = os.urandom(TICKET_BYTES)
        self._open[ticket] = Ticket(verb, lease, now + EXPIRY_S if verb == REDEEM else None, generation, host)
        return ticket

    def spend(self, verb: bytes, ticket: bytes) -> Ticket:
        """What `ticket` was issued for; it is void from now on. Raises `TicketError`."""
        found = self._open.pop(ticket, None)
        if found is None or found.verb != verb:
            raise TicketError("The ticket for file descriptors is unknown or spent; attach again.")
        if found.lease.ended:
            raise TicketError("The lease of this ticket has ended; attach again.")
        if found.expires is not None and self._monotonic() > found.expires:
            raise TicketError(f"The ticket for file descriptors expired after {EXPIRY_S:g} s; attach again.")
        return found
