"""TRL: adapters of its trainers go to rollout engines as adapters, while the base stays where engines have it.

TRL itself merges an adapter into the base for each step, and sends all of it. A base on a companion's memory
(`training.from_companion`) is not written to. Written for the shapes of TRL 1.16.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.trainers.trl import step

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from vllm_companion_plugin.settings import Given
    from vllm_companion_plugin.training import Colocated

logger = logging.getLogger("vllm.companion.trainers")


def vllm_generation(
    adapter: str, both: Colocated | None = None, *, device: str | torch.device | None = None, **settings: Unpack[Given]
) -> type[Any]:
    """TRL's `VLLMGeneration`, for trainers whose model is a `PeftModel`.

        from trl.trainer import grpo_trainer
        grpo_trainer.VLLMGeneration = vllm_generation("my-adapter")   # before the trainer is made

    With `vllm_mode="server"` the server is `vllm serve MODEL --load-format companion --enable-lora` with
    VLLM_SERVER_DEV_MODE=1, and with `vllm_mode="colocate"` the engine is that of `both`.

    Args:
        adapter: under which engines are asked for it; it is published before each step's first rollout.
        both: what `training.colocated` returned, for `vllm_mode="colocate"`. The caller closes it.
        device: whose companion the trainer publishes to; None: the trainer's own.
        settings: as of `CompanionClient`.
    """
    from trl.generation import vllm_generation as of_trl

    class Client(of_trl.VLLMClient):  # type: ignore[misc]
        """A client that never sends weights."""

        def reset_prefix_cache(self) -> None:
            """Nothing: a prefix cache never mixes generations of an adapter."""

    class CompanionGeneration(of_trl.VLLMGeneration):  # type: ignore[misc]
        """Rollouts with the adapter of a companion.

        The constructor raises `BadRequestError` for what has no adapter, no engine, or more ranks than this can serve.
        """

        def _init_vllm(self) -> None:
            _check(self, both)
            self._sent = 0
            if both is not None:
                self.llm = _Engine(adapter, both)
            elif self.accelerator.is_main_process:
                url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
                self.vllm_client = Client(base_url=url, connection_timeout=self.server_timeout)
                self._companion = CompanionClient(device or self.accelerator.device, **settings)
            self.accelerator.wait_for_everyone()

        @property
        def _llm_weights_sleeping(self) -> bool:
            """Whether TRL has to send the weights before it wakes the engine: they never leave."""
            return False

        @_llm_weights_sleeping.setter
        def _llm_weights_sleeping(self, asleep: bool) -> None:
            pass

        def sync_weights(self) -> None:
            """Publish the adapter as it is now. Raises as `CompanionClient.publish_adapter`."""
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            with self._dist.gather_params(parameters):
                version = step(self._sent + 1)
                if both is not None and adapter in both.adapters:
                    both.publish(adapter, version)
                elif both is not None:
                    both.client.publish_adapter(adapter, self.model, version=version)
                elif self.accelerator.is_main_process:
                    self._companion.publish_adapter(adapter, self.model, version=version)
                    self.vllm_client.model = adapter
            self._sent += 1

    return CompanionGeneration


def _check(generation: Any, both: Colocated | None) -> None:
    """Raise `BadRequestError` unless this trainer can have its rollouts with an adapter."""
    if not hasattr(generation.model, "peft_config"):
        raise BadRequestError(
            "The trainer's model has no adapter.", remedy="Give the trainer a peft_config, or a PeftModel."
        )
    if (generation.mode == "colocate") is not (both is not None):
        raise BadRequestError(
            f"vllm_mode={generation.mode!r} {'has no' if both is None else 'is not for an'} engine of this process.",
            remedy='Give vllm_generation what training.colocated returned, and say vllm_mode="colocate".',
        )
    if generation._dist.is_fsdp:
        raise BadRequestError(
            "FSDP spreads an adapter over its ranks.", remedy="Have each process train a whole one (DDP, or ZeRO)."
        )
    if both is None:
        return
    if generation.tensor_parallel_size > 1:
        raise BadRequestError(
            f"vllm_tensor_parallel_size={generation.tensor_parallel_size}: the engine of this process has one rank."
        )
    config = both.engine.llm_engine.vllm_config.model_config
    if config.logprobs_mode != "processed_logprobs":
        logger.warning(
            "The engine has logprobs_mode=%s, which biases TRL's importance sampling correction. Start it with "
            '`colocated(model, {"logprobs_mode": "processed_logprobs"})`.',
            config.logprobs_mode,
        )


class _Engine:
    """What TRL uses of vLLM's `LLM`, of the engine of `both`: each request is one of the adapter."""

    def __init__(self, adapter: str, both: Colocated) -> None:
        self._adapter, self._both = adapter, both
        self.llm_engine = both.engine.llm_engine
        self._can_sleep = bool(self.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def generate(self, prompts: Any, sampling_params: Any, **options: Any) -> list[Any]:
        return self._both.sample(self._adapter, prompts, sampling_params, **options)

    def sleep(self, level: int) -> None:
        """Give back the KV cache, if the engine can. Weights stay, since the trainer uses them."""
        if self._can_sleep:
            self._both.engine.sleep(level=min(level, 1))

    def wake_up(self, tags: list[str]) -> None:
        if self._can_sleep and "kv_cache" in tags:
            self._both.engine.wake_up()
