"""Fuzz by hand: `python -m tests.fuzz.run TARGET... [--seconds 120] [--seed 1]`, all targets by default.

With `--atheris` (if it is installed) inputs are found by coverage instead of by chance; one target a process.
Inputs that are findings are kept in --findings, and `--replay FILE` runs one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW_S = 1.0
"""Of processor time, for one input; decoders take microseconds."""
POOL = 200
AT_LEAST = 50
"""Mutations, however busy the machine is."""


def fuzz(name: str, seconds: float, seed: int, on_finding: Callable[[bytes, Exception], None]) -> int:
    """Run the seeds of target `name`, then mutations, the same ones for the same `seed`; how many were run."""
    from tests.fuzz.targets import TARGETS

    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    pool = list(target.seeds())
    fixed, count = len(pool), 0
    deadline = time.monotonic() + seconds
    while count < fixed + AT_LEAST or time.monotonic() < deadline:
        data = pool[count] if count < fixed else target.mutated(rng, rng.choice(pool), rng.choice(pool))
        try:
            took = _took_s(target, data)
            # Python may have collected just then, which takes long where much was imported.
            if took > SLOW_S and (took := min(_took_s(target, data) for _ in range(3))) > SLOW_S:
                raise AssertionError(f"took {took:.1f} s")
        except Exception as error:
            on_finding(data, error)
        count += 1
        # Mutations of mutations, so that accidents come together.
        if rng.randrange(20) == 0 and len(data) < 1 << 16:
            if len(pool) < POOL:
                pool.append(data)
            else:
                pool[rng.randrange(fixed, POOL)] = data
    return count


def _took_s(target: Any, data: bytes) -> float:
    began = time.process_time()
    target.run(data)
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--atheris", action="store_true")
    parsed = parser.parse_args()
    if parsed.atheris:
        return _by_coverage(parsed)
    from tests.fuzz.targets import TARGETS

    if parsed.replay:
        TARGETS[parsed.targets[0]].run(parsed.replay.read_bytes())
        return 0
    found = 0
    for name in parsed.targets or TARGETS:
        kinds: dict[str, int] = {}

        def keep(data: bytes, error: Exception, name: str = name, kinds: dict[str, int] = kinds) -> None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}"
            if kind not in kinds:
                parsed.findings.mkdir(parents=True, exist_ok=True)
                path = parsed.findings / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                path.write_bytes(data)
                print(f"  {kind}: {str(error)[:200]!r} [{path}]", flush=True)
            kinds[kind] = kinds.get(kind, 0) + 1

        faulthandler.dump_traceback_later(parsed.seconds + 60, exit=True)  # of what waits for ever
        count = fuzz(name, parsed.seconds, parsed.seed, keep)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{name}: {count} executions in {parsed.seconds:g} s, {len(kinds)} findings, {peak} MiB", flush=True)
        found += len(kinds)
    return int(found > 0)


def _by_coverage(parsed: argparse.Namespace) -> int:
    import atheris

    with atheris.instrument_imports(include=["vllm_companion_plugin"]):
        from tests.fuzz.targets import TARGETS

    (name,) = parsed.targets
    target = TARGETS[name]
    corpus = parsed.findings / f"{name}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:12]).write_bytes(seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.randrange(4) == 0:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutated(rng, data, rng.choice(list(target.seeds())))[:max_size]

    arguments = [sys.argv[0], f"-max_total_time={parsed.seconds:.0f}", "-max_len=65536", "-timeout=10"]
    arguments += [f"-artifact_prefix={parsed.findings}/{name}-", str(corpus)]
    atheris.Setup(arguments, target.run, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
