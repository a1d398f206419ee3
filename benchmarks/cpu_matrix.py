"""Every tiny case of benchmarks/models.py, on CPU: is it shared, is it equal, and is what is shared never written?

    python -m benchmarks.cpu_matrix --out DIR [--only CASE ...]

Four engines a case, each in a fork of this process, which has imported vLLM once: one loads normally, one loads and
publishes, one attaches, and one attaches and packs its weights as a normal load does. Each is asked as
`vllm-companion verify` asks (pictures, long prompts, adapters, several requests at once), with the arena mapped
read-only: who writes to it dies, and the row says so. Then everything that their models lead to is compared. Writes
DIR/cpu-<vllm version>.json and .md; exits with 1 unless every row is equal.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.gpu_matrix import flags_of, table
from vllm_companion_plugin.cli import look
from vllm_companion_plugin.cli import verify as judging
from vllm_companion_plugin.settings import resolve

COMMON: dict[str, object] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # a long prompt is read in pieces
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
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


class Ended(Exception):
    """A fork ended otherwise than by returning."""


def fork(work: Callable[[], object], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run `work` in a fork of this process, with its output in `log`.

    Raises:
        Ended: it raised, was killed by a signal, or took too long; with its last line.
    """
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
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "failed"


def row_of(name: str, root: Path, out: Path) -> dict[str, Any]:
    """The verdict on one case, as a row of the table."""
    case = models.CASES[name]
    path = root / name
    log = out / f"{name}.log"
    log.unlink(missing_ok=True)
    row: dict[str, Any] = {"case": name, "flags": " ".join(flags_of(case.flags | case.cpu_flags, path))}
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="vcm-"))
    settings = resolve({"runtime_dir": str(directory / "r")})
    environment = {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "60"} | case.environment
    reports: dict[str, dict[str, Any]] = {}
    try:
        fork(lambda: models.make(name, path, tiny=True), log)
        for engine in ENGINES:
            fork(partial(start, case, path, engine, directory / engine), log, environment)
            reports[engine] = json.loads((directory / engine).read_text())
    except Ended as error:
        what = next(words for engine, words in ENGINES.items() if engine not in reports)
        verdict = "dies" if reports else "vLLM refuses"
        return row | {"verdict": verdict, "reason": f"the engine that {what}: {error}", "differences": []}
    finally:
        fork(lambda: look.stop_all(settings), out / "stop.log")
        shutil.rmtree(directory, ignore_errors=True)
    judged = judge(name, reports)
    found = [line for rank in judged.ranks for line in rank.byte_differences + rank.attribute_differences]
    rank = judged.ranks[0]
    return row | {
        "verdict": judged.to_json()["verdict"],
        "seconds": round(time.monotonic() - started, 1),
        "ranks": 1,
        "GiB": round(rank.size_bytes / 2**30, 4),
        "tensors": rank.tensors,
        "attach_s": round(rank.seconds, 3),
        "ways": rank.ways,
        "draft": ", ".join(r.attached for r in judged.ranks[1:]),
        "answers": judged.answers,
        "differences": found,
        "reason": "; ".join(dict.fromkeys(text for rank in judged.ranks for text in rank.reasons)),
    }


def start(case: models.Case, path: Path, engine: str, out: Path) -> None:
    """One engine of a case, in this process."""
    from vllm_companion_plugin.engine import verify

    sys.path[:0] = case.environment.get("PYTHONPATH", "").split(":")
    torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
    options = COMMON | case.flags | case.cpu_flags
    if engine == "published":
        options |= case.publisher_flags
    if engine == "packed":
        extra = dict(options.get("model_loader_extra_config", {}))  # type: ignore[call-overload]
        options["model_loader_extra_config"] = extra | {"cpu_prepack": True}
    adapter = Path(f"{path}-adapter")
    asked = ["--adapter", str(adapter)] if adapter.exists() else []
    role = "reference" if engine == "reference" else "companion"
    verify.main([role, str(out), *asked, str(path), *flags_of(options, path)])


def judge(name: str, reports: dict[str, dict[str, Any]]) -> judging.Verdict:
    """As `verify` does; and who packs its weights as vLLM does must have what a normal engine has, whatever it did."""
    engines = (reports[engine] for engine in ("reference", "published", "attached"))
    verdict = judging.judge(name, [], *engines, seconds=0.0, alike=not models.CASES[name].publisher_flags)
    pairs = zip(reports["reference"]["workers"], reports["packed"]["workers"], strict=True)
    for number, (normal, packed) in enumerate(pairs):
        for role, rank in zip(("target", "draft"), verdict.ranks[number:], strict=False):
            one, other = (worker if role == "target" else worker[role] for worker in (normal, packed))
            for difference in judging.differences(one.get("running", one), other):
                found = rank.byte_differences if difference.of_bytes else rank.attribute_differences
                found.append(f"packed: {difference}")
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "cpu-matrix-models")
    parser.add_argument("--only", nargs="*", choices=sorted(models.CASES), metavar="CASE", help="these cases")
    parser.add_argument("--stdin", action="store_true", help="cases by name, a line each, as they come")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    ready()
    rows: list[dict[str, Any]] = []
    version = metadata.version(metadata.packages_distributions()["vllm"][0])
    every = [name for name, case in models.CASES.items() if case.on_cpu or case.only_cpu]
    for name in map(str.strip, sys.stdin) if args.stdin else args.only or every:
        row = row_of(name, args.models, args.out)
        rows.append(row)
        print(json.dumps(row), flush=True)
        report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "rows": rows}
        (args.out / f"cpu-{version}.json").write_text(json.dumps(report, indent=1))
        (args.out / f"cpu-{version}.md").write_text(table(rows))
    gc.unfreeze()  # or what ends with the process is told as leaks
    print(json.dumps(Counter(row["verdict"] for row in rows)))
    raise SystemExit(any(row["verdict"] not in ("equal", "vLLM refuses") for row in rows))


def ready() -> None:
    """Import what every engine imports, once; no thread may start before a fork."""
    import vllm.entrypoints.llm
    import vllm.model_executor.model_loader
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from vllm_companion_plugin.engine import verify  # noqa: F401

    gc.collect()
    gc.freeze()  # vLLM collects eight times in each engine


if __name__ == "__main__":
    main()
