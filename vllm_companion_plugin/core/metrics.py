"""The table of all metrics of companions. Only the exporter knows Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import EntryState, LeaseState
from vllm_companion_plugin.errors import BY_CODE

PREFIX = "vllm_companion_"

MAX_LABEL = 200

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of all histograms, in seconds: an attach takes a tenth of a second, a load takes minutes."""

OUTCOMES = ("attached", "copied", "published", "alone")

VERIFY_MODES = ("full", "sample")

VERIFY_RESULTS = ("equal", "different")

SIDES = ("companion", "client")

SUBJECT = ("model", "rank", "role")


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics. Every metric also has the label `device`.

    Attributes:
        kind: "gauge" (read from the status), "counter" or "histogram" (counted by the companion).
        values: all possible values of the labels that follow the entry's labels, so that each series begins at zero.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    values: tuple[tuple[str, ...], ...] = ((),)

    @property
    def exported_name(self) -> str:
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def _listed(states: type[EntryState] | type[LeaseState]) -> str:
    *words, last = (state.value for state in states)
    return f"{', '.join(words)} or {last}"


TABLE = (
    Metric("up", "gauge", (), "1 if the companion answers, 0 if it does not; absent if no companion runs."),
    Metric("info", "gauge", ("version", "protocol"), "Version and protocol version of the companion; always 1."),
    Metric("start_time_seconds", "gauge", (), "Unix time at which the companion started."),
    Metric("arenas", "gauge", (*SUBJECT, "state"), f"Entries, by state: {_listed(EntryState)}."),
    Metric(
        "arena_bytes",
        "gauge",
        (*SUBJECT, "state"),
        "Bytes of the entries on the device, in all generations; 0 while loading, parked or dropped.",
    ),
    Metric("host_bytes", "gauge", SUBJECT, "Bytes in host memory: copies kept for engines that sleep, and adapters."),
    Metric("leases", "gauge", (*SUBJECT, "state"), f"Clients, by state: {_listed(LeaseState)}."),
    Metric("generations", "gauge", SUBJECT, "Generations on the device: the current one, those kept, those mapped."),
    Metric("current_generation", "gauge", SUBJECT, "Number of the generation that clients get; absent while loading."),
    Metric("load_silence_seconds", "gauge", SUBJECT, "Seconds since the loading process last reported progress."),
    Metric(
        "loads",
        "counter",
        (*SUBJECT, "result"),
        "Loads that ended, by result: published, declined or abandoned.",
        (("published",), ("declined",), ("abandoned",)),
    ),
    Metric("load_seconds", "histogram", SUBJECT, "Seconds from a loader's election to its publication."),
    Metric("attaches", "counter", SUBJECT, "Clients that got an entry which another client had loaded."),
    Metric("wait_seconds", "histogram", SUBJECT, "Seconds that clients waited for another client to load."),
    Metric(
        "readoptions",
        "counter",
        (*SUBJECT, "result"),
        "Entries of the previous companion: handed_back, renewed (one more client of such an entry) or given_up.",
        (("handed_back",), ("renewed",), ("given_up",)),
    ),
    Metric(
        "updates",
        "counter",
        (*SUBJECT, "result"),
        "Generations that clients began to write, by result: committed or aborted.",
        (("committed",), ("aborted",)),
    ),
    Metric("rollbacks", "counter", SUBJECT, "Times that an older generation was made the current one."),
    Metric(
        "failures",
        "counter",
        ("side", "cause"),
        "Errors that the companion sent (side companion) or clients reported (side client), by the code of errors.md.",
        tuple(product(SIDES, BY_CODE)),
    ),
    Metric(
        "outcomes",
        "counter",
        (*SUBJECT, "outcome"),
        "Models that engines attached, copied, published or loaded alone.",
        tuple((outcome,) for outcome in OUTCOMES),
    ),
    Metric(
        "attach_seconds", "histogram", SUBJECT, "Seconds that engines took to attach to an entry or to copy an entry."
    ),
    Metric(
        "verifications",
        "counter",
        (*SUBJECT, "mode", "result"),
        "Comparisons of checksums, in mode full or sample: equal or different.",
        tuple(product(VERIFY_MODES, VERIFY_RESULTS)),
    ),
    Metric("verify_seconds", "histogram", SUBJECT, "Seconds that engines waited for the comparison of checksums."),
)

BY_NAME = {metric.name: metric for metric in TABLE}


def subject(key: EntryKey | None) -> tuple[str, str, str]:
    """Return the values of the labels model, rank and role; empty for an entry that the companion does not have."""
    return (key.model[:MAX_LABEL], key.rank[:MAX_LABEL], key.role[:MAX_LABEL]) if key else ("", "", "")


def to_markdown() -> str:
    """Return the table of docs/operations.md."""
    lines = ["| metric | type | labels, besides `device` | meaning |", "| --- " * 4 + "|"]
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exported_name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


@dataclass
class Series:
    """One series that a companion counts.

    Attributes:
        value: the count; for a histogram, the sum of the observed values.
        counts: for a histogram, the number of values in each bucket, the last one beyond all bounds; else empty.
    """

    name: str
    labels: Mapping[str, str]
    value: float
    counts: list[int] = field(default_factory=list)
