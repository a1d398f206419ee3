"""Adapters as an engine's processes find them: at whichever companion of the runtime directory has them.

A trainer publishes to one companion, and the workers of an engine may be on other devices. An adapter is in host
memory, so every process of the host can map it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Lease, Ready
from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.core.adapters import Asked, Bound
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.status import EntryState, EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionUnavailableError,
    EntryNotFoundError,
    LeaseLostError,
    ManifestError,
    StaleError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.runtime_dir import device_paths, list_devices
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.settings import Settings

logger = logging.getLogger("vllm.companion.adapters")

ANSWER_S = 2.0
"""A companion that has not said by then what it has is silent."""
SILENT_S = 30.0
"""For so long a silent companion is asked only for what no other one has."""
HAND_BACK_TIMEOUT_S = 10.0
"""For a process that holds an adapter to hand it to the companion that follows one that died."""
NOTHING = Manifest(stage=Stage.UNPROCESSED, modules=(), tensors=(), storages=())
"""What is known of an adapter's tensors when its bytes are compared."""
MAX_KNOWN = 1024
"""Adapters of which it is known who had them."""
_POLL_S = 0.05
_NOT_THERE = (EntryNotFoundError, LeaseLostError, CompanionUnavailableError, StaleError)
Where = tuple[str, EntryStatus]
"""The device of a companion that has an adapter, and how it is there."""


@dataclass(frozen=True)
class AdapterLease:
    """A claim on one generation of an adapter, which its companion keeps meanwhile. The caller releases it."""

    bound: Bound
    ready: Ready
    lease: Lease
    device: str

    @property
    def is_gone(self) -> bool:
        """Whether companions need not have the generation any more: it was removed, or its companion has died."""
        return self.lease.retired or self.lease.is_over

    def release(self) -> None:
        """Idempotent, and does not wait."""
        self.lease.release(wait=False)


@dataclass(frozen=True)
class AdapterFile:
    """The memory of one generation of an adapter: a file as `wire.adapter_file` has it."""

    info: ArenaInfo
    fds: Descriptors

    def check(self, verify: str, label: str) -> None:
        """Raise `IntegrityError` unless its bytes are those that were published, as far as `verify` wants to know."""
        with contextlib.closing(arenas.open_arena(self.info, self.fds.dup())) as arena:
            views = ArenaViews(arena, self.info.size_bytes, torch.device("cpu"))
            Verification(views, self.info, verify, views.device).check(NOTHING, label)

    def close(self) -> None:
        self.fds.close()


class AdapterLeases:
    """Finds adapters at the companions of a runtime directory. Thread-safe.

    Args:
        first: the device whose companion is asked before others; empty: none is. Among others, and without it, the
            one counts to which an adapter was published last.
        client_name: who we are, for `status`.
    """

    def __init__(self, settings: Settings, client_name: str, first: str = "") -> None:
        self._settings = settings
        self._client_name = client_name
        self._first = first
        self._connections: dict[str, CompanionConnection] = {}
        self._left: list[CompanionConnection] = []  # that have leases yet, and are asked nothing any more
        self._had: dict[str, str] = {}  # the devices of companions that had an adapter when it was asked for
        self._silent_until: dict[str, float] = {}
        self._mutex = threading.Lock()

    def is_current(self, held: AdapterLease, found: list[Where]) -> bool:
        """Whether a request of this adapter, which was found there just now, would still get this generation."""
        if held.is_gone:
            return False
        for device, entry in found[:1]:
            same = (entry.generation, entry.ready_unix_s) == (held.ready.generation, held.ready.published.ready_unix_s)
            return same and device == held.device
        return False

    def lease(self, asked: Asked, found: list[Where] | None = None) -> AdapterLease:
        """A lease on what is asked for. Waits, if the companion has died, for whoever hands the adapter back.

        Args:
            found: where it was found just now.

        Raises:
            EntryNotFoundError: no companion has it.
            StaleError: that generation has another content by now.
            CompanionError: as `Lease.wait`.
        """
        key_id = adapters.key_of(asked.name).id
        deadline = time.monotonic() + HAND_BACK_TIMEOUT_S
        # Of one content it does not matter whose it is, so where it was before is as good as where it counts.
        at_once = found[0][0] if found else self._had.get(key_id) if asked.content else None
        if at_once is not None:
            with contextlib.suppress(*_NOT_THERE):
                return self._attach(at_once, key_id, asked)
        while True:
            problem: Exception | None = None
            for device, _ in self.where(asked.name):
                try:
                    return self._attach(device, key_id, asked)
                except _NOT_THERE as error:
                    problem = error
            on_its_way = isinstance(problem, (LeaseLostError, CompanionUnavailableError))
            if time.monotonic() > deadline or not (on_its_way or (problem is None and self._is_held(key_id))):
                break
            time.sleep(_POLL_S)
        if isinstance(problem, StaleError):
            raise problem
        if silent := self._silent():
            raise CompanionUnavailableError(
                f"{asked} is not held by any companion in {self._settings.runtime_dir} that answers; that of "
                f"{', '.join(sorted(silent))} is silent."
            )
        raise EntryNotFoundError(
            f"{asked} is not held by any companion in {self._settings.runtime_dir}.",
            remedy="Publish it by CompanionClient.publish_adapter; `vllm-companion status` shows what there is.",
        ) from problem

    def fetch(self, bound: Bound) -> AdapterFile:
        """The adapter's file, which the caller closes. Its bytes have not been proved. Raises as `lease`."""
        lease = self.lease(bound)
        try:
            return AdapterFile(lease.ready.arena, lease.ready.redeem())
        finally:
            lease.release()

    def close(self) -> None:
        """Close all connections, and end all leases. Idempotent."""
        with self._mutex:
            connections, self._connections, self._left = [*self._connections.values(), *self._left], {}, []
        for connection in connections:
            connection.close()

    def _attach(self, device: str, key_id: str, asked: Asked) -> AdapterLease:
        with self._asking(device) as connection, ExitStack() as undo:
            lease = connection.attach(key_id=key_id, may_load=False, client_name=self._client_name)
            undo.callback(lease.release, wait=False)
            ready = lease.wait(HAND_BACK_TIMEOUT_S)
            if not isinstance(ready, Ready) or ready.manifest != adapters.MANIFEST:
                raise ManifestError(f"{asked} was published by another version.", remedy="Publish it anew.")
            if asked.generation not in (0, ready.generation):
                ready = lease.generation(asked.generation, adapters.MANIFEST)
                lease.advanced(asked.generation)
            bound = Bound(asked.name, ready.generation, adapters.content_of(ready.arena))
            if asked.content not in ("", bound.content):
                raise StaleError(
                    f"{asked} is another one than before: its companion was replaced.", remedy=f"Ask for {asked.name}."
                )
            undo.pop_all()
        self._note(key_id, device)
        return AdapterLease(bound, ready, lease, device)

    def _note(self, key_id: str, device: str) -> None:
        with self._mutex:
            self._had.pop(key_id, None)
            self._had[key_id] = device
            while len(self._had) > MAX_KNOWN:
                del self._had[next(iter(self._had))]

    def where(self, name: str) -> list[Where]:
        """The companions that have an adapter of this name, the one that counts first."""
        key_id = adapters.key_of(name).id
        devices, silent = list_devices(self._settings), self._silent()
        found = [each for device in devices if device not in silent for each in self._there(device, key_id)]
        if not found:  # a companion that hung a moment ago is asked if nobody else has it
            found = [each for device in devices if device in silent for each in self._there(device, key_id)]
        return sorted(found, key=lambda each: (each[0] != self._first, -each[1].ready_unix_s))

    def _there(self, device: str, key_id: str) -> list[Where]:
        """The entry of this key, if the companion of a device has one."""
        entries: tuple[EntryStatus, ...] = ()
        try:
            if is_listening(device_paths(device, self._settings)):
                with self._asking(device) as connection:
                    entries = connection.status(ANSWER_S, key_id=key_id).entries
            self._silent_until.pop(device, None)
        except WaitTimeoutError as error:
            if device not in self._silent():
                logger.warning("Adapters are looked for elsewhere: %s", error)
            self._silent_until[device] = time.monotonic() + SILENT_S
        except CompanionUnavailableError:
            self._silent_until.pop(device, None)
        except BadRequestError as error:  # of another version
            logger.debug("%s", error)
        states = (EntryState.READY, EntryState.LOADING)
        return [(device, entry) for entry in entries if entry.key.id == key_id and entry.state in states]

    def _silent(self) -> set[str]:
        """Devices whose companions have not answered a moment ago: others are not kept waiting for them."""
        now_s = time.monotonic()
        return {device for device, until_s in list(self._silent_until.items()) if now_s < until_s}

    def _is_held(self, key_id: str) -> bool:
        return any(notes.is_held(device_paths(each, self._settings), key_id) for each in list_devices(self._settings))

    @contextlib.contextmanager
    def _asking(self, device: str) -> Iterator[CompanionConnection]:
        """The connection to a companion. If that does not answer by it, others are not asked by it any more."""
        with self._mutex:
            if device not in self._connections:
                self._connections[device] = CompanionConnection(device_paths(device, self._settings))
            connection = self._connections[device]
        try:
            yield connection
        except CompanionUnavailableError:
            self._forget(device, connection)
            raise

    def _forget(self, device: str, connection: CompanionConnection) -> None:
        """Close it, but not while leases of it live: requests are bound to these, whatever became of a question."""
        with self._mutex:
            if self._connections.get(device) is connection:
                del self._connections[device]
                self._left.append(connection)
            over = [each for each in self._left if not each.has_leases]
            self._left = [each for each in self._left if each not in over]
        for each in over:
            each.close()
