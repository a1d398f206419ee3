"""An engine whose start fails, and one that runs, in one process. Prints "RESULT {...}": what is left of each.

The arguments are a model and its load format.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
import weakref
from pathlib import Path

from tests.vllm.results import tell


def mapped() -> int:
    """Arenas in this process's memory."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:vllm" in line})


def resident_kb() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


class Collections:
    """Counts full collections, and their seconds."""

    def __init__(self) -> None:
        self.count, self.seconds, self._started = 0, 0.0, 0.0
        gc.callbacks.append(self._called)

    def _called(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            if phase == "start":
                self._started = time.perf_counter()
            else:
                self.count += 1
                self.seconds += time.perf_counter() - self._started

    def take(self) -> tuple[int, float]:
        taken = self.count, round(self.seconds, 3)
        self.count, self.seconds = 0, 0.0
        return taken


def main() -> None:
    model, load_format = sys.argv[1:]
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    workers: weakref.WeakSet[WorkerBase] = weakref.WeakSet()
    inner = WorkerBase.__init__

    def init(self: WorkerBase, *args: object, **kwargs: object) -> None:
        inner(self, *args, **kwargs)
        workers.add(self)

    WorkerBase.__init__ = init
    begin = EngineCore._initialize_kv_caches

    def fail(self: EngineCore, *args: object) -> object:
        raise RuntimeError("no memory is left for the KV cache")

    collections, results = Collections(), []
    flags = {"load_format": load_format, "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    for initialize in (fail, begin, begin):
        EngineCore._initialize_kv_caches = initialize
        collections.take()
        result: dict[str, object] = {}
        try:
            llm = LLM(model=model, max_model_len=128, **flags)
            result["collections"] = collections.take()
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=8, detokenize=False))
            result["blocks"] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            result["frozen"] = gc.get_freeze_count()
            del llm
        except Exception as error:
            result["error"] = str(error)
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        results.append(result | {"mapped": mapped(), "workers": len(workers), "resident_kb": resident_kb()})
    tell(results)


if __name__ == "__main__":
    main()
