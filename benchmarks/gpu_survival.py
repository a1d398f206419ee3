"""The companion is killed under load: requests, times, device memory at 10 Hz; then attach and detach in a circle.

    python -m benchmarks.gpu_survival --out DIR [--layers 32] [--kills 5] [--cycles 1000] [--device cpu]

Makes the model itself (Llama-8B with random weights; a tiny one on CPU). Prints one line per check and exits with 1
if one failed; figures go to DIR/survival.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.servers import Load, Server
from tests.support.checkpoints.formats import write_tokenizer
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState, EntryStatus
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import resolve

GIB = 1 << 30
QUESTION = ("/v1/completions", {"prompt": [5, 17, 4, 99, 3], "max_tokens": 16, "temperature": 0})
ATTEMPT_S = 30.0


def make_model(path: Path, layers: int, tiny: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128 if tiny else 4096,
        intermediate_size=256 if tiny else 14336,
        num_hidden_layers=layers,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=512 if tiny else 128256,
        max_position_embeddings=2048,
        dtype="float32" if tiny else "bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    with torch.device("cpu" if tiny else "cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(path, max_shard_size="4GB")
    write_tokenizer(path, config.vocab_size, [])


class Memory:
    """Bytes in use on the device, seen ten times a second while the context is open."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self.samples: list[tuple[float, int]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def now(self) -> int:
        if not self._on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def highest(self, since: float) -> int:
        return max(used for at, used in self.samples if at >= since)

    def _run(self) -> None:
        while not self._ending.wait(0.1):
            self.samples.append((time.monotonic(), self.now()))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(5)


def entry_now(device: str) -> EntryStatus | None:
    with contextlib.suppress(CompanionError), connect(device, resolve(), spawn=False) as connection:
        (entry,) = connection.status().entries or (None,)
        return entry if entry is not None and entry.state is EntryState.READY else None
    return None


def leases_now(device: str) -> int:
    entry = entry_now(device)
    return len(entry.leases) if entry is not None else 0


def companion_pid(device: str) -> int:
    with connect(device, resolve(), spawn=False) as connection:
        return connection.status().pid


def until(condition: Any, within_s: float, what: str) -> None:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise SystemExit(f"not within {within_s} s: {what}")
        time.sleep(0.02)


class Report:
    def __init__(self) -> None:
        self.checks: list[tuple[str, bool, str]] = []
        self.figures: dict[str, Any] = {}

    def check(self, what: str, good: bool, figure: str) -> None:
        self.checks.append((what, bool(good), figure))
        print(f"{'ok  ' if good else 'FAIL'} {what}: {figure}", flush=True)


def survive(report: Report, servers: list[Server], start: Any, memory: Memory, device: str, kills: int) -> None:
    before = entry_now(device)
    assert before is not None
    weights = before.size_bytes
    times_s = []
    with Load(servers, (0.02,)) as load:
        until(lambda: min(load.done) > 3, 60, "requests are answered")
        began, used = time.monotonic(), memory.now()
        for _ in range(kills):
            os.kill(companion_pid(device), signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: leases_now(device) == len(servers), ATTEMPT_S, "all are attached again")
            times_s.append(round(time.monotonic() - killed, 3))
            load.done[:] = [0] * len(servers)
            until(lambda: min(load.done) > 3, 60, "requests are answered")
        grown = memory.highest(began) - used if memory.samples else 0
        report.check("no request fails while the companion is killed", not load.failures, f"{load.failures[:2]}")
        report.check("handed back within 2 s", max(times_s) < 2, f"{times_s} s")
        after = entry_now(device)
        same = after is not None and (after.generation, after.load_s) == (before.generation, before.load_s)
        report.check("the same generation", same, f"{before.generation}, loaded in {before.load_s:.2f} s")
        report.check("no second copy meanwhile", grown < weights / 4, f"{grown / GIB:+.3f} of {weights / GIB:.2f} GiB")
        began, used = time.monotonic(), memory.now()
        third = start()
        until(third.is_up, 300, "a third server is up")
        said = third.log.read_text()
        report.check("a third attaches", "Attached to" in said and "Published" not in said, "from its log")
        cached = float(report.figures["kv_gib"]) * GIB
        grown = memory.highest(began) - used if memory.samples else 0
        limit = cached + weights / 2
        report.check("and brings no copy", grown < limit, f"{grown / GIB:+.3f} GiB, its KV cache {cached / GIB:.1f}")
    report.check("no request failed in all", not load.failures, f"{load.failures[:2]}")
    report.figures |= {"handed_back_s": times_s, "weights_gib": weights / GIB, "samples": len(memory.samples)}


# A client like any other: argv are the device, the model, how often to attach, and after how often to begin to measure.
CYCLES = """
import json, os, sys, time, torch
from tests.process.scale_child import usage
from vllm_companion_plugin import CompanionClient

device, model, cycles, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
client, measured = CompanionClient(device, verify="off"), []
for number in range(1, cycles + 1):
    if number == first + 1:
        began = time.monotonic()
    with client.attach(model, role="target"):
        pass
    if number in (first, cycles):
        seconds = time.monotonic() - began if measured else 0.0
        time.sleep(1)  # what ends in the background has ended
        free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
        measured.append({**usage(os.getpid()), "device_kb": -free >> 10})
print(json.dumps([*measured, seconds / (cycles - first)]))
"""


def cycle(report: Report, device: str, cycles: int) -> None:
    """Attach and detach; what grows between the hundredth and the last is lost."""
    entry = entry_now(device)
    assert entry is not None
    arguments = [device, entry.key.model, str(cycles), str(min(100, cycles // 2))]
    environment = dict(os.environ, MALLOC_ARENA_MAX="2")  # or glibc reserves 64 MiB for a thread now and then
    done = subprocess.run(
        [sys.executable, "-c", CYCLES, *arguments], stdout=subprocess.PIPE, env=environment, text=True, timeout=300
    )
    if done.returncode:
        report.check(f"{cycles} attachments leave nothing", False, f"the client ended with {done.returncode}")
        return
    before, after, seconds = json.loads(done.stdout)
    grown = {name: after[name] - before[name] for name in after}
    flat = grown["fds"] <= 0 and grown["threads"] <= 0 and grown["resident_kb"] < 4096 and grown["device_kb"] < 4096
    report.check(
        f"{cycles} attachments leave nothing", flat and grown["space_kb"] < 65536, f"{grown}, {seconds:.4f} s each"
    )
    report.figures["cycles"] = {"grown": grown, "seconds_each": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=1000, help="at least 2")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    report, servers = Report(), []
    tiny = parsed.device == "cpu"
    device = "cpu" if tiny else CompanionClient().device
    kv_gib = 1 if tiny else 2
    report.figures["kv_gib"] = kv_gib
    flags = ["--load-format", "companion", "--enforce-eager", "--max-model-len", "512"]
    flags += ["--kv-cache-memory-bytes", str(kv_gib * GIB), "--dtype", "float32" if tiny else "bfloat16"]
    flags += [] if tiny else ["--gpu-memory-utilization", "0.25"]
    with tempfile.TemporaryDirectory() as directory, Memory(device) as memory:
        model = Path(directory) / "model"
        make_model(model, parsed.layers, tiny)
        if not tiny:
            torch.cuda.empty_cache()

        def start() -> Server:
            log = parsed.out / f"server-{len(servers)}.log"
            servers.append(Server(model, flags, QUESTION, dict(os.environ), log))
            return servers[-1]

        try:
            for server in [start(), start()]:  # one of them loads
                until(server.is_up, 300, "a server is up")
            survive(report, servers[:2], start, memory, device, parsed.kills)
            cycle(report, device, parsed.cycles)
        finally:
            for server in servers:
                server.stop()
            with contextlib.suppress(CompanionError), connect(device, resolve(), spawn=False) as connection:
                connection.shutdown()
    report.figures["memory_mib"] = [[round(at, 2), used >> 20] for at, used in memory.samples]
    from importlib.metadata import version

    versions = {name: version(name) for name in ("vllm", "torch", "vllm-companion-plugin")}
    written = {
        "gpu": torch.cuda.get_device_name() if not tiny else "none",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.gpu_survival " + " ".join(sys.argv[1:]),
        "versions": versions,
        "checks": report.checks,
        "figures": report.figures,
    }
    (parsed.out / "survival.json").write_text(json.dumps(written) + "\n")
    return int(not all(good for _, good, _ in report.checks))


if __name__ == "__main__":
    sys.exit(main())
