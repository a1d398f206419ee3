"""How long the companion stays, whose it is, and how it ends. Pure: time is an argument.

While nobody uses anything the *idle time* of the companion runs, and when the linger time is over it should end. The
client that starts a companion gives it a *grace*, within which it does not end before its first user has come.

A `serve` may *own* the companion. Its linger time counts instead, and nothing expires by itself: what belongs to an
owner stays, or goes with the companion as a whole. When the owner goes the time before counts again, from that moment.
"""

from __future__ import annotations

import math

from vllm_companion_plugin.errors import (
    AlreadyRunningError,
    BadRequestError,
    CompanionError,
    CompanionReplacedError,
    CompanionUnavailableError,
    LeaseLostError,
)

FOR_EVER = -1.0
"""A linger time that never ends."""


class Lifetime:
    """The life of one companion.

    Args:
        device, pid: of the companion, for the texts of errors.
        linger_s: seconds that it stays while nobody uses anything; negative or infinite: until it is stopped.
        grace_s: seconds that it stays at least, until its first user has come.
        now_s: monotonic time.

    Attributes:
        linger_s: what counts now; negative: until it is stopped.
        owner_pid: the owner's; 0: it has none.
        idle_since: monotonic time since which nobody uses anything (a load is a use); None while somebody does.
        ending: nobody is let in any more.
        is_over: it ends because nobody came within its linger time.
    """

    def __init__(self, device: str, pid: int, linger_s: float, grace_s: float, now_s: float) -> None:
        self._device, self._pid = device, pid
        self._without_owner_s = self.linger_s = linger_s if math.isfinite(linger_s) else FOR_EVER
        self._grace_s = grace_s
        self._ended_by: type[CompanionError] = LeaseLostError
        self.owner_pid = 0
        self.idle_since: float | None = now_s
        self.ending = False
        self.is_over = False

    # ---- users

    def use(self) -> None:
        """Somebody uses something from now on."""
        self.idle_since, self._grace_s = None, 0.0

    def idle(self, now_s: float) -> None:
        """Nobody uses anything. Idle time that runs already goes on."""
        if self.idle_since is None:
            self.idle_since = now_s

    @property
    def ends_at(self) -> float | None:
        """Monotonic time at which the companion should end if nobody comes; None: that is not in sight."""
        if self.idle_since is None or self.linger_s < 0 or math.isinf(self._grace_s):
            return None
        return self.idle_since + max(self.linger_s, self._grace_s)

    # ---- owner

    @property
    def entry_linger_s(self) -> float:
        """Seconds that an entry stays while nobody uses it; negative: for ever."""
        return FOR_EVER if self.owner_pid else self.linger_s

    def own(self, pid: int, linger_s: float, *, from_first_client: bool = False) -> None:
        """The companion belongs to process `pid`, and stays as long as that says.

        Args:
            from_first_client: the linger time begins when the first user has come.

        Raises:
            AlreadyRunningError: it has an owner.
            BadRequestError: no pid, or a linger time that is not finite.
        """
        if self.owner_pid:
            raise AlreadyRunningError(
                f"A companion of {self._device} runs already (pid {self._pid}), for `vllm-companion serve` "
                f"(pid {self.owner_pid}). End it: vllm-companion stop --device {self._device}"
            )
        if pid <= 0 or not math.isfinite(linger_s):
            raise BadRequestError("An owner has a pid and a finite linger time.")
        self.owner_pid, self.linger_s = pid, linger_s
        self._grace_s = math.inf if from_first_client and self.idle_since is not None else 0.0

    def disown(self, now_s: float) -> None:
        """The owner has gone. Time that has passed before does not count."""
        self.owner_pid, self.linger_s, self._grace_s = 0, self._without_owner_s, 0.0
        if self.idle_since is not None:
            self.idle_since = now_s

    # ---- end

    def end(self, *, replaced: bool) -> None:
        """The companion ends; `replaced`: another one follows, to which clients hand back what they map."""
        self.ending = True
        self._ended_by = CompanionReplacedError if replaced else LeaseLostError

    @property
    def replaced(self) -> bool:
        return self._ended_by is CompanionReplacedError

    def check_open(self) -> None:
        """Raise what clients are told, if the companion is ending."""
        if self.ending:
            raise self.end_error()

    def end_error(self, *, to_spectator: bool = False) -> CompanionError:
        """What a client is told at the end. How it came about matters only to those who hold something, or own us."""
        kind = CompanionUnavailableError if to_spectator else self._ended_by
        who = f"companion of {self._device} (pid {self._pid})"
        if self.is_over:
            return kind(f"Nobody used the {who} for {self.linger_s:g} s, so it has ended.")
        how = "makes room for another one" if self.replaced else "was stopped"
        return kind(f"The {who} {how}. What is mapped stays valid.")
