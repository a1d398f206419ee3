"""Record the picture of the README, a terminal with two engines on one copy of a real model, on CPU; or draw it again.

python tools/record.py           # run the commands, write docs/pictures/terminal.cast, and draw
python tools/record.py --draw    # draw docs/pictures/terminal.svg from the recording that is there
python tools/record.py --check   # exit with 1 if the picture, or the `status` in the README, is of another recording

The recording (asciicast v2) has what was typed and printed, and when. The drawing shortens waits to `LONGEST_WAIT_S`.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from demo import companion, find_model, left_over, make_environment

ROOT = Path(__file__).resolve().parent.parent
CAST = ROOT / "docs" / "pictures" / "terminal.cast"
SVG = CAST.with_suffix(".svg")
README = ROOT / "README.md"

COLUMNS = 110
LONGEST_WAIT_S = 1.5
STEP_TIMEOUT_S = 300.0
DONE = "a step has ended"
SERVE = "vllm serve ./all-MiniLM-L6-v2 --enforce-eager --load-format companion --port"


class Terminal:
    """A shell whose commands and output are written down."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.events: list[tuple[float, str]] = []
        self._began = time.monotonic()
        self._shell = subprocess.Popen(
            ["bash", "--norc"],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _note(self, text: str) -> None:
        self.events.append((time.monotonic() - self._began, text.replace("\n", "\r\n")))
        print(text, end="", flush=True)

    def type(self, command: str) -> str:
        """Run a command; what it printed."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._note(f"$ {command}\n")
        self._shell.stdin.write(f"{command}\necho {DONE}\n")
        self._shell.stdin.flush()
        lines = []
        while (line := self._shell.stdout.readline()) and line.strip() != DONE:
            self._note(line)
            lines.append(line)
        if not line:
            raise SystemExit(f"the shell ended in: {command}")
        return "".join(lines)

    def say(self, text: str) -> None:
        """A comment, as one types it between commands."""
        self._note(f"# {text}\n")

    def close(self) -> None:
        """End the shell and what it started."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()


def up(port: int) -> str:
    return f"until curl -sf localhost:{port}/health; do sleep 0.1; done"


def logged(what: str, log: str) -> str:
    return f"grep -o '{what} .*' {log}"


def scene(terminal: Terminal, environment: dict[str, str]) -> None:
    terminal.say("Two engines of one model. The first one loads it, the second one attaches.")
    terminal.type(f"{SERVE} 8001 &> one.log &")
    terminal.type(f"{up(8001)}; {logged('Published', 'one.log')}")
    terminal.type(f"{SERVE} 8002 &> two.log &")
    terminal.type(f"{up(8002)}; {logged('Attached', 'two.log')}")
    terminal.type("vllm-companion status")
    (held,) = json.loads(companion("status", "--json", environment=environment))
    first = held["entries"][0]["leases"][0]["pid"]
    terminal.say("Kill the companion, and the engine that had loaded. The other engine goes on, and hands back.")
    terminal.type(f"kill -9 {held['pid']} {first}")
    question = """--json '{"input": "Hello?"}' -so answer.json -w 'HTTP %{http_code}\\n'"""
    terminal.type(f"curl localhost:8002/v1/embeddings {question}")
    terminal.type(f"until {logged('Handed back', 'two.log')}; do sleep 0.1; done")
    terminal.say("Start the first engine again.")
    terminal.type(f"until ! curl -s localhost:8001/health; do sleep 0.1; done; {SERVE} 8001 &> again.log &")
    terminal.type(f"{up(8001)}; {logged('Attached', 'again.log')}")
    terminal.type("vllm-companion status")


def record() -> None:
    place = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))
    environment = make_environment(place / "run") | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "COLUMNS": str(COLUMNS),
        "no_proxy": "localhost,127.0.0.1",
    }
    shutil.copytree(find_model(), place / "all-MiniLM-L6-v2")
    terminal = Terminal(place, environment)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(terminal._shell.pid, signal.SIGKILL))
    signal.alarm(int(4 * STEP_TIMEOUT_S))
    try:
        scene(terminal, environment)
        head = {"version": 2, "width": COLUMNS, "height": 40, "timestamp": int(time.time())}
        lines = [json.dumps(head), *(json.dumps([round(at, 3), "o", text]) for at, text in terminal.events)]
        CAST.write_text("\n".join(lines) + "\n")
    finally:
        terminal.close()
        companion("stop", environment=environment)
        for pid in left_over(place):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


def shown() -> list[tuple[float, str, str]]:
    """The lines of the recording, each with the second at which the drawing shows it, and its class."""
    events = [json.loads(line) for line in CAST.read_text().splitlines()[1:]]
    now, last, lines = 0.0, 0.0, []
    for at, _, text in events:
        now += min(at - last, LONGEST_WAIT_S) + 0.15
        last = at
        wrapped = textwrap.wrap(
            text.rstrip(), COLUMNS, subsequent_indent="    ", replace_whitespace=False, drop_whitespace=False
        )
        kind = {"$": "typed", "#": "said"}.get(text[:1], "output")
        lines += [(now, kind, line) for line in wrapped or [""]]
    return lines


STYLE = """
.back { fill: #f6f8fa; stroke: #d0d7de; }
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }
.output { fill: #24292f; } .typed { fill: #0550ae; } .said { fill: #57606a; }
@media (prefers-color-scheme: dark) {
  .back { fill: #161b22; stroke: #30363d; }
  .output { fill: #e6edf3; } .typed { fill: #79c0ff; } .said { fill: #9da7b1; }
}
@media (prefers-reduced-motion: no-preference) {
  text { animation: appear 0.01s linear both; }
  @keyframes appear { from { opacity: 0; } to { opacity: 1; } }
}
"""


def drawing() -> str:
    """The terminal as text in SVG. Without animation, or printed, it shows all lines."""
    lines = shown()
    width, height = 24 + COLUMNS * 8.1, 24 + 18 * len(lines)
    rows = []
    for number, (at, kind, line) in enumerate(lines):
        place = f'x="12" y="{26 + 18 * number}" style="animation-delay: {at:.2f}s" xml:space="preserve"'
        rows.append(f'<text class="{kind}" {place}>{html.escape(line)}</text>')
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">',
        "<title>Two engines on one copy of a model; engine and companion are killed; a restart</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="6"/>',
        *rows,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def readme() -> str:
    """The README with the first `status` of the recording."""
    texts = [json.loads(line)[2].rstrip() for line in CAST.read_text().splitlines()[1:]]
    first = texts.index("$ vllm-companion status") + 1
    table = itertools.takewhile(lambda text: not text.startswith(("$", "#")), texts[first:])
    block = "```text\n" + "\n".join(table) + "\n```\n"
    return re.sub(r"^```text\n.*?^```\n", lambda _: block, README.read_text(), flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    options = sys.argv[1:]
    if "--check" in options:
        return int(SVG.read_text() != drawing() or README.read_text() != readme())
    if "--draw" not in options:
        record()
    SVG.write_text(drawing())
    README.write_text(readme())
    return 0


if __name__ == "__main__":
    sys.exit(main())
