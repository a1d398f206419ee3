"""verl: the checkpoint engine `companion`, which importing this module registers.

    rollout.checkpoint_engine.backend=companion
    rollout.checkpoint_engine.custom_backend_module=vllm_companion_plugin.trainers.verl
    +rollout.checkpoint_engine.engine_kwargs.companion.model=org/model

Weights come from the actors by NCCL, as with verl's backend `nccl`, to a worker of verl's beside each worker of vLLM.
There they are written into the companion of that GPU, while the engine has the weights of before. When all have been
written each replica maps them. Engines load with `load_format=companion`. Written for the shapes of verl 0.9.1:
`CheckpointEngineManager.update_weights` stops all replicas, clears their caches, has all workers receive, and calls
`finalize` when all have.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Any

import ray
from verl.checkpoint_engine import CheckpointEngineRegistry

from vllm_companion_plugin.client.api import CompanionClient

SWITCH_TIMEOUT_S = 120.0
_Nccl: Any = CheckpointEngineRegistry.get("nccl")


@CheckpointEngineRegistry.register("companion")
class CompanionCheckpointEngine(_Nccl):  # type: ignore[misc]
    """verl's backend `nccl` up to the GPU; from there on the companion.

    Args:
        bucket_size: bytes that are received at a time.
        model: as the engines have it.
        server: name of the Ray actor of the engine whose workers these are, with `{replica}`; verl's own by default.
        replica_size: workers of a replica: tensor times pipeline times data parallel size.
        others: as of verl's backend `nccl`.
    """

    wire_format = "delta_flush"
    """Of an empty stream in this format verl loads nothing, and calls no method of vLLM's workers."""

    def __init__(
        self,
        bucket_size: int,
        *,
        model: str,
        server: str = "vllm_server_{replica}_0",
        replica_size: int = 1,
        **others: Any,
    ) -> None:
        super().__init__(bucket_size, **others)
        self._model, self._server, self._replica_size = model, server, replica_size
        self._has_received = False

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[Any, None]:
        """Write what arrives into the companion of this GPU. Yields nothing.

        Raises:
            CompanionError: it cannot be written; nothing of it stays.
        """
        with CompanionClient().update(self._model, f"step-{global_steps}", name="verl") as new:
            async for name, tensor in super().receive_weights(global_steps=global_steps):
                new.load([(name, tensor)])  # has landed when it returns: the next bucket comes into the same memory
        self._has_received = True
        nothing: tuple[Any, ...] = ()
        for each in nothing:
            yield each

    def finalize(self) -> None:
        """All workers have received. The first one of each replica has its engine switch.

        Raises whatever the engine says if it cannot. It goes on with what it had.
        """
        super().finalize()
        received, self._has_received = self._has_received, False
        replica, rank = divmod(int(os.environ["RANK"]), self._replica_size)
        if received and rank == 0:
            server = ray.get_actor(self._server.format(replica=replica))
            ray.get(server.collective_rpc.remote("companion_update"), timeout=SWITCH_TIMEOUT_S)
