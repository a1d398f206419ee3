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
from vllm_companion_plugin.client.connection import CompanionConnection, Lease, Ready, connect
from vllm_companion_plugin.client.mirror import Held, Holder
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.core.status import CompanionStatus, EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.memory.tensors import checksum
from vllm_companion_plugin.memory.tensors.views import ArenaViews, check_dtypes, without_storage
from vllm_companion_plugin.settings import Settings, resolve
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes

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
        if self.settings.verify != "off":
            checksum.prepare(torch_device_of(self.device))
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(self._connect())
            lease = connection.attach(
                model=model, rank=rank or "", role=role, key_id=key_id, may_load=False, client_name=name
            )
            outcome = lease.wait(self.settings.wait_timeout_s)
            if not isinstance(outcome, Ready):
                raise BadRequestError(f"The companion of {self.device} asked a reader to load {model}.")
            made = Attachment(self.device, lease, outcome, self.settings.verify)
            undo.pop_all()
        made._connection = connection
        made._hold(self.settings, name)
        return made


class Attachment:
    """Weights of one rank of one model, mapped read-only, until `close` or the end of `with`.

    The tensors view the mapping: writing to one ends the process (host) or the CUDA context
    (device), and using one after `close` does too, so keep none. Clone what must stay.

    Attributes:
        tensors: by full name, as `named_parameters` would give it; tied tensors under each name.
            They share memory with the companion, without a copy, on the device (small host
            tensors beside a device model are copies).
        manifest: the module tree they come from.
        generation: counts the publications under this key.
    """

    def __init__(self, device: str, lease: Lease, ready: Ready, verify: str) -> None:
        self.model = ready.key.model
        self.rank = ready.key.rank
        self.generation = ready.generation
        self.manifest = manifest_from_bytes(ready.manifest)
        check_manifest_fits(self.manifest, ready.arena)
        check_dtypes(self.manifest)
        torch_device = torch_device_of(device)
        self._lease = lease
        self._connection: CompanionConnection | None = None
        self._holder: Holder | None = None
        self._ready = ready
        self._device = device
        self._arena = arenas.open_arena(ready.arena, ready.redeem(), torch_device.index)
        try:
            views = ArenaViews(self._arena, ready.arena.size_bytes, torch_device)
            verification = checksum.Verification(views, ready.arena, verify, torch_device)
            self.tensors = tensors_by_name(self.manifest, views)
            verification.check(self.manifest, f"{ready.key.title} ({self.rank}) on {device}")
        except BaseException:
            self._arena.close()
            raise

    def _hold(self, settings: Settings, name: str) -> None:
        ready, arena = self._ready, self._arena
        held = Held(ready.key, ready.generation, arena.info, arena.fds, ready.manifest, ready.published)
        try:
            self._holder = Holder(self._device, settings, held, self._lease, name)
        except CompanionError as error:
            logger.warning("%s will not be handed back if its companion dies: %s", held.key.title, error)

    @property
    def lost(self) -> bool:
        """Whether the companion has ended, and no new one has taken over yet. What is mapped stays valid."""
        return self._holder.lost if self._holder is not None else self._lease.lost.is_set()

    def close(self) -> None:
        """Forget the tensors, unmap the memory and end the lease. Idempotent."""
        self.tensors.clear()
        if self._holder is not None:
            self._holder.close()  # before its descriptors go
        self._arena.close()
        self._lease.release()
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensors_by_name(manifest: Manifest, views: ArenaViews) -> dict[str, torch.Tensor]:
    """One tensor object for each that was published, under every name that it has.

    What each engine makes for itself (caches, work space) was not.
    """
    made: list[torch.Tensor | None] = []
    for info in manifest.tensors:
        if info.storage >= 0:
            made.append(views.tensor(info, manifest.storages[info.storage]))
        else:
            made.append(None if info.own else without_storage(info, views.device))
    return {
        f"{path}.{slot.name}" if path else slot.name: tensor
        for module in manifest.modules
        for path in (module.path, *module.aliases)
        for slot in module.slots
        if (tensor := made[slot.tensor]) is not None
    }


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
