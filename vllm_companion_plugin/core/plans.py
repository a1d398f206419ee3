"""What one rank of an engine answers when a fleet is told to take new weights, as JSON, and reading it.

Ranks answer errors as values. An error that a rank raises leaves the answers of the ranks behind it in vLLM's queues,
and the next call gets them for its own (vllm/v1/executor/multiproc_executor.py: collective_rpc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_companion_plugin.errors import BadRequestError, CompanionError, from_code


@dataclass(frozen=True)
class Plan:
    """What one model of a rank maps now, and what it will map.

    Attributes:
        generation: that it will map, by the number that its companion gave it.
        version: how the writer of that generation calls it; empty: a checkpoint.
        before: the number of what it maps now.
        version_before: the version of what it maps now.
    """

    generation: int
    version: str
    before: int
    version_before: str


def plans_answer(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The answer of a rank that has prepared these, by model and role."""
    return {"plans": {title: asdict(plan) for title, plan in plans.items()}}


def done_answer() -> dict[str, Any]:
    """The answer of a rank that has done what it was told."""
    return {"plans": {}}


def error_answer(error: CompanionError) -> dict[str, Any]:
    """The answer of a rank that could not do it."""
    return {"error": {"code": error.code, "text": str(error)}}


def read_answer(answer: object) -> dict[str, Plan]:
    """The plans of a rank, by model and role; none if it was to do something else than to prepare.

    Raises:
        BadRequestError: no rank of this project answers so.
        CompanionError: the error that the rank answered.
    """
    match answer:
        case {"error": {"code": str(code), "text": str(text)}}:
            raise from_code(code, text)
        case {"plans": dict(plans)}:
            return {_text(title): _plan(plan) for title, plan in plans.items()}
    raise BadRequestError(f"A rank answered {str(answer)[:200]!r}.", remedy="Does it have this version of the plugin?")


def _plan(plan: object) -> Plan:
    match plan:
        case {
            "generation": int(generation),
            "version": str(version),
            "before": int(before),
            "version_before": str(version_before),
        }:
            return Plan(generation, version, before, version_before)
    raise BadRequestError(f"A rank answered with the plan {str(plan)[:200]!r}.")


def _text(title: object) -> str:
    if isinstance(title, str):
        return title
    raise BadRequestError(f"A rank answered with a model called {str(title)[:200]!r}.")
