"""Draw docs/deploy/grafana/vllm-companion.svg: what the dashboard shows of a companion that lives through two minutes.

python tools/draw_dashboard.py PROMETHEUS     # the path of the program

Stand-ins for engines use a real companion with the client library: they load, wait, attach, report and leave, the
companion is killed, and they hand back. Prometheus scrapes the real exporter, and answers the queries of the
dashboard's panels. What draws is this script, not Grafana, in Grafana's arrangement.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.place import Place, until  # noqa: E402
from tests.support.publishing import publish  # noqa: E402
from vllm_companion_plugin import CompanionClient  # noqa: E402
from vllm_companion_plugin.client.attachment import Attachment  # noqa: E402
from vllm_companion_plugin.client.connection import Granted, connect  # noqa: E402
from vllm_companion_plugin.core.identity import EntryKey  # noqa: E402
from vllm_companion_plugin.core.status import Progress, Report  # noqa: E402

DASHBOARD = ROOT / "docs" / "deploy" / "grafana" / "vllm-companion.json"
SVG = DASHBOARD.with_suffix(".svg")

MODELS = {"Qwen/Qwen3-8B": (96, 6.0), "meta-llama/Llama-3.1-8B-Instruct": (64, 9.0), "BAAI/bge-m3": (24, 3.0)}
"""MiB of each stand-in for a model, and the seconds that its loader takes."""
SCENE_S, KILL_S, STEP_S = 120.0, 70.0, 2

COLUMN, ROW, GAP = 50, 30, 6
COLORS = (
    *("#1f77b4", "#d9730d", "#2c974b", "#c93c37", "#8250df", "#a0782d"),
    *("#bf3989", "#57606a", "#17becf", "#9aa500", "#1b2a8a", "#e377c2"),
)

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Scene:
    """Engines that come and go, as threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._keys = {name: EntryKey(f"{number:02x}" * 32, name) for number, name in enumerate(MODELS, 1)}
        self._client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
        self._running: list[Attachment] = []

    def _load(self, name: str) -> None:
        size_mib, seconds = MODELS[name]
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(size_mib << 20, dtype=torch.uint8), requires_grad=False)
        with connect("cpu", self._place.settings, spawn=False) as connection:
            granted = connection.attach(self._keys[name], may_load=True, client_name="vLLM").wait(30)
            assert isinstance(granted, Granted)
            for step in range(int(seconds / 0.5)):
                # A loader is silent while vLLM processes what it has read.
                if step < seconds:
                    granted.publication.report(Progress("loading", step, int(seconds / 0.5)))
                time.sleep(0.5)
            publish(granted.publication, model)
            self._report(Report(self._keys[name].id, "published"))

    def _attach(self, name: str) -> None:
        with connect("cpu", self._place.settings, spawn=False) as connection:
            connection.attach(self._keys[name], may_load=False, client_name="vLLM").wait(60)
        began = time.monotonic()
        attached = self._client.attach(name)
        self._running.append(attached)
        seconds = time.monotonic() - began
        verified = {"verify": "full", "verified": "equal", "verify_seconds": seconds / 2}
        self._report(Report(self._keys[name].id, "attached", seconds, **verified))

    def _report(self, report: Report) -> None:
        with connect("cpu", self._place.settings, spawn=False) as connection:
            connection.report(report)
            time.sleep(1)  # nobody waits for the answer; an engine stays connected

    def _alone(self) -> None:
        self._report(Report(outcome="alone", failure="not_shareable"))

    def play(self) -> None:
        chance = random.Random(1)
        began = time.monotonic()
        threads = []

        def at(second: float, act: Any, *arguments: str) -> None:
            def later() -> None:
                time.sleep(max(0, began + second - time.monotonic()))
                act(*arguments)

            threads.append(threading.Thread(target=later))
            threads[-1].start()

        for number, name in enumerate(MODELS):
            at(4 + 8 * number, self._load, name)
            for _ in range(2):
                at(5 + 8 * number, self._attach, name)
        for second in range(34, int(SCENE_S) - 8, 6):
            if abs(second - KILL_S) > 6:
                at(second, self._attach, chance.choice(list(MODELS)))
                at(second + 3, self._end, "")
        at(50, self._alone)
        at(KILL_S, os.kill, self._place.companion_pid(), signal.SIGKILL)
        for thread in threads:
            thread.join()
        time.sleep(max(0, began + SCENE_S - time.monotonic()))
        while self._running:
            self._end()

    def _end(self, _: str = "") -> None:
        with contextlib.suppress(IndexError):
            self._running.pop(0).close()


def ask(port: int, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    query = {"query": expression.replace("$device", ".*"), "start": start, "end": end, "step": STEP_S}
    with _http.open(
        f"http://127.0.0.1:{port}/api/v1/query_range?{urllib.parse.urlencode(query)}", timeout=30
    ) as answer:
        return list(json.load(answer)["data"]["result"])


def gather(prometheus: str) -> list[tuple[dict[str, Any], list[tuple[str, list[tuple[float, float]]]]]]:
    """The panels, each with its series: name, and seconds since the beginning with values."""
    root = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))
    place = Place(str(root))
    metrics_port, port = free_port(), free_port()
    config = root / "prometheus.yml"
    jobs = [{"job_name": "companion", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}]
    config.write_text(json.dumps({"global": {"scrape_interval": f"{STEP_S}s"}, "scrape_configs": jobs}))
    store = f"--storage.tsdb.path={root}/data"
    started = []
    try:
        place.companion()
        exporter = ["-m", "vllm_companion_plugin.cli.main", "metrics", "--metrics-port", str(metrics_port)]
        started.append(subprocess.Popen([sys.executable, *exporter], env=place.environment))
        listens = f"--web.listen-address=127.0.0.1:{port}"
        started.append(subprocess.Popen([prometheus, f"--config.file={config}", store, listens, "--log.level=error"]))

        def ready() -> bool:
            with contextlib.suppress(OSError), _http.open(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                return bool(ask(port, "vllm_companion_up", time.time() - 60, time.time()))
            return False

        until(ready, 60, "Prometheus has scraped", every_s=0.5)
        start = time.time()
        Scene(place).play()
        panels = []
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            series = []
            for target in panel["targets"]:
                for found in ask(port, target["expr"], start, start + SCENE_S):
                    name = target["legendFormat"]
                    for label, value in found["metric"].items():
                        name = name.replace(f"{{{{{label}}}}}", value)
                    points = [(at - start, float(value)) for at, value in found["values"] if value != "NaN"]
                    series.append((name, points))
            panels.append((panel, series))
        return panels
    finally:
        for process in started:
            process.terminate()
            process.wait(10)
        place.clean()
        shutil.rmtree(root, ignore_errors=True)


def end_of_axis(highest: float, unit: str) -> float:
    """The end of an axis: a round number above all values, half of which is round, too."""
    scale = 2**20 if unit == "bytes" else 1
    power = 10 ** math.floor(math.log10(highest / scale))
    return next(step * power * scale for step in (2, 4, 6, 8, 10, 20) if step * power * scale > highest)


def number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s":
        return f"{value:.2g} s"
    return f"{value:g}"


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def curves(x: float, y: float, width: float, height: float, unit: str, series: list[Any]) -> list[str]:
    """Steps, an axis, and beside them the names with the last values."""
    names = 320 if width > 500 else 232
    left, right, top, bottom = x + 54, x + width - names, y + 30, y + height - 24
    assert len(series) <= len(COLORS), series
    highest = end_of_axis(max((value for _, points in series for _, value in points), default=0.0) or 1.0, unit)
    out = []
    for share in (0, 0.5, 1):
        at = bottom - share * (bottom - top)
        out.append(f'<path class="grid" d="M{left:.1f},{at:.1f}H{right:.1f}"/>')
        out.append(text(left - 5, at + 4, number(share * highest, unit), "axis", "end"))
    for second in (0, 60, 120):
        out.append(text(left + second / SCENE_S * (right - left), bottom + 15, f"{second} s", "axis", "middle"))
    for index, (name, points) in enumerate(series):
        color = COLORS[index % len(COLORS)]
        # Curves that lie on one another stay visible: each is moved by a pixel.
        path, before = "", -1e9
        for second, value in points:
            px = left + second / SCENE_S * (right - left)
            py = bottom - value / highest * (bottom - top) - index
            path += f"H{px:.1f}V{py:.1f}" if second - before < 2 * STEP_S + 1 else f"M{px:.1f},{py:.1f}"
            before = second
        out.append(f'<path class="curve" stroke="{color}" d="{path}"/>')
        row = y + 34 + 16 * index
        out.append(f'<rect x="{right + 10:.1f}" y="{row:.1f}" width="10" height="10" fill="{color}"/>')
        last = f" {number(points[-1][1], unit)}" if points else ""
        limit = int((names - 40 - 8 * len(last)) / 6.2)
        half = limit // 2
        short = name if len(name) <= limit else f"{name[: limit - half - 1]}…{name[-half:]}"
        out.append(text(right + 25, row + 9, short, "name"))
        out.append(text(x + width - 8, row + 9, last, "value", "end"))
    return out


STYLE = """
.back { fill: #f6f8fa; } .panel { fill: #ffffff; stroke: #d0d7de; } .grid { stroke: #d0d7de; }
.curve { fill: none; stroke-width: 1.6; }
text { font: 11px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #24292f; }
.title { font-size: 13px; font-weight: 600; } .axis { fill: #57606a; font-size: 10px; } .stat { font-size: 24px; }
.value { font-weight: 600; }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; } .panel { fill: #161b22; stroke: #30363d; } .grid { stroke: #30363d; }
  text { fill: #e6edf3; } .axis { fill: #9da7b1; } .curve { filter: brightness(1.4); }
}
"""


def draw(panels: list[Any]) -> str:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels) * ROW + GAP
    width = 24 * COLUMN + GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The dashboard: a companion that is killed after 70 seconds, and the engines that use it</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{width}" height="{height}"/>',
    ]
    for panel, series in panels:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + GAP, place["y"] * ROW + GAP
        w, h = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        unit = panel["fieldConfig"]["defaults"]["unit"]
        out.append(f'<rect class="panel" x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>')
        out.append(text(x + 10, y + 20, panel["title"], "title"))
        if panel["type"] == "stat":
            for row, (name, points) in enumerate(series):
                out.append(text(x + 10, y + 68 + 36 * row, f"{number(points[-1][1], unit)} {name}", "stat"))
        else:
            out += curves(x, y, w, h, unit, series)
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(draw(gather(sys.argv[1])))
