"""`vllm-companion metrics` exports the metrics of all companions of a runtime directory on one loopback port.

The companions answer on their sockets; no HTTP server runs in the processes that own the memory (adr/0010).
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
"""How long the exporter waits for the companions, which it asks all at once. Prometheus gives up after 10 s."""
RETRY_S = 10.0

Answer = tuple[CompanionStatus, list[float], list[Series]]


def main(parsed: argparse.Namespace) -> int:
    """Serve metrics until a signal ends this process; return 0."""
    settings = settings_of(parsed)
    if not settings.metrics_port:
        raise SettingsError("metrics: no port is named.", remedy=f"Name one: {SETTINGS['metrics_port'].option} 9464")
    with Signals() as signals:
        _listen(settings)
        say(f"Ready: {_where(settings)}")
        try:
            while True:
                signals.wait()
        except Stopped:
            return 0


def serve_beside(settings: Settings) -> None:
    """Serve metrics from this process if a port is set. A taken port is no error: the exporter tries again."""
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
    """Answer on the port from now on, in daemon threads. Raises `SettingsError`, `CompanionUnavailableError`."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise SettingsError(
            f"metrics_port needs prometheus_client ({error}).", remedy="Run: pip install prometheus-client"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(settings))
    try:
        start_http_server(settings.metrics_port, HOST, registry)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise CompanionUnavailableError(
            f"Metrics are not served: port {settings.metrics_port} of {HOST} (metrics_port) "
            f"{'is taken' if taken else f'cannot be used ({error.strerror})'}.",
            remedy=f"Choose another one: {SETTINGS['metrics_port'].option} or {SETTINGS['metrics_port'].env}.",
        ) from error


class _Collector:
    """A Prometheus collector that asks all companions at each scrape."""

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
    """Return the answer of each device's companion, by device; None for a wrong or missing answer."""
    devices = list_devices(settings)
    if not devices:
        return {}
    with ThreadPoolExecutor(len(devices)) as pool:
        asked = dict(zip(devices, pool.map(lambda device: _ask(device, settings), devices), strict=True))
    return {device: found[0] for device, found in asked.items() if found}


def _ask(device: str, settings: Settings) -> tuple[Answer | None] | None:
    """Return the answer of the device's companion in a tuple, (None,) for a wrong or missing one; None if none runs."""
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
    """Yield one family of samples for each metric of the table."""
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
            if one.name not in found:  # a newer companion sent this metric
                continue
            labels = (device, *(one.labels.get(label, "") for label in BY_NAME[one.name].labels))
            if one.counts:
                found[one.name].add_metric(labels, _buckets(bounds_s, one.counts), one.value)
            else:
                found[one.name].add_metric(labels, one.value)
    return iter(found.values())


def _buckets(bounds_s: list[float], counts: list[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets as Prometheus has them: the number of values up to each bound."""
    bounds = [*map(str, bounds_s), "+Inf"]
    return [(bound, float(sum(counts[: index + 1]))) for index, bound in enumerate(bounds)]


def _gauges(status: CompanionStatus, now: float) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield name, labels and value of each gauge of the status; entries of the same name and state are added up."""
    yield "info", (status.version, str(status.protocol_version)), 1
    yield "start_time_seconds", (), status.started_unix_s
    arenas: Counter[tuple[str, ...]] = Counter()
    arena_bytes: Counter[tuple[str, ...]] = Counter()
    host_bytes: Counter[tuple[str, ...]] = Counter()
    leases: Counter[tuple[str, ...]] = Counter()
    generations: Counter[tuple[str, ...]] = Counter()
    current: dict[tuple[str, ...], float] = {}
    silence: dict[tuple[str, ...], float] = {}
    for entry in status.entries:
        of = subject(entry.key)
        # All states are sent, because a panel that adds up must not miss a state that has just become empty.
        arenas.update({(*of, state.value): int(entry.state is state) for state in EntryState})
        arena_bytes.update({(*of, state.value): entry.device_bytes * (entry.state is state) for state in EntryState})
        host_bytes[of] += entry.host_bytes
        if not entry.key.rules.is_on_device:
            host_bytes[of] += sum(each.size_bytes for each in entry.generations)
        leases.update({(*of, state.value): 0 for state in LeaseState})
        leases.update((*of, lease.state.value) for lease in entry.leases)
        generations[of] += len(entry.generations)
        if entry.state in (EntryState.READY, EntryState.PARKED):
            current[of] = max(current.get(of, 0.0), float(entry.generation))
        if entry.loader is not None and entry.loader.changed_unix_s:
            silence[of] = max(silence.get(of, 0.0), now - entry.loader.changed_unix_s)
    counts = {
        "arenas": arenas,
        "arena_bytes": arena_bytes,
        "host_bytes": host_bytes,
        "leases": leases,
        "generations": generations,
    }
    for name, counted in counts.items():
        yield from ((name, labels, float(value)) for labels, value in counted.items())
    yield from (("current_generation", labels, value) for labels, value in current.items())
    yield from (("load_silence_seconds", labels, value) for labels, value in silence.items())
