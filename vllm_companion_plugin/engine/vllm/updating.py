"""What a worker of vLLM does when somebody has written new weights: methods for `collective_rpc`.

`companion_prepare` and `companion_switch` are the two phases of a fleet, `companion_update` is both in one call. The
names begin so because vLLM refuses a worker extension that has a method of a worker.
"""

from __future__ import annotations

from typing import Any

from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import BadRequestError


def let_update() -> None:
    """Give the workers of this process these methods. Idempotent."""
    patches.UPDATE.add(companion_update)
    patches.PREPARE.add(companion_prepare)
    patches.SWITCH.add(companion_switch)
    patches.FORGET.add(companion_forget)


def companion_prepare(self: Any, generations: dict[str, int] | None = None) -> dict[str, int]:
    """Get hold of the current generation of the worker's weights, or another one, and prove it. Nothing changes.

    What was prepared before is forgotten.

    Args:
        generations: by model; without, the current ones.

    Returns:
        The generation that each will have, by model and role.

    Raises:
        CompanionError: one of them cannot advance.
    """
    return current().prepare_switch(generations or {}).targets


def companion_switch(self: Any) -> dict[str, int]:
    """Map what was prepared, at the same addresses.

    Reset the prefix cache afterwards: what it has was computed with the weights of before.

    Returns:
        The generation of each, by model and role.

    Raises:
        BadRequestError: nothing is prepared.
        CompanionError: one of them cannot be mapped; all are as they were, and nothing is prepared any more.
    """
    if (switch := current().take_switch()) is None:
        raise BadRequestError("Nothing is prepared here to switch to.", remedy="Call companion_prepare first.")
    found = switch.carry_out()
    reset_caches(self.model_runner)
    return found


def companion_forget(self: Any) -> None:
    """What was prepared is not wanted. Idempotent."""
    current().forget_switch()


def companion_update(self: Any, generations: dict[str, int] | None = None) -> dict[str, int]:
    """`companion_prepare` and `companion_switch`, with what they take, return and raise."""
    companion_prepare(self, generations)
    return companion_switch(self)


def reset_caches(model_runner: Any) -> None:
    """Forget what a worker itself has computed with the weights of before."""
    for name in ("reset_encoder_cache", "reset_mm_cache"):
        if (reset := getattr(model_runner, name, None)) is not None:
            reset()
