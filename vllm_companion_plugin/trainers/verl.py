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

import functools
import os
import re
from collections.abc import AsyncGenerator
from typing import Any

import ray
from verl.checkpoint_engine import CheckpointEngineRegistry

from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.client.casting import cast
from vllm_companion_plugin.errors import EngineVersionError

SWITCH_TIMEOUT_S = 120.0
_Nccl: Any = CheckpointEngineRegistry.get("nccl")


@CheckpointEngineRegistry.register("companion")
class CompanionCheckpointEngine(_Nccl):  # type: ignore[misc]
    """verl's backend `nccl` up to the GPU; from there on the companion.

    Args:
        bucket_size: bytes that are received at a time.
        model: as the engines have it.
        others: as of verl's backend `nccl`.
    """

    wire_format = "delta_flush"
    """Of an empty stream in this format verl loads nothing, and calls no method of vLLM's workers."""

    def __init__(self, bucket_size: int, *, model: str, **others: Any) -> None:
        super().__init__(bucket_size, **others)
        self._model = model
        self._has_received = False

    @functools.cached_property
    def _client(self) -> CompanionClient:
        """Of the GPU of a worker that receives. Kept, because it keeps the process of processed updates."""
        return CompanionClient()

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[Any, None]:
        """Write what arrives into the companion of this GPU. Yields nothing.

        Raises:
            CompanionError: it cannot be written; nothing of it stays.
        """
        with self._client.update(self._model, f"step-{global_steps}", name="verl") as new:
            dtypes = new.checkpoint_dtypes
            async for name, tensor in super().receive_weights(global_steps=global_steps):
                # It has landed when this returns: the next bucket comes into the same memory.
                new.load(cast([(name, tensor)], dtypes))
        self._has_received = True
        nothing: tuple[Any, ...] = ()
        for each in nothing:
            yield each

    def finalize(self) -> None:
        """All workers have received. The first one of each replica has its engine switch.

        Raises:
            EngineVersionError: this verl names its workers otherwise, so that nobody knows their engine.
            RayTaskError: the engine says why it cannot switch. It goes on with what it had.
        """
        super().finalize()
        received, self._has_received = self._has_received, False
        if received and int(os.environ["RANK"]) == 0:
            server = ray.get_actor(_server_of(os.environ.get("WG_PREFIX", "")))
            ray.get(server.collective_rpc.remote("companion_update"), timeout=SWITCH_TIMEOUT_S)


def _server_of(group: str) -> str:
    """The name of the actor whose engine has these workers, as in verl/workers/rollout/replica.py: init_standalone."""
    replica = re.fullmatch(r"rollout_(?:standalone|colocate)_(\d+)(_.*)?", group)
    if replica is None:
        raise EngineVersionError(f"verl calls the workers of a replica {group!r}; 0.9 has rollout_standalone_0.")
    return f"vllm_server_{replica[1]}_0{replica[2] or ''}"
