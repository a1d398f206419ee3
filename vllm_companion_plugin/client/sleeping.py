"""Sleeping and waking of what this process maps: the memory leaves its addresses, and comes back from where it is then.

What can fail comes before what cannot be undone: who cannot fall asleep is awake, and who cannot wake sleeps on.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Granted, Lease, Ready
from vllm_companion_plugin.client.mapped import Mapped
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.client.parked import bring_back
from vllm_companion_plugin.client.sleeper import Sleeper
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.residency import Residence, WhenAsleep, residence
from vllm_companion_plugin.core.status import LoaderInfo
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    EntryNotFoundError,
    LayoutError,
    ManifestError,
    OvertakenError,
    ParityError,
)
from vllm_companion_plugin.memory.host_copy import HostCopy
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.tree.parity import compare_published
from vllm_companion_plugin.wire.manifest import manifest_from_bytes

logger = logging.getLogger("vllm.companion.client")


class Sleepable(Mapped):
    """What is mapped, or sleeps: then nothing is mapped, and no descriptor is held. It begins awake, and shared.

    Attributes:
        is_stale: whether what is mapped is another generation than what was cloned, since it woke.
    """

    is_stale = False
    _asleep = False
    _level = 0
    _is_private = False
    _follows = False
    _fixed = ""
    _wish = WhenAsleep.AUTO
    _sleeper: Sleeper | None = None
    _kept: HostCopy | None = None
    """Of a copy in host memory that this process has made: what makes it quicker to bring back."""
    _backup: tuple[ArenaInfo, arenas.Descriptors] | None = None
    """The bytes of what nobody else has, while that sleeps: of memory of this process's own, or that was unloaded."""

    @property
    def can_sleep(self) -> bool:
        """Whether this kind of memory can leave its addresses."""
        return arenas.KINDS[self.held.arena.kind].can_remap

    @property
    def asleep(self) -> bool:
        """Whether nothing is mapped, and nothing is held."""
        return self._asleep

    @property
    def is_private(self) -> bool:
        """Whether the memory is this process's own, since it writes to it."""
        return self._is_private

    def renew(self) -> None:
        """As `Mapped.renew`. Raises `ArenaError` if it is asleep."""
        self._check_awake()
        super().renew()
        self.is_stale = False

    def close(self) -> None:
        """As `Mapped.close`, also of what sleeps."""
        if self._sleeper is not None:
            self._sleeper.close()
        self._drop_backup()
        self._drop_kept()
        super().close()

    # ---- falling asleep

    def fall_asleep(self, level: int, when_asleep: WhenAsleep) -> str:
        """Tell the companion that this process is about to let go of the memory; leave a copy on the host if it asks.

        The memory is mapped until `let_go`. All that can fail is done here; `stay_awake` takes it back.

        Args:
            level: as vLLM counts.
            when_asleep: what becomes of the bytes if this process is the last one.

        Returns:
            Where the bytes are from now on: "device", "host" or "nowhere".

        Raises:
            ArenaError: it is asleep, this kind of memory cannot leave its addresses, or there is no host memory for
                the copy.
            CompanionError: the companion does not answer, or refuses.
        """
        self._check_awake()
        kind = arenas.KINDS[self.held.arena.kind]
        if not kind.can_remap:
            raise ArenaError(
                f"{self.label} is memory of kind {kind.name}, which cannot leave its addresses.",
                remedy='Leave out the setting "arena"; the default can.',
            )
        self._level = level
        if self.is_private:  # as vLLM does with memory of its own
            if self.device.type == "cuda":  # the engine may have written to it just now
                torch.cuda.synchronize(self.device)
            return self._back_up(Residence.HOST if level < 2 else Residence.NOWHERE)
        self._wish = when_asleep
        return self._tell(lambda lease: lease.fall_asleep(level, when_asleep, self._leave_copy))

    def sleep_on(self) -> None:
        """Take `wake` back: `let_go` follows, at the level of before. What was wished of the bytes stays.

        Raises as `fall_asleep`.
        """
        if self.is_private:
            self.fall_asleep(self._level, WhenAsleep.AUTO)
            return
        try:
            self._tell(lambda lease: lease.sleep_on(self._level))
        except BadRequestError:  # the companion is of before this call
            self.fall_asleep(self._level, WhenAsleep.STAY)

    def _tell(self, how: Callable[[Lease], str]) -> str:
        """Tell the companion that this process falls asleep, or the next one if it dies; where the bytes are then."""
        try:
            where = self._ask(how)
        except CompanionError:
            if not self._is_forgotten:
                raise
            where = Residence.NOWHERE.value  # nobody waits for an answer
        if where == Residence.NOWHERE.value and self._is_forgotten:  # it was unloaded, so nobody else has the bytes
            is_owned = bool(self.held.published.version)
            where = self._back_up(residence(self._wish, [self._level], is_owned=is_owned))
        if where != Residence.HOST.value or self._backup is not None:
            self._drop_kept()
        return where

    def _back_up(self, wanted: Residence) -> str:
        """Keep the bytes in host memory, unless they are to be nowhere; where they are. Raises `ArenaError`."""
        if wanted is Residence.NOWHERE:
            return str(wanted.value)
        self._drop_backup()
        self._backup = arenas.KINDS[self.held.arena.kind].to_host(self.arena, self.device.index)
        return str(Residence.HOST.value)

    @property
    def _is_forgotten(self) -> bool:
        """Whether no companion is to know any more of what this process maps."""
        return self._mirror.ended if self._mirror is not None else self.lease.lost.is_set() or self.lease.released

    def _leave_copy(self) -> tuple[int, ArenaInfo, arenas.Descriptors]:
        """Of the current generation, which need not be the one that is mapped here."""
        kind = arenas.KINDS[self.held.arena.kind]
        ready = self.current_lease.generation(0, self.held.manifest)
        self._drop_kept()
        if not self.had(ready):
            with contextlib.closing(arenas.open_arena(ready.arena, ready.redeem(), self.device.index)) as arena:
                return ready.generation, *kind.to_host(arena, self.device.index)
        info, fds = kind.to_host(self.arena, self.device.index)
        self._kept = kind.keep(info, fds, self.device.index)
        return ready.generation, info, fds

    def let_go(self, settings: Settings, client_name: str) -> None:
        """Unmap the memory, whose addresses stay, and close all descriptors of it. Nothing may use it any more."""
        self.arena.unmap()
        self._asleep = True
        if self._is_private or self._backup is not None:
            return
        if self._kept is not None:
            self._kept.lock()
        lease, own = self.lease, None
        if self._mirror is not None:
            lease, own = self._mirror.keep_lease()
            self._mirror = None
        self._sleeper = Sleeper(self.device_id, settings, self.held.key, self._level, lease, client_name, own)

    def stay_awake(self) -> None:
        """Take `fall_asleep` back. Raises `CompanionError`; the memory stays mapped even then."""
        self._drop_backup()
        if self._mirror is not None and not self._mirror.ended:
            self._mirror.know_again()

    def _check_awake(self) -> None:
        if self.asleep:
            raise ArenaError(
                f"{self.label} sleeps: there is no memory at its addresses.", remedy="Wake the engine first."
            )

    def _drop_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _drop_backup(self) -> None:
        if self._backup is not None:
            self._backup[1].close()
            self._backup = None

    # ---- waking

    def wake(
        self,
        connection: CompanionConnection,
        settings: Settings,
        client_name: str,
        load: Callable[[Lease, Granted], AbstractContextManager[object]],
        on_waiting: Callable[[LoaderInfo], None] | None = None,
    ) -> str:
        """Map the memory at its addresses again, wherever its bytes are by now.

        What was cloned has the bytes of before, as its own memory may not be there yet. If `is_stale`, `renew` it then.

        Args:
            load: loads and publishes the entry; called if nobody has it any more. It owns the lease, and what it
                returns is closed when this process maps the entry.
            on_waiting: as of `Lease.wait`.

        Returns:
            Where the bytes were: "device", "host" or "checkpoint"; "nowhere" of memory of this process's own that
            slept at level 2, as vLLM has it: what is in it is anything.

        Raises:
            ArenaError: it is awake.
            LayoutError: what was loaded meanwhile under this key is laid out differently.
            IntegrityError: the bytes are not what was published.
            CompanionError: as `Lease.wait`, `bring_back` and `load`. This stays asleep, and can be woken again.
        """
        if not self.asleep:
            raise ArenaError(f"{self.label} is awake.")
        if self._is_private:
            return self._wake_private()
        if self._backup is not None:
            return self._wake_alone(*self._backup)
        if self._wake_by_lease(settings, client_name):
            return Residence.DEVICE.value
        source = "device"
        loaded = ExitStack()
        overtaken = False
        while True:
            if overtaken:
                gc.collect()  # a model that was loaded in vain refers to itself
            lease = connection.attach(
                self.held.key, may_load=True, client_name=client_name, known_manifest=self.held.manifest
            )
            try:
                outcome = lease.wait(settings.wait_timeout_s, on_waiting)
                if isinstance(outcome, Granted) and outcome.parked is not None:
                    source = "host"
                    self._generation_to_wake(lease, outcome.parked.entry, settings)
                    kept = self._kept if self.had(outcome.parked.entry) else None
                    held, arena = bring_back(connection, outcome, outcome.parked, self.device, settings.verify, kept)
                    with contextlib.closing(arena):
                        fds = arena.fds.dup()
                elif isinstance(outcome, Granted):
                    source = "checkpoint"
                    self._check_not_lost(settings)
                    loaded.enter_context(load(lease, outcome))
                    continue
                else:
                    held, fds = self._to_wake(lease, outcome, outcome.redeem(), settings)
                self._map(held, fds, settings)
                mirror = Mirror(self.device_id, settings, replace(held, fds=self.arena.fds), lease, client_name)
            except OvertakenError as error:
                logger.info("%s", error.what)
                lease.release()
                source, overtaken = "device", True
                continue
            except BaseException:
                self.arena.unmap()
                lease.release()
                loaded.close()
                raise
            self._has_woken(replace(held, fds=self.arena.fds), lease, mirror)
            if self._sleeper is not None:
                self._sleeper.close()
                self._sleeper = None
            loaded.close()
            return source

    def _wake_by_lease(self, settings: Settings, client_name: str) -> bool:
        """Wake by one question to the companion, if the bytes are on the device; else nothing has changed.

        Raises as `wake`.
        """
        sleeper = self._sleeper
        if sleeper is None or (woken := sleeper.wake(self.held.manifest)) is None:
            return False
        lease, ready, fds = woken
        try:
            held, fds = self._to_wake(lease, ready, fds, settings)
            self._map(held, fds, settings)
            held = replace(held, fds=self.arena.fds)
            own = sleeper.connection_of(lease)
            mirror = Mirror(self.device_id, settings, held, lease, client_name, connection=own)
        except BaseException:
            self.arena.unmap()
            sleeper.sleep_again(lease)
            raise
        sleeper.hand_over(lease)
        self._sleeper = None
        self._has_woken(held, lease, mirror)
        return True

    def _wake_private(self) -> str:
        source = Residence.NOWHERE
        try:
            self.arena.map_private()
            if self._backup is not None:
                (info, fds), source = self._backup, Residence.HOST
                arenas.KINDS[self.held.arena.kind].fill(self.arena, info, fds.dup(), self.device.index)
        except BaseException:
            self.arena.unmap()
            raise
        self._drop_backup()  # the only copy goes last
        self._asleep = False
        return str(source.value)

    def _wake_alone(self, info: ArenaInfo, fds: arenas.Descriptors) -> str:
        """Wake what no companion knows of any more, of the copy that this process has kept."""
        kind = arenas.KINDS[self.held.arena.kind]
        with contextlib.closing(kind.from_host(self.held.arena, info, fds.dup(), self.device.index)) as arena:
            self.arena.map_again(self.held.arena, arena.fds.dup())
        self.held = replace(self.held, fds=self.arena.fds)
        self._drop_backup()
        self._asleep = False
        return str(Residence.HOST.value)

    def _has_woken(self, held: Held, lease: Lease, mirror: Mirror) -> None:
        self.is_stale |= not self.had(held) or held.arena.trained
        self.held, self.lease, self._mirror = held, lease, mirror
        self._asleep = False

    def _to_wake(
        self, lease: Lease, current: Ready, fds: arenas.Descriptors, settings: Settings
    ) -> tuple[Held, arenas.Descriptors]:
        """What this process maps when it wakes, which is the current generation or its own, and its descriptors.

        Args:
            fds: of the current generation; this method's from now on.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(fds.close)
            ready = self._generation_to_wake(lease, current, settings)
            if ready is not current:
                fds.close()
                fds = ready.redeem()
                undo.callback(fds.close)
                lease.advanced(ready.generation)
            undo.pop_all()
        return Held.of(ready, fds), fds

    def _generation_to_wake(self, lease: Lease, current: Ready, settings: Settings) -> Ready:
        """The current one, unless a trainer has written it and this process was never told to follow.

        Raises:
            LayoutError: what it had is not held any more.
        """
        if self.had(current):
            return current
        written = current.published.version
        # What was loaded anew is no checkpoint to which somebody went back: by its number, unless that was given again.
        is_later = current.published.ready_unix_s > self.held.published.ready_unix_s
        if not written and (current.generation > self.generation or is_later):
            self._check_not_lost(settings)
        if not written or ((self._follows or settings.follow_updates) and not self._fixed):
            return current
        with contextlib.suppress(EntryNotFoundError):
            mine = lease.generation(self.generation, self.held.manifest)
            if self.had(mine):
                return mine
        raise LayoutError(
            f"{self.label} is {current.published.version} by now, which a trainer has written while this engine slept, "
            "and what the engine had is not held any more.",
            remedy="Start the engine anew, or with the setting follow_updates.",
        )

    def _check_not_lost(self, settings: Settings) -> None:
        """Raise `LayoutError` if this process had what a trainer wrote: the checkpoint does not take its place."""
        if self.held.published.version and not settings.follow_updates:
            raise LayoutError(
                f"{self.label} was {self.held.published.version}, which a trainer had written, and nobody has it any "
                "more.",
                remedy="Start the engine anew, or with the setting follow_updates, to take the checkpoint's weights.",
            )

    def _map(self, held: Held, fds: arenas.Descriptors, settings: Settings) -> None:
        """Map what may take the place of what was mapped, and prove it if it is not the same generation."""
        if held.manifest != self.held.manifest:
            try:
                compare_published(self.manifest, manifest_from_bytes(held.manifest))
            except (ParityError, ManifestError) as error:
                fds.close()
                raise LayoutError(
                    f"{self.label} was loaded anew, generation {held.generation}, and is laid out differently or made "
                    f"of other values: {error} Start this engine anew to use it."
                ) from error
        self.arena.map_again(held.arena, fds)
        if not self.had(held):
            Verification(self.views(), held.arena, settings.verify, self.device).check(self.manifest, self.label)
