"""What the first model of a process would wait for, done while the companion is asked."""

from __future__ import annotations

import functools
import threading

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.companion")


@functools.cache
def load_kernels(device: torch.device) -> None:
    """Have the kernels loaded, in a thread, with which constructors compute tables of positions. Once in a process.

    CUDA loads a kernel when it is first used, about 10 ms each; nothing else in building without weights takes longer.
    """
    if device.type == "cuda":
        threading.Thread(target=_use, args=(device,), name="companion-warming", daemon=True).start()


def _use(device: torch.device) -> None:
    """As vLLM's rotary embeddings do, by few numbers."""
    try:
        with torch.inference_mode():
            steps = torch.arange(0, 8, 2, dtype=torch.float, device=device)
            frequencies = torch.arange(4, dtype=torch.float, device=device)[:, None] * (1.0 / 1e4 ** (steps / 8))
            table = torch.cat((frequencies.cos(), frequencies.sin()), dim=-1)
            table.to(torch.bfloat16)
            table.to(torch.float16)
    except RuntimeError as error:  # the engine meets it too, and says it
        logger.debug("Kernels were not loaded ahead: %s", error)
