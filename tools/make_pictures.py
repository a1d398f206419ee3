"""Draw the README's charts from the committed results: python tools/make_pictures.py [--check]

With --check nothing is written, and the exit status is 1 if docs/pictures/figures.svg is not what the results give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "h200-llama8b-vllm-0.33.0.json"
SVG = ROOT / "docs" / "pictures" / "figures.svg"

GIB = 2**30
ENGINES = ("three-0", "three-1", "three-2")
"""Engines that started one after the other and stayed, in `RESULTS`."""

PANEL, HEIGHT, LEFT, TOP, BAR = 400, 268, 16, 66, 26

STYLE = """
.back { fill: #ffffff; stroke: #d0d7de; } .axis { stroke: #8c959f; }
text { font: 13px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #24292f; }
.title { font-size: 15px; font-weight: 600; } .small { font-size: 11px; fill: #57606a; }
.weights { fill: #0969da; } .rest { fill: #9a6700; fill-opacity: 0.55; }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; stroke: #30363d; } .axis { stroke: #6e7681; }
  text { fill: #e6edf3; } .small { fill: #9da7b1; }
  .weights { fill: #58a6ff; } .rest { fill: #d29922; fill-opacity: 0.6; }
}
"""


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def bar(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{BAR}"/>'


def times(results: dict[str, Any]) -> list[str]:
    """Seconds inside vLLM's load_model, one bar for each way to get the weights."""
    rows = [
        ("vLLM alone", results["eager-auto"]),
        ("the first: loads, publishes", results["eager-loaded"]),
        ("every other: attaches", results["eager-attached"]),
    ]
    longest = max(row["load_model_s"] for _, row in rows)
    out = [text(LEFT, 30, "Time to weights", "title"), text(LEFT, 48, "seconds inside load_model", "small")]
    for number, (name, row) in enumerate(rows):
        y = TOP + number * 56
        seconds = row["load_model_s"]
        width = seconds / longest * (PANEL - 2 * LEFT - 60)
        out += [text(LEFT, y + 12, name), bar(LEFT, y + 18, width, "weights")]
        out.append(text(LEFT + width + 8, y + 36, f"{seconds:.2f} s"))
    return out


def memory(results: dict[str, Any]) -> list[str]:
    """GiB of a GPU with one, two, three engines: measured with a companion, computed for engines alone."""
    free = [results[name]["free"] for name in ENGINES]
    weights = results[ENGINES[0]]["weights"] / GIB
    rest = (free[0] - free[2]) / 2 / GIB
    longest = 3 * (weights + rest)
    x0 = PANEL + LEFT + 8
    scale = (PANEL - 2 * LEFT - 170) / longest
    out = [text(x0, 30, "GPU memory of 1, 2, 3 replicas", "title")]
    out += [bar(x0, 38, 10, "weights").replace(f'height="{BAR}"', 'height="10"'), text(x0 + 15, 48, "weights", "small")]
    out += [bar(x0 + 66, 38, 10, "rest").replace(f'height="{BAR}"', 'height="10"')]
    out += [text(x0 + 81, 48, "each engine's own (here: KV cache of 1 GiB)", "small")]
    out += [text(x0, TOP + number * 58 + 33, str(number + 1), "title") for number in range(3)]
    for shared, name in ((False, "vLLM alone*"), (True, "companion")):
        for count in (1, 2, 3):
            y = TOP + (count - 1) * 58 + (28 if shared else 0)
            copies = 1 if shared else count
            own, sizes = count * rest, copies * weights
            x = x0 + 108
            out.append(text(x - 8, y + 18, name, "small", "end"))
            out += [bar(x, y, sizes * scale, "weights"), bar(x + sizes * scale, y, own * scale, "rest")]
            out.append(text(x + (sizes + own) * scale + 6, y + 18, f"{sizes + own:.1f} GiB"))
    return out


def draw() -> str:
    measured = json.loads(RESULTS.read_text())
    name, driver, _ = measured["gpu"][0]
    source = (
        f"{name}, driver {driver}, Llama-8B bf16, vLLM {measured['vllm']}, eager, warm page cache, {measured['date']}"
    )
    width = 2 * PANEL + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 20}" role="img">',
        "<title>Time to weights, and GPU memory of 1, 2 and 3 replicas, with and without a companion</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1}" height="{HEIGHT + 19}" rx="6"/>',
        *times(measured["results"]),
        *memory(measured["results"]),
        text(LEFT, HEIGHT + 8, f"{source}. * computed: replicas times one engine.", "small"),
        "</svg>\n",
    ]
    return "\n".join(lines)


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(SVG.read_text() != draw())
    SVG.write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())
