"""New weights for all models of a living engine: prepared one after the other, then mapped all together, or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Prepared
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.errors import EntryNotFoundError

logger = init_logger("vllm.companion")


class Switch:
    """A generation for each of some models, prepared and not mapped yet. Nothing has changed until `carry_out`.

    It keeps the memory of those generations, until it is carried out or closed.

    Args:
        models: of one engine.
        generations: by id of the model's key, or by its name, or the last parts of that; the current one if it is 0, or
            left out.
        token: of whoever asks. Another one cannot carry it out, or undo it.

    Raises:
        EntryNotFoundError: `generations` names a model that is none of these.
        CompanionError: one of them cannot advance, as of `Attachment.prepare`.
    """

    def __init__(self, models: list[LiveModel], generations: Mapping[str, int], token: str = "") -> None:
        _check_names(models, generations)
        self.token = token
        self._steps: list[tuple[LiveModel, Prepared]] = []
        # What models had before they were switched, to go back to.
        self._ways_back: list[tuple[LiveModel, Prepared]] = []
        with ExitStack() as undo:
            for model in models:
                number = next((n for name, n in generations.items() if _is_called(model, name)), 0)
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

    @property
    def mapped(self) -> dict[str, Held]:
        """What each maps now, by model and role."""
        return {_title(model): model.attachment.held for model, _ in self._steps}

    def carry_out(self, confirm: Callable[[], None] | None = None, *, keep_ways_back: bool = False) -> dict[str, int]:
        """Map all of them. Nothing may use the models meanwhile.

        A generation that is trained, and mapped already, has other bytes by now: what is private is renewed.

        What was computed with the weights of before (prefix cache) is the caller's to reset.

        Args:
            confirm: called when all are mapped; if it raises, all are as they were.
            keep_ways_back: keep the memory of before until `close`, for `go_back`.

        Returns:
            The generation of each, by model and role.

        Raises:
            CompanionError: one of them cannot be mapped. Those before it are as they were, and this is closed.
        """
        steps = [(model, new) for model, new in self._steps if not model.attachment.had(new.held)]
        written = [model for model, new in self._steps if (model, new) not in steps and new.held.arena.trained]
        with ExitStack() as unused, ExitStack() as undo:
            unused.callback(self.close)
            for model, prepared in steps:
                back = model.attachment.way_back()
                self._ways_back.append((model, back))
                undo.callback(_go_back, model, back)
                _advance(model, prepared)
            for model in written:
                model.attachment.renew()
            if confirm is not None:
                confirm()
            undo.pop_all()
            if keep_ways_back:
                unused.pop_all()
        return {_title(model): model.attachment.generation for model, _ in self._steps}

    def go_back(self) -> None:
        """Map what was mapped before `carry_out`, and close this. Nothing happens if it was not carried out.

        Raises:
            CompanionError: one of them cannot be mapped; all others are.
        """
        with ExitStack() as steps:
            steps.callback(self.close)
            for model, back in self._ways_back:
                steps.callback(_go_back, model, back)

    def close(self) -> None:
        """It will neither be carried out nor undone. Idempotent."""
        for _, prepared in self._steps + self._ways_back:
            prepared.close()
        self._ways_back.clear()


def _is_called(model: LiveModel, name: str) -> bool:
    attachment = model.attachment
    return name == attachment.held.key.id or f"/{attachment.model}".endswith(f"/{name.lstrip('/')}")


def _check_names(models: list[LiveModel], generations: Mapping[str, int]) -> None:
    for name in generations:
        if not any(_is_called(model, name) for model in models):
            here = ", ".join(sorted({model.attachment.model for model in models})) or "none"
            raise EntryNotFoundError(
                f"This engine has no model {name} of a companion.", remedy=f"Its models of a companion: {here}."
            )


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
