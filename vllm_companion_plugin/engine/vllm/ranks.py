"""All ranks of an engine take a step of an update, or none does.

Were only some of them to fail, the others would go on with it, and serve one model of two generations; and vLLM notes
on each rank whether an update of its own kind is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed
from vllm.distributed import parallel_state

from vllm_companion_plugin.errors import UpdateRefusedError


@contextmanager
def together(step: str) -> Iterator[Callable[[], None]]:
    """A step that each rank of this engine tries at the same time.

    Args:
        step: what it does, for the message.

    Yields:
        Called once by a rank that has succeeded; it raises `UpdateRefusedError` if another rank has not.
    """
    told = False

    def succeeded() -> None:
        nonlocal told
        told = True
        if error := _first_error(""):
            raise UpdateRefusedError(f"Another rank of this engine could not {step}, so none did: {error}")

    try:
        yield succeeded
    except BaseException as error:
        if not told:
            _first_error(str(error) or type(error).__name__)
        raise


def _first_error(error: str) -> str:
    """What a rank of this engine failed with; empty if none has."""
    for group in _groups():
        # One group after the other: at the end each rank knows of all ranks, whatever their dimensions.
        errors: list[Any] = [None] * group.world_size
        distributed.all_gather_object(errors, error, group=group.cpu_group)
        error = next(filter(None, errors), "")
    return error


def _groups() -> Iterator[Any]:
    """Those that together join all ranks of an engine, and no other engine's, as ranks of data parallelism are."""
    for name in ("tp", "pcp", "pp"):
        get = getattr(parallel_state, f"get_{name}_group", None)
        if get is not None and (group := get()).world_size > 1:
            yield group
