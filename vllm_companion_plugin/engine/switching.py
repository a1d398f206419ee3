"""New weights for all models of a living engine: prepared one after the other, then mapped all together, or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Prepared
from vllm_companion_plugin.engine.live import LiveModel

logger = init_logger("vllm.companion")


class Switch:
    """A generation for each of some models, prepared and not mapped yet. Nothing has changed until `carry_out`.

    It keeps the memory of those generations, until it is carried out or closed.

    Args:
        models: of one engine.
        generations: by model, as its users name it, or by id of its key; the current one if it is 0, or left out.

    Raises:
        CompanionError: one of them cannot advance, as of `Attachment.prepare`.
    """

    def __init__(self, models: list[LiveModel], generations: Mapping[str, int]) -> None:
        self._steps: list[tuple[LiveModel, Prepared]] = []
        with ExitStack() as undo:
            for model in models:
                attachment = model.attachment
                number = generations.get(attachment.held.key.id, generations.get(attachment.model, 0))
                prepared = model.attachment.prepare(number, model.settings)
                undo.callback(prepared.close)
                self._steps.append((model, prepared))
            undo.pop_all()

    @property
    def targets(self) -> dict[str, int]:
        """The generation that each will have, by model and role."""
        return {_title(model): prepared.generation for model, prepared in self._steps}

    @property
    def versions(self) -> dict[str, str]:
        """How whoever wrote them calls these generations, by model and role; empty: a checkpoint."""
        return {_title(model): prepared.held.published.version for model, prepared in self._steps}

    def carry_out(self, confirm: Callable[[], None] | None = None) -> dict[str, int]:
        """Map all of them. Nothing may use the models meanwhile.

        What was computed with the weights of before (prefix cache) is the caller's to reset.

        Args:
            confirm: called when all are mapped; if it raises, all are as they were.

        Returns:
            The generation of each, by model and role.

        Raises:
            CompanionError: one of them cannot be mapped. Those before it are as they were, and this is closed.
        """
        steps = [each for each in self._steps if each[1].generation != each[0].attachment.generation]
        with ExitStack() as unused, ExitStack() as undo:
            unused.callback(self.close)
            for model, prepared in steps:
                back = model.attachment.way_back()
                unused.callback(back.close)
                undo.callback(_go_back, model, back)
                _advance(model, prepared)
            if confirm is not None:
                confirm()
            undo.pop_all()
        return {_title(model): model.attachment.generation for model, _ in self._steps}

    def close(self) -> None:
        """It will not be carried out. Idempotent."""
        for _, prepared in self._steps:
            prepared.close()


def _advance(model: LiveModel, prepared: Prepared) -> None:
    started = time.perf_counter()
    attachment, before = model.attachment, model.attachment.generation
    attachment.advance(prepared)
    logger.info(
        "%s: generation %d (%s) in place of %d, in %.4f s.",
        *(attachment.label, attachment.generation, attachment.held.published.version or "as loaded"),
        *(before, time.perf_counter() - started),
    )


def _go_back(model: LiveModel, back: Prepared) -> None:
    model.attachment.advance(back)
    logger.warning("%s has generation %d again, as before.", model.attachment.label, model.attachment.generation)


def _title(model: LiveModel) -> str:
    return f"{model.attachment.model} ({model.attachment.held.key.role})"
