"""TRL: weights of its trainers go to rollout engines through the companion of the device that they share.

The server is `vllm serve MODEL --load-format companion` with VLLM_SERVER_DEV_MODE=1, and needs no weight-transfer
backend. Written for the shapes of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.client.casting import cast
from vllm_companion_plugin.errors import BadRequestError, CompanionError, FleetError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vllm_companion_plugin.settings import Given

READY_TIMEOUT_S = 600.0
LOOK_TIMEOUT_S = 10.0
"""For an entry that was written a moment ago."""


def step(number: int) -> str:
    """The version of the `number`th weights that a trainer sends."""
    return f"step-{number}"


class CompanionWeightTransfer:
    """The argument `weight_transfer` of TRL's `AsyncGRPOTrainer`.

    Weights are written while the engines generate. They pause for the switch alone, so `pause` and `resume` do nothing.

    Args:
        model: as the engines have it.
        engines: as of `fleet.advance`.
        version: names the weights by how many times they were sent; 1 is the first time, before the first step.
        device: which the trainer's main process shares with the engines; None: torch's current one.
        settings: as of `CompanionClient`.
    """

    def __init__(
        self,
        model: str,
        engines: Sequence[Any],
        *,
        version: Callable[[int], str] = step,
        device: str | torch.device | None = None,
        **settings: Unpack[Given],
    ) -> None:
        self._model, self._engines, self._version = model, list(engines), version
        self._client = CompanionClient(device, **settings)
        self._sent = 0

    def init_weight_transfer(self) -> None:
        """Wait until an engine has loaded the model. Raises `WaitTimeoutError` if none has after 10 minutes."""
        self._client.wait_ready(self._model, timeout_s=READY_TIMEOUT_S)

    def pause(self) -> None:
        """Nothing: engines may generate while weights are written."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write these, under the names of the checkpoint and in its types, and have the engines switch.

        Raises:
            CompanionError: they cannot be written. The engines go on with what they have.
            FleetError: not all engines have switched. If none has, what was current before is so again, as engines that
                start or wake would have other weights than those that serve; the message says if that failed, too.
        """
        version = self._version(self._sent + 1)
        with self._client.update(self._model, version, name="TRL") as new:
            new.load(cast(iterator, new.checkpoint_dtypes))
        self._sent += 1
        try:
            self._client.advance(self._model, self._engines)
        except CompanionError as error:
            report = error.report if isinstance(error, FleetError) else None
            if report is not None and any(engine.state == "new" for engine in report.engines):
                raise
            said = self._take_back(version, new.generation)
            raise FleetError(f"{error.what} {said}", remedy=error.remedy, report=report) from error

    def _take_back(self, version: str, generation: int) -> str:
        """Make current again what was so before `generation`; what became of that, in a sentence."""
        try:
            entry = self._client.wait_ready(self._model, timeout_s=LOOK_TIMEOUT_S)
            before = next((each.follows for each in entry.generations if each.number == generation), 0)
            if not before:  # a companion that died since took that with it
                return f"Nobody knows any more what was current before {version}."
            self._client.make_current(self._model, before, key_id=entry.key.id, base=generation)
        except CompanionError as error:
            return f"What was current before {version} could not be made so again: {error}"
        return f"Generation {before} is current again."

    def resume(self) -> None:
        """Nothing: `send_weights` has had the engines resume."""

    def destroy(self) -> None:
        """End the process of processed updates, if there was one. The engines keep what they have."""
        self._client.close()


def vllm_client(model: str, **settings: Unpack[Given]) -> type[Any]:
    """TRL's `VLLMClient`, for trainers with `vllm_mode="server"`, which make their client themselves.

        from trl.generation import vllm_generation
        vllm_generation.VLLMClient = vllm_client("org/model")   # before the trainer is made

    Args:
        model: as the engine has it.
        settings: as of `CompanionClient`.
    """
    from trl.generation.vllm_client import VLLMClient

    class CompanionVLLMClient(VLLMClient):  # type: ignore[misc]
        """A client whose weights go through the companion."""

        def init_communicator(self, device: torch.device | str | int = 0) -> None:
            named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
            self._transfer = CompanionWeightTransfer(model, [self.base_url], device=named, **settings)
            self._transfer.init_weight_transfer()

        def update_named_params(
            self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
        ) -> None:
            self._transfer.send_weights(named_params)

        def close_communicator(self) -> None:
            self._transfer.destroy()

        def _start_weight_update(self) -> None:
            raise BadRequestError(
                "This client sends all weights at once, because engines switch once for all of them.",
                remedy="Call update_named_params.",
            )

    return CompanionVLLMClient
