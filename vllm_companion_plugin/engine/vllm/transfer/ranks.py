"""All ranks of an engine take a step of an update, or none does.

vLLM notes on each rank whether an update is under way. Were only some of them to fail, the others would go on with it,
and serve one model of two generations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from vllm.distributed import parallel_state

from vllm_companion_plugin.errors import UpdateRefusedError


@contextmanager
def together(step: str) -> Iterator[Callable[[], None]]:
    """A step that each rank of this engine tries at the same time.

    Args:
        step: what it does, for the message.

    Yields:
        Called once by a rank that has succeeded; it raises `UpdateRefusedError` if another rank has not.
    """
    told = False

    def succeeded() -> None:
        nonlocal told
        told = True
        if not _all_succeeded(True):
            raise UpdateRefusedError(
                f"Another rank of this engine could not {step}, so this one did not.",
                remedy="The log of the engine has its error.",
            )

    try:
        yield succeeded
    finally:
        if not told:
            _all_succeeded(False)


def _all_succeeded(has_succeeded: bool) -> bool:
    count = torch.tensor([int(has_succeeded)], dtype=torch.int32)
    for group in _groups():
        # One after the other: afterwards each rank has the least of all ranks, whatever their dimensions.
        distributed.all_reduce(count, distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(count.item())


def _groups() -> Iterator[Any]:
    """Those that together join all ranks of an engine, and no other engine's, as ranks of data parallelism are."""
    for name in ("tp", "pcp", "pp"):
        get = getattr(parallel_state, f"get_{name}_group", None)
        if get is not None and (group := get()).world_size > 1:
            yield group
