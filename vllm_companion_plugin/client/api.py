"""The companion for programs that are not vLLM: trainers, converters, tools.

with CompanionClient("cpu").attach("my/model") as weights:
    print(weights.tensors["model.embed_tokens.weight"].shape)
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Ready, connect
from vllm_companion_plugin.core.status import CompanionStatus, EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionUnavailableError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.memory.tensors import checksum
from vllm_companion_plugin.settings import resolve

logger = logging.getLogger("vllm.companion.api")

POLL_S = 0.1


class CompanionClient:
    """Finds the companion of a device by the device's name. Holds nothing open by itself.

    Args:
        device: GPU UUID or "cpu". None: torch's current CUDA device, or "cpu" without CUDA.
        settings: by name, as in docs/settings.md, e.g. `runtime_dir="/run/weights"`.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """

    def __init__(self, device: str | None = None, **settings: Any) -> None:
        self.settings = resolve(settings, origin="CompanionClient")
        self.device = current_device() if device is None else device

    def _connect(self) -> CompanionConnection:
        return connect(self.device, self.settings, spawn=False)

    def status(self) -> CompanionStatus:
        """What the companion holds. Raises `CompanionUnavailableError` if there is none."""
        with self._connect() as connection:
            return connection.status()

    def watch(self, timeout_s: float | None = None) -> Iterator[CompanionStatus]:
        """The status now and after every change, until the companion ends or you stop iterating.

        Raises:
            CompanionUnavailableError: there is none, or it ended.
            WaitTimeoutError: `timeout_s` is over.
        """
        with self._connect() as connection:
            yield from connection.watch(timeout_s)

    def wait_ready(
        self, model: str, rank: str | None = None, timeout_s: float = 600.0, *, role: str = "target"
    ) -> EntryStatus:
        """The READY entry of `model`, as soon as there is one; waits for a companion, too.

        Args:
            role: "target", or "draft" of speculative decoding.

        Raises:
            WaitTimeoutError: there was none for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._connect() as connection:
                    left_s = max(0.01, deadline - time.monotonic())
                    return connection.wait_ready(model, rank=rank, role=role, timeout_s=left_s)
            except CompanionUnavailableError as error:
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(f"{model} on {self.device} after {timeout_s:g} s: {error}") from error
            time.sleep(POLL_S)

    def attach(
        self,
        model: str,
        rank: str | None = None,
        *,
        role: str = "target",
        key_id: str = "",
        name: str = "CompanionClient",
    ) -> Attachment:
        """Map the weights of `model`, waiting while somebody loads them. Never loads.

        Args:
            rank: needed if several are published, e.g. "tp0/2".
            role: "target", or "draft" of speculative decoding; with MTP both have the same name.
            key_id: of one of several loads of the model, from `status`.
            name: who we are, for `status` and other clients' messages.

        Raises:
            CompanionUnavailableError: no companion.
            EntryNotFoundError: nobody has published it nor is loading it.
            BadRequestError: several match.
            WaitTimeoutError: its loader made no progress for `wait_timeout_s`.
            ArenaError: it cannot be mapped.
            IntegrityError: its bytes are not those that were published.
        """
        device = torch_device_of(self.device)
        if self.settings.verify != "off":
            checksum.prepare(device)
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(self._connect())
            lease = connection.attach(
                model=model, rank=rank or "", role=role, key_id=key_id, may_load=False, client_name=name
            )
            outcome = lease.wait(self.settings.wait_timeout_s)
            if not isinstance(outcome, Ready):
                raise BadRequestError(f"The companion of {self.device} asked a reader to load {model}.")
            made = Attachment.open(self.device, device, lease, outcome)
            try:
                made.verify(self.settings.verify)
            except BaseException:
                made.close()
                raise
            made.close_with_it(undo.pop_all())
        made.mirror(self.settings, name)
        return made


def current_device() -> str:
    """UUID of torch's current CUDA device, or "cpu"."""
    return arenas.cuda_device(torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


def torch_device_of(device: str) -> torch.device:
    """torch's name of `device`. Raises `SettingsError` if this process does not see it."""
    if device == "cpu":
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if arenas.cuda_device(index) == device:
            return torch.device("cuda", index)
    raise SettingsError(f"torch does not see {device} in this process; look at CUDA_VISIBLE_DEVICES.")
