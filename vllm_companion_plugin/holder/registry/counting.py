"""What counts as what: from moves of the registry, and from reports of clients, to the table of core/metrics.py."""

from __future__ import annotations

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import OUTCOMES, VERIFY_MODES, VERIFY_RESULTS, subject
from vllm_companion_plugin.core.status import LeaseState, Report
from vllm_companion_plugin.errors import BY_CODE, CompanionError
from vllm_companion_plugin.holder.registry.counters import Counters
from vllm_companion_plugin.holder.registry.moves import CurrentChanged, GenerationMoved, LeaseMoved, Move
from vllm_companion_plugin.holder.registry.table import GenerationEvent, LeaseEvent


class Counting:
    """An observer of a registry that keeps `counters`."""

    def __init__(self) -> None:
        self.counters = Counters()

    def observe(self, move: Move) -> None:
        """Count one move."""
        if isinstance(move, GenerationMoved):
            self._generation(move)
        elif isinstance(move, LeaseMoved):
            self._lease(move)
        elif isinstance(move, CurrentChanged) and move.generation.number < move.before:
            self.counters.count("rollbacks", *subject(move.entry.key))

    def refused(self, error: CompanionError) -> None:
        """A client was told `error` in answer to a call."""
        self.counters.count("failures", "companion", error.code)

    def reported(self, report: Report, key: EntryKey | None) -> None:
        """A client's report about the entry `key`. Only words that the table knows become labels."""
        of = subject(key)
        if report.outcome in OUTCOMES:
            self.counters.count("outcomes", *of, report.outcome)
        if report.outcome in ("attached", "copied"):
            self.counters.observe("attach_seconds", report.seconds, *of)
        if report.failure in BY_CODE:
            self.counters.count("failures", "client", report.failure)
        if report.verify in VERIFY_MODES and report.verified in VERIFY_RESULTS:
            self.counters.count("verifications", *of, report.verify, report.verified)
            self.counters.observe("verify_seconds", report.verify_seconds, *of)

    def _generation(self, move: GenerationMoved) -> None:
        of = subject(move.entry.key)
        if move.before is None:
            self.counters.start(*of)
        if move.event is GenerationEvent.PUBLISH and move.loaded_s is not None:
            self.counters.count("loads", *of, "published")
            self.counters.observe("load_seconds", move.loaded_s, *of)
        elif move.event is GenerationEvent.HAND_BACK:
            self.counters.count("readoptions", *of, "handed_back")
        elif move.event is GenerationEvent.GIVE_UP:
            self.counters.count("readoptions", *of, "given_up")

    def _lease(self, move: LeaseMoved) -> None:
        lease, of = move.lease, subject(move.lease.entry.key)
        if move.waited_s is not None:
            self.counters.observe("wait_seconds", move.waited_s, *of)
        if move.event is LeaseEvent.MAP and lease.holds:
            self.counters.count("readoptions", *of, "renewed")
        elif move.event in (LeaseEvent.MAP, LeaseEvent.WAKE) and not lease.passive:
            self.counters.count("attaches", *of)
        loads = not lease.holds and lease.entry.current.host is None
        if move.before is LeaseState.LOADING and lease.ended and loads:
            self.counters.count("loads", *of, "declined" if move.event is LeaseEvent.DECLINE else "abandoned")
        if move.before is LeaseState.WRITING and lease.state is not LeaseState.WRITING:
            is_committed = move.event is LeaseEvent.COMMIT_STAGED
            self.counters.count("updates", *of, "committed" if is_committed else "aborted")
        if move.error is not None:
            self.counters.count("failures", "companion", move.error.code)
