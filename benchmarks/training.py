"""Training beside serving on the same bytes, beside a trainer and an engine that have a copy each.

    python -m benchmarks.training --out DIR [--only beside full colocated] [--layers N] [--steps N] [--ranks N]

`beside`: an engine of an 8B model with CUDA graphs, and a trainer of a LoRA adapter (r=16, gradient checkpointing) in
another process: memory, losses, and the milliseconds from an adapter's publication to its first token. Then the same
trainer on weights of its own, beside an engine with `auto`, as TRL's `colocate` has it.
`full`: full fine-tuning of a 1.5B model in place, in the engine's process; log-probabilities of both after each step.
`colocated`: torchrun with a process for each of RANKS GPUs, each with an engine and a trainer, on a tiny model.

On a machine without a GPU the models are tiny, and memory is not looked at. Writes DIR/training-<vllm version>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_acceptance, matrix, sleeping, sleeping_together
from benchmarks.sleeping_together import Remote, Report, settled
from tests.support.checkpoints import models
from vllm_companion_plugin.settings import resolve

ADAPTER = "mine"
ROWS, LENGTH = 2, 512
"""Sequences of a training step, and their tokens."""
FLAGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.3,
}
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2}


def flags(on_gpu: bool) -> dict[str, Any]:
    return FLAGS | ({"max_model_len": 1024} if on_gpu else {"max_model_len": 128, "dtype": "float32"})


def on_device() -> tuple[Any, Any]:
    """In a fork: the device of trainers, and the dtype of engines there."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", 0), torch.bfloat16
    return torch.device("cpu"), torch.float32


class Served(sleeping.Engine):
    """An engine that is asked for an adapter, or for the base model."""

    def look(self) -> dict[str, Any]:
        return {"tokens": self.tokens(), "start_s": round(self.found["start_s"], 2)}

    def answer(self, name: str | None, prompt: list[int], count: int) -> dict[str, Any]:
        """Tokens of one request, and its milliseconds."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, 1, f"companion:{name}") if name else None
        self.synchronize()
        started = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt}], self.sampling(count), lora_request=request, use_tqdm=False
        )
        return {
            "tokens": list(outputs[0].outputs[0].token_ids),
            "ms": round((time.perf_counter() - started) * 1000, 2),
        }


class Lora:
    """A trainer of an adapter, on an entry's memory or on weights of its own."""

    def __init__(self, path: Path, shared: bool) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from vllm_companion_plugin import CompanionClient
        from vllm_companion_plugin.training import from_companion

        self.torch = torch
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)  # or two trainers differ, whatever they compute on
        self.device, self.dtype = on_device()
        self.on_gpu = self.device.type == "cuda"
        before = self.allocated_mib()
        started = time.perf_counter()
        plain = {"attn_implementation": "eager"}  # computes the same each time, backwards too
        if shared:
            flags = ["--enable-lora", *(["--dtype", "float32"] * (not self.on_gpu))]
            base = from_companion(str(path), device=self.device, flags=flags, options=plain)
        else:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, **plain).to(self.device)
        self.found = {"base_s": round(time.perf_counter() - started, 2), "base_mib": self.allocated_mib() - before}
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=1e-3)
        self.random = torch.Generator().manual_seed(1)
        self.client = CompanionClient(self.device)
        self.path = str(path)

    def allocated_mib(self) -> int:
        """Of PyTorch's own memory, in which nothing of a companion is."""
        return self.torch.cuda.memory_allocated() >> 20 if self.on_gpu else 0

    def look(self) -> dict[str, Any]:
        return self.found

    def step(self) -> float:
        """The loss of one step on random tokens, the same for each trainer."""
        length = LENGTH if self.on_gpu else 32
        tokens = self.torch.randint(10, 100, (ROWS, length), generator=self.random).to(self.device)
        loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def publish(self, as_trained: bool) -> float:
        """In float32, which PEFT trains in, or as it is by default, in the dtype of the model; milliseconds."""
        if self.on_gpu:
            self.torch.cuda.synchronize()
        started = time.perf_counter()
        self.client.publish_adapter(ADAPTER, self.model, dtype=self.torch.float32 if as_trained else None)
        return round((time.perf_counter() - started) * 1000, 2)

    def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """By how much the trainer's own logits prefer another token at each place; 0 where it says the same."""
        self.model.eval()
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([prompt + tokens], device=self.device)).logits[
                0, len(prompt) - 1 : -1
            ]
        self.model.train()
        logits = logits.float()
        said = logits.gather(1, self.torch.tensor(tokens, device=self.device)[:, None])[:, 0]
        return [round(float(x), 4) for x in logits.max(1).values - said]

    def check(self) -> str:
        """Whether the entry's bytes are still those that were published."""
        with self.client.attach(self.path) as attachment:
            attachment.verify("full")
        return "equal"


class Full:
    """An engine, and a trainer that writes what the engine serves, in one process."""

    def __init__(self, path: Path, more: dict[str, Any]) -> None:
        import torch

        from vllm_companion_plugin.training import trained

        self.torch = torch
        self.device, _ = on_device()
        self.engine = Served(path, "companion", more)
        self.before_mib = self.engine.used_mib()
        self.training = trained(str(path), [self.engine.llm], version="run", device=self.device)
        self.optimizer = torch.optim.SGD(self.training.model.parameters(), lr=1e-2)
        self.random = torch.Generator().manual_seed(1)

    def look(self) -> dict[str, Any]:
        return {"used_mib": self.engine.used_mib(), "before_training_mib": self.before_mib, "noise": self.difference()}

    def difference(self) -> float:
        """The largest one of log-probabilities of engine and trainer."""
        from vllm import SamplingParams

        prompt = list(range(20, 80))
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        self.engine.llm.reset_prefix_cache()
        output = self.engine.llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)[0]
        theirs = [each[token].logprob for token, each in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        with self.torch.no_grad():
            logits = self.training.model(self.torch.tensor([prompt], device=self.device)).logits[0, :-1].float()
        ours = logits.log_softmax(-1).gather(1, self.torch.tensor(prompt[1:], device=self.device)[:, None])[:, 0]
        return round(float((ours.cpu() - self.torch.tensor(theirs)).abs().max()), 6)

    def step(self) -> dict[str, Any]:
        length = LENGTH if self.device.type == "cuda" else 32
        tokens = self.torch.randint(10, 100, (ROWS, length), generator=self.random).to(self.device)
        loss = self.training.model(tokens, labels=tokens).loss
        loss.backward()
        self.engine.synchronize()
        started = time.perf_counter()
        with self.training.step():
            self.optimizer.step()
            self.engine.synchronize()
        paused_ms = round((time.perf_counter() - started) * 1000, 2)
        self.optimizer.zero_grad()
        return {
            "loss": round(float(loss.detach()), 5),
            "paused_ms": paused_ms,
            "difference": self.difference(),
            "used_mib": self.engine.used_mib(),
        }


def beside(report: Report, model: Path, steps: int, *, on_gpu: bool) -> list[float]:
    """An engine and a trainer on one copy; the losses."""
    remotes: list[Remote] = []
    try:
        engine = Remote("engine", report.out, partial(Served, model, "companion", flags(on_gpu) | LORA))
        remotes.append(engine)
        started = engine.answer()
        used = used_mib(report)
        trainer = Remote("trainer", report.out, partial(Lora, model, True))
        remotes.append(trainer)
        found = trainer.answer()
        report.add("one copy", start_s=started["start_s"], engine_mib=used, both_mib=used_mib(report), **found)
        losses, behind = [], []
        took: dict[str, list[dict[str, float]]] = {"as trained": [], "in the model's dtype": []}
        prompt = list(range(20, 60))
        for number in range(steps):
            losses.append(trainer.do("step"))
            as_trained = number < steps // 2  # one after the other, as one trainer does
            rows = took[[*took][not as_trained]]
            began = time.perf_counter()
            publishing = trainer.do("publish", as_trained)
            engine.do("answer", ADAPTER, [10 + number, *prompt], 1)
            first = (time.perf_counter() - began) * 1000
            began = time.perf_counter()
            engine.do("answer", ADAPTER, [60 + number, *prompt], 1)  # another one: nothing of it is cached
            again = (time.perf_counter() - began) * 1000
            more = {"publish_ms": publishing, "first_ms": first, "again_ms": again, "more_ms": first - again}
            rows.append({name: round(value, 2) for name, value in more.items()})
            answer = engine.do("answer", ADAPTER, prompt, 12)
            behind.append(max(trainer.do("margins", prompt, answer["tokens"])))
        report.add(
            "adapter, from its publication to its first token",
            **{name: rows for name, rows in took.items() if rows},
            more_ms={name: median([each["more_ms"] for each in rows]) for name, rows in took.items() if rows},
        )
        report.add("adapter", logits_behind_the_trainers_choice=behind, peak_mib=used_mib(report))
        checked = trainer.do("check")
        trainer.end()
        remotes.remove(trainer)
        same = engine.do("tokens") == started["tokens"]
        report.add("afterwards", base=checked, tokens_equal=same, losses=losses)
        return losses
    finally:
        for each in remotes:
            each.end()
        if on_gpu:
            sleeping_together.until_empty(report)


def two_copies(report: Report, model: Path, steps: int, losses: list[float], *, on_gpu: bool) -> None:
    """The same with a copy each."""
    remotes: list[Remote] = []
    try:
        engine = Remote("auto-engine", report.out, partial(Served, model, "auto", flags(on_gpu) | LORA))
        remotes.append(engine)
        start_s = engine.answer()["start_s"]
        used = used_mib(report)
        trainer = Remote("auto-trainer", report.out, partial(Lora, model, False))
        remotes.append(trainer)
        found = trainer.answer()
        report.add("two copies", start_s=start_s, engine_mib=used, both_mib=used_mib(report), **found)
        own = [trainer.do("step") for _ in range(steps)]
        differences = [abs(a - b) for a, b in zip(own, losses, strict=True)]
        report.add("losses of two copies", losses=own, most_different=max(differences), peak_mib=used_mib(report))
    finally:
        for each in remotes:
            each.end()
        if on_gpu:
            sleeping_together.until_empty(report)


def full(report: Report, model: Path, steps: int, *, on_gpu: bool) -> None:
    remote = Remote("full", report.out, partial(Full, model, flags(on_gpu)))
    try:
        report.add("full, start", **remote.answer())
        report.add("full", steps=[remote.do("step") for _ in range(steps)])
    finally:
        remote.end()
        if on_gpu:
            sleeping_together.until_empty(report)


def colocated(report: Report, out: Path, runtime_dir: str, ranks: int) -> None:
    model = Path(tempfile.gettempdir()) / "tiny-colocated"
    if not (model / "config.json").exists():
        matrix.fork(lambda: models.make("llama", model, tiny=True), out / "make.log")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.vllm.colocated_child", str(model), runtime_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    (out / "colocated.log").write_text(done.stdout + done.stderr)
    found = [json.loads(line.partition("RESULT ")[2]) for line in done.stdout.splitlines() if "RESULT " in line]
    report.add(f"colocated, {ranks} ranks", status=done.returncode, ranks=found)


def used_mib(report: Report) -> int:
    return settled() - report.empty_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["beside", "full", "colocated"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runtime_dir = str(Path(tempfile.mkdtemp(prefix="vct-")) / "r")
    os.environ.update(matrix.ENVIRONMENT | {"COMPANION_RUNTIME_DIR": runtime_dir, "COMPANION_LINGER_S": "2"})
    on_gpu = bool(gpu_acceptance.smi("gpu", "uuid"))
    matrix.ready(on_gpu=on_gpu)
    report = Report(args.out, "training")
    root = Path(tempfile.gettempdir())
    if on_gpu:
        big, small = root / "m8b", root / "m1b"
        sleeping_together.make(args.out, {big: (args.layers, 0), small: (2, 0)})
    else:
        big = small = root / "tiny-training"
        if not (big / "config.json").exists():
            matrix.fork(lambda: models.make("llama", big, tiny=True), args.out / "make.log")
    if "beside" in args.only:
        losses = beside(report, big, args.steps, on_gpu=on_gpu)
        two_copies(report, big, args.steps, losses, on_gpu=on_gpu)
    if "full" in args.only:
        full(report, small, args.steps, on_gpu=on_gpu)
    if "colocated" in args.only:
        colocated(report, args.out, runtime_dir, args.ranks)
    matrix.fork(lambda: matrix.look.stop_all(resolve({})), args.out / "stop.log")


if __name__ == "__main__":
    main()
