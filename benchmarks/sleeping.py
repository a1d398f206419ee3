"""Engines that sleep, wake, reload and are written to, on a GPU: with weights of a companion, and with `auto`.

    python -m benchmarks.sleeping --out DIR [--only CASE ...] [--jobs N] [--big PATH] [--no-sleep-mode]

Each engine is a fork of this process, which has imported vLLM, with CUDA graphs. It goes through the same steps in
either way; tokens and the fingerprint of every live tensor are compared with those before, and between the two. With
--big, a model of 8B is made there and run alone, for seconds and memory. Writes DIR/sleeping-<vllm version>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import gpu_acceptance, matrix
from tests.support.checkpoints import models
from vllm_companion_plugin.settings import resolve

CASES = ("llama", "qwen3-moe-fp8-block", "fp8-kv-checkpoint", "deepseek-v3", "llama-eagle", "llama-lora", "qwen3-vl")
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
WAYS = ("auto", "companion")
CYCLES = 20
STEPS = 100
"""More than requests that go on after waking need."""


def models_of(worker: Any) -> list[Any]:
    """A worker's target, and its draft."""
    runner = worker.model_runner
    found = [runner.get_model()]
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    if (draft := getattr(drafter, "model", None)) is not None:
        found.append(draft)
    return found


def fingerprints(worker: Any) -> dict[str, str]:
    """In a worker: of every tensor that its models lead to."""
    import torch

    from vllm_companion_plugin.tree.capture import capture
    from vllm_companion_plugin.tree.live import plain_tensors

    found = {}
    with plain_tensors(), torch.inference_mode():
        for number, model in enumerate(models_of(worker)):
            for module in capture(model).modules:
                for slot in module.slots:
                    tensor = slot.tensor
                    if tensor.is_meta or not tensor.numel() or "kv_cache" in slot.name or "lora" in slot.name:
                        continue
                    data = tensor.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
                    weights = torch.arange(1, data.numel() + 1, device=data.device) % 65521
                    found[f"{number}.{module.path}.{slot.name}"] = str(int((data * weights).sum()))
                    del data, weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def sleeps_among_others() -> None:
    """vLLM takes an engine for awake if other processes have taken memory while it fell asleep; it sleeps."""
    from vllm.v1.worker.gpu_worker import Worker

    inner = Worker.sleep

    def sleep(self: Any, level: int = 1) -> None:
        try:
            inner(self, level)
        except AssertionError as error:
            if "Memory usage increased" not in str(error):
                raise

    Worker.sleep = sleep  # type: ignore[method-assign]


class Engine:
    """An engine in this process, and what is known of it."""

    def __init__(self, path: Path, way: str, flags: dict[str, Any]) -> None:
        import torch
        from vllm import LLM

        self.torch = torch
        self.path = path
        self.way = way
        self.found: dict[str, Any] = {"steps": {}, "tokens": {}}
        started = time.perf_counter()
        self.on_gpu = torch.cuda.is_available()
        flags = flags | ({"compilation_config": GRAPHS} if self.on_gpu else {"enforce_eager": True})
        self.ranks = flags.get("tensor_parallel_size", 1)
        if way == "auto" and self.on_gpu:
            sleeps_among_others()
        self.llm = LLM(str(path), load_format=way, **flags)
        self.found["start_s"] = time.perf_counter() - started
        generator = torch.Generator().manual_seed(3)
        vocabulary = min(self.llm.llm_engine.vllm_config.model_config.get_vocab_size(), 30000)
        self.prompts = [torch.randint(10, vocabulary, (12 + 5 * i,), generator=generator).tolist() for i in range(8)]
        self.lora = None
        if Path(f"{path}-adapter").exists():
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("adapter", 1, f"{path}-adapter")

    # ---- what is looked at

    def sampling(self, count: int = 24) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=count, temperature=0, detokenize=False, ignore_eos=True)

    def tokens(self) -> list[list[int]]:
        """Of one request after the other: batches differ from run to run."""
        found = []
        for prompt in self.prompts[:4]:
            self.llm.reset_prefix_cache()
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt}], self.sampling(), lora_request=self.lora, use_tqdm=False
            )
            found.append(list(outputs[0].outputs[0].token_ids))
        return found

    def models(self) -> list[Any]:
        """Of a worker in this process."""
        return models_of(self.llm.llm_engine.model_executor.driver_worker.worker)

    def fingerprints(self) -> dict[str, str]:
        """Of every tensor that the models of all ranks lead to."""
        found = {}
        for rank, marks in enumerate(self.llm.collective_rpc(fingerprints)):
            found.update({f"{rank}.{name}": mark for name, mark in marks.items()})
        return found

    def used_mib(self) -> int:
        if not self.on_gpu:
            return 0
        free, total = self.torch.cuda.mem_get_info()
        return (total - free) >> 20

    def synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    # ---- what is done

    def step(self, name: str, do: Callable[[], None]) -> None:
        """Do something, and see what the engine says then."""
        entry: dict[str, Any] = {}
        try:
            do()
            tokens = self.tokens()
            self.found["tokens"][name] = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
            entry["tokens"] = "other" if tokens != self.before else "equal"
            now = self.fingerprints()
            differ = [key for key, value in self.marks.items() if now.get(key) != value]
            entry["tensors"] = "equal" if not differ else f"{len(differ)} differ: {differ[:3]}"
            entry["used_mib"] = self.used_mib()
        except Exception as error:
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.found["steps"][name] = entry
        print("STEP", self.way, name, json.dumps(entry), flush=True)
        if "error" in entry and "CUDA error" in entry["error"]:
            raise SystemExit(f"the context is gone: {entry['error']}")

    def timed(self, name: str, do: Callable[[], object]) -> None:
        self.synchronize()
        started = time.perf_counter()
        do()
        self.synchronize()
        self.found.setdefault("seconds", {}).setdefault(name, []).append(round(time.perf_counter() - started, 4))

    def nap(self, level: int, *waking: list[str] | None) -> None:
        self.timed(f"sleep {level}", lambda: self.llm.sleep(level))
        self.found.setdefault("asleep_mib", {})[str(level)] = self.used_mib()
        for tags in waking or (None,):
            self.timed(f"wake {level} {tags or ''}".strip(), lambda tags=tags: self.llm.wake_up(tags))

    def reloaded(self) -> None:
        """As frameworks do after level 2."""
        self.nap(2, ["weights"])
        self.timed("reload", lambda: self.llm.collective_rpc("reload_weights"))
        self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()

    def in_flight(self, mode: str) -> None:
        """Eight requests run, the engine sleeps and wakes; with `keep` they end as if nothing had been."""
        engine = self.llm.llm_engine
        whole = self.outputs_of_all()
        for number, prompt in enumerate(self.prompts):
            engine.add_request(
                f"{mode}-{number}", {"prompt_token_ids": prompt}, self.sampling(), lora_request=self.lora
            )
        for _ in range(5):
            engine.step()
        self.llm.sleep(1, mode=mode)
        self.llm.wake_up()
        rest: dict[str, list[int]] = {}
        for _ in range(STEPS):  # of what was aborted vLLM's own front end hears nothing here
            if not engine.has_unfinished_requests():
                break
            for output in engine.step():
                if output.finished:
                    rest[output.request_id] = list(output.outputs[0].token_ids)
        engine.abort_request([f"{mode}-{number}" for number in range(len(self.prompts))])
        if mode == "keep":
            same = [rest.get(f"{mode}-{number}") == tokens for number, tokens in enumerate(whole)]
            self.found["in_flight_equal"] = sum(same)

    def outputs_of_all(self) -> list[list[int]]:
        self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        outputs = self.llm.generate(prompts, self.sampling(), lora_request=self.lora, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def cycles(self) -> None:
        used = []
        for _ in range(CYCLES):
            self.llm.sleep(1)
            self.llm.wake_up()
            used.append(self.used_mib())
        self.found["cycles_mib"] = [used[0], used[-1]]

    def other_weights(self) -> Iterator[tuple[str, Any]]:
        """Of a step of training: the checkpoint's, a little different."""
        from safetensors import safe_open

        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt", device="cuda" if self.on_gpu else "cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    tensor = opened.get_tensor(name)
                    yield name, tensor * 1.01 if tensor.is_floating_point() and tensor.element_size() > 1 else tensor

    def trl(self) -> None:
        """The colocated trainer of TRL 1.16, one step: level 2, weights, reload, each parameter, the cache."""
        self.llm.sleep(level=2)
        self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights")
        model = self.models()[0]
        for name, tensor in self.other_weights():
            model.load_weights([(name, tensor)])
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def verl(self) -> None:
        """The rollout of verl, one step: buckets of weights, and post-processing once more."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        config = self.llm.llm_engine.vllm_config
        model, bucket, size = self.models()[0], [], 0
        with set_current_vllm_config(config):
            for name, tensor in self.other_weights():
                bucket.append((name, tensor))
                size += tensor.nbytes
                if size > 256 << 20:
                    model.load_weights(bucket)
                    bucket, size = [], 0
            model.load_weights(bucket)
            process_weights_after_loading(model, config.model_config, self.torch.device("cuda"))
        self.llm.reset_prefix_cache()

    def run(self, *, big: bool) -> None:
        self.before = self.tokens()
        self.found["tokens"]["before"] = hashlib.sha256(json.dumps(self.before).encode()).hexdigest()[:16]
        self.marks = self.fingerprints()
        self.found["tensors"] = len(self.marks)
        self.found["awake_mib"] = self.used_mib()
        self.step("nothing", lambda: None)
        self.step("level 1", lambda: self.nap(1))
        self.step("level 1 again", lambda: self.nap(1))
        self.step("tags", lambda: self.nap(1, ["weights"], ["kv_cache"]))
        self.step("level 2, reload", self.reloaded)
        if self.way != "auto":
            self.step("level 2", lambda: self.nap(2))
        for mode in ("abort", "keep"):
            self.step(f"in flight, {mode}", partial(self.in_flight, mode))
        self.step("cycles", self.cycles)
        quantized = self.llm.llm_engine.vllm_config.model_config.quantization is not None
        if not quantized and not self.lora and self.ranks == 1:
            if self.on_gpu:  # on a CPU processing once more packs what was packed
                self.step("verl", self.verl)
            self.step("trl", self.trl)
            self.step("trl again", self.trl)
            self.step("private, level 1", lambda: self.nap(1))
        self.step("reload to what was", self.reloaded)


async def modes(path: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Eight requests run, and an engine in a process of its own is put to sleep in each mode.

    Those of `wait` and of `keep` have to end whole; tokens of one request at a time are those of before.
    """
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(str(path), load_format="companion", compilation_config=GRAPHS, **flags)
    )
    found: dict[str, Any] = {}

    async def tokens(name: str, prompt: list[int], count: int) -> list[int]:
        sampling = SamplingParams(max_tokens=count, temperature=0, detokenize=False, ignore_eos=True)
        last: list[int] = []
        async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
            last = list(output.outputs[0].token_ids)
        return last

    prompts = [list(range(10 * number + 3, 10 * number + 15)) for number in range(8)]
    before = [await tokens(f"before-{number}", prompt, 24) for number, prompt in enumerate(prompts)]
    for level in (1, 2):
        for mode in ("abort", "wait", "keep"):
            name = f"{mode}, level {level}"
            running = [
                asyncio.create_task(tokens(f"{name}-{number}", prompt, 200)) for number, prompt in enumerate(prompts)
            ]
            await asyncio.sleep(0.1)
            await engine.sleep(level, mode)
            whole_asleep = sum(each.done() for each in running)
            await engine.wake_up()
            lengths = [len(each) for each in await asyncio.wait_for(asyncio.gather(*running), 60)]
            after = [await tokens(f"{name}-after-{number}", prompt, 24) for number, prompt in enumerate(prompts)]
            found[name] = {
                "tokens": "equal" if after == before else "other",
                "ended_before_sleep": whole_asleep,
                "whole": lengths.count(200),
            }
            print("STEP companion in flight,", name, json.dumps(found[name]), flush=True)
    engine.shutdown()
    return found


def in_each_mode(path: Path, flags: dict[str, Any], out: Path) -> None:
    """`modes`, for a fork."""
    out.write_text(json.dumps(asyncio.run(modes(path, flags))))


def engine(path: Path, way: str, flags: dict[str, Any], out: Path, big: bool) -> None:
    """One engine, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `fingerprints` is sent to workers
    made = Engine(path, way, flags)
    try:
        made.run(big=big)
    finally:
        out.write_text(json.dumps(made.found))


def case(name: str, path: Path, flags: dict[str, Any], out: Path, big: bool, tiny: bool) -> dict[str, Any]:
    """Both ways of one model: side by side, but for the big one."""
    directory = Path(tempfile.mkdtemp(prefix="vcs-"))
    environment = {"COMPANION_RUNTIME_DIR": str(directory / "r"), "COMPANION_LINGER_S": "60"}
    found: dict[str, Any] = {"case": name}
    if not big:
        matrix.fork(lambda: models.make(name, path, tiny=tiny), out / f"{name}.log")

    def run(way: str) -> None:
        try:
            work = partial(engine, path, way, flags, directory / way, big)
            matrix.fork(work, out / f"{name}-{way}.log", environment)
        except matrix.Ended as error:
            found[f"{way} error"] = str(error)
        if (directory / way).exists():
            found[way] = json.loads((directory / way).read_text())

    with ThreadPoolExecutor(1 if big else len(WAYS)) as executor:
        list(executor.map(run, reversed(WAYS)))
    if name == "llama" and not tiny:
        matrix.fork(partial(in_each_mode, path, flags, directory / "modes"), out / "llama-modes.log", environment)
        found["modes"] = json.loads((directory / "modes").read_text())
    settings = resolve({"runtime_dir": str(directory / "r")})
    matrix.fork(lambda: matrix.look.stop_all(settings), out / f"{name}-stop.log")
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong, and the figures."""
    auto, ours = (found.get(way, {}) for way in WAYS)
    for way in WAYS:
        if f"{way} error" in found:
            yield f"{way}: {found[f'{way} error']}"
    for name, step in found.get("modes", {}).items():
        yield f"eight in flight, {name}: {json.dumps(step)}"
    for name, step in ours.get("steps", {}).items():
        theirs = auto.get("steps", {}).get(name, {})
        same = ours["tokens"].get(name) == auto.get("tokens", {}).get(name, ours["tokens"]["before"])
        yield f"{name}: {json.dumps(step)}; tokens as auto's: {same}" + (f"; auto: {theirs}" if not same else "")
    for what in ("start_s", "awake_mib", "asleep_mib", "seconds", "cycles_mib", "in_flight_equal"):
        yield f"{what}: ours {ours.get(what)}, auto {auto.get(what)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--big", type=Path, help="where the model of 8B is, or is made")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, on a CPU")
    parser.add_argument("--no-sleep-mode", action="store_true", help="without --enable-sleep-mode")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(matrix.ENVIRONMENT)
    matrix.ready(on_gpu=not args.tiny)
    common: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 512}
    common["enable_sleep_mode"] = not (args.no_sleep_mode or args.tiny)
    common |= {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << (26 if args.tiny else 30)}
    if args.tiny:
        common["max_model_len"] = 128
    root = Path(tempfile.gettempdir()) / "matrix-models"
    work = []
    for name in args.only:
        flags = {key: value for key, value in models.CASES[name].flags.items() if key != "enforce_eager"}
        flags = json.loads(json.dumps(flags).replace("{path}", str(root / name)))
        if "moe" in name:
            flags["kv_cache_dtype"] = "fp8"
        work.append((name, root / name, {"gpu_memory_utilization": 0.12} | common | flags, args.out, False, args.tiny))
    rows = []
    if args.big:
        if not (args.big / "config.json").exists():
            matrix.fork(lambda: gpu_acceptance.make_model(args.big, 32), args.out / "big-make.log")
        rows.append(case("big", args.big, common | {"gpu_memory_utilization": 0.4}, args.out, True, False))
        print("\n".join(["== big", *lines(rows[-1])]), flush=True)
    if work:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
            for future in as_completed([pool.submit(case, *one) for one in work]):
                rows.append(future.result())
                print("\n".join([f"== {rows[-1]['case']}", *lines(rows[-1])]), flush=True)
    version = metadata.version(metadata.packages_distributions()["vllm"][0])
    report = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "vllm": version, "rows": rows}
    (args.out / f"sleeping-{version}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
