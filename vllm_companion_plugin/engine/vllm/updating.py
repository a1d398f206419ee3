"""What a worker of vLLM does when somebody has written new weights: methods for `collective_rpc`.

`companion_update` is for one engine. The others are for a fleet, whose engines all prepare before one of them switches;
they answer as `core/plans.py` says. The names begin so because vLLM refuses a worker extension that has a method of a
worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.core.plans import Plan, done_answer, error_answer, plans_answer
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.switching import Switch
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import BadRequestError, CompanionError


def let_update() -> None:
    """Give the workers of this process these methods. Idempotent."""
    patches.UPDATE.add(companion_update)
    patches.PREPARE.add(companion_prepare)
    patches.SWITCH.add(companion_switch)
    patches.BACK.add(companion_back)
    patches.FORGET.add(companion_forget)


def companion_update(self: Any, generations: dict[str, int] | None = None) -> dict[str, int]:
    """Map the current generation of the worker's weights, or another one, at the same addresses.

    Reset the prefix cache and the encoder's afterwards: what they have was computed with the weights of before. Here
    they cannot be, as the scheduler would count on what is gone.

    Args:
        generations: by model; without, the current ones.

    Returns:
        The generation of each, by model and role.

    Raises:
        CompanionError: one of them cannot advance; all are as they were.
    """
    session = current()
    session.prepare_switch(generations or {})
    return _taken().carry_out()


def companion_prepare(self: Any, generations: dict[str, int] | None = None) -> dict[str, Any]:
    """Get hold of the current generation of the worker's weights, or another one, and prove it. Nothing changes.

    What was prepared before is forgotten, and what was kept to go back to.

    Args:
        generations: by model; without, the current ones.
    """
    return _answered(lambda: plans_answer(_plans(current().prepare_switch(generations or {}))))


def companion_switch(self: Any) -> dict[str, Any]:
    """Map what was prepared, at the same addresses, and keep what was mapped until `companion_forget`.

    The engine is paused, and its caches have been reset: what they had was computed with the weights of before. After
    an error all are as they were, and nothing is prepared any more.
    """
    return _answered(_switch)


def companion_back(self: Any) -> dict[str, Any]:
    """Map what was mapped before `companion_switch`. A worker that has not switched does nothing."""
    return _answered(_go_back)


def companion_forget(self: Any) -> dict[str, Any]:
    """What was prepared is not wanted, and neither is the way back. Idempotent."""
    current().forget_switch()
    return done_answer()


def _answered(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return act()
    except CompanionError as error:
        return error_answer(error)


def _plans(switch: Switch) -> dict[str, Plan]:
    targets, versions = switch.targets, switch.versions
    return {
        title: Plan(targets[title], versions[title], held.generation, held.published.version)
        for title, held in switch.mapped.items()
    }


def _switch() -> dict[str, Any]:
    switch = _taken()
    switch.carry_out(keep_ways_back=True)
    current().keep_switch(switch)
    return done_answer()


def _go_back() -> dict[str, Any]:
    if (switch := current().take_switch()) is not None:
        switch.go_back()
    return done_answer()


def _taken() -> Switch:
    if (switch := current().take_switch()) is None:
        raise BadRequestError("Nothing is prepared here to switch to.", remedy="Call companion_prepare first.")
    return switch
