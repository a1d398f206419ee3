"""What a client has of an entry that it maps: memory, lease, and what the next companion needs to know of it.

Engines and programs that are not vLLM open an entry in the same way, and give it back in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Granted, Lease, Ready
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.client.parked import bring_back
from vllm_companion_plugin.client.sleeper import Sleeper
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.residency import Residence, WhenAsleep
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
from vllm_companion_plugin.memory.tensors.views import ArenaViews, check_dtypes, without_storage
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.tree.parity import compare_published
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes

logger = logging.getLogger("vllm.companion.client")

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A generation that an attachment can advance to. Owns the descriptors until then.

    Attributes:
        follows: whether the attachment, once it has advanced, takes what is current when it wakes.
    """

    held: Held
    fds: arenas.Descriptors
    follows: bool = True

    @property
    def generation(self) -> int:
        """Its number."""
        return self.held.generation

    def close(self) -> None:
        """It will not be used. Idempotent."""
        self.fds.close()


class Attachment:
    """An entry that this process maps, read-only, until `close` or the end of `with`.

    In an engine it ends by itself, when no tensor views the memory any more. Writing to a tensor that views it ends the
    process (host) or the CUDA context (device), and using one after `close` does too: clone what must stay.

    Args:
        device_id: whose companion holds it: a GPU's UUID, or "cpu".
        device: the same device, as PyTorch names it in this process.
        lease: on the entry; owned from now on.
        held: what the next companion is told if this one dies; an attribute, too.
        arena: mapped; owned from now on.
        manifest: the module tree that is in it; an attribute, too.

    Attributes:
        is_stale: whether what is mapped is another generation than what was cloned, since it woke.
    """

    def __init__(
        self,
        device_id: str,
        device: torch.device,
        lease: Lease,
        held: Held,
        arena: arenas.Arena,
        manifest: Manifest,
    ) -> None:
        self.device_id = device_id
        self.device = device
        self.lease = lease
        self.held = held
        self.manifest = manifest
        self._arena: arenas.Arena | None = arena
        self._weak_arena = weakref.ref(arena)
        self._mirror: Mirror | None = None
        self._sleeper: Sleeper | None = None
        self._level = 0
        self._follows = False
        self._kept: HostCopy | None = None
        self._backup: tuple[ArenaInfo, arenas.Descriptors] | None = None
        self._asleep = False
        self._is_private = False
        self.is_stale = False
        self._fixed = ""
        self._clones: list[tuple[int, torch.Tensor]] = []
        self._with_it = ExitStack()

    @classmethod
    def open(
        cls, device_id: str, device: torch.device, lease: Lease, ready: Ready, *, stage: Stage | None = None
    ) -> Attachment:
        """Read and check the manifest of an entry that is ready, fetch its descriptors, and map it.

        The lease stays the caller's if this raises.

        Args:
            stage: in which the entry must have been published; None: in any.

        Raises:
            ManifestError: the manifest is damaged, does not fit the arena, or is of another stage.
            TicketError, CompanionUnavailableError: the companion did not give the descriptors.
            ArenaError: the memory cannot be mapped.
        """
        manifest = _checked_manifest(ready, device_id, stage)
        arena = arenas.open_arena(ready.arena, ready.redeem(), device.index)
        held = Held.of(ready, arena.fds)
        return cls(device_id, device, lease, held, arena, manifest)

    @classmethod
    def bring_back(
        cls,
        device_id: str,
        device: torch.device,
        lease: Lease,
        granted: Granted,
        connection: CompanionConnection,
        *,
        verify: str,
        stage: Stage | None = None,
    ) -> Attachment:
        """As `open`, of an entry that is in host memory alone: copy it to the device for all who ask for it.

        Raises:
            ManifestError, TicketError, CompanionUnavailableError: as `open`.
            ArenaError: there is not so much memory on the device; the entry stays in host memory.
            IntegrityError: the copy is damaged, and was dropped.
        """
        assert granted.parked is not None
        manifest = _checked_manifest(granted.parked.entry, device_id, stage)
        held, arena = bring_back(connection, granted, granted.parked, device, verify)
        return cls(device_id, device, lease, held, arena, manifest)

    @property
    def model(self) -> str:
        return self.held.key.model

    @property
    def rank(self) -> str:
        return self.held.key.rank

    @property
    def generation(self) -> int:
        """Counts the publications under this key."""
        return self.held.generation

    @property
    def current(self) -> int:
        """The generation that clients get, as far as the companion has told; this process may map another one."""
        return self.current_lease.current

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By full name, as `named_parameters` would give it; tied tensors under each name.

        They share memory with the companion, without a copy, on the device (small host tensors beside a device model
        are copies).
        """
        return tensors_by_name(self.manifest, self.views())

    @property
    def arena(self) -> arenas.Arena:
        """The mapped memory. Raises `ReferenceError` after the last tensor that viewed it has gone."""
        arena = self._arena or self._weak_arena()
        if arena is None:
            raise ReferenceError(f"{self.held.key.title} is not mapped any more")
        return arena

    @property
    def size_bytes(self) -> int:
        """Of the arena."""
        return self.held.arena.size_bytes

    @property
    def label(self) -> str:
        """Which entry it is, for messages: model, rank and device."""
        return f"{self.held.key.title} ({self.held.key.rank}) on {self.device_id}"

    @property
    def lost(self) -> bool:
        """Whether the companion has ended, and no new one has taken over yet. What is mapped stays valid."""
        return self._mirror.lost if self._mirror is not None else self.lease.lost.is_set()

    def views(self) -> ArenaViews:
        """What makes tensors on the arena. The views, and all their tensors, keep the arena mapped."""
        return ArenaViews(self.arena, self.size_bytes, self.device)

    def verification(self, views: ArenaViews, mode: str) -> Verification:
        """The comparison of the arena's bytes with their checksums, begun; `mode` is the setting `verify`."""
        return Verification(views, self.held.arena, mode, self.device)

    def verify(self, mode: str) -> None:
        """Compare the bytes with their checksums. Raises `IntegrityError` if they differ."""
        self.verification(self.views(), mode).check(self.manifest, self.label)

    def mirror(self, settings: Settings, client_name: str) -> None:
        """From now on, hand the entry back to the next companion if this one dies; the log says if it cannot be."""
        try:
            self._mirror = Mirror(self.device_id, settings, self.held, self.lease, client_name)
        except CompanionError as error:
            logger.warning("%s is not handed back if its companion dies: %s", self.held.key.short_title, error)

    def keep_private(self, clones: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Remember what was cloned from the arena, for `renew`: the first byte there, and the clone, of dtype uint8."""
        self._clones += clones

    def fix(self, why: str) -> None:
        """Have `prepare` refuse other generations, and waking not follow. `why` ends the error; empty: it may."""
        self._fixed = why

    def renew(self) -> None:
        """Give what was cloned the arena's bytes again, as they are mapped now. Raises `ArenaError` if it is asleep."""
        self._check_awake()
        self.views().renew(self._clones)
        self.is_stale = False

    # ---- sleeping

    @property
    def in_use(self) -> bool:
        """Whether a tensor may view the memory: it has not been closed, nor left by the last one."""
        return self._arena is not None or self._weak_arena() is not None

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
            raise ArenaError(f"{self.label} is memory of kind {kind.name}, which cannot leave its addresses.")
        self._level = level
        if self.is_private:  # as vLLM does with memory of its own
            if self.device.type == "cuda":  # the engine may have written to it just now
                torch.cuda.synchronize(self.device)
            self._backup = kind.to_host(self.arena, self.device.index) if level < 2 else None
            return str((Residence.HOST if self._backup else Residence.NOWHERE).value)
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
            where = Residence.NOWHERE.value  # it was unloaded: nobody waits for an answer
        if where != Residence.HOST.value:
            self._drop_kept()
        return where

    @property
    def _is_forgotten(self) -> bool:
        """Whether no companion is to know any more of what this process maps."""
        return self._mirror.ended if self._mirror is not None else self.lease.lost.is_set() or self.lease.released

    def _ask(self, question: Callable[[Lease], T]) -> T:
        """Ask the companion, and the next one if it dies, unless the entry is not handed back then. Raises as that."""
        return question(self.lease) if self._mirror is None else self._mirror.ask(question)

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

    def _drop_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def let_go(self, settings: Settings, client_name: str) -> None:
        """Unmap the memory, whose addresses stay, and close all descriptors of it. Nothing may use it any more."""
        self.arena.unmap()
        self._asleep = True
        if self._is_private:
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

    def wake(
        self,
        connection: CompanionConnection,
        settings: Settings,
        client_name: str,
        load: Callable[[Lease, Granted], Attachment],
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

    def _wake_private(self) -> str:
        self.arena.map_private()
        source = Residence.NOWHERE.value
        if self._backup is not None:
            (info, fds), self._backup, source = self._backup, None, Residence.HOST.value
            arenas.KINDS[self.held.arena.kind].fill(self.arena, info, fds, self.device.index)
        self._asleep = False
        return source

    def _check_awake(self) -> None:
        if self.asleep:
            raise ArenaError(f"{self.label} sleeps: there is no memory at its addresses.")

    def _drop_backup(self) -> None:
        if self._backup is not None:
            self._backup[1].close()
            self._backup = None

    def _generation_to_wake(self, lease: Lease, current: Ready, settings: Settings) -> Ready:
        """The current one, unless a trainer has written it and this process was never told to follow.

        Raises:
            LayoutError: what it had is not held any more.
        """
        if self.had(current):
            return current
        written = current.published.version
        if not written and current.published.ready_unix_s > self.held.published.ready_unix_s:  # it was loaded anew
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

    def had(self, other: Ready | Held) -> bool:
        """Whether this process had that very generation: its number may be given again after a companion has died."""
        return (other.generation, other.published) == (self.generation, self.held.published)

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

    # ---- generations

    def prepare(self, number: int, settings: Settings) -> Prepared:
        """Get hold of another generation of the entry, and prove it. Nothing changes here.

        Args:
            number: of the generation; 0: the current one.

        Raises:
            EntryNotFoundError: it is not held.
            LayoutError: it is laid out differently.
            IntegrityError: its bytes are not those that were written.
            ArenaError: as `check_can_advance`.
        """
        self.check_can_advance()

        def fetch(lease: Lease) -> tuple[Ready, arenas.Descriptors]:
            ready = lease.generation(number, self.held.manifest)
            return ready, ready.redeem()

        ready, fds = self._ask(fetch)
        try:
            if ready.manifest != self.held.manifest or ready.arena.block_sizes != self.held.arena.block_sizes:
                raise LayoutError(f"Generation {ready.generation} of {self.label} is laid out differently.")
            if self._fixed and (not self.had(ready) or ready.arena.trained):
                raise LayoutError(f"{self.label} cannot advance to generation {ready.generation}: {self._fixed}.")
            if settings.verify != "off" and not ready.arena.trained and not self.had(ready):
                label = f"{self.label}, generation {ready.generation},"
                with contextlib.closing(arenas.open_arena(ready.arena, fds.dup(), self.device.index)) as arena:
                    views = ArenaViews(arena, ready.arena.size_bytes, self.device)
                    Verification(views, ready.arena, settings.verify, self.device).check(self.manifest, label)
        except BaseException:
            fds.close()
            raise
        return Prepared(Held.of(ready, fds), fds)

    def check_can_advance(self) -> None:
        """Raise `ArenaError` if this sleeps or is private, `EntryNotFoundError` if the entry was unloaded."""
        if self._asleep:
            raise ArenaError(f"{self.label} sleeps, so it cannot advance.", remedy="Wake the engine first.")
        if self._is_private or self.arena.is_private:
            raise ArenaError(f"{self.label} is private, so it cannot advance.", remedy="Start the engine anew.")
        if self._mirror is not None and self._mirror.ended:
            raise EntryNotFoundError(
                f"{self.label} was unloaded, or its companion was stopped. This process keeps what it maps, and cannot "
                "advance.",
                remedy="Start the engine anew.",
            )

    def way_back(self) -> Prepared:
        """What is mapped now, to advance to after something else. Raises `ArenaError` as `check_can_advance`."""
        self.check_can_advance()
        fds = self.arena.fds.dup()
        return Prepared(replace(self.held, fds=fds), fds, self._follows)

    def advance(self, prepared: Prepared) -> None:
        """Map the prepared generation at the same addresses, and renew what is private. Nothing may use the memory.

        Args:
            prepared: used up, also by an error.

        Raises:
            ArenaError: it cannot be mapped; what was mapped is. After an error from what is private, or from what is
                held for the next companion, it is mapped, and this has to go back: `way_back`, taken before.
            RuntimeDirError: as the latter.
        """
        held = prepared.held
        self.arena.replace(held.arena, arenas.Descriptors(prepared.fds.take()))
        self._follows = prepared.follows
        self._drop_kept()  # of what was mapped
        self.renew()
        self.held = replace(held, fds=self.arena.fds)
        if self._mirror is not None:
            self._mirror.hold_instead(self.held)
        try:
            self.current_lease.advanced(held.generation)
        except CompanionError as error:
            logger.warning("The companion does not know which generation of %s is mapped: %s", self.label, error)

    @property
    def current_lease(self) -> Lease:
        """The lease on the companion that holds the entry now, which may have followed another one."""
        return self._mirror.lease if self._mirror is not None else self.lease

    # ---- writing

    @contextlib.contextmanager
    def written_through(self, writer: arenas.ArenaWriter) -> Iterator[None]:
        """While open, what views the memory writes to the generation that `writer` fills. Raises as `Arena`'s."""
        self._check_awake()
        with self.arena.written_through(writer):
            yield

    def privatize(
        self, connection: CompanionConnection | None, free_bytes: Callable[[torch.device], int | None] = lambda _: None
    ) -> None:
        """Make the memory this process's own, at the same addresses and with the same bytes, so that it may write.

        The entry is not used here any more. If nobody else uses it, it goes: this process needs its memory. Nothing
        else may use the memory meanwhile.

        Args:
            connection: to the companion; None: there is none, and nobody else has the entry.
            free_bytes: memory of a device that nobody uses; None: that is not known.

        Raises:
            ArenaError: it is asleep, or there is no memory for a copy; what is mapped has the bytes that it had, and
                this may be tried again. The companion still knows of this process, if others use the entry.
        """
        self._check_awake()
        if self._is_private:
            return
        is_alone = connection is None or self._is_alone(connection)
        free, sizes = free_bytes(self.device), self.arena.shared_sizes
        needed = max(sizes, default=0) if is_alone else sum(sizes)
        if free is not None and free < needed:
            what = "the first block of its own" if is_alone else "a copy, as others use the entry,"
            raise ArenaError(
                f"{self.label} needs {needed / 2**30:.2f} GiB for {what} and {free / 2**30:.2f} GiB of the device are "
                "free."
            )
        if not is_alone:  # then none of its memory becomes free by our leaving
            self.arena.privatize()
        self._leave()
        if is_alone:
            if connection is not None:
                with contextlib.suppress(CompanionError):  # somebody else uses it by now, or it has gone
                    connection.unload(key_id=self.held.key.id)
            self.arena.privatize()
        self._drop_kept()
        self._is_private = True

    def _is_alone(self, connection: CompanionConnection) -> bool:
        """Whether nobody else uses the entry, or wants it to stay; not if that cannot be found out."""
        if self.lost:
            return False
        try:
            status = connection.status(key_id=self.held.key.id)
        except CompanionError:
            return False
        return not status.owner_pid and sum(len(entry.leases) for entry in status.entries) <= 1

    def _leave(self) -> None:
        """The entry is not used here any more, nor handed back."""
        lease = self.lease
        if self._mirror is not None:
            lease, own = self._mirror.keep_lease()
            self._mirror = None
            if own is not None:
                own.close()
        lease.release()

    def wait_known(self, timeout_s: float) -> None:
        """Return once a companion knows that this process maps the entry, or the time is over."""
        if self._mirror is not None:
            self._mirror.wait_known(timeout_s)

    def leave_to_tensors(self, unused: Callable[[], object]) -> None:
        """From now on only tensors keep the arena mapped; `unused()` is called, in any thread, after the last one."""
        arena = self.arena
        weakref.finalize(arena, unused).atexit = False
        self._arena = None

    def close_with_it(self, others: ExitStack) -> None:
        """Close `others`, too, when this is closed."""
        self._with_it = others

    def close(self) -> None:
        """Forget the tensors, unmap the memory and end the lease. Idempotent."""
        vars(self).setdefault("tensors", {}).clear()
        if self._mirror is not None:
            self._mirror.close()  # before its descriptors go
        if self._sleeper is not None:
            self._sleeper.close()
        self._drop_backup()
        self._drop_kept()
        arena, self._arena = self._arena or self._weak_arena(), None
        if arena is not None:
            arena.close()
        self.lease.release()
        self._with_it.pop_all().close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_manifest(ready: Ready, device_id: str, stage: Stage | None) -> Manifest:
    """The manifest of an entry that is about to be mapped. Raises `ManifestError` as `Attachment.open`."""
    manifest = manifest_from_bytes(ready.manifest)
    check_manifest_fits(manifest, ready.arena)
    check_dtypes(manifest)
    if stage is not None and manifest.stage is not stage:
        raise ManifestError(f"{ready.key.title} was published {manifest.stage.value}; {device_id} needs {stage.value}.")
    return manifest


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
