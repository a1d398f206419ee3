"""Engines one after the other in one process. Prints "RESULT [...]": for each its tokens, and what is left of it.

The argument is a JSON object: models, prompts, flags, "room" if a CPU shall be so large that only one fits, and
"device" if it is not a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

from tests.vllm.results import tell


def mapped() -> int:
    """Arenas in this process's memory."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:vllm" in line})


def used(device: str) -> int:
    """Entries on `device` that this process uses."""
    from vllm_companion_plugin.client.connection import connect
    from vllm_companion_plugin.settings import resolve

    with connect(device, resolve(), spawn=False) as connection:
        leases = [lease for entry in connection.status().entries for lease in entry.leases]
    return sum(lease.pid == os.getpid() for lease in leases)


def shrink_device(size_bytes: int, kv_bytes: int) -> None:
    """Let the device have `size_bytes` for weights, and nothing on it but what its companion holds."""
    from vllm_companion_plugin.client.connection import connect
    from vllm_companion_plugin.engine.vllm import devices
    from vllm_companion_plugin.settings import resolve

    def memory(device: devices.EngineDevice) -> tuple[int, int]:
        with connect("cpu", resolve(), spawn=False) as connection:
            held = sum(entry.size_bytes for entry in connection.status().entries)
        return size_bytes + kv_bytes - held, 1 << 40

    devices.memory = memory


def main() -> None:
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    if "room" in options:
        shrink_device(options["room"], 1 << 30)
    results = []
    flags = options.get("flags", {"dtype": "float32", "enforce_eager": True})
    load_format = options.get("load_format", "companion")
    device = options.get("device")
    for model in options["models"]:
        llm = LLM(model=model, load_format=load_format, max_model_len=128, skip_tokenizer_init=True, **flags)
        sampling = SamplingParams(max_tokens=16, temperature=0, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in options["prompts"]], sampling)
        result = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
        if load_format == "companion":
            result["mapped"] = used(device) if device else mapped()
        del llm, outputs
        gc.collect()
        if load_format == "companion":
            result["left"] = used(device) if device else mapped()
        results.append(result)
    tell(results)
    sys.stdin.read()


if __name__ == "__main__":
    main()
