"""Several engines as one, for a trainer that has written new weights for all of them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_companion_plugin.errors import UpdateRefusedError

Call = Callable[[Any], object]
_SHOWN = 600
"""Most characters of what an engine said."""


class Engines:
    """Each call goes to all engines at the same time. Until all of them have prepared, none has changed.

    It has the four methods of vLLM's `VLLMWeightSyncClient`, and can be used as one.

    Args:
        clients: one for each engine: `HTTPVLLMWeightSyncClient(url)`, `RayVLLMWeightSyncClient([actors])`, or whatever
            has these methods. vLLM's own for Ray makes one client of several actors, and one failure of theirs.
    """

    def __init__(self, clients: Sequence[Any]) -> None:
        self._clients = list(clients)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Raises `UpdateRefusedError` if an engine cannot be updated in this way."""
        self._all("cannot be updated", lambda client: client.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        """Begin an update, in place of one that a trainer began and did not end.

        Raises:
            UpdateRefusedError: an engine cannot take new weights now. No update is under way in any.
        """
        self._all("cannot take new weights now", _start, on_failure=_forget)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have all engines prepare the new weights.

        Raises:
            UpdateRefusedError: one of them cannot. No update is under way in any.
        """
        self._all("cannot take these weights", lambda client: client.update_weights(update_info), on_failure=_forget)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have all engines serve the new weights.

        Raises:
            UpdateRefusedError: some do not; the message says which. They go on with what they had.
        """
        self._all("did not switch", lambda client: _finish(client, weight_version), on_failure=_forget)

    def _all(self, problem: str, call: Call, *, on_failure: Call | None = None) -> None:
        with ThreadPoolExecutor(max(1, len(self._clients))) as pool:
            errors = list(pool.map(lambda client: _error_of(call, client), self._clients))
            if not any(errors):
                return
            if on_failure is not None:
                list(pool.map(on_failure, self._clients))
        refused = [
            f"{_name(client, number)} {problem}: {_reason(error)}"
            for number, (client, error) in enumerate(zip(self._clients, errors, strict=True))
            if error is not None
        ]
        raise UpdateRefusedError(f"Of {len(self._clients)} engines {len(refused)} refused. {' '.join(refused)}")


def _error_of(call: Call, client: Any) -> Exception | None:
    try:
        call(client)
    except Exception as error:  # of whatever library the client speaks through
        return error
    return None


def _start(client: Any) -> None:
    try:
        client.start_weight_update()
    except Exception:
        # vLLM knows of no way to end the update of a trainer that has died, and begins no other one meanwhile.
        _forget(client)
        client.start_weight_update()


def _forget(client: Any) -> None:
    """End the update that is under way, if there is one, without a change."""
    with contextlib.suppress(Exception):
        client.update_weights({"forget": True})
        client.finish_weight_update()


def _finish(client: Any, weight_version: str | None) -> None:
    # vLLM 0.26 knows no versions.
    if "weight_version" in inspect.signature(client.finish_weight_update).parameters:
        client.finish_weight_update(weight_version=weight_version)
    else:
        client.finish_weight_update()


def _name(client: Any, number: int) -> str:
    return str(getattr(client, "base_url", f"engine {number}"))


def _reason(error: Exception) -> str:
    """What the engine said, which an error of HTTP has in its response."""
    said = getattr(getattr(error, "response", None), "text", "")
    text = f"{type(error).__name__}: {error}"
    return f"{text} {said}"[:_SHOWN] if said else text[:_SHOWN]
