"""How long checksums of a device's memory take: python -m benchmarks.checksums [--gib 15] [--device cuda:0]."""

from __future__ import annotations

import argparse
import json
import time

import torch

from vllm_companion_plugin.core.arena import PIECE_BYTES
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews


class Memory:
    """Stands where an arena is expected."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.words = torch.arange(size_bytes // 8, dtype=torch.int64, device=device)
        self.address = self.words.data_ptr()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=15)
    parser.add_argument("--device", default="cuda:0")
    parsed = parser.parse_args()
    device = torch.device(parsed.device)
    size_bytes = int(parsed.gib * (1 << 30)) // PIECE_BYTES * PIECE_BYTES
    memory = Memory(size_bytes, device)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    runs = []
    for _ in range(6):
        synchronize()
        started = time.perf_counter()
        summing = Summing(ArenaViews(memory, size_bytes, device), size_bytes, device)  # type: ignore[arg-type]
        summing.extend(size_bytes)
        enqueued = time.perf_counter()
        values = summing.values()
        runs.append({"enqueued_ms": 1e3 * (enqueued - started), "ms": 1e3 * (time.perf_counter() - started)})
    first = values[0]
    memory.words[PIECE_BYTES // 8 * 3 + 12345] ^= 1 << 17
    summing = Summing(ArenaViews(memory, size_bytes, device), size_bytes, device)  # type: ignore[arg-type]
    summing.extend(size_bytes)
    changed = [index for index, pair in enumerate(zip(values, summing.values(), strict=True)) if pair[0] != pair[1]]
    report = {
        "gib": size_bytes / (1 << 30),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "runs": runs,
        "gib_per_s": size_bytes / (1 << 30) / (min(run["ms"] for run in runs) / 1e3),
        "one_bit_flipped_in_piece_3_found_in": changed,
        "first_value": first,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
