"""Several engines on one GPU that sleep, wake and are written to, beside engines with `auto`, on a model of 8B.

    python -m benchmarks.sleeping_together --out DIR [--layers N] [--turns N]

Each engine is a fork of this process, which has imported vLLM, with CUDA graphs and sleep mode, and does what it is
told. Memory is what `nvidia-smi` shows of the device, beyond what was in use before the first engine, or the least that
was free as an engine saw it every two milliseconds.
Makes its checkpoints itself. Writes DIR/together-<vllm version>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import gpu_acceptance, matrix, sleeping
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.settings import resolve

ANSWER_S = 200
FLAGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "enable_sleep_mode": True,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.25,
}


class Worker(sleeping.Engine):
    """An engine that does what it is told, one call after the other."""

    def __init__(self, path: Path, way: str, extra: dict[str, Any]) -> None:
        with lowest_free() as seen, until_loaded(seen):
            super().__init__(path, way, FLAGS | ({"model_loader_extra_config": extra} if extra else {}))
        self.loading = seen

    def look(self) -> dict[str, Any]:
        self.before = self.tokens()
        return {"tokens": self.before, "start_s": self.found["start_s"], **self.loading}

    def sleep(self, level: int) -> float:
        return self.seconds(lambda: self.llm.sleep(level))

    def wake(self) -> dict[str, float]:
        """The weights alone, and all the rest."""
        return {
            "weights_s": self.seconds(lambda: self.llm.wake_up(["weights"])),
            "rest_s": self.seconds(lambda: self.llm.wake_up(["kv_cache"])),
        }

    def write(self, checkpoint: str) -> dict[str, Any]:
        """As TRL does it: parameter by parameter, on the living model."""
        import torch
        from safetensors import safe_open

        model, first = self.models()[0], torch.zeros(self.models()[0].model.norm.weight.shape, dtype=torch.bfloat16)
        with lowest_free() as own:  # what it takes to get memory of its own
            model.load_weights([("model.norm.weight", first)])
        with lowest_free() as seen:
            for file in sorted(Path(checkpoint).glob("*.safetensors")):
                with safe_open(file, "pt", device="cuda") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        model.load_weights([(name, opened.get_tensor(name))])
        self.llm.reset_prefix_cache()
        return {"tokens": self.tokens(), "becoming_private_mib": own["peak_mib"], **seen}

    def turn(self) -> bool:
        """Awake, an answer, asleep; whether the answer is that of before."""
        self.llm.wake_up()
        same = self.tokens() == self.before
        self.llm.sleep(1)
        return same

    def seconds(self, do: Callable[[], object]) -> float:
        self.synchronize()
        started = time.perf_counter()
        do()
        self.synchronize()
        return round(time.perf_counter() - started, 4)


@contextlib.contextmanager
def lowest_free() -> Iterator[dict[str, Any]]:
    """While open, a thread notes how little of the device was free."""
    import torch

    free = torch.cuda.mem_get_info()[0]
    found: dict[str, Any] = {"free_before_mib": free >> 20, "lowest_free_mib": free >> 20, "watched": True}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if found["watched"]:
                found["lowest_free_mib"] = min(found["lowest_free_mib"], torch.cuda.mem_get_info()[0] >> 20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found["peak_mib"] = found["free_before_mib"] - found["lowest_free_mib"]


@contextlib.contextmanager
def until_loaded(found: dict[str, Any]) -> Iterator[None]:
    """Of an engine that starts, only the time until its weights are there counts."""
    from vllm.model_executor.model_loader import base_loader

    from vllm_companion_plugin.engine import loader

    owners = [base_loader.BaseModelLoader, loader.CompanionModelLoader]
    inner = [owner.load_model for owner in owners]

    def wrapped(do: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(*args: Any, **kwargs: Any) -> Any:
            made = do(*args, **kwargs)
            found["watched"] = False
            return made

        return load_model

    for owner, do in zip(owners, inner, strict=True):
        owner.load_model = wrapped(do)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for owner, do in zip(owners, inner, strict=True):
            owner.load_model = do  # type: ignore[method-assign]


class Remote:
    """Something in a fork of this process that does what it is told, after `look`."""

    def __init__(self, name: str, out: Path, make: Callable[[], Any]) -> None:
        self.name = name
        self.log = out / f"{name}.log"
        self._here, there = Pipe()
        self.pid = os.fork()
        if not self.pid:
            self._serve(there, make)
        there.close()
        self._asked = "starting"

    def _serve(self, there: Connection, make: Callable[[], Any]) -> None:
        try:
            os.setsid()
            with self.log.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            worker = make()
            there.send(worker.look())
            while True:
                name, args = there.recv()
                there.send(getattr(worker, name)(*args))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(1)

    def ask(self, name: str, *args: Any) -> None:
        self._asked = name
        self._here.send((name, args))

    def answer(self) -> Any:
        """Of what was asked last, or of the start. Raises `RuntimeError`."""
        with contextlib.suppress(EOFError):
            if self._here.poll(ANSWER_S):
                return self._here.recv()
        raise RuntimeError(f"{self.name} does not answer {self._asked}: {matrix.last_line(self.log)}")

    def do(self, name: str, *args: Any) -> Any:
        self.ask(name, *args)
        return self.answer()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def told(self, pattern: str) -> list[str]:
        """What its log says."""
        return re.findall(pattern, self.log.read_text(errors="replace"))


class Report:
    """Lines that are printed when they are known, and kept in OUT/NAME-VERSION.json."""

    def __init__(self, out: Path, name: str) -> None:
        self.out = out
        self.name = name
        self.rows: dict[str, Any] = {}
        self.empty_mib = settled()

    def add(self, name: str, **found: Any) -> None:
        self.rows[name] = found
        print("==", name, json.dumps(found), flush=True)
        version = metadata.version(metadata.packages_distributions()["vllm"][0])
        report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "vllm": version, "rows": self.rows}
        (self.out / f"{self.name}-{version}.json").write_text(json.dumps(report, indent=1))


def settled() -> int:
    """MiB in use, once that does not change any more."""
    before = -1
    while before != (now := gpu_acceptance.used_mib()):
        before = now
        time.sleep(0.7)
    return now


def host_mib(client: CompanionClient) -> int:
    """Of weights in host memory."""
    return sum(entry.size_bytes for entry in client.status().entries if entry.state.value == "parked") >> 20


def pair(report: Report, model: Path, other: Path, way: str) -> dict[str, Any]:
    """Two engines of one model; what the other way's are compared with."""
    client = CompanionClient(gpu_acceptance.smi("gpu", "uuid")[0][0])  # without a context here
    first = Remote(f"{way}-first", report.out, partial(Worker, model, way, {}))
    engines = [first]
    try:
        started = first.answer()
        report.add(f"{way}, start", **{key: value for key, value in started.items() if key != "tokens"})
        engines.append(Remote(f"{way}-second", report.out, partial(Worker, model, way, {})))
        second = engines[1]
        same = second.answer()["tokens"] == started["tokens"]
        report.add(f"{way}, two awake", used_mib=settled() - report.empty_mib, tokens_equal=same)
        for level in (1, 2) if way == "companion" else (1,):
            naps = [{"sleep_s": first.do("sleep", level), **first.do("wake")} for _ in range(3)]
            same = first.do("tokens") == started["tokens"]
            report.add(f"{way}, one sleeps at level {level}, the other is awake", naps=naps, tokens_equal=same)
        for level in (1, 1, 2):
            found: dict[str, Any] = {"sleep_s": [each.do("sleep", level) for each in engines]}
            found["used_mib"] = settled() - report.empty_mib
            if way == "companion":
                found["host_mib"] = host_mib(client)
            found["wake"] = [each.do("wake") for each in engines]
            if way == "companion" or level == 1:
                found["tokens_equal"] = [each.do("tokens") == started["tokens"] for each in engines]
            report.add(f"{way}, both asleep at level {level}{' again' * (found_before(report, way, level))}", **found)
        if way == "auto":
            for each in engines:
                each.do("write", str(model))
        found = {} if way == "auto" else {"awake_after_s": first.told(r"is awake after ([\d.]+) s")}
        written = first.do("write", str(other))
        report.add(
            f"{way}, written to",
            other_engine_equal=second.do("tokens") == started["tokens"],
            used_mib=settled() - report.empty_mib,
            **{key: value for key, value in written.items() if key != "tokens"},
            **found,
            said=first.told(r"load_weights is about to write to .*"),
        )
        return {"before": started["tokens"], "written": written["tokens"]}
    finally:
        for each in engines:
            each.end()
        until_empty(report)


def until_empty(report: Report) -> None:
    """The companion gives back what nobody uses, some seconds later."""
    deadline = time.monotonic() + 20
    while gpu_acceptance.used_mib() > report.empty_mib + 50 and time.monotonic() < deadline:
        time.sleep(0.5)


def found_before(report: Report, way: str, level: int) -> bool:
    return f"{way}, both asleep at level {level}" in report.rows


def staying(report: Report, model: Path) -> None:
    """One engine alone, whose weights stay on the device."""
    engine = Remote("stay", report.out, partial(Worker, model, "companion", {"when_asleep": "stay"}))
    try:
        tokens = engine.answer()["tokens"]
        naps = [{"sleep_s": engine.do("sleep", 1), **engine.do("wake")} for _ in range(5)]
        report.add(
            "companion, when_asleep=stay",
            naps=naps,
            tokens_equal=engine.do("tokens") == tokens,
            awake_after_s=engine.told(r"is awake after ([\d.]+) s"),
        )
    finally:
        engine.end()


def in_turns(report: Report, paths: list[Path], turns: int) -> None:
    """Models that are awake one at a time."""
    engines = []
    try:
        for number, path in enumerate(paths):
            engines.append(Remote(f"turns-{number}", report.out, partial(Worker, path, "companion", {})))
            engines[-1].answer()
            engines[-1].do("sleep", 1)
        used, right, started = [settled()], 0, time.perf_counter()
        for number in range(turns):
            right += engines[number % len(engines)].do("turn")
            if number % 10 == 9:
                used.append(settled())
        report.add("three models in turns", turns=turns, right=right, used_mib=used, s=time.perf_counter() - started)
    finally:
        for each in engines:
            each.end()


def make(out: Path, models: dict[Path, tuple[int, int]]) -> None:
    """Checkpoints of so many layers, from a seed, where there are none yet."""

    def one(path: Path) -> None:
        if not (path / "config.json").exists():
            matrix.fork(lambda: gpu_acceptance.make_model(path, *models[path]), out / "make.log")

    with ThreadPoolExecutor() as executor:
        list(executor.map(one, models))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=["companion", "auto", "stay", "turns"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="vcs-"))
    os.environ.update(matrix.ENVIRONMENT | {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "2"})
    matrix.ready(on_gpu=True)
    report = Report(args.out, "together")
    root = Path(tempfile.gettempdir())
    model, other = root / "m8b", root / "m8b-other"
    paths = [root / f"m4b-{number}" for number in range(3)]
    make(args.out, {model: (args.layers, 0), other: (args.layers, 1)})
    found = {way: pair(report, model, other, way) for way in ("companion", "auto") if way in args.only}
    if len(found) == 2:
        ours, theirs = found["companion"], found["auto"]
        report.add("tokens as auto's", **{name: ours[name] == theirs[name] for name in ours})
    if "stay" in args.only:
        staying(report, model)
    if "turns" in args.only:
        for path in (model, other):  # the disk is small
            shutil.rmtree(path)
        make(args.out, {path: (args.layers // 2, 2 + number) for number, path in enumerate(paths)})
        in_turns(report, paths, args.turns)
    matrix.fork(lambda: matrix.look.stop_all(resolve({})), args.out / "stop.log")


if __name__ == "__main__":
    main()
