"""What a companion counts, for core/metrics.py. Pure.

Counts live as long as the companion. Their number is bounded: `MAX_SUBJECTS` models and ranks, of which the one
that was counted least recently is forgotten first.
"""

from __future__ import annotations

from bisect import bisect_left

from vllm_companion_plugin.core.metrics import BOUNDS_S, BY_NAME, SUBJECT, TABLE, Series, subject

MAX_SUBJECTS = 200


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
            if metric.kind != "gauge" and metric.labels[:3] == SUBJECT:
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
        if metric.labels[:3] == SUBJECT:
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
            if BY_NAME[at[0]].labels[:3] != SUBJECT or at[1][:3] != oldest
        }

    def all(self) -> list[Series]:
        return list(self._series.values())
