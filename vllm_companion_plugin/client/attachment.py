"""An attachment as engines and programs have it: it advances to other generations, or its memory becomes their own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Lease, Ready
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.client.sleeping import Sleepable
from vllm_companion_plugin.errors import ArenaError, CompanionError, EntryNotFoundError, LayoutError
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.settings import Settings

logger = logging.getLogger("vllm.companion.client")


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


class Attachment(Sleepable):
    """An entry that this process maps, read-only, until `close` or the end of `with`.

    In an engine, or if nobody refers to it, it ends by itself, when no tensor views the memory any more. Writing to a
    tensor that views it ends the process (host) or the CUDA context (device), and using one after `close` does too:
    clone what must stay.

    Arguments and attributes: as of `Mapped` and `Sleepable`.
    """

    # ---- generations

    def fix(self, why: str) -> None:
        """Have `prepare` refuse other generations, and waking not follow. `why` ends the error; empty: it may."""
        self._fixed = why

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
                "free.",
                remedy="Lower --gpu-memory-utilization, or start the engine with "
                """--model-loader-extra-config '{"share": "copy"}'.""",
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
