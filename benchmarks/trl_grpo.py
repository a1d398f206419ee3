"""TRL's own GRPO loop with weights or adapters that go through the companion: do engine and trainer agree at each step?

    python -m benchmarks.trl_grpo --out DIR [--only all-weights adapter colocated] [--hidden N] [--layers N]
        [--dtype D] [--jobs N] [--timeout S]

Runs docs/examples/trl_grpo.py with a server, and docs/examples/trl_lora_grpo.py with a server and with an engine in its
own process, ten steps each, on a Llama with random weights and a tokenizer of single letters. Each runs once more as a
control, whose engine gets what is published first, and nothing later. At the first step both sides have the same
weights: how far their log-probabilities differ there is the noise of the dtype. Each run has companions of its own.

Needs TRL. On a machine without a GPU the model is tiny, in float32, and engines are eager; on a GPU it is in bfloat16,
engines have CUDA graphs, and all runs are beside each other. Writes DIR/trl-<vllm version>.json; exits with 1 unless
all runs ended well, and each engine had its trainer's weights at each step, other than its control.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import gpu_acceptance, matrix
from benchmarks.servers import SMALL_CPU_ENGINE, Server
from benchmarks.sleeping_together import Report
from tests.support.place import until
from vllm_companion_plugin.cli import look
from vllm_companion_plugin.settings import resolve

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10
WAYS = {
    "all-weights": ("trl_grpo.py", True),
    "adapter": ("trl_lora_grpo.py", True),
    "colocated": ("trl_lora_grpo.py", False),
}
"""The example of each way, and whether it has a server."""
WIDE = 512
RATES = {"trl_grpo.py": "5e-5", "trl_lora_grpo.py": "1e-3"}
"""Learning rates for models from that width on, which with the examples' own know one letter only after three steps."""
ENGINE: dict[str, object] = {"max_model_len": 128, "max_num_seqs": 8}
ON_GPU: dict[str, object] = {
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 256 << 20,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}
ON_CPU: dict[str, object] = {"enforce_eager": True}
SERVER: dict[str, object] = {
    "load_format": "companion",
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": "-1",
}
FIGURES = {
    "reward": "reward",
    "mean": "sampling/sampling_logp_difference/mean",
    "max": "sampling/sampling_logp_difference/max",
    "ratio_min": "sampling/importance_sampling_ratio/min",
    "ratio_mean": "sampling/importance_sampling_ratio/mean",
    "ratio_max": "sampling/importance_sampling_ratio/max",
}
"""What is kept of each step, and how TRL calls it."""
SWITCHED = r"\(step-\d+\) in place of \d+, in ([\d.]+) s"
NOISE, CONTROL = 8.0, 4.0
"""How much more than at the first step engine and trainer may differ, and by how much more a control has to."""


def make(path: Path, hidden: int, layers: int, dtype: str) -> None:
    """A checkpoint with random weights, and a tokenizer of the printable characters."""
    import string

    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<pad>", "</s>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    heads = max(2, hidden // 64)
    config = LlamaConfig(
        vocab_size=128,
        pad_token_id=0,
        eos_token_id=1,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)


def steps_of(output: str) -> list[dict[str, float]]:
    """What an example printed of each step."""
    return [ast.literal_eval(line) for line in output.splitlines() if line.startswith("{'reward'")]


def control(example: str, *arguments: str) -> None:
    """Run it in this process, with an engine that gets what is published first, and nothing later."""
    from vllm_companion_plugin import CompanionClient
    from vllm_companion_plugin.trainers.trl import CompanionWeightTransfer

    for owner, name in ((CompanionWeightTransfer, "send_weights"), (CompanionClient, "publish_adapter")):
        setattr(owner, name, _once(getattr(owner, name)))
    sys.argv = [example, *arguments]
    runpy.run_path(example, run_name="__main__")


def _once(do: Any) -> Any:
    done: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(do(*args, **kwargs))
        return done[0]

    return once


class Run:
    """A way of training, or the control of one, with companions of its own.

    Args:
        work: a directory of a short name, for what the run leaves.
        engine: its options.
        hidden: the model's width.
    """

    def __init__(
        self, name: str, model: Path, out: Path, work: Path, timeout_s: float, engine: dict[str, object], hidden: int
    ) -> None:
        self.name = name
        self._way, _, self._control = name.partition(", ")
        self._model, self._work, self._timeout_s = model, work, timeout_s
        self._log = out / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        self._engine = engine
        self._settings = {"COMPANION_RUNTIME_DIR": str(work / "r"), "COMPANION_LINGER_S": "2"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environment = {
            **os.environ,
            **SMALL_CPU_ENGINE,
            **self._settings,
            "PYTHONPATH": path,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **({"LEARNING_RATE": RATES[WAYS[self._way][0]]} if hidden >= WIDE else {}),
        }

    def do(self) -> dict[str, Any]:
        """Exit status, seconds, and the figures of each step."""
        self._work.mkdir(parents=True)
        started = time.monotonic()
        server: Server | None = None
        example, with_server = WAYS[self._way]
        try:
            arguments = [str(ROOT / "docs" / "examples" / example), str(self._model)]
            if with_server:
                server = self._serve()
                until(server.is_up, self._timeout_s, f"the server of {self.name} is up", every_s=0.2)
                arguments.append(server.url)
            ready = time.monotonic()
            status, output = self._train(arguments)
            found: dict[str, Any] = {"status": status, "server_s": round(ready - started, 1)}
            found |= {"trainer_s": round(time.monotonic() - ready, 1)}
            found["steps"] = [
                {"step": line["step"]} | {name: line[theirs] for name, theirs in FIGURES.items()}
                for line in steps_of(output)
            ]
            if status:
                found["said"] = matrix.last_line(self._log)
            if server is not None and "weights" in self._way:
                said = server.log.read_text(errors="replace")
                found["switched_s"] = [float(each) for each in re.findall(SWITCHED, said)]
            return found
        except (AssertionError, RuntimeError) as error:
            return {"status": None, "steps": [], "said": str(error)[-2000:]}
        finally:
            if server is not None:
                server.stop()
            look.stop_all(resolve({"runtime_dir": self._settings["COMPANION_RUNTIME_DIR"]}))

    def _serve(self) -> Server:
        lora: dict[str, object] = {"enable_lora": True} if self._way == "adapter" else {}
        flags = matrix.flags_of(self._engine | SERVER | lora, self._model)
        log = self._log.with_name(f"{self._log.stem}-server.log")
        return Server(self._model, flags, ("", {}), self._environment, log)

    def _train(self, arguments: list[str]) -> tuple[int | None, str]:
        """Exit status, None if it took too long, and what was printed."""
        command = [sys.executable, *arguments]
        if self._control:
            code = "import sys; from benchmarks.trl_grpo import control; control(*sys.argv[1:])"
            command = [sys.executable, "-c", code, *arguments]
        environment = self._environment | {"ENGINE_ARGS": json.dumps(self._engine)}
        printed = self._log.with_suffix(".out")
        with self._log.open("w") as log, printed.open("w") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=self._work,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        return status, printed.read_text(errors="replace")


def judge(ours: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Means over a step's tokens: of one way, and of its control."""
    whole = all(found["status"] == 0 and len(found["steps"]) == STEPS for found in (ours, others))
    if not whole:
        return {"good": False}
    (first, *later), (_, *apart) = ([line["mean"] for line in found["steps"]] for found in (ours, others))
    return {
        "noise": first,
        "later_most": max(later),
        "control_median": statistics.median(apart),
        "control_least": min(apart),
        "max_of_noise": ours["steps"][0]["max"],
        "max_of_later": max(line["max"] for line in ours["steps"][1:]),
        "max_of_control": max(line["max"] for line in others["steps"][1:]),
        "good": max(later) < NOISE * first and statistics.median(apart) > CONTROL * max(later),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = bool(gpu_acceptance.smi("gpu", "uuid"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--hidden", type=int, default=1024 if on_gpu else 64)
    parser.add_argument("--layers", type=int, default=12 if on_gpu else 3)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--jobs", type=int, default=2 * len(WAYS) if on_gpu else 1)
    parser.add_argument("--timeout", type=float, default=240, help="seconds, of a server's start and of a trainer")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="vct-"))
    model = work / "model"
    matrix.fork(lambda: make(model, args.hidden, args.layers, args.dtype), out / "make.log")
    report = Report(out, "trl")
    versions = {name: metadata.version(name) for name in ("trl", "transformers", "peft", "accelerate", "torch")}
    report.add("model", hidden=args.hidden, layers=args.layers, dtype=args.dtype, on_gpu=on_gpu, **versions)
    names = [name for way in args.only for name in (way, f"{way}, no updates")]
    engine = ENGINE | (ON_GPU if on_gpu else ON_CPU) | {"dtype": args.dtype}  # for "auto", float32 is too much
    runs = [
        Run(name, model, out, work / str(number), args.timeout, engine, args.hidden)
        for number, name in enumerate(names)
    ]
    with ThreadPoolExecutor(args.jobs) as executor:
        found = dict(zip(names, executor.map(Run.do, runs), strict=True))
    for name in names:
        report.add(name, **found[name])
    judged = {way: judge(found[way], found[f"{way}, no updates"]) for way in args.only}
    report.add("differences of log-probabilities", **judged)
    raise SystemExit(not all(each["good"] for each in judged.values()))


if __name__ == "__main__":
    main()
