"""What sharing costs in speed on CPU: vLLM's packed weights against shared ones.

    python -m benchmarks.cpu_prepack [--rounds N]

Runs each engine in a process of its own, on a random Llama of 0.5 GB in float32 and on all-MiniLM-L6-v2,
and prints a table. `auto` and `cpu_prepack` multiply packed private copies; `companion` the shared weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.support.checkpoints.formats import minilm

FORMATS = {
    "auto": {"load_format": "auto"},
    "companion": {"load_format": "companion"},
    "companion, cpu_prepack": {"load_format": "companion", "model_loader_extra_config": {"cpu_prepack": True}},
}
LLAMA = (
    "import sys, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0);"
    "LlamaForCausalLM(LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,"
    " num_attention_heads=16, num_key_value_heads=8, vocab_size=16000, max_position_embeddings=2048))"
    ".to(torch.float32).save_pretrained(sys.argv[1])"
)
SENTENCE = "The companion holds the weights of a model so that engines come and go without reading the disk again. "


def measure(options: dict, rounds: int) -> dict[str, float]:
    """Seconds of each workload, the median of `rounds`."""
    from vllm import LLM, SamplingParams

    pooling = options.get("runner") == "pooling"
    llm = LLM(dtype="float32", enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True, **options)

    def timed(work, *arguments, **keywords) -> float:
        seconds = []
        for _ in range(rounds + 1):  # the first one warms up
            started = time.perf_counter()
            work(*arguments, use_tqdm=False, **keywords)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])

    if pooling:
        return {"64 sentences": timed(llm.embed, [SENTENCE] * 64), "1 sentence": timed(llm.embed, [SENTENCE])}

    def tokens(prompts: int, length: int) -> list[dict]:
        return [{"prompt_token_ids": [(7 * i + p) % 15000 + 10 for i in range(length)]} for p in range(prompts)]

    def generate(count: int) -> SamplingParams:
        return SamplingParams(max_tokens=count, temperature=0, detokenize=False, ignore_eos=True)

    return {
        "prefill, 1,024 tokens": timed(llm.generate, tokens(1, 1024), sampling_params=generate(1)),
        "decode, 1 x 64 tokens": timed(llm.generate, tokens(1, 8), sampling_params=generate(64)),
        "decode, 16 x 64 tokens": timed(llm.generate, tokens(16, 8), sampling_params=generate(64)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(measure(json.loads(args.child), args.rounds)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="vc-") as directory:
        os.environ["COMPANION_RUNTIME_DIR"] = f"{directory}/r"
        llama = f"{directory}/llama"
        subprocess.run([sys.executable, "-c", LLAMA, llama], check=True)
        models = {
            "Llama": {"model": llama, "skip_tokenizer_init": True, "max_model_len": 2048},
            "MiniLM": {"model": str(minilm()), "runner": "pooling", "max_model_len": 256},
        }
        try:
            for name, model in models.items():
                table(name, {label: run(model | options, args.rounds) for label, options in FORMATS.items()})
        finally:
            subprocess.run([sys.executable, "-m", "vllm_companion_plugin.cli.main", "stop", "--device", "cpu"])


def run(options: dict, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cpu_prepack", "--rounds", str(rounds), "--child", json.dumps(options)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def table(model: str, results: dict[str, dict[str, float]]) -> None:
    base = results["auto"]
    for work, seconds in base.items():
        cells = [f"{results[label][work]:.3f} s ({results[label][work] / seconds:.2f}x)" for label in results]
        print(f"| {model}: {work} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
