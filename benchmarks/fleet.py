"""A fleet of `vllm serve` takes new weights from a trainer of several processes (FSDP2), with requests in flight.

    python -m benchmarks.fleet --out DIR [--layers N] [--updates N]

On a machine with two GPUs: two servers of one 8B model, each split over both GPUs (TP=2), with CUDA graphs, so that
each GPU's companion has one rank's weights for both servers. The trainer runs under torchrun with a process for each
GPU; its model is sharded by `fully_shard`, and is given the tensors of a second checkpoint. It sends them by vLLM's
weight transfer, each process to the companion of its own GPU. A thread for each server posts completions all the time.
Tokens must be those of a server that loads the second checkpoint by itself, one sequence at a time; then the fleet is
rolled back by the command line, and has its first tokens; then it is updated back and forth. Memory is what
`nvidia-smi` shows of each GPU, beyond what was in use before.

Without a GPU the model is tiny, the servers are split over two processes, and memory is not looked at. Makes its
checkpoints itself. Writes DIR/fleet-<vllm version>.json; exits with 1 unless all is as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks import gpu_acceptance, matrix, processed, sleeping, sleeping_together
from benchmarks.servers import Server
from benchmarks.sleeping_together import Report
from tests.support.checkpoints import models
from tests.support.place import until
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.fleet.engines import HttpEngine
from vllm_companion_plugin.settings import resolve

SERVERS = 2
RANKS = 2
"""Processes of the trainer, and of each server."""
START_S = 400.0
ANSWER_S = 150.0
PAUSE_S = 30.0
END_S = 60.0
FLAGS: dict[str, Any] = {
    "tensor_parallel_size": RANKS,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
}
ON_GPU: dict[str, Any] = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.2,
    "compilation_config": sleeping.GRAPHS,
}
ON_CPU: dict[str, Any] = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True}
TRANSFER: dict[str, Any] = {"load_format": "companion", "weight_transfer_config": {"backend": "companion"}}
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
"""GPUs whose links others share must not use NVLink's multicast."""
FLAT_MIB = 256
"""By how much memory may differ between updates."""
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Rollout(Server):
    """A server that takes weights, with the routes of `VLLM_SERVER_DEV_MODE`."""

    def __init__(self, name: str, model: Path, flags: dict[str, Any], out: Path) -> None:
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        super().__init__(model, matrix.flags_of(flags, model), ("", {}), environment, out / f"{name}.log")
        self.name = name
        self.started = time.monotonic()
        self.start_s = 0.0

    def is_up(self) -> bool:
        if not self.start_s and super().is_up():
            self.start_s = round(time.monotonic() - self.started, 1)
        return bool(self.start_s)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else b""
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with _http.open(request, timeout=ANSWER_S) as response:
                answer: dict[str, Any] = json.loads(response.read() or b"{}")
                return answer
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{self.name} answered /{path} by {error}: {error.read()[:500]!r}") from error

    def complete(self, prompt: list[int], count: int) -> list[int]:
        body = {"model": "model", "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        answer = self.post("v1/completions", body | {"return_token_ids": True, "detokenize": False})
        tokens: list[int] = answer["choices"][0]["token_ids"]
        if len(tokens) != count:
            raise RuntimeError(f"{self.name} said {len(tokens)} of {count} tokens")
        return tokens

    def tokens(self) -> list[list[int]]:
        """One sequence after the other, and nothing from the prefix cache."""
        self.post("reset_prefix_cache")
        return [self.complete(prompt, 24) for prompt in prompts(4, seed=3)]

    def version(self) -> str:
        with _http.open(f"{self.url}/weight_info", timeout=20) as response:
            return str(json.load(response)["weight_version"])


def prompts(count: int, seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(10, 500) for _ in range(12 + 5 * each)] for each in range(count)]


class Load:
    """A thread for each server that posts a completion as soon as the one before has ended.

    Attributes:
        spans: of requests that ended well, by server: when they began and ended, by `time.monotonic`.
        errors: what the others ended with.
    """

    def __init__(self, servers: list[Rollout], count: int) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {server.name: [] for server in servers}
        self.errors: list[str] = []
        self._count = count
        self._over, self._may_run = threading.Event(), threading.Event()
        self._may_run.set()
        self._idle = {server.name: threading.Event() for server in servers}
        self._threads = [threading.Thread(target=self._run, args=(server,), daemon=True) for server in servers]

    def _run(self, server: Rollout) -> None:
        idle = self._idle[server.name]
        for number in range(sys.maxsize):
            if not self._may_run.is_set():
                idle.set()
                self._may_run.wait()
                idle.clear()
            if self._over.is_set():
                return
            began = time.monotonic()
            try:
                server.complete(prompts(1, seed=number)[0], self._count)
                self.spans[server.name].append((began, time.monotonic()))
            except Exception as error:
                self.errors.append(f"{server.name}: {type(error).__name__}: {error}"[:500])
                time.sleep(0.2)

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """While open no request is in flight: another batch rounds in another way."""
        self._may_run.clear()
        try:
            for name, idle in self._idle.items():
                if not idle.wait(ANSWER_S):
                    raise RuntimeError(f"the last request to {name} does not end")
            yield
        finally:
            for idle in self._idle.values():
                idle.clear()
            self._may_run.set()

    def in_flight(self, began: float, ended: float) -> dict[str, int]:
        """How many requests to each server were in flight all that time, and ended well afterwards."""
        until(lambda: all(any(end > ended for _, end in each) for each in self.spans.values()), ANSWER_S, "answers")
        return {name: sum(a < began and b > ended for a, b in each) for name, each in self.spans.items()}

    def found(self) -> dict[str, Any]:
        ended = {name: len(spans) for name, spans in self.spans.items()}
        return {"ended_well": ended, "errors": len(self.errors), "first_errors": self.errors[:3]}

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._may_run.set()
        for thread in self._threads:
            thread.join(END_S)


class Memory:
    """MiB in use of each GPU beyond what was when this was made; while open, a thread notes the most."""

    def __init__(self) -> None:
        self._empty = self._now()
        self._most = [0] * len(self._empty)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def _now() -> list[int]:
        return [int(row[0]) for row in gpu_acceptance.smi("gpu", "memory.used")]

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._most = [max(pair) for pair in zip(self._most, self._now(), strict=True)]

    def used(self) -> list[int]:
        """Once it does not change any more, or after some seconds."""
        deadline, before = time.monotonic() + 15, self._now()
        while time.monotonic() < deadline:
            time.sleep(0.7)
            if (now := self._now()) == before:
                break
            before = now
        self._most = list(before)
        return self._beyond(before)

    def most(self) -> list[int]:
        """Since `used` was called last."""
        return self._beyond(self._most)

    def _beyond(self, used: list[int]) -> list[int]:
        return [mib - empty for mib, empty in zip(used, self._empty, strict=True)]

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(END_S)


class Trainers:
    """The trainer's processes under torchrun. What they are told, and what they say, are files of a directory."""

    def __init__(self, model: Path, urls: list[str], out: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="vcf-"))
        self._number = 0
        self._pids: list[int] = []
        self._log = out / "trainer.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "benchmarks.fleet"]
        command += ["--train", str(model), str(self._directory), *urls]
        with self._log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def do(self, name: str, *args: str, within_s: float = ANSWER_S) -> list[dict[str, Any]]:
        """What each process says, by rank. Raises `RuntimeError`."""
        put(self._directory / f"{self._number}.json", [name, *args])
        paths = [self._directory / f"{self._number}-{rank}.json" for rank in range(RANKS)]
        self._number += 1
        deadline = time.monotonic() + within_s
        while not all(path.exists() for path in paths):
            if self._process.poll() is not None:
                raise RuntimeError(f"the trainer ended in {name}: {matrix.last_line(self._log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the trainer does not answer {name}: {matrix.last_line(self._log)}")
            time.sleep(0.005)
        said: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
        if errors := [each["error"] for each in said if "error" in each]:
            raise RuntimeError(f"the trainer could not {name}: {'; '.join(errors)}")
        return said

    def start(self) -> list[dict[str, Any]]:
        said = self.do("look", within_s=START_S)
        self._pids = [each["pid"] for each in said]
        return said

    def end(self) -> None:
        """SIGKILL them; those whose pids are not known die with torchrun."""
        for pid in [*self._pids, self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)


def put(path: Path, value: object) -> None:
    """Whoever sees the file sees all of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


# ---- in the trainer's processes


class Trainer:
    """One process of the trainer: a part of every tensor, on its own GPU."""

    def __init__(self, model: Path, urls: list[str]) -> None:
        import torch
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch = torch
        self.rank = int(os.environ["RANK"])
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=ANSWER_S)
        distributed.init_process_group("nccl" if self.on_gpu else "gloo", timeout=limit)
        mesh = init_device_mesh(self.device.type, (RANKS,))
        torch.set_default_dtype(torch.bfloat16 if self.on_gpu else torch.float32)
        with self.device:
            self.model = LlamaForCausalLM(LlamaConfig.from_pretrained(model))
        torch.set_default_dtype(torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.engines = [HttpEngine(url) for url in urls]
        self.trainer = self._made(model, urls)
        self._tidy()

    def _made(self, model: Path, urls: list[str]) -> Any:
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ModuleSource,
            WeightTransferTrainerFactory,
        )

        from vllm_companion_plugin.engine.vllm.transfer.engines import Engines
        from vllm_companion_plugin.engine.vllm.transfer.trainer import CompanionTrainerInitInfo

        # Each writes to its own GPU's companion. There is one companion of the CPU, to which the first one writes.
        devices = None if self.on_gpu else ["cpu"] * (self.rank == 0)
        return WeightTransferTrainerFactory.trainer_init(
            CompanionTrainerInitInfo(str(model), rank=self.rank, devices=devices),
            client=Engines([HTTPVLLMWeightSyncClient(url, timeout=ANSWER_S) for url in urls]),
            source=ModuleSource(self.model),
        )

    def _tidy(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()

    def look(self) -> dict[str, Any]:
        parts = [parameter.to_local() for parameter in self.model.parameters()]  # type: ignore[operator]
        return {
            "pid": os.getpid(),
            "device": str(parts[0].device),
            "own_bytes": sum(part.nbytes for part in parts),
            "all_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
        }

    def take(self, checkpoint: str) -> dict[str, Any]:
        """Train for a while."""
        from safetensors.torch import load_file
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=False)  # file by file
        names = set()
        for file in sorted(Path(checkpoint).glob("*.safetensors")):
            weights = load_file(file)
            names |= weights.keys()
            set_model_state_dict(self.model, weights, options=options)
        self._tidy()
        wanted = {name for name, _ in self.model.named_parameters()}
        if names != wanted:
            raise RuntimeError(f"{checkpoint} and the model differ: {sorted(names ^ wanted)[:8]}")
        return {}

    def send(self, version: str) -> dict[str, Any]:
        """Write while engines serve, and have them switch while they are paused, with their caches reset."""
        started = time.monotonic()
        self.trainer.write_weights(version)
        written = time.monotonic()
        self._tell(lambda engine: engine.pause(PAUSE_S, clear_caches=True))
        paused = time.monotonic()
        try:
            self.trainer.switch_engines()
            switched = time.monotonic()
        finally:
            self._tell(lambda engine: engine.resume(PAUSE_S))
        ended = time.monotonic()
        self._tidy()
        return {
            "write_s": round(written - started, 4),
            "pause_s": round(paused - written, 4),
            "switch_s": round(switched - paused, 4),
            "all_s": round(ended - started, 4),
            "generations": self.trainer.written,
            "switched": [paused, switched],
        }

    def _tell(self, do: Callable[[HttpEngine], None]) -> None:
        """All engines; the first process does."""
        if self.rank:
            return
        with ThreadPoolExecutor(len(self.engines)) as pool:
            list(pool.map(do, self.engines))


def train(model: Path, directory: Path, urls: list[str]) -> None:
    """Do what is told, until this is killed, or torchrun has died."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent, rank, number, trainer = os.getppid(), os.environ["RANK"], 0, None
    while os.getppid() == parent:
        if not (path := directory / f"{number}.json").exists():
            time.sleep(0.005)
            continue
        name, *args = json.loads(path.read_text())
        try:
            trainer = trainer or Trainer(model, urls)
            said = getattr(trainer, name)(*args)
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"rank {rank}: {type(error).__name__}: {error}"[:2000]}
        put(directory / f"{number}-{rank}.json", said)
        number += 1


# ---- in the process that watches


class Fleet:
    """What is measured, with the servers, the trainer and the load."""

    def __init__(self, report: Report, servers: list[Rollout], model: Path) -> None:
        self.report, self.servers, self.model = report, servers, model
        uuids = [row[0] for row in gpu_acceptance.smi("gpu", "uuid")][:RANKS]
        self.clients = [CompanionClient(device) for device in uuids or ["cpu"]]
        self.failed: list[str] = []

    def check(self, what: str, good: bool) -> bool:
        print("ok  " if good else "FAIL", what, flush=True)
        if not good:
            self.failed.append(what)
        return good

    def all(self, do: Callable[[Rollout], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(do, self.servers))

    def look(self, load: Load, what: str, wanted: Any, version: str) -> dict[str, Any]:
        """Tokens and versions of all servers, and whether they are what they must be."""
        with load.silence():
            tokens = self.all(lambda server: server.tokens())
        versions = self.all(lambda server: server.version())
        return {
            "tokens_equal": self.check(f"{what}: tokens", all(each == wanted for each in tokens)),
            "weight_versions": versions,
            "versions_equal": self.check(f"{what}: versions", set(versions) == {version}),
        }

    def held(self) -> list[dict[str, Any]]:
        """Of each companion: ranks, generations, and bytes."""
        return [
            {
                "ranks": sorted(entry.key.rank for entry in entries),
                "generations": [[each.number for each in entry.generations] for entry in entries],
                "mib": round(sum(entry.size_bytes for entry in entries) / 2**20, 1),
            }
            for entries in (client.status().entries for client in self.clients)
        ]

    def command(self, *arguments: str) -> dict[str, Any]:
        """What the command line says."""
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "vllm_companion_plugin.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
        seconds = round(time.perf_counter() - started, 2)
        if done.returncode:
            raise RuntimeError(f"vllm-companion {arguments[0]}: {done.stdout}{done.stderr}")
        return {"s": seconds, "said": done.stdout.splitlines()}

    def sent(self, trainers: Trainers, load: Load, version: str) -> dict[str, Any]:
        """One update as the first process saw it, which tells the engines, and the requests in flight at the switch."""
        ranks = trainers.do("send", version)
        began, ended = ranks[0].pop("switched")
        written = [each.pop("generations") for each in ranks]
        found = ranks[0] | {"write_s": [each["write_s"] for each in ranks]}
        flying = load.in_flight(began, ended)
        self.check(f"{version}: a request to each server was in flight, and ended", min(flying.values()) > 0)
        self.check(f"{version}: all ranks know what was written", written == written[:1] * RANKS)
        return found | {"generations": written[0], "in_flight": flying}


def measure(fleet: Fleet, trainers: Trainers, memory: Memory, fresh: Rollout, other: Path, updates: int) -> None:
    report, servers, model = fleet.report, fleet.servers, fleet.model
    try:
        until(lambda: min(each.is_up() for each in (*servers, fresh)), START_S, "the servers are up", every_s=0.2)
        wanted = fresh.tokens()
    finally:
        fresh.stop()
    on_gpu = bool(gpu_acceptance.smi("gpu", "uuid"))
    size = 400 if on_gpu else 200
    report.add("trainer", ranks=trainers.start())  # before the servers are busy
    with Load(servers, size) as load:
        with load.silence():
            first, *others = fleet.all(lambda server: server.tokens())
        versions = fleet.all(lambda server: server.version())
        fleet.check("at first: both servers say the same", others == [first] * len(others))
        fleet.check("the second checkpoint says something else", first != wanted)
        serving, held = memory.used(), fleet.held()
        if on_gpu:
            ranks = sorted(each["ranks"] for each in held)
            fleet.check("each GPU's companion has one rank", ranks == [[f"tp{each}/{RANKS}"] for each in range(RANKS)])
        seconds = {each.name: each.start_s for each in (*servers, fresh)}
        report.add("start", start_s=seconds, weight_versions=versions, held=held, used_mib=serving)

        trainers.do("take", str(other))
        before = memory.used()
        sent = fleet.sent(trainers, load, "step-1")
        most = memory.most()
        seen = fleet.look(load, "step-1", wanted, "step-1")
        after = memory.used()
        report.add("update", **sent, **seen, mib={"before": before, "most": most, "after": after}, held=fleet.held())

        back = fleet.command("rollback", str(model))
        engines = [word for server in servers for word in ("--engine", server.url)]
        advanced = fleet.command("advance", str(model), *engines)
        seen = fleet.look(load, "rolled back", first, versions[0])
        report.add("back", rollback=back, advance=advanced, **seen, used_mib=memory.used(), held=fleet.held())

        used, most_used = [], []
        for number in range(updates):
            path, tokens = ((other, wanted), (model, first))[number % 2]
            version = f"many-{number}"
            trainers.do("take", str(path))
            sent = fleet.sent(trainers, load, version)
            most_used.append(memory.most())
            seen = fleet.look(load, version, tokens, version)
            used.append(memory.used())
            report.add(version, **sent, **seen, used_mib=used[-1], most_mib=most_used[-1], held=fleet.held())
        spread = [max(gpu) - min(gpu) for gpu in zip(*[after, *used], strict=True)]
        fleet.check("memory is flat", all(each <= FLAT_MIB for each in spread))
        most_held = max(len(numbers) for companion in fleet.held() for numbers in companion["generations"])
        fleet.check("two generations are held", most_held == 2)
        report.add("memory of all updates", used_mib=used, most_mib=most_used, spread_mib=spread)
    found = load.found()
    fleet.check("no request failed", not found["errors"])
    report.add("requests", **found)


def make(out: Path, layers: int, *, on_gpu: bool) -> Path:
    """The model."""
    model = Path(tempfile.gettempdir()) / (f"m8b-{layers}" if on_gpu else "tiny-fleet")
    if on_gpu:
        sleeping_together.make(out, {model: (layers, 0)})
    elif not (model / "config.json").exists():
        matrix.fork(lambda: models.make("llama", model, tiny=True), out / "make.log")
    return model


def second(out: Path, model: Path) -> Path:
    """Other weights for it."""
    other, part = Path(f"{model}-second"), Path(f"{model}-part")
    if not other.exists():
        matrix.fork(lambda: processed.other_checkpoint(model, part), out / "make.log")
        part.rename(other)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", metavar="ARGUMENT", help="be a process of the trainer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--updates", type=int, default=5)
    args = parser.parse_args()
    if args.train:
        train(Path(args.train[0]), Path(args.train[1]), args.train[2:])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the processes
    args.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="vcf-"))
    os.environ.update(matrix.ENVIRONMENT | NO_MULTICAST)
    os.environ.update({"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "2"})
    on_gpu = bool(gpu_acceptance.smi("gpu", "uuid"))
    matrix.TIMEOUT_S = START_S
    model = make(args.out, args.layers, on_gpu=on_gpu)
    report = Report(args.out, "fleet")
    flags = FLAGS | (ON_GPU if on_gpu else ON_CPU)
    servers: list[Rollout] = []
    trainers: list[Trainers] = []
    failed = ["not finished"]
    try:
        memory = Memory()
        for number in range(SERVERS):
            servers.append(Rollout(f"server-{number}", model, flags | TRANSFER, args.out))
        fleet = Fleet(report, list(servers), model)
        other = second(args.out, model)  # meanwhile, and before there are threads
        servers.append(Rollout("fresh", other, flags, args.out))
        trainers.append(Trainers(model, [each.url for each in fleet.servers], args.out))
        with memory:
            measure(fleet, trainers[0], memory, servers[-1], other, args.updates)
        failed = fleet.failed
    finally:
        for each in (*trainers, *servers):
            with contextlib.suppress(Exception):
                each.end() if isinstance(each, Trainers) else each.stop()
        report.add("failed", checks=failed)
        matrix.fork(lambda: matrix.look.stop_all(resolve({})), args.out / "stop.log")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
