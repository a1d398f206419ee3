"""What a worker of vLLM does in a weight update of the backend `companion`.

vLLM's four calls: `init` looks whether the worker serves from a companion. `start` looks whether it can take other
weights now. `update` says which: they are fetched and proved, and nothing changes. `finish` maps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from vllm_companion_plugin.engine.live import LiveModel, engine_of
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm.ranks import together
from vllm_companion_plugin.errors import ArenaError, BadRequestError, LayoutError, NotShareableError
from vllm_companion_plugin.host.models import model_name


@dataclass
class CompanionInitInfo(WeightTransferInitInfo):
    """Attributes: model: that the trainer writes; empty: whichever this engine serves."""

    model: str = ""


@dataclass
class CompanionUpdateInfo(WeightTransferUpdateInfo):
    """What a trainer has written, in values that JSON has.

    Attributes:
        generations: by device (a GPU's UUID, or "cpu") and by id of the entry's key, for all ranks of all engines.
        version: the trainer's name for them; empty: it does not matter.
        forget: instead, nothing is to change. `finish` then ends the update without doing anything.
    """

    generations: dict[str, dict[str, int]] = field(default_factory=dict)
    version: str = ""
    forget: bool = False


class CompanionTransferEngine(WeightTransferEngine):
    """Of one worker: it maps generations that a trainer has written into the companion, all ranks or none.

    An error of `start` or `update` ends the update on all ranks. After one of `finish` vLLM takes it for open: announce
    a generation again, or say `forget`, and finish it. Whatever fails, the engine goes on with what it had.

    What was computed with the weights of before in the KV cache is the caller's to reset, as with any backend of vLLM.
    """

    init_info_cls = CompanionInitInfo
    update_info_cls = CompanionUpdateInfo
    # A worker's target and draft are switched together, by the update of the target.
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self._engine = engine_of(vllm_config)
        self._is_forgotten = False

    def init_transfer_engine(self, init_info: CompanionInitInfo) -> None:
        """Look whether this worker serves the trainer's model from a companion.

        Raises:
            NotShareableError: it has weights of its own, or another model.
        """
        models = {model.attachment.model for model in self._served()}
        if init_info.model and model_name(init_info.model) not in models:
            raise NotShareableError(
                f"This engine serves {', '.join(sorted(models))}, and the trainer writes {init_info.model}."
            )

    def start_weight_update(self) -> None:
        """Look whether all models of this worker can take other weights now.

        Raises:
            NotShareableError: as `init_transfer_engine`.
            ArenaError: one of them sleeps, writes to memory of its own, or its memory cannot leave its addresses.
            UpdateRefusedError: another rank cannot.
        """
        with together("begin an update") as succeeded:
            current().forget_switch()
            self._is_forgotten = False
            for model in self._served():
                model.attachment.check_can_advance()
                if not model.attachment.can_sleep:
                    raise ArenaError(
                        f"{model.attachment.label} cannot take other weights: memory of kind "
                        f"{model.attachment.held.arena.kind} cannot leave its addresses."
                    )
            succeeded()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As `receive_weights`. vLLM's own would wait for copies on the device, and there are none."""
        try:
            with together("prepare the new weights") as succeeded:
                self.receive_weights(self.parse_update_info(update_info))
                succeeded()
        except BaseException:
            current().forget_switch()  # it keeps a generation's memory, also where only another rank could not
            raise

    def receive_weights(self, update_info: CompanionUpdateInfo) -> None:
        """Get hold of the generations of this worker's models, and prove them. Nothing changes.

        Raises:
            BadRequestError: nothing is named for this worker's device, or for its entry there, or the generation has
                another version.
            CompanionError: as `Attachment.prepare`.
        """
        current().forget_switch()
        self._is_forgotten = update_info.forget
        if self._is_forgotten:
            return
        switch = current().prepare_switch(dict(self._wanted(update_info)), engine=self._engine)
        if update_info.version and update_info.version not in switch.versions.values():
            current().forget_switch()
            raise BadRequestError(
                f"The trainer announced {update_info.version}, and these are {switch.targets}, "
                f"versions {switch.versions}.",
                remedy="Have one trainer at a time update these engines.",
            )

    def finish_weight_update(self) -> None:
        """Map what was announced, at the same addresses, between two steps of the engine.

        Raises:
            BadRequestError: nothing was announced since `start_weight_update`.
            UpdateRefusedError: another rank could not map it.
            CompanionError: it cannot be mapped. All is as it was before, and nothing is announced any more.
        """
        if self._is_forgotten:
            self._is_forgotten = False
            return
        with together("map the new weights") as succeeded:
            if (switch := current().take_switch()) is None:
                raise BadRequestError(
                    f"No weights of {self.model_config.model} were announced in this update.",
                    remedy="Call update_weights before finish_weight_update.",
                )
            switch.carry_out(succeeded)

    def shutdown(self) -> None:
        """Forget what was announced. Idempotent."""
        current().forget_switch()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> NoReturn:
        """vLLM 0.26 asks for it, and trainers of today do not call it. Raises `BadRequestError`."""
        raise BadRequestError(
            "The backend companion has a trainer that is made by WeightTransferTrainerFactory.trainer_init.",
            remedy="See docs/rl.md, or write with CompanionClient.update.",
        )

    def _served(self) -> list[LiveModel]:
        models = current().models(self._engine)
        if not any(model.attachment.held.key.role == "target" for model in models):
            outcomes = [each for each in current().outcomes if each.role == "target"]
            why = f" ({outcomes[-1].reason or outcomes[-1].what})" if outcomes else ""
            raise NotShareableError(
                f"{self.model_config.model} has weights of its own in this engine{why}, which no trainer reaches.",
                remedy="Start it with --load-format companion, and without the setting share=copy.",
            )
        return models

    def _wanted(self, update_info: CompanionUpdateInfo) -> Iterator[tuple[str, int]]:
        """Of each model whose entry was written: the id of its key, and the generation."""
        for model in self._served():
            attachment = model.attachment
            key = attachment.held.key
            here = update_info.generations.get(attachment.device_id)
            if here is None:
                raise BadRequestError(
                    f"{attachment.label} is not on {', '.join(sorted(update_info.generations)) or 'any device'}, which "
                    "the trainer has written to.",
                    remedy=f"Have the trainer write to {attachment.device_id}, too.",
                )
            if key.id in here:
                yield key.id, here[key.id]
            elif key.role == "target":
                raise LayoutError(
                    f"{attachment.label} has the key {key.id[:12]}, and the trainer has written "
                    f"{', '.join(each[:12] for each in sorted(here))}: engines that are configured in another way.",
                    remedy="`vllm-companion status` shows them; have the trainer write that one, too.",
                )
