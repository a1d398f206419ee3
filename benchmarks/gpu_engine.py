"""One vLLM engine on the GPU, measured from outside the loader: a child of gpu_acceptance.py.

Prints one JSON line, then stays until standard input closes if --stay is given.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import os
import re
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

SECONDS = {
    "model_loading_s": re.compile(r"Model loading took .* and ([\d.]+) seconds"),
    "built_s": re.compile(r"model built in ([\d.]+) s"),
    "bound_s": re.compile(r"bound in ([\d.]+) s"),
}


def listen(figures: dict[str, float]) -> None:
    """Note the seconds that vLLM and the loader tell of by themselves. vLLM takes handlers from its loggers."""
    make = logging.getLogRecordFactory()

    def made(*args, **kwargs):
        record = make(*args, **kwargs)
        text = record.getMessage()
        for name, pattern in SECONDS.items():
            if (found := pattern.search(text)) is not None:
                figures[name] = float(found[1])
        return record

    logging.setLogRecordFactory(made)


def watch_loader(name: str, figures: dict[str, float]) -> None:
    """Time `load_model` of the loader in use, and note free memory around packing."""
    import torch
    from vllm.model_executor import model_loader

    if name == "companion":
        from vllm_companion_plugin.engine import attach, loader, publish

        owner = loader.CompanionModelLoader
        inner_attach = attach.building.initialize_model

        def timed_build(*args, **kwargs):
            started = time.perf_counter()
            try:
                return inner_attach(*args, **kwargs)
            finally:
                figures["build_s"] = time.perf_counter() - started

        attach.building.initialize_model = timed_build
        make_release = publish._release

        def release(device):
            inner = make_release(device)

            def measured():
                free = torch.cuda.mem_get_info()[0]
                figures["lowest_free"] = min(figures.get("lowest_free", free), free)
                inner()

            return measured

        publish._release = release
        inner_copy = publish.copy

        def copy(packed, *args, **kwargs):
            torch.cuda.synchronize()
            figures["free_before_pack"] = torch.cuda.mem_get_info()[0]
            figures["torch_reserved_before_pack"] = torch.cuda.memory_reserved()
            started = time.perf_counter()
            arena = inner_copy(packed, *args, **kwargs)
            torch.cuda.synchronize()
            figures["copy_s"] = time.perf_counter() - started
            figures["weights"] = sum(storage.size_bytes for storage in packed.manifest.storages)
            return arena

        publish.copy = copy
        inner_publish = publish._Publisher._publish

        def publish_all(self, *args):
            torch.cuda.synchronize()
            started = time.perf_counter()
            inner_publish(self, *args)
            figures["pack_and_publish_s"] = time.perf_counter() - started

        publish._Publisher._publish = publish_all
    else:
        kind = model_loader._LOAD_FORMAT_TO_MODEL_LOADER[name]
        owner = next(each for each in kind.__mro__ if "load_model" in vars(each))
    inner = owner.load_model

    def load_model(self, *args, **kwargs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model = inner(self, *args, **kwargs)
        torch.cuda.synchronize()
        figures.setdefault("load_model_s", 0.0)
        figures["load_model_s"] += time.perf_counter() - started
        return model

    owner.load_model = load_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--format", default="companion")
    parser.add_argument("--extra", default="{}")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--quantization")
    parser.add_argument("--speculative-config", type=json.loads, help="as vLLM takes it")
    parser.add_argument("--utilization", type=float, default=0.5)
    parser.add_argument("--kv-gib", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="of each of 16 answers")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--again", action="store_true", help="then a second engine in this process, after the first")
    args = parser.parse_args(argv)

    import torch
    from vllm import LLM, SamplingParams

    figures: dict[str, float] = {}
    listen(figures)
    watch_loader(args.format, figures)

    def start() -> LLM:
        started = time.perf_counter()
        llm = LLM(
            args.model,
            load_format=args.format,
            model_loader_extra_config=json.loads(args.extra),
            skip_tokenizer_init=True,
            enforce_eager=args.eager,
            quantization=args.quantization,
            speculative_config=args.speculative_config,
            max_model_len=2048,
            max_num_batched_tokens=args.batch,
            max_num_seqs=16 if args.batch else None,
            gpu_memory_utilization=args.utilization,
            kv_cache_memory_bytes=int(args.kv_gib * 2**30) if args.kv_gib else None,
            compilation_config=None if args.eager else {"cudagraph_capture_sizes": [1, 8, 16]},
        )
        figures["engine_start_s"] = time.perf_counter() - started
        return llm

    llm = start()
    if args.again:
        first = dict(figures)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        figures.clear()
        llm = start()
        again = {f"again_{name}": value for name, value in figures.items()}
        figures.clear()
        figures.update(first, **again)
    words = min(30000, llm.llm_engine.vllm_config.model_config.get_vocab_size())
    generator = torch.Generator().manual_seed(7)
    prompts = [
        {"prompt_token_ids": torch.randint(10, words, (16 + 8 * i,), generator=generator).tolist()} for i in range(16)
    ]
    answers = SamplingParams(max_tokens=args.tokens, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate(prompts, answers)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    cache = llm.llm_engine.vllm_config.cache_config
    import vllm

    print(
        "RESULT "
        + json.dumps(
            {
                "vllm": vllm.__version__,
                "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
                "token_lengths": sorted({len(t) for t in tokens}),
                "first": tokens[0][:8],
                "kv_tokens": cache.num_gpu_blocks * cache.block_size,
                "free": torch.cuda.mem_get_info()[0],
                "pid": os.getpid(),
                **figures,
            }
        ),
        flush=True,
    )
    if args.stay:
        sys.stdin.read()


if __name__ == "__main__":
    main()
