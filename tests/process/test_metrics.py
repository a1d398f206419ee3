"""Metrics of real companions, through the real exporter, as Prometheus reads them."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.process.test_cli import CLI, cli, read_until, serve
from tests.support.place import KEY, Place, arena_of, until
from vllm_companion_plugin.cli import metrics
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import BOUNDS_S, PREFIX, TABLE, Series
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    GenerationStatus,
    Progress,
    Report,
)
from vllm_companion_plugin.errors import BadRequestError, CompanionError, EntryNotFoundError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.wire import codec

pytestmark = pytest.mark.usefixtures("serve_ends_its_companions")

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "deploy" / "grafana" / "vllm-companion.json"
NASTY = 'org/"quoted"\\back\nvllm_companion_up{device="forged"} 7\x1b[31m'
QUOTED = 'org/"quoted"\\back vllm_companion_up{device="forged"} 7'
"""As much of it as a key may have."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a series twice"
    return found


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=15) as answer:
        return parsed(answer.read().decode())


def collect(place: Place) -> Samples:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics._Collector(place.settings))
    return parsed(generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """The only sample of this name with these labels, among others."""
    found = [v for (n, pairs), v in samples.items() if n == PREFIX + name and labels.items() <= dict(pairs).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def publish(connection: CompanionConnection, key: EntryKey, size_bytes: int = 4096) -> None:
    outcome = connection.attach(key, may_load=True, client_name="loader").wait(30)
    assert isinstance(outcome, Granted)
    arena, fds = arena_of(b"x" * size_bytes)
    outcome.publication.publish(arena, fds, b"manifest", 1)
    fds.close()


def counted(connection: CompanionConnection) -> list[Series]:
    """What is not zero."""
    return [series for series in connection.metrics()[1] if series.value]


def live_through_everything(place: Place) -> CompanionConnection:
    """What a companion can count happens once at least: loads of all endings, waits, failures, reports."""
    connection = connect("cpu", place.settings, spawn=False)
    loader = connection.attach(KEY, may_load=True, client_name="loader")
    granted = loader.wait(30)
    assert isinstance(granted, Granted)
    granted.publication.report(Progress("loading", 1, 2))
    waiter = connection.attach(KEY, may_load=False, client_name="waiter")
    until(lambda: len(connection.status().entries[0].leases) == 2, 5, "somebody waits")
    arena, fds = arena_of(b"x" * 4096)
    granted.publication.publish(arena, fds, b"manifest", 1)
    fds.close()
    assert isinstance(waiter.wait(30), Ready)
    declined = connection.attach(replace(KEY, id="cd" * 32), may_load=True, client_name="loader").wait(30)
    assert isinstance(declined, Granted)
    declined.publication.decline("because")
    with pytest.raises(CompanionError):
        connection.unload(model="nothing")
    with pytest.raises(EntryNotFoundError):  # as an engine asks first; that its entry is not there is an answer
        connection.attach(replace(KEY, id="ef" * 32), may_load=False, client_name="engine").wait(30)
    connection.report(Report(KEY.id, "attached", 0.2, verify="full", verified="equal", verify_seconds=0.5))
    connection.report(Report(outcome="alone", failure="not_shareable"))
    until(lambda: sum(one.value for one in counted(connection) if one.name == "outcomes") == 2, 5, "reports came")
    return connection


def test_every_metric_is_served_on_loopback_with_real_values(place: Place, port: int) -> None:
    place.environment["COMPANION_METRICS_PORT"] = str(port)
    serving = serve(place)
    with live_through_everything(place):
        found = scrape(port)
        with pytest.raises(ConnectionRefusedError):  # an address of this machine, as any but the one it listens at
            socket.create_connection(("127.0.0.2", port), 5)
    of = {"device": "cpu", "model": KEY.model, "rank": "single", "role": "target"}
    assert value(found, "up", device="cpu") == 1
    assert value(found, "arenas", **of, state="ready") == 1
    assert value(found, "arena_bytes", **of, state="ready") == 4096
    assert value(found, "leases", **of, state="attached") == 2
    assert value(found, "generations", **of) == 1
    assert value(found, "current_generation", **of) == 1
    assert value(found, "updates_total", **of, result="committed") == 0
    assert value(found, "loads_total", **of, result="published") == 1
    assert value(found, "loads_total", **of, result="declined") == 1
    assert value(found, "attaches_total", **of) == 1
    assert value(found, "wait_seconds_count", **of) == 1
    assert value(found, "failures_total", side="companion", cause="not_found") == 1
    assert value(found, "failures_total", side="client", cause="not_shareable") == 1
    assert value(found, "outcomes_total", **of, outcome="attached") == 1
    assert value(found, "outcomes_total", model="", outcome="alone") == 1
    assert value(found, "attach_seconds_sum", **of) == pytest.approx(0.2)
    assert value(found, "attach_seconds_bucket", **of, le="0.1") == 0
    assert value(found, "attach_seconds_bucket", **of, le="0.25") == 1
    assert value(found, "attach_seconds_bucket", **of, le="+Inf") == 1
    assert value(found, "verifications_total", **of, mode="full", result="equal") == 1
    named = {metric.exported_name for metric in TABLE} - {PREFIX + "load_silence_seconds", PREFIX + "readoptions_total"}
    assert named <= {re.sub("_(bucket|sum|count)$", "", name) for name, _ in found}

    # Loopback and nothing else: the port is in no other listening socket of this machine.
    listening = [
        re.findall(rf"(\w+):{port:04X} 0+:0000 0A", Path(f"/proc/net/{p}").read_text()) for p in ("tcp", "tcp6")
    ]
    assert listening == [["0100007F"], []]
    serving.terminate()
    assert serving.wait(30) == 0


def test_the_dashboard_uses_only_metrics_that_a_companion_has_and_every_panel_has_data(place: Place) -> None:
    place.companion()
    with live_through_everything(place) as connection:
        silent = connection.attach(replace(KEY, id="ef" * 32), may_load=True, client_name="loader")
        silent.wait(30)
        found = collect(place)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) >= 8
    used = set(re.findall(rf"{PREFIX}\w+", " ".join(queries)))
    # Only a companion that follows another one has re-adoptions: tests of that are test_handing_back.py's.
    assert used - {f"{PREFIX}readoptions_total"} <= {name for name, _ in found}
    assert f"{PREFIX}readoptions_total" in {metric.exported_name for metric in TABLE}


def test_what_is_gone_is_no_series_and_a_name_is_only_a_name(place: Place) -> None:
    place.companion()
    key = replace(KEY, model=QUOTED)
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection, key)
        found = collect(place)
        assert value(found, "arena_bytes", model=QUOTED, state="ready") == 4096
        assert value(found, "up") == 1  # the only one
        connection.unload(force=True)
        assert value(collect(place), "arenas", model=QUOTED, state="retired") == 1
    until(lambda: not [name for name, _ in collect(place) if name == PREFIX + "arenas"], 5, "the last lease has ended")


@pytest.mark.parametrize(
    ("state", "generations", "on_device"),
    [(EntryState.READY, 1, 7), (EntryState.READY, 2, 14), (EntryState.RETIRED, 0, 7), (EntryState.PARKED, 0, 0)],
)
def test_bytes_count_where_they_are(state: EntryState, generations: int, on_device: int) -> None:
    """On the device, once a generation, or in host memory while all clients sleep."""
    held = tuple(GenerationStatus(number, "", 1.0, 7, number == 1, ()) for number in range(1, generations + 1))
    copied = 7 * (state is EntryState.PARKED)
    entry = EntryStatus(*(KEY, state, 1, 7, 1, "memfd", 1.0, 1.0, None, ()), host_bytes=copied, generations=held)
    gauges = list(metrics._gauges(CompanionStatus("cpu", 1, "v", 4, 1.0, 600.0, 0.0, (entry,)), now=2.0))
    found = {(name, labels[-1]): value for name, labels, value in gauges if name.endswith("_bytes")}
    assert sum(value for (name, _), value in found.items() if name == "arena_bytes") == on_device
    assert found["host_bytes", KEY.role] == entry.host_bytes


def test_a_report_is_counted_only_in_words_that_the_companion_knows(place: Place) -> None:
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        for nonsense in (
            Report("no such key", "stolen", 1.0, "no_such_code", "quick", "fine", 1.0),
            Report("x" * 100_000, "", 1.0, NASTY, NASTY, NASTY),
        ):
            connection._stub.Report(codec.report_to_message(nonsense), timeout=5)
        assert counted(connection) == []
        for seconds in (float("nan"), float("inf"), -1.0):
            with pytest.raises(BadRequestError):
                connection._call("Report", codec.report_to_message(Report(outcome="attached", seconds=seconds)))
        connection.report(Report("unknown", "attached", 1.0))
        until(lambda: {one.name for one in counted(connection)} >= {"outcomes", "attach_seconds"}, 5, "it came")
        (bounds_s, series) = connection.metrics()
    assert tuple(bounds_s) == BOUNDS_S
    assert {one.labels.get("model", "") for one in series} == {""}
    connection.report(Report("unknown", "attached", 1.0))  # on a closed channel: nothing happens


def test_a_companion_that_hangs_is_down_and_hides_no_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ANSWER_TIMEOUT_S", 2.0)
    gpu = "GPU-00000000-0000-0000-0000-000000000000"
    place.companion()
    process = place.run("-m", "vllm_companion_plugin.holder", "--device", gpu)
    paths = device_paths(gpu, place.settings)
    until(lambda: is_listening(paths), 20, "it listens")
    device_paths("GPU-11111111-0000-0000-0000-000000000000", place.settings)  # nobody runs there
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    found = collect(place)
    process.send_signal(signal.SIGCONT)
    assert time.monotonic() - began < 20
    assert {dict(labels)["device"]: up for (name, labels), up in found.items() if name == PREFIX + "up"} == {
        "cpu": 1,
        gpu: 0,
    }


def test_a_port_that_is_taken_keeps_no_weights_from_being_served(
    place: Place, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = socket.create_server(("127.0.0.1", port))
    serving = serve(place, "--metrics-port", str(port))
    assert [status["device"] for status in json.loads(cli(place, "status", "--json")[1])] == ["cpu"]
    code, _, error = cli(place, "metrics", "--metrics-port", str(port))
    assert code == 1
    assert f"port {port} of 127.0.0.1 (metrics_port) is taken" in error
    assert "COMPANION_METRICS_PORT" in error
    monkeypatch.setattr(metrics, "RETRY_S", 0.05)
    metrics.serve_beside(replace(place.settings, metrics_port=port))
    assert "Trying again" in capsys.readouterr().err
    taken.close()
    until(lambda: "Serving metrics" in capsys.readouterr().out, 5, "it is served as soon as the port is free")
    assert value(scrape(port), "up", device="cpu") == 1
    serving.terminate()
    _, error = serving.communicate(timeout=100)
    assert f"port {port} of 127.0.0.1 (metrics_port) is taken" in error


def test_without_a_port_there_are_no_metrics(place: Place) -> None:
    assert place.settings.metrics_port == 0
    code, _, error = cli(place, "metrics")
    assert (code, "--metrics-port 9464" in error) == (2, True)


def test_the_exporter_runs_without_companions_and_ends_by_signal(place: Place, port: int) -> None:
    process = place.run("-u", *CLI, "metrics", "--metrics-port", str(port))
    read_until(process, "Ready")
    assert scrape(port) == {}
    place.companion()
    assert value(scrape(port), "up", device="cpu") == 1
    process.terminate()
    assert process.wait(30) == 0
