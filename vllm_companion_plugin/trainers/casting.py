"""The type that an engine has, for the weights of trainers that compute in another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from vllm_companion_plugin.client.processed import ProcessedUpdate
from vllm_companion_plugin.client.update import Update


def cast(
    weights: Iterable[tuple[str, torch.Tensor]], new: Update | ProcessedUpdate
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` in the types of the checkpoint, as vLLM casts when it loads; what the checkpoint has not, as it is."""
    dtypes = new.checkpoint_dtypes
    for name, tensor in weights:
        yield name, tensor.detach().to(dtypes.get(name, tensor.dtype))
