"""Llama-8B on one GPU: equality, cost of packing, cost of attaching, memory. Writes a report.

    python -m benchmarks.gpu_acceptance --out DIR [--only STEP ...]

Makes the model itself (random weights). Prints one line per check and exits with 1 if one
failed; figures go to DIR/acceptance-<vllm version>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from benchmarks import gpu_engine, matrix

ENGINE = Path(__file__).with_name("gpu_engine.py")
GIB = 2**30


def make_model(path: Path, layers: int, seed: int = 0) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(path, max_shard_size="4GB")


class Run:
    """Checks and figures of one vLLM version."""

    def __init__(self, model: Path, out: Path) -> None:
        self.model = model
        self.out = out
        self.results: dict[str, dict] = {}
        self.checks: list[tuple[str, bool, str]] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        log = (self.out / f"{name}.log").open("w")
        return subprocess.Popen(
            [sys.executable, str(ENGINE), str(self.model), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def result(self, name: str, process: subprocess.Popen[str]) -> dict:
        assert process.stdout is not None
        for line in process.stdout:
            with (self.out / f"{name}.log").open("a") as log:
                log.write(line)
            if line.startswith("RESULT "):
                self.results[name] = json.loads(line.removeprefix("RESULT "))
                figures = {k: round(v, 4) for k, v in self.results[name].items() if isinstance(v, float)}
                print(f"{name}: {figures} kv {self.results[name]['kv_tokens']}", flush=True)
                return self.results[name]
        raise SystemExit(f"{name} failed:\n" + (self.out / f"{name}.log").read_text()[-6000:])

    def engine(self, name: str, *arguments: str) -> dict:
        process = self.start(name, *arguments)
        try:
            return self.result(name, process)
        finally:
            process.kill()
            process.wait()

    def forked(self, name: str, *arguments: str) -> dict:
        """As `engine`, in a fork of this process, which has imported vLLM: imports are not what is measured."""
        log = self.out / f"{name}.log"
        matrix.fork(lambda: gpu_engine.main([str(self.model), *arguments]), log)
        line = next(line for line in log.read_text().splitlines() if line.startswith("RESULT "))
        result: dict = json.loads(line.removeprefix("RESULT "))
        self.results[name] = result
        figures = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
        print(f"{name}: {figures} kv {result['kv_tokens']}", flush=True)
        return result

    def check(self, what: str, good: bool, figure: str) -> None:
        self.checks.append((what, bool(good), figure))
        print(f"{'ok  ' if good else 'FAIL'} {what}: {figure}", flush=True)


def companion(command: str) -> None:
    """Unload everything, or stop, on every device that has a companion."""
    from vllm_companion_plugin.client.connection import connect
    from vllm_companion_plugin.errors import CompanionUnavailableError, EntryNotFoundError
    from vllm_companion_plugin.host.runtime_dir import list_devices
    from vllm_companion_plugin.settings import resolve

    settings = resolve()
    for device in list_devices(settings):
        nothing_there = contextlib.suppress(CompanionUnavailableError, EntryNotFoundError)
        with nothing_there, connect(device, settings, spawn=False) as connection:
            if command == "status":
                print(connection.status())
            elif command == "unload":
                connection.unload(force=True)
            else:
                connection.shutdown()


def holders() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"vllm_companion_plugin.holder" in command:
                found.append(int(entry.name))
    return found


def smi(query: str, fields: str) -> list[list[str]]:
    """What `nvidia-smi` answers of the visible GPUs, a row a line; nothing on a machine without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    out = subprocess.run(
        [
            *("nvidia-smi", f"--query-{query}={fields}", "--format=csv,noheader,nounits"),
            *(["--id", visible] if visible else []),
        ],
        text=True,
        capture_output=True,
        timeout=30,
    ).stdout
    return [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]


def used_mib() -> int:
    return int(next((row[0] for row in smi("gpu", "memory.used")), 0))


def compare(run: Run, label: str, *flags: str) -> None:
    """auto, then load and publish, then attach: tokens, KV cache, costs."""
    if label == "graphs":
        # The engine that compiles and those that find the compiled graph may round differently
        # (seen with vLLM 0.26.0 without any plugin), so the reference must be one of the latter.
        cold = run.engine(f"{label}-auto-cold", "--format", "auto", *flags)
    auto = run.engine(f"{label}-auto", "--format", "auto", *flags)
    if label == "graphs":
        same = "the same tokens as" if cold["tokens"] == auto["tokens"] else "other tokens than"
        print(f"note: auto with a cold compile cache gives {same} auto with a warm one", flush=True)
    companion("unload")
    loaded = run.engine(f"{label}-loaded", *flags)
    attached = run.engine(f"{label}-attached", *flags)
    run.check(f"{label}: 64 tokens of 16 prompts, loaded = auto", loaded["tokens"] == auto["tokens"], loaded["tokens"])
    run.check(
        f"{label}: 64 tokens of 16 prompts, attached = auto", attached["tokens"] == auto["tokens"], attached["tokens"]
    )
    run.check(
        f"{label}: the second engine attached", "build_s" in attached and "copy_s" not in attached, "from its figures"
    )
    if "copy_s" not in loaded:
        run.check(f"{label}: the first engine published", False, "it did not")
        return
    extra = loaded["free_before_pack"] - loaded["lowest_free"]
    run.check(f"{label}: extra device memory while packing <= 1 GiB", extra <= GIB, f"{extra / GIB:.3f} GiB")
    run.check(
        f"{label}: packing and publishing <= 50 ms",
        loaded["pack_and_publish_s"] <= 0.050,
        f"{1e3 * loaded['pack_and_publish_s']:.1f} ms for {loaded['weights'] / GIB:.2f} GiB",
    )
    run.check(
        f"{label}: load_model, loaded against auto",
        True,
        f"{loaded['load_model_s']:.3f} s against {auto['load_model_s']:.3f} s",
    )
    outside = attached["load_model_s"] - attached["build_s"]
    run.check(
        f"{label}: attach inside load_model <= 0.30 s",
        attached["load_model_s"] <= 0.30,
        f"{attached['load_model_s']:.3f} s",
    )
    if label == "fp8":  # each layer is replayed through the real quantization kernel
        run.check(f"{label}: of it outside the meta model", True, f"{1e3 * outside:.1f} ms")
    else:
        run.check(f"{label}: of it outside the meta model <= 40 ms", outside <= 0.040, f"{1e3 * outside:.1f} ms")
    for name, other in (("loaded", loaded), ("attached", attached)):
        ratio = other["kv_tokens"] / auto["kv_tokens"]
        run.check(
            f"{label}: KV cache, {name} = auto within 0.5%",
            abs(ratio - 1) <= 0.005,
            f"{other['kv_tokens']} against {auto['kv_tokens']} ({100 * (ratio - 1):+.3f}%)",
        )


def three_engines(run: Run) -> None:
    """Three engines at once on one copy; what the companion itself uses."""
    companion("unload")
    before = used_mib()
    deltas, processes = [], []
    try:
        for number in range(3):
            process = run.start(f"three-{number}", "--eager", "--kv-gib", "1", "--utilization", "0.3", "--stay")
            processes.append(process)
            run.result(f"three-{number}", process)
            deltas.append(used_mib() - before - sum(deltas))
        weights = run.results["three-0"]["weights"] / 2**20
        run.check(
            "three engines: weights once",
            max(deltas[1:]) < deltas[0] - 0.98 * weights,
            f"GPU memory grew by {deltas} MiB; weights are {weights:.0f} MiB",
        )
        run.check(
            "three engines: equal tokens",
            len({r["tokens"] for n, r in run.results.items() if n.startswith("three")}) == 1,
            "",
        )
        pids = holders()
        on_gpu = {int(row[0]) for row in smi("compute-apps", "pid") if row[0].isdigit()}
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        run.check("one companion", len(pids) == 1, str(pids))
        run.check(
            "companion has no GPU memory and no CUDA",
            not on_gpu & set(pids) and "libcuda" not in maps,
            f"compute apps {sorted(on_gpu)}",
        )
        status = Path(f"/proc/{pids[0]}/status").read_text()
        rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
        run.check("companion RSS <= 80 MB", rss <= 80, f"{rss:.1f} MiB")
        companion("status")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    time.sleep(2)
    idle = used_mib()
    run.check(
        "engines killed: memory of the weights stays", abs(idle - before - weights) < 600, f"{idle - before} MiB held"
    )
    companion("stop")
    time.sleep(2)
    run.check(
        "companion stopped: memory is free", used_mib() - before < 100, f"{used_mib() - before} MiB more than before"
    )


COSTS = ("model_loading_s", "load_model_s", "again_load_model_s", "built_s", "bound_s", "engine_start_s")


@contextlib.contextmanager
def preloaded(run: Run, model: Path) -> Iterator[list[str]]:
    """vLLM's own daemon holds `model` while open: the flags of an engine that maps from it."""
    with tempfile.TemporaryDirectory(prefix="ipc") as place, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "preload",
            "--model",
            str(model),
            "--weight-cache-socket-dir",
            place,
        ]
        command += ["--weight-cache-health-port", str(port), "--max-model-len", "2048", "--enforce-eager"]
        with (run.out / f"preload-{model.name}.log").open("w") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 300
            while True:
                with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                if daemon.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("vllm preload did not get ready: " + log.name)
                time.sleep(0.2)
            yield ["--format", "ipc_cache", "--extra", json.dumps({"socket_dir": place})]
        finally:
            daemon.terminate()
            daemon.wait(60)


def costs(run: Run, model: Path, turns: int, formats: tuple[str, ...] = ("auto", "companion", "ipc_cache")) -> None:
    """What a start costs with weights that somebody holds, in turns: vLLM's loader, the companion, vLLM's own cache."""
    run.model, whole = model, run.model
    label = f"costs-{model.name}"
    matrix.fork(lambda: companion("unload"), run.out / "unload.log")  # gRPC's threads must not be here before a fork
    try:
        with contextlib.ExitStack() as undo:
            ways = {way: ["--format", way] for way in formats}
            eager = ["--eager", "--utilization", "0.3", "--tokens", "2"]
            run.forked(f"{label}-publish", *ways["companion"], *eager)
            try:
                ways["ipc_cache"] = undo.enter_context(preloaded(run, model))
            except (RuntimeError, OSError) as error:  # this vLLM has none
                print(f"note: no ipc_cache: {error}", flush=True)
                del ways["ipc_cache"]
            for turn in range(turns):
                for way, flags in ways.items():
                    again = ["--again"] if way != "auto" and turn == 0 else []
                    run.forked(f"{label}-{way}-{turn}", *flags, *eager, *again)
        for way in ways:
            each = [run.results[f"{label}-{way}-{turn}"] for turn in range(turns)]
            taken = {name: [round(one[name], 3) for one in each if name in one] for name in COSTS}
            run.check(f"{label}: {way}", True, ", ".join(f"{name} {values}" for name, values in taken.items()))
    finally:
        run.model = whole


def tight(run: Run) -> None:
    """The weights are 85% of what is free: the rest of the GPU is taken by somebody else."""
    companion("unload")
    weights = run.results["eager-loaded"]["weights"]
    ballast = subprocess.Popen(
        [sys.executable, "-c", BALLAST, str(int(weights / 0.85))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert ballast.stdout is not None
        free, total = map(int, ballast.stdout.readline().split())
        flags = ["--eager", "--kv-gib", "0.3", "--batch", "512", "--utilization", f"{0.95 * free / total:.4f}"]
        auto = run.engine("tight-auto", "--format", "auto", *flags)
        loaded = run.engine("tight-loaded", *flags)
        attached = run.engine("tight-attached", *flags)
    finally:
        ballast.kill()
        ballast.wait()
    published = "copy_s" in loaded and "build_s" in attached and "copy_s" not in attached
    run.check(
        "tight: a model of 85% of the free memory is published and attached",
        published,
        f"{weights / GIB:.2f} of {free / GIB:.2f} GiB free before the engine",
    )
    run.check(
        "tight: tokens, loaded = attached = auto",
        loaded["tokens"] == attached["tokens"] == auto["tokens"],
        loaded["tokens"],
    )


def shares(run: Run) -> None:
    """Engines whose shares add up to the GPU: all start, each with the KV cache that it has alone."""
    companion("unload")
    auto = run.engine("shares-auto", "--format", "auto", "--eager", "--utilization", "0.33")
    running: dict[str, subprocess.Popen[str]] = {}

    def begin(name: str, utilization: float) -> None:
        running[name] = run.start(f"shares-{name}", "--eager", "--utilization", str(utilization), "--stay")

    def end(*names: str) -> None:
        for name in names:
            process = running.pop(name)
            process.kill()
            process.wait()
        time.sleep(1)

    def compare_cache(what: str, name: str) -> None:
        result = run.result(f"shares-{name}", running[name])
        ratio = result["kv_tokens"] / auto["kv_tokens"]
        good = abs(ratio - 1) <= 0.005 and result["tokens"] == auto["tokens"]
        run.check(f"shares: {what}: KV cache within 0.5%, equal tokens", good, f"{100 * (ratio - 1):+.3f}%")

    try:
        for name, what in (("a", "one of 0.33 loads"), ("b", "a second attaches"), ("c", "a third attaches")):
            begin(name, 0.33)
            compare_cache(what, name)
        end("a")
        begin("d", 0.33)
        compare_cache("the loader is killed, another takes its share", "d")
        end("b", "c", "d")
        begin("e", 0.95)
        alone = run.result("shares-e", running["e"])
        run.check(
            "shares: one of 0.95 while the weights are held", "copy_s" not in alone, f"{alone['kv_tokens']} tokens"
        )
        end("e")
        companion("unload")
        for name in "fgh":
            begin(name, 0.3)
        for name in "fgh":
            found = run.result(f"shares-{name}", running[name])
            print(f"note: one of three started at once: {found['kv_tokens']} tokens", flush=True)
    finally:
        end(*running)


# Takes all of the GPU but argv[1] bytes; prints what is free then, and the total.
BALLAST = """
import sys, torch
free, total = torch.cuda.mem_get_info()
taken = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], total, flush=True)
sys.stdin.read()
"""


STEPS = ["eager", "tight", "graphs", "three", "shares", "fp8", "costs", "costs-many"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "llama-8b-random")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=STEPS, choices=STEPS)
    parser.add_argument("--turns", type=int, default=3, help="of each way, of `costs` and `costs-many`")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("COMPANION_RUNTIME_DIR", tempfile.mkdtemp(prefix="vc-"))
    if not (args.model / "config.json").exists():
        started = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gpu_acceptance as g; "
                f"from pathlib import Path; g.make_model(Path({str(args.model)!r}), {args.layers})",
            ],
            check=True,
        )
        print(f"model made in {time.perf_counter() - started:.0f} s", flush=True)
    run = Run(args.model, args.out)
    if {"costs", "costs-many"} & set(args.only):
        matrix.ready(on_gpu=True, freeze=False)
    try:
        if "eager" in args.only:
            compare(run, "eager", "--eager")
        if "costs" in args.only:
            costs(run, args.model, args.turns)
        if "costs-many" in args.only:
            from benchmarks.attach_cost import write_model

            many = args.model.with_name("many-layers")
            if not many.exists():
                write_model(many, 1250)
            costs(run, many, args.turns, ("companion", "ipc_cache"))
        if "tight" in args.only:
            tight(run)
        if "graphs" in args.only:
            compare(run, "graphs")
        if "three" in args.only:
            three_engines(run)
        if "shares" in args.only:
            shares(run)
        if "fp8" in args.only:
            compare(run, "fp8", "--eager", "--quantization", "fp8")
    finally:
        companion("stop")
        version = next(iter(run.results.values()), {}).get("vllm", "none")
        report = {
            "vllm": version,
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            "gpu": smi("gpu", "name,driver_version,memory.total"),
            "checks": run.checks,
            "results": run.results,
        }
        (args.out / f"acceptance-{version}.json").write_text(json.dumps(report, indent=1))
    failed = [what for what, good, _ in run.checks if not good]
    print(f"{len(run.checks) - len(failed)} passed, {len(failed)} failed", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
