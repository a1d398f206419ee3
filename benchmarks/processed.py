"""Processed updates on a GPU: a trainer's bf16 weights become what a quantized engine would have loaded.

    python -m benchmarks.processed --out DIR [--only CASE ...] [--big PATH] [--updates N]

For each case: an engine loads a second checkpoint of the model by itself, and says its tokens and the fingerprint of
every live tensor. Another engine, with CUDA graphs, loads the first checkpoint through a companion; a trainer, a
process of its own, updates the entry with the tensors of the second one; the engine advances. Tokens and fingerprints
must be those of the first engine. Seconds and the peak of the device's memory are told for each update (`more_mib`:
beside what was used before it): the first one starts vLLM's headless process, the others find it warm. With --big, a
model of 8B is made at PATH and takes part with `quantization="fp8"`. Writes DIR/processed-<vllm version>.json; exits
with 1 unless all is equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import gpu_acceptance, matrix, sleeping
from tests.support.checkpoints import models
from vllm_companion_plugin.settings import resolve

FP8 = {"quantization": "fp8"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("llama", FP8),
    "fp8-per-tensor": ("llama", {"quantization": "fp8_per_tensor"}),
    "fp8-block": ("fp8-block", {}),
    "bf16": ("llama", {}),
    "moe-fp8": ("qwen3-moe", FP8),
    "moe-fp8-block": ("qwen3-moe-fp8-block", {}),
    "hybrid": ("hybrid", {}),
    "deepseek-v3": ("deepseek-v3", {}),
    "gpt-oss": ("gpt-oss", {}),
    "gpt-oss-mxfp4": ("gpt-oss-mxfp4", {}),
    "big": ("llama", FP8),
}
"""By name: the checkpoint, and the flags of both engines."""
POLL_S = 0.01


def other_checkpoint(path: Path, target: Path) -> None:
    """Other weights for the same model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    random = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(1)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt", device=str(random.device)) as opened:
            tensors = {name: other(opened.get_tensor(name), random) for name in opened.keys()}  # noqa: SIM118
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, target / file.name, {"format": "pt"})


def other(tensor: Any, random: Any) -> Any:
    import torch

    if tensor.element_size() == 1:  # quantized values: others of the same size
        return tensor.view(torch.uint8).flip(0).contiguous().view(tensor.dtype)
    if not tensor.is_floating_point():
        return tensor
    noise = torch.rand(tensor.shape, generator=random, device=tensor.device)
    return (tensor * (0.75 + 0.5 * noise)).to(tensor.dtype)


def fresh(path: Path, flags: dict[str, Any], out: Path) -> None:
    """What an engine has that loads `path` by itself."""
    engine = sleeping.Engine(path, "auto", flags)
    out.write_text(json.dumps({"tokens": engine.tokens(), "tensors": engine.fingerprints(), **start_of(engine)}))


def start_of(engine: sleeping.Engine) -> dict[str, Any]:
    return {"start_s": engine.found["start_s"], "used_mib": engine.used_mib()}


class Peak:
    """The most memory of the device that was used while this was open, in MiB; whoever used it."""

    def __init__(self, engine: sleeping.Engine) -> None:
        self._engine = engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mib = 0

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            self.mib = max(self.mib, self._engine.used_mib())

    def take(self) -> int:
        """The peak since the last call."""
        found, self.mib = self.mib, 0
        return found

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def updated(path: Path, second: Path, flags: dict[str, Any], updates: int, wanted: Path, out: Path) -> None:
    """An engine of a companion, and what it has after each update."""
    engine = sleeping.Engine(path, "companion", flags)
    want = json.loads(wanted.read_text())
    before = engine.tokens()
    found: dict[str, Any] = {**start_of(engine), "other_than_before": before != want["tokens"], "updates": []}
    command = [sys.executable, "-m", "benchmarks.processed", "--train", str(path), str(second)]
    with Peak(engine) as peak:
        trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        trainer.stdout.readline()  # it has its weights on the device
        used = engine.used_mib()
        found["with_trainer_mib"] = used
        for number in range(updates):
            trainer.stdin.write(f"step-{number}\n")
            trainer.stdin.flush()
            one = json.loads(trainer.stdout.readline() or '{"error": "the trainer ended; see the log"}')
            one["peak_mib"] = peak.take()
            one["more_mib"] = one["peak_mib"] - used
            found["updates"].append(one)
            if "error" in one:
                break
            started = time.perf_counter()
            one["advanced"] = engine.llm.collective_rpc("companion_update")
            engine.synchronize()
            one["advance_s"] = time.perf_counter() - started
            one["tokens_equal"] = engine.tokens() == want["tokens"]
            now = engine.fingerprints()
            differ = sorted(
                key for key in now.keys() | want["tensors"].keys() if now.get(key) != want["tensors"].get(key)
            )
            one["tensors"] = len(now)
            one["tensors_differ"] = [len(differ), differ[:8]]
            one["used_mib"] = used = engine.used_mib()
            print("UPDATE", json.dumps(one), flush=True)
            peak.take()
        trainer.stdin.close()
        trainer.wait(60)
    out.write_text(json.dumps(found))


def train(path: Path, second: Path) -> None:
    """A trainer: for each line, a version, one update with the tensors of `second`, which it has on the device."""
    import torch
    from safetensors import safe_open

    from vllm_companion_plugin import CompanionClient, CompanionError

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensors() -> Iterator[tuple[str, Any]]:
        for file in sorted(second.glob("*.safetensors")):
            with safe_open(file, "pt", device=device) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name)

    weights = dict(tensors())
    client = CompanionClient(device)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        said: dict[str, Any] = {"weights_mib": sum(tensor.nbytes for tensor in weights.values()) >> 20}
        try:
            with client.update(str(path), line.strip(), mode="processed") as new:
                said["begin_s"] = time.perf_counter() - started
                new.load({name: weights[name] for name in new.checkpoint_names})
                said["load_s"] = time.perf_counter() - started - said["begin_s"]
            said["all_s"] = time.perf_counter() - started
            said["commit_s"] = said["all_s"] - said["begin_s"] - said["load_s"]
            (entry,) = client.status().entries
            said["arena_mib"] = entry.size_bytes >> 20
        except (CompanionError, KeyError) as error:
            said["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(said), flush=True)
    client.close()


def case(name: str, path: Path, flags: dict[str, Any], updates: int, out: Path, tiny: bool) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="vcp-"))
    environment = {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "60"}
    found: dict[str, Any] = {"case": name}
    second = Path(f"{path}-second")
    try:
        if not (path / "config.json").exists():
            if name == "big":
                matrix.fork(lambda: gpu_acceptance.make_model(path, 32), out / f"{name}-make.log")
            else:
                matrix.fork(lambda: models.make(CASES[name][0], path, tiny=tiny), out / f"{name}-make.log")
        matrix.fork(lambda: other_checkpoint(path, second), out / f"{name}-make.log")
        wanted, ours = directory / "fresh.json", directory / "updated.json"
        matrix.fork(lambda: fresh(second, flags, wanted), out / f"{name}-fresh.log")
        work = partial(updated, path, second, flags, updates, wanted, ours)
        matrix.fork(work, out / f"{name}-updated.log", environment)
        fresh_one = json.loads(wanted.read_text())
        found["fresh"] = {key: fresh_one[key] for key in ("start_s", "used_mib")}
        found["updated"] = json.loads(ours.read_text())
    except matrix.Ended as error:
        found["error"] = str(error)
    matrix.fork(lambda: matrix.look.stop_all(resolve({"runtime_dir": str(directory / "r")})), out / f"{name}-stop.log")
    shutil.rmtree(second, ignore_errors=True)
    return found


def is_equal(row: dict[str, Any], *, tensors: bool) -> bool:
    updates = row.get("updated", {}).get("updates", [{}])
    return bool(updates) and all(
        each.get("tokens_equal") and (not tensors or each["tensors_differ"][0] == 0) for each in updates
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", nargs=2, type=Path, metavar=("MODEL", "SECOND"), help="be the trainer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[name for name in CASES if name != "big"])
    parser.add_argument("--big", type=Path, help="where the model of 8B is, or is made")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, on a CPU")
    args = parser.parse_args()
    if args.train:
        train(*args.train)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(matrix.ENVIRONMENT)
    matrix.TIMEOUT_S = 900.0
    matrix.ready(on_gpu=not args.tiny)
    common: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 128 if args.tiny else 512}
    common |= {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << (26 if args.tiny else 30)}
    common |= {"dtype": "float32"} if args.tiny else {}
    root = Path(tempfile.gettempdir()) / "matrix-models"
    rows = []
    for name in [*args.only, *(["big"] if args.big else [])]:
        path = args.big if name == "big" else root / CASES[name][0]
        flags = common | {"gpu_memory_utilization": 0.4 if name == "big" else 0.2} | CASES[name][1]
        rows.append(case(name, path, flags, args.updates, args.out, args.tiny))
        rows[-1]["equal"] = is_equal(rows[-1], tensors=not args.tiny)
        print(f"== {name}", json.dumps(rows[-1], indent=1), sep="\n", flush=True)
    version = metadata.version(metadata.packages_distributions()["vllm"][0])
    report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "vllm": version, "rows": rows}
    (args.out / f"processed-{version}.json").write_text(json.dumps(report, indent=1))
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
