"""A pure rule for an entry that every client sleeps on: where its bytes stay."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class WhenAsleep(Enum):
    """What a user wants of the memory while every client of an entry sleeps: the setting `when_asleep`."""

    AUTO = "auto"
    """What vLLM's levels mean: PARK if one client sleeps at level 1, DROP if all of them sleep at level 2."""
    STAY = "stay"
    """The bytes stay on the device: the fastest way to wake."""
    PARK = "park"
    """The bytes stay in host memory, once for all who sleep."""
    DROP = "drop"
    """The bytes go. The first client that wakes loads them again."""


class Residence(Enum):
    """Where the bytes of an entry stay while every client of it sleeps."""

    DEVICE = "device"
    HOST = "host"
    NOWHERE = "nowhere"


LEVELS = range(3)
"""vLLM's levels of sleep: 0 keeps everything, 1 keeps the weights in host memory, 2 keeps nothing."""


def residence(wish: WhenAsleep, levels: Iterable[int], *, is_owned: bool) -> Residence:
    """Where the bytes stay once the last client has fallen asleep.

    Args:
        wish: of the client that fell asleep last.
        levels: at which the clients sleep, all of them.
        is_owned: a `serve` keeps the entry for clients to come, or it was written, so that no checkpoint has it. It
            never goes for good then.
    """
    if wish is WhenAsleep.AUTO:
        chosen = (Residence.DEVICE, Residence.HOST, Residence.NOWHERE)[min(levels)]
    else:
        chosen = {
            WhenAsleep.STAY: Residence.DEVICE,
            WhenAsleep.PARK: Residence.HOST,
            WhenAsleep.DROP: Residence.NOWHERE,
        }[wish]
    return Residence.HOST if is_owned and chosen is Residence.NOWHERE else chosen
