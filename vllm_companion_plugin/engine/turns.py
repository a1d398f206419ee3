"""The ranks of one engine are elected in an order that all engines share.

Otherwise two engines that start together could each be elected on one device and wait there for the other's
load on another device, for ever where no rank loads before all ranks are ready: vLLM's first Ray executor
initializes all workers before any of them loads, and some load formats and expert parallel kernels exchange
something while they load.
"""

from __future__ import annotations

import contextlib
import itertools
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store
from vllm.logger import init_logger

logger = init_logger("vllm.companion")

# All ranks take the same decisions, so their counts agree.
_turns = itertools.count()


class Turn:
    """One decision of this rank, among those of all ranks of its engine.

    Ranks are ordered by device, because all engines of a host must agree, and then by number. A rank that does not
    get on in `timeout_s` is waited for no longer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        self._announced = False
        if not self._alone:
            self._store, self._own = _get_default_store(), distributed.get_rank()
            self._ranks = range(distributed.get_world_size())
            self._name = f"vllm-companion/{next(_turns)}"

    def announce(self, device_id: str) -> None:
        """Say where this rank stands in the order."""
        if not self._alone and not self._announced:
            self._announced = True
            self._store.set(f"{self._name}/device/{self._own}", device_id)

    def wait(self) -> None:
        """Return once all ranks before this one have decided."""
        if self._alone:
            return
        try:
            self._store.wait([f"{self._name}/device/{rank}" for rank in self._ranks], self._timeout)
            order = sorted(self._ranks, key=lambda rank: (self._store.get(f"{self._name}/device/{rank}"), rank))
            before = order[: order.index(self._own)]
            self._store.wait([f"{self._name}/decided/{rank}" for rank in before], self._timeout)
        except RuntimeError as error:  # DistError, but for some stores
            logger.warning("Rank %d decides without the ranks before it: %s", self._own, error)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the store's host is gone, and this engine with it
            self.announce("")  # if this rank has failed: nobody waits for it
            if not self._alone:
                self._store.set(f"{self._name}/decided/{self._own}", "")
