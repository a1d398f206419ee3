"""Attachments of a small model that sleep and wake beside a real companion, in this process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.support.place import Place
from tests.support.publishing import CPU, Small
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import EntryState, EntryStatus, LeaseState, LoaderInfo
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, EntryNotFoundError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening, listener_pid
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.wire.manifest import manifest_to_bytes

NAME = "sleeper"


class Sleeping:
    """One entry of a companion, whose model can be loaded at any time, and the attachments of this process.

    Attributes:
        loads: how often it was loaded.
        model: what the next load publishes.
    """

    def __init__(self, settings: Settings, key: EntryKey, model: nn.Module) -> None:
        self.settings, self.key, self.model = settings, key, model
        self.loads = 0
        self.attachments: list[Attachment] = []
        self._connection: CompanionConnection | None = None
        self._companion_pid: int | None = None

    @classmethod
    def of(cls, place: Place, key: EntryKey, model: nn.Module) -> Sleeping:
        """Its settings are those of `place`, but that nobody waits long."""
        return cls(replace(place.settings, wait_timeout_s=10.0), key, model)

    def connection(self) -> CompanionConnection:
        """To the companion there is, which is started if there is none.

        Not one that goes to the companion of before: it may not find the next one at once.
        """
        paths = device_paths("cpu", self.settings)
        if self._connection is None or listener_pid(paths) != self._companion_pid:
            self._connection = connect("cpu", self.settings, spawn=True)
            self._companion_pid = listener_pid(paths)
        return self._connection

    def attach(self) -> Attachment:
        """One more attachment, which loads if nobody has."""
        lease = self.connection().attach(self.key, may_load=True, client_name=NAME)
        outcome = lease.wait(self.settings.wait_timeout_s)
        if isinstance(outcome, Ready):
            made = Attachment.open("cpu", CPU, lease, outcome)
        elif outcome.parked is not None:
            made = Attachment.bring_back("cpu", CPU, lease, outcome, self.connection(), verify="full")
        else:
            made = self.load(lease, outcome)
        made.mirror(self.settings, NAME)
        self.attachments.append(made)
        return made

    def load(self, lease: Lease, granted: Granted) -> Attachment:
        """Publish `model` under the lease that was granted."""
        self.loads += 1
        packed = prepare(capture(self.model), Stage.UNPROCESSED, arenas.MEMFD, CPU)
        arena = copy(packed, arenas.MEMFD, CPU, rebind=False, release=lambda: None)
        manifest = manifest_to_bytes(packed.manifest)
        publication = granted.publication
        try:
            generation = publication.publish(arena.info, arena.fds, manifest, len(packed.manifest.tensors))
        except CompanionError:
            arena.close()
            raise
        held = Held(self.key, generation, arena.info, arena.fds, manifest, publication.published)
        return Attachment("cpu", CPU, lease, held, arena, packed.manifest)

    def sleep(self, attachment: Attachment, level: int, wish: WhenAsleep = WhenAsleep.AUTO) -> str:
        where = attachment.fall_asleep(level, wish)
        attachment.let_go(self.settings, NAME)
        return where

    def wake(self, attachment: Attachment, on_waiting: Callable[[LoaderInfo], None] | None = None) -> str:
        return attachment.wake(self.connection(), self.settings, NAME, self.load, on_waiting)

    def entry(self) -> EntryStatus | None:
        """Its status, if a companion has it."""
        try:
            status = self.connection().status()
        except CompanionUnavailableError:
            return None
        current = [entry for entry in status.entries if entry.key.id == self.key.id]
        return current[-1] if current else None

    def unload(self) -> None:
        """Whoever uses it."""
        with contextlib.suppress(EntryNotFoundError):
            self.connection().unload(key_id=self.key.id, force=True)

    def close(self) -> None:
        """Leave nothing behind in the companion, if there is one."""
        for attachment in self.attachments:
            attachment.close()
        if self._connection is not None and is_listening(self._connection.paths):
            with contextlib.suppress(CompanionUnavailableError):  # it was killed a moment ago, and dies yet
                self.unload()
        if self._connection is not None:
            self._connection.close()


def seeded() -> Small:
    """The same weights in each process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def content(attachment: Attachment) -> bytes:
    """All that it maps."""
    views = attachment.views()
    return bytes(views.bytes_at(0, attachment.size_bytes).numpy())


def write(attachment: Attachment, value: int) -> None:
    """Fill memory that is private."""
    views = attachment.views()
    views.bytes_at(0, attachment.size_bytes).fill_(value)


def clone(attachment: Attachment) -> torch.Tensor:
    """What is private to it beside the mapping, as an engine has it."""
    first = attachment.manifest.storages[0]
    made = attachment.views().bytes_at(first.offset_bytes, first.size_bytes).clone()
    attachment.keep_private([(first.offset_bytes, made)])
    return made


_numbers = itertools.count(1)


def new_key() -> EntryKey:
    """One that no other test of this process has."""
    number = next(_numbers)
    return EntryKey(f"{number:064x}", f"test/model-{number}")


def states(sleeping: Sleeping) -> tuple[EntryState, list[LeaseState]] | None:
    """Of its entry, and of the leases of that in the order of their names; None if no companion has it."""
    entry = sleeping.entry()
    return (entry.state, sorted((x.state for x in entry.leases), key=lambda x: x.value)) if entry else None


def raising(error: Exception) -> Callable[..., Any]:
    """What a test puts in the place of something that fails."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail
