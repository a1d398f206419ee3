"""What a worker of vLLM does when somebody has written new weights: methods for `collective_rpc`.

`companion_update` is for one engine, whose ranks agree among themselves. The others are for a fleet, whose engines all
prepare before one of them switches; they answer as `core/plans.py` says. The names begin so because vLLM refuses a
worker extension that has a method of a worker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vllm_companion_plugin.core.plans import Plan, done_answer, error_answer, plans_answer
from vllm_companion_plugin.engine.live import engine_of
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.switching import Switch
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.ranks import together
from vllm_companion_plugin.errors import BadRequestError, CompanionError


def let_update() -> None:
    """Give the workers of this process these methods, whatever became of their weights. Idempotent.

    So that a rank whose weights are its own can refuse: the others wait for what it says.
    """
    if "vllm.v1.worker.gpu_worker" not in sys.modules:  # which vLLM's worker on a CPU needs, too
        return
    patches.UPDATE.add(companion_update)
    patches.PREPARE.add(companion_prepare)
    patches.SWITCH.add(companion_switch)
    patches.BACK.add(companion_back)
    patches.FORGET.add(companion_forget)


def companion_update(self: Any, generations: dict[str, int] | None = None) -> dict[str, int]:
    """Map the current generation of the worker's weights, or another one, at the same addresses: on all ranks, or none.

    Reset the prefix cache and the encoder's afterwards: what they have was computed with the weights of before. Here
    they cannot be, as the scheduler would count on what is gone.

    Args:
        generations: by model; without, the current ones.

    Returns:
        The generation of each, by model and role.

    Raises:
        CompanionError: one of them cannot advance; all are as they were.
        UpdateRefusedError: another rank cannot; so are its.
    """
    try:
        with together("prepare the new weights") as succeeded:
            current().prepare_switch(generations or {}, engine=engine_of(self.vllm_config))
            succeeded()
        with together("map the new weights") as succeeded:
            return _taken("").carry_out(succeeded)
    except BaseException:
        current().forget_switch()  # it keeps a generation's memory, also where only another rank could not
        raise


def companion_prepare(self: Any, generations: dict[str, int] | None = None, token: str = "") -> dict[str, Any]:
    """Get hold of the current generation of the worker's weights, or another one, and prove it. Nothing changes.

    What was prepared before is forgotten, and what was kept to go back to.

    Args:
        generations: by model; without, the current ones.
        token: what the caller gives the other steps, too: somebody else may prepare meanwhile.
    """
    return _answered(lambda: _prepare(self, generations or {}, token))


def companion_switch(self: Any, token: str = "") -> dict[str, Any]:
    """Map what was prepared, at the same addresses, and keep what was mapped until `companion_forget`.

    The engine is paused, and its caches have been reset: what they had was computed with the weights of before. After
    an error all are as they were, and nothing is prepared any more.
    """
    return _answered(lambda: _switch(token))


def companion_back(self: Any, token: str = "") -> dict[str, Any]:
    """Map what was mapped before `companion_switch`. A worker that has not switched does nothing."""
    return _answered(lambda: _go_back(token))


def companion_forget(self: Any, token: str = "") -> dict[str, Any]:
    """What was prepared is not wanted, and neither is the way back. Idempotent."""
    if (switch := current().take_switch(token)) is not None:
        switch.close()
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


def _prepare(worker: Any, generations: dict[str, int], token: str) -> dict[str, Any]:
    parallel = worker.vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and not getattr(parallel, "data_parallel_external_lb", False):
        raise BadRequestError(
            "Of replicas behind one server only the first one's answers reach who asks.",
            remedy="Start a server for each replica (--data-parallel-external-lb).",
        )
    return plans_answer(_plans(current().prepare_switch(generations, token, engine_of(worker.vllm_config))))


def _switch(token: str) -> dict[str, Any]:
    switch = _taken(token)
    switch.carry_out(keep_ways_back=True)
    current().keep_switch(switch)
    return done_answer()


def _go_back(token: str) -> dict[str, Any]:
    if (switch := current().take_switch(token)) is not None:
        switch.go_back()
    elif current().has_switch:
        raise BadRequestError("Somebody else has prepared other weights here since, so the way back is gone.")
    return done_answer()


def _taken(token: str) -> Switch:
    if (switch := current().take_switch(token)) is None:
        raise BadRequestError(
            "Nothing is prepared here to switch to, or somebody else has prepared since.",
            remedy="Call companion_prepare first, and have one at a time update an engine.",
        )
    return switch
