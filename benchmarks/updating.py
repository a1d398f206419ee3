"""New weights in three running engines of an 8B model on one GPU: through the companion, and by vLLM's `ipc` backend.

    python -m benchmarks.updating --out DIR [--layers N] [--updates N] [--quantization METHOD]

A trainer in a process of its own has the tensors of a second checkpoint on the GPU. Through the companion it writes
them once, and each engine maps them; by `ipc` each engine copies them. Engines are forks of this process with CUDA
graphs, and have requests in flight while they switch. Engines that quantize are updated through the companion alone,
which has a headless vLLM process the tensors. Writes DIR/updating-<vllm version>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import matrix, sleeping, sleeping_together
from benchmarks.sleeping_together import Remote, Report, lowest_free, settled
from vllm_companion_plugin.settings import resolve

ENGINES = 3
FLAGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.25,
}
IPC = {"weight_transfer_config": {"backend": "ipc"}}


class Rollout(sleeping.Engine):
    """An engine that takes new weights while it has requests."""

    def __init__(self, path: Path, way: str, more: dict[str, Any]) -> None:
        super().__init__(path, way, FLAGS | more)

    def look(self) -> dict[str, Any]:
        return {"tokens": self.tokens(), "start_s": self.found["start_s"]}

    def rpc(self, name: str, *args: Any) -> float:
        """Milliseconds of a call to the worker."""
        self.synchronize()
        started = time.perf_counter()
        answers = self.llm.collective_rpc(name, args=args)
        self.synchronize()
        took = round((time.perf_counter() - started) * 1000, 2)
        if any("error" in (answer or {}) for answer in answers):
            raise RuntimeError(f"{name}: {answers}")
        return took

    def switch(self, generations: dict[str, int] | None = None) -> dict[str, Any]:
        """With eight requests in flight, which end afterwards."""
        engine = self.llm.llm_engine
        for number, prompt in enumerate(self.prompts):
            engine.add_request(f"in-flight-{number}", {"prompt_token_ids": prompt}, self.sampling())
        for _ in range(5):
            engine.step()
        found = {
            "prepare_ms": self.rpc("companion_prepare", generations or {}),
            "switch_ms": self.rpc("companion_switch"),
            "forget_ms": self.rpc("companion_forget"),
            "ended": 0,
        }
        while engine.has_unfinished_requests():
            found["ended"] += sum(output.finished for output in engine.step())
        return found

    def follow(self) -> None:
        self.llm.collective_rpc("companion_update")

    def take(self, update: dict[str, Any]) -> float:
        """A whole update by vLLM's own backend; seconds."""
        started = time.perf_counter()
        self.llm.collective_rpc("start_weight_update")
        self.llm.collective_rpc("update_weights", args=(update,))
        self.llm.collective_rpc("finish_weight_update")
        self.synchronize()
        return round(time.perf_counter() - started, 4)

    def usage(self) -> dict[str, int]:
        return usage()


class Trainer:
    """Has the tensors of a checkpoint on the GPU."""

    def __init__(self, checkpoint: Path, model: Path) -> None:
        import torch
        from safetensors import safe_open

        from vllm_companion_plugin import CompanionClient

        self.model = str(model)
        self.weights: dict[str, Any] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt", device="cuda") as opened:
                self.weights.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        torch.cuda.synchronize()
        self.client = CompanionClient("cuda")
        self.size_bytes = sum(tensor.nbytes for tensor in self.weights.values())

    def look(self) -> dict[str, Any]:
        """How fast this device copies."""
        import torch

        source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        seconds = []
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rate = source.nbytes / min(seconds) / 1e9
        del source, target
        torch.cuda.empty_cache()
        return {"weights_gib": self.size_bytes / 2**30, "copy_gb_s": rate}

    def write(self, version: str) -> dict[str, Any]:
        import torch

        with lowest_free() as seen:
            started = time.perf_counter()
            with self.client.update(self.model, version=version) as new:
                begun = time.perf_counter()
                count = new.load(self.weights)
                torch.cuda.synchronize()
                written = time.perf_counter()
            ended = time.perf_counter()
        return {
            "tensors": count,
            "begin_s": round(begun - started, 4),
            "load_s": round(written - begun, 4),
            "commit_s": round(ended - written, 4),
            "all_s": round(ended - started, 4),
            "load_gb_s": round(self.size_bytes / (written - begun) / 1e9),
            "peak_mib": seen["peak_mib"],
        }

    def handles(self) -> dict[str, Any]:
        """What vLLM's `ipc` backend hands to each engine."""
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(0).uuid)
        return {
            "names": list(self.weights),
            "dtype_names": [str(tensor.dtype).split(".")[-1] for tensor in self.weights.values()],
            "shapes": [list(tensor.shape) for tensor in self.weights.values()],
            "ipc_handles": [{uuid: reduce_tensor(tensor)[1]} for tensor in self.weights.values()],
        }

    def usage(self) -> dict[str, int]:
        return usage()


def usage() -> dict[str, int]:
    """Of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return {"fds": len(os.listdir("/proc/self/fd")), "resident_mib": resident >> 10}


def through_the_companion(
    report: Report, model: Path, other: Path, updates: int, more: dict[str, Any]
) -> dict[str, Any]:
    remotes: list[Remote] = []
    try:
        for number in range(ENGINES):
            remotes.append(Remote(f"engine-{number}", report.out, partial(Rollout, model, "companion", more)))
            if not number:
                before = remotes[0].answer()["tokens"]
        engines = list(remotes)
        same = [each.answer()["tokens"] == before for each in engines[1:]]
        one = settled() - report.empty_mib
        trainer = Remote("trainer", report.out, partial(Trainer, other, model))
        remotes.append(trainer)
        report.add("trainer", **trainer.answer(), engines_equal=same, used_mib=one)
        with_trainer = settled() - report.empty_mib
        for number in range(3):
            written = trainer.do("write", f"step-{number}")
            written["share_of_copy_rate"] = round(written["load_gb_s"] / report.rows["trainer"]["copy_gb_s"], 2)
            switches = [each.do("switch") for each in engines]
            seconds = written["all_s"] + sum(each["prepare_ms"] + each["switch_ms"] for each in switches) / 1000
            report.add(
                f"update {number}",
                written=written,
                switches=switches,
                all_s=round(seconds, 4),
                more_mib=settled() - report.empty_mib - with_trainer,
            )
        after = [each.do("tokens") for each in engines]
        backs = [each.do("switch", {str(model): 3}) for each in engines]  # the generation before
        again = [each.do("switch") for each in engines]
        report.add("back, and there again", back=backs, again=again)
        usages = []
        for number in range(updates):
            trainer.do("write", f"many-{number}")
            for each in engines:
                each.ask("follow")
            for each in engines:
                each.answer()
            if number in (updates // 4, updates - 1):
                usages.append(
                    {
                        "used_mib": settled() - report.empty_mib,
                        "trainer": trainer.do("usage"),
                        "engines": [each.do("usage") for each in engines],
                        "companion": companion_usage(),
                    }
                )
        if updates:
            report.add(f"{updates} updates", early=usages[0], late=usages[-1])
        return {"before": before, "after": after}
    finally:
        for each in remotes:
            each.end()
        sleeping_together.until_empty(report)


def companion_usage() -> dict[str, int]:
    """Of the companion's process, found by its command line."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "vllm_companion_plugin.holder" in command:
                status = (path / "status").read_text().splitlines()
                resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
                return {"fds": len(os.listdir(path / "fd")), "resident_mib": resident >> 10}
        except OSError:
            continue
    return {}


def by_ipc(report: Report, model: Path, other: Path) -> dict[str, Any]:
    remotes: list[Remote] = []
    try:
        for number in range(ENGINES):
            remotes.append(Remote(f"ipc-{number}", report.out, partial(Rollout, model, "auto", IPC)))
        engines = list(remotes)
        before = [each.answer()["tokens"] for each in engines]
        trainer = Remote("ipc-trainer", report.out, partial(Trainer, other, model))
        remotes.append(trainer)
        trainer.answer()
        for each in engines:
            each.do("rpc", "init_weight_transfer_engine", {})
        used = settled() - report.empty_mib
        runs = []
        for _ in range(3):
            started = time.perf_counter()
            update = trainer.do("handles")
            seconds = [each.do("take", update) for each in engines]
            runs.append({"engines_s": seconds, "all_s": round(time.perf_counter() - started, 4)})
        after = [each.do("tokens") for each in engines]
        report.add("ipc", runs=runs, used_mib=used, used_after_mib=settled() - report.empty_mib)
        return {"before": before[0], "after": after}
    finally:
        for each in remotes:
            each.end()
        sleeping_together.until_empty(report)


def fresh(report: Report, path: Path, more: dict[str, Any]) -> Any:
    engine = Remote("fresh", report.out, partial(Rollout, path, "auto", more))
    try:
        return engine.answer()["tokens"]
    finally:
        engine.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--quantization", help="of the engines, as vLLM takes it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="vcs-"))
    os.environ.update(matrix.ENVIRONMENT | {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "2"})
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    matrix.ready(on_gpu=True)
    report = Report(args.out, "updating")
    model, other = (Path(tempfile.gettempdir()) / name for name in ("m8b", "m8b-other"))
    sleeping_together.make(args.out, {model: (args.layers, 0), other: (args.layers, 1)})
    more = {"quantization": args.quantization} if args.quantization else {}
    ours = through_the_companion(report, model, other, args.updates, more)
    theirs = None if more else by_ipc(report, model, other)
    wanted = fresh(report, other, more)
    found = {
        "companion_as_fresh": [tokens == wanted for tokens in ours["after"]],
        "changed": ours["before"] != wanted,
    }
    if theirs is not None:
        found["ipc_as_fresh"] = [tokens == wanted for tokens in theirs["after"]]
        found["before_as_ipc"] = ours["before"] == theirs["before"]
    report.add("tokens", **found)
    print(json.dumps(report.rows["tokens"]))
    matrix.fork(lambda: matrix.look.stop_all(resolve({})), args.out / "stop.log")


if __name__ == "__main__":
    main()
