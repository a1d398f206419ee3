"""What became of a fleet that was to take new weights: for people, and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_companion_plugin.errors import FleetError

AS_LOADED = "the checkpoint"


@dataclass(frozen=True)
class EngineReport:
    """What one engine has, when the fleet is done with it.

    Attributes:
        engine: its URL, or how it was called.
        state: "new", "old" or "unknown" weights; or "gone", if it exists no more or cannot be reached.
        generations: the numbers of its generations, by model and role; empty if they are unknown. Of several ranks, the
            first one's.
        version: the name of its target's weights; empty: a checkpoint; None: unknown, also if it could not prepare.
        failures: what did not work, step by step.
        may_be_paused: whether nobody knows if it answers requests: it was paused, and has not said that it resumed.
        paused_s: seconds from the moment in which it was told to pause until it had resumed; 0 if it was not paused.
    """

    engine: str
    state: str
    generations: Mapping[str, int] = field(default_factory=dict)
    version: str | None = None
    failures: tuple[str, ...] = ()
    may_be_paused: bool = False
    paused_s: float = 0.0

    def __str__(self) -> str:
        gone = "is gone, or cannot be reached" if self.may_be_paused else "is gone"
        has = {"gone": gone, "unknown": "has unknown weights"}.get(self.state) or f"has {self._weights()}"
        said = f"{self.engine} {has}"
        if self.paused_s:
            said += f", after a pause of {self.paused_s:.3f} s"
        if self.may_be_paused:
            said += ", and may be paused"
        return ": ".join([said, "; ".join(each.rstrip(".") for each in self.failures)]) if self.failures else said

    def _weights(self) -> str:
        if self.version is None:
            return "what it had"
        numbers = sorted(set(self.generations.values()))
        return f"{self.version or AS_LOADED} (generation {', '.join(map(str, numbers))})"


@dataclass(frozen=True)
class FleetReport:
    """What each engine has.

    Attributes:
        engines: in the order in which they were given.
        version: the name of the weights that they were to take; empty: a checkpoint; None: no engine said what it is.
        prepare_s: seconds in which all were prepared, while they served.
    """

    engines: tuple[EngineReport, ...]
    version: str | None
    prepare_s: float

    @property
    def has_advanced(self) -> bool:
        """Whether each engine has the new weights, and nothing failed."""
        return all(each.state == "new" and not each.failures for each in self.engines)

    @property
    def is_uniform(self) -> bool:
        """Whether all engines that exist have the same weights, and are known to."""
        here = [each for each in self.engines if each.state != "gone"]
        return len({each.version for each in here}) <= 1 and all(each.version is not None for each in here)

    def check(self) -> None:
        """Raise `FleetError` with this report unless `has_advanced`."""
        if self.has_advanced:
            return
        done = sum(each.state == "new" for each in self.engines)
        wanted = "the new weights" if self.version is None else self.version or AS_LOADED
        raise FleetError(
            f"{done} of {len(self.engines)} engines have taken {wanted}. {self}.", remedy=self._remedy(), report=self
        )

    def _remedy(self) -> str:
        lost = [each.engine for each in self.engines if each.state in ("gone", "unknown") or each.may_be_paused]
        if lost:
            return f"Restart {', '.join(lost)}, then advance again."
        return "No engine was left paused. Mend what failed, then advance again."

    def __str__(self) -> str:
        return ". ".join(map(str, self.engines))
