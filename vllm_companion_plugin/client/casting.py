"""The types that an engine has, for the weights of trainers that compute in others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch


def cast(
    weights: Iterable[tuple[str, torch.Tensor]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` in these types, as vLLM casts when it loads; what is not named there, as it is.

    Args:
        dtypes: `checkpoint_dtypes` of an update.
    """
    for name, tensor in weights:
        yield name, tensor.detach().to(dtypes.get(name, tensor.dtype))
