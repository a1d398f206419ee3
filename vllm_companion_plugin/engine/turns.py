"""The ranks of one engine are elected in an order that all engines share.

Otherwise two engines that start together could each be elected on one device and wait there for the other's
load on another device, for ever where no rank loads before all ranks are ready: vLLM's first Ray executor
initializes all workers before any of them loads, and some load formats and expert parallel kernels exchange
something while they load.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store
from vllm.logger import init_logger

logger = init_logger("vllm.companion")

# All ranks take the same decisions, so their counts agree.
_decisions = itertools.count()


@contextlib.contextmanager
def turn(device_id: str, timeout_s: float) -> Iterator[Callable[[], None]]:
    """While open, this rank decides. Gives a function that returns once all ranks before it have decided.

    Ranks are ordered by device, because all engines of a host must agree, and then by number. A rank that does not
    report in `timeout_s` is waited for no longer.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield lambda: None
        return
    store, own, ranks = _get_default_store(), distributed.get_rank(), range(distributed.get_world_size())
    timeout = timedelta(seconds=timeout_s)
    name = f"vllm-companion/{next(_decisions)}"

    def wait() -> None:
        try:
            store.wait([f"{name}/device/{rank}" for rank in ranks], timeout)
            order = sorted(ranks, key=lambda rank: (store.get(f"{name}/device/{rank}"), rank))
            store.wait([f"{name}/decided/{rank}" for rank in order[: order.index(own)]], timeout)
        except distributed.DistError as error:
            logger.warning("Rank %d decides without the ranks before it: %s", own, error)

    store.set(f"{name}/device/{own}", device_id)
    try:
        yield wait
    finally:
        with contextlib.suppress(distributed.DistError):  # its host is gone, and this engine with it
            store.set(f"{name}/decided/{own}", "")
