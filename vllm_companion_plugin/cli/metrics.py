"""`vllm-companion metrics`: what all companions of a runtime directory measure, for Prometheus, on one loopback port.

The companions answer on their sockets; nothing of HTTP runs in the processes that own the memory (adr/0010).
"""

from __future__ import annotations

import argparse
import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.metrics import BY_NAME, PREFIX, TABLE, Series, subject
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, LeaseState
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, SettingsError
from vllm_companion_plugin.host.runtime_dir import device_paths, list_devices
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.settings import BY_NAME as SETTINGS
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.supervise.children import Signals, Stopped

logger = logging.getLogger("vllm.companion.metrics")

HOST = "127.0.0.1"
ANSWER_TIMEOUT_S = 3.0
"""Of each companion, all at once. Prometheus gives up after 10 s."""
RETRY_S = 10.0

Answer = tuple[CompanionStatus, list[float], list[Series]]


def main(parsed: argparse.Namespace) -> int:
    """Serve metrics until a signal ends it (0)."""
    settings = settings_of(parsed)
    if not settings.metrics_port:
        raise SettingsError(f"metrics: name a port: {SETTINGS['metrics_port'].option} 9464")
    with Signals() as signals:
        _listen(settings)
        say(f"Ready: {_where(settings)}")
        try:
            while True:
                signals.wait()
        except Stopped:
            return 0


def serve_beside(settings: Settings) -> None:
    """Serve metrics from this process if a port is set. A port that is taken stops nobody: it is tried again."""
    if not settings.metrics_port:
        return
    try:
        _listen(settings)
    except CompanionError as error:
        say(f"vllm-companion: {error} Trying again every {RETRY_S:g} s.", error=True)
        threading.Thread(target=_listen_later, args=(settings,), name="metrics", daemon=True).start()
    else:
        say(f"Serving {_where(settings)}")


def _listen_later(settings: Settings) -> None:
    while True:
        time.sleep(RETRY_S)
        try:
            _listen(settings)
        except CompanionError:
            continue
        say(f"Serving {_where(settings)}")
        return


def _where(settings: Settings) -> str:
    return f"metrics of {settings.runtime_dir} at http://{HOST}:{settings.metrics_port}/metrics"


def _listen(settings: Settings) -> None:
    """Answer on the port from now on, from daemon threads. Raises `SettingsError`, `CompanionUnavailableError`."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise SettingsError(f"metrics_port needs prometheus_client ({error}): pip install prometheus-client") from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(settings))
    try:
        start_http_server(settings.metrics_port, HOST, registry)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise CompanionUnavailableError(
            f"Metrics are not served: port {settings.metrics_port} of {HOST} (metrics_port) "
            f"{'is taken' if taken else f'cannot be used ({error.strerror})'}. Choose another one: "
            f"{SETTINGS['metrics_port'].option} or {SETTINGS['metrics_port'].env}."
        ) from error


class _Collector:
    """Asks all companions at each scrape."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def collect(self) -> Iterable[Any]:
        try:
            answers = _ask_all(self._settings)
        except CompanionError as error:
            logger.error("No metrics: %s", error)
            answers = {}
        return _families(answers, time.time())


def _ask_all(settings: Settings) -> dict[str, Answer | None]:
    """By device: what its companion says, None if it does not answer as we expect."""
    devices = list_devices(settings)
    if not devices:
        return {}
    with ThreadPoolExecutor(len(devices)) as pool:
        asked = dict(zip(devices, pool.map(lambda device: _ask(device, settings), devices), strict=True))
    return {device: found[0] for device, found in asked.items() if found}


def _ask(device: str, settings: Settings) -> tuple[Answer | None] | None:
    """None if no companion runs."""
    try:
        paths = device_paths(device, settings)
        if not is_listening(paths):
            return None
        with CompanionConnection(paths) as connection:
            connection.check_protocol(ANSWER_TIMEOUT_S)
            bounds_s, series = connection.metrics(ANSWER_TIMEOUT_S)
            return ((connection.status(ANSWER_TIMEOUT_S), bounds_s, series),)
    except CompanionError as error:
        logger.debug("No metrics of the companion of %s: %s", device, error)
        return (None,)


def _families(answers: Mapping[str, Answer | None], now: float) -> Iterator[Any]:
    """One family of samples for each metric of the table."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
    found: dict[str, Any] = {
        metric.name: kinds[metric.kind](PREFIX + metric.name, metric.help, labels=("device", *metric.labels))
        for metric in TABLE
    }
    for device, answer in answers.items():
        found["up"].add_metric((device,), float(answer is not None))
        if answer is None:
            continue
        status, bounds_s, series = answer
        for name, labels, value in _gauges(status, now):
            found[name].add_metric((device, *labels), value)
        for one in series:
            if one.name not in found:  # of a newer companion
                continue
            labels = (device, *(one.labels.get(label, "") for label in BY_NAME[one.name].labels))
            if one.counts:
                found[one.name].add_metric(labels, _buckets(bounds_s, one.counts), one.value)
            else:
                found[one.name].add_metric(labels, one.value)
    return iter(found.values())


def _buckets(bounds_s: list[float], counts: list[int]) -> list[tuple[str, float]]:
    """As Prometheus has them: how many were at most so long."""
    bounds = [*map(str, bounds_s), "+Inf"]
    return [(bound, float(sum(counts[: index + 1]))) for index, bound in enumerate(bounds)]


def _gauges(status: CompanionStatus, now: float) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Name, labels and value of what the status shows; entries of the same name and state are added up."""
    yield "info", (status.version, str(status.protocol_version)), 1
    yield "start_time_seconds", (), status.started_unix_s
    arenas: Counter[tuple[str, ...]] = Counter()
    arena_bytes: Counter[tuple[str, ...]] = Counter()
    leases: Counter[tuple[str, ...]] = Counter()
    silence: dict[tuple[str, ...], float] = {}
    for entry in status.entries:
        of = subject(entry.key)
        # All states at once: a panel that adds up must not miss the one that has just become empty.
        arenas.update({(*of, state.value): int(entry.state is state) for state in EntryState})
        arena_bytes.update({(*of, state.value): entry.size_bytes * (entry.state is state) for state in EntryState})
        leases.update({(*of, state.value): 0 for state in LeaseState})
        leases.update((*of, lease.state.value) for lease in entry.leases)
        if entry.loader is not None and entry.loader.changed_unix_s:
            silence[of] = max(silence.get(of, 0.0), now - entry.loader.changed_unix_s)
    for name, counted in (("arenas", arenas), ("arena_bytes", arena_bytes), ("leases", leases)):
        yield from ((name, labels, float(value)) for labels, value in counted.items())
    yield from (("load_silence_seconds", labels, value) for labels, value in silence.items())
