"""What is measured of companions, and what they count of it themselves. Pure: Prometheus is the exporter's business.

Counts live as long as the companion. Their number is bounded: `MAX_SUBJECTS` models and ranks, of which the one
that was counted least recently is forgotten first.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import product

from vllm_companion_plugin.errors import BY_CODE
from vllm_companion_plugin.types import EntryKey, Series

PREFIX = "vllm_companion_"
MAX_SUBJECTS = 200
MAX_LABEL = 200
BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Of all histograms: attaching takes a tenth of a second, loading minutes."""

OUTCOMES = ("attached", "copied", "published", "alone")
VERIFY_MODES = ("full", "sample")
VERIFY_RESULTS = ("equal", "different")
SIDES = ("companion", "client")

_SUBJECT = ("model", "rank", "role")


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics. All have the label `device` besides.

    Attributes:
        kind: "gauge" (from the status), "counter" or "histogram" (counted here).
        values: all that the labels after those of the entry can be, so that each series begins at zero.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    values: tuple[tuple[str, ...], ...] = ((),)

    @property
    def exported_name(self) -> str:
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


TABLE = (
    Metric("up", "gauge", (), "1 if the companion answers, 0 if it does not; absent if none runs."),
    Metric("info", "gauge", ("version", "protocol"), "Version and protocol version of the companion; always 1."),
    Metric("start_time_seconds", "gauge", (), "Unix time at which the companion started."),
    Metric("arenas", "gauge", (*_SUBJECT, "state"), "Entries, by state: loading, ready or retired."),
    Metric("arena_bytes", "gauge", (*_SUBJECT, "state"), "Bytes of their arenas; 0 while loading."),
    Metric("leases", "gauge", (*_SUBJECT, "state"), "Clients, by state: attached, waiting or loading."),
    Metric("load_silence_seconds", "gauge", _SUBJECT, "Seconds since the process that loads last reported progress."),
    Metric(
        "loads",
        "counter",
        (*_SUBJECT, "result"),
        "Loads that ended, by result: published, declined or abandoned.",
        (("published",), ("declined",), ("abandoned",)),
    ),
    Metric("load_seconds", "histogram", _SUBJECT, "Seconds from election to publication, of published loads."),
    Metric("attaches", "counter", _SUBJECT, "Clients that were given an entry that another one had loaded."),
    Metric("wait_seconds", "histogram", _SUBJECT, "Seconds that clients waited for somebody else to load."),
    Metric(
        "readoptions",
        "counter",
        (*_SUBJECT, "result"),
        "Entries of the companion before: handed_back, renewed (one more client of such an entry) or given_up.",
        (("handed_back",), ("renewed",), ("given_up",)),
    ),
    Metric(
        "failures",
        "counter",
        ("side", "cause"),
        "Errors that clients were told (side companion) or reported (side client), by the code of errors.md.",
        tuple(product(SIDES, BY_CODE)),
    ),
    Metric(
        "outcomes",
        "counter",
        (*_SUBJECT, "outcome"),
        "Models in engines: attached, copied, published or alone.",
        tuple((outcome,) for outcome in OUTCOMES),
    ),
    Metric("attach_seconds", "histogram", _SUBJECT, "Seconds that engines took to attach to an entry, or to copy it."),
    Metric(
        "verifications",
        "counter",
        (*_SUBJECT, "mode", "result"),
        "Checksums compared, in mode full or sample: equal or different.",
        tuple(product(VERIFY_MODES, VERIFY_RESULTS)),
    ),
    Metric("verify_seconds", "histogram", _SUBJECT, "Seconds that engines waited for the comparison of checksums."),
)
BY_NAME = {metric.name: metric for metric in TABLE}


def subject(key: EntryKey | None) -> tuple[str, str, str]:
    """Values of the labels model, rank and role; empty for an entry that the companion does not have."""
    return (key.model[:MAX_LABEL], key.rank[:MAX_LABEL], key.role[:MAX_LABEL]) if key else ("", "", "")


class Counters:
    """Counts and histograms of one companion."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, tuple[str, ...]], Series] = {}
        self._subjects: dict[tuple[str, ...], None] = {}
        for labels in BY_NAME["failures"].values:
            self._at("failures", labels)
        self._at("outcomes", (*subject(None), "alone"))

    def start(self, *of: str) -> None:
        """Begin all series of a `subject` at zero: Prometheus sees no increase in one that begins at one."""
        for metric in TABLE:
            if metric.kind != "gauge" and metric.labels[:3] == _SUBJECT:
                for values in metric.values:
                    self._at(metric.name, (*of, *values))

    def count(self, name: str, *labels: str) -> None:
        """One more. `labels` in the order of the table."""
        self._at(name, labels).value += 1

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """One more in a histogram. `labels` in the order of the table."""
        series = self._at(name, labels)
        series.value += seconds
        series.counts[bisect_left(BOUNDS_S, seconds)] += 1

    def _at(self, name: str, labels: tuple[str, ...]) -> Series:
        metric = BY_NAME[name]
        if metric.labels[:3] == _SUBJECT:
            self._subjects.pop(labels[:3], None)
            self._subjects[labels[:3]] = None
            if len(self._subjects) > MAX_SUBJECTS:
                self._forget(next(iter(self._subjects)))
        if (name, labels) not in self._series:
            counts = [0] * (len(BOUNDS_S) + 1) if metric.kind == "histogram" else []
            pairs = dict(zip(metric.labels, labels, strict=True))
            self._series[name, labels] = Series(name, pairs, 0.0, counts)
        return self._series[name, labels]

    def _forget(self, oldest: tuple[str, ...]) -> None:
        del self._subjects[oldest]
        self._series = {
            at: series
            for at, series in self._series.items()
            if BY_NAME[at[0]].labels[:3] != _SUBJECT or at[1][:3] != oldest
        }

    def all(self) -> list[Series]:
        return list(self._series.values())


def to_markdown() -> str:
    """The table of docs/operations.md."""
    lines = ["| metric | type | labels, besides `device` | meaning |", "| --- " * 4 + "|"]
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exported_name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
