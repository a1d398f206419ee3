"""Writing the next generation of an entry, while engines serve the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.filling import Filling
from vllm_companion_plugin.client.fitting import Weights, check_open
from vllm_companion_plugin.client.lease import Lease
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire import codec


class Update:
    """The next generation of an entry: tensors that are written by name, and all others as the current one has them.

    Nothing is seen of it before `commit`. Each byte is moved once: what nobody has written is copied at the end.

    Args:
        attachment: of the writer, to the current generation; borrowed.
        lease: of that attachment, which is the entry's writer.
        check_finite: as of `Filling`.
        base: as of `updating`.

    Attributes:
        generation: the number of what was written; 0 before it is committed.

    Raises:
        ArenaError: there is no memory for a second generation.
    """

    generation = 0

    def __init__(self, attachment: Attachment, lease: Lease, *, check_finite: bool = False, base: int = 0) -> None:
        self._attachment = attachment
        self._lease = lease
        self._base = base
        self._is_over = False
        held = attachment.held.arena
        self._writer = memory.create(held.kind, held.size_bytes, attachment.device.index)
        try:
            self._filling = Filling(
                *(self._writer, held.size_bytes, attachment.manifest, attachment.device, attachment.label),
                check_finite=check_finite,
            )
            for size_bytes in held.block_sizes:
                self._writer.add_block(size_bytes)
        except BaseException:
            self._writer.abort()
            raise

    @property
    def names(self) -> list[str]:
        """Of all tensors that can be written as `CompanionClient.attach` has them."""
        return list(self._filling.infos)

    @property
    def checkpoint_names(self) -> list[str]:
        """Of all tensors that can be written as a checkpoint has them: by a copy, without processing."""
        return list(self._filling.sources)

    @property
    def checkpoint_dtypes(self) -> dict[str, torch.dtype]:
        """The types that `checkpoint_names` have to have."""
        return {name: dtype_of(source.dtype) for name, source in self._filling.sources.items()}

    @property
    def writer(self) -> memory.ArenaWriter:
        """Of its memory; borrowed."""
        return self._writer

    def complete(self) -> None:
        """Copy all that nobody has written yet from the current generation; of that, nothing is copied at the end.

        This and what follows raise `BadRequestError` after `commit` or `abort`.
        """
        self._check_open()
        self._filling.complete(self._attachment.arena.address)

    def check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As `Filling.check`."""
        self._check_open()
        self._filling.check(weights)

    def load(self, weights: Weights) -> int:
        """As `Filling.load`."""
        self._check_open()
        return self._filling.load(weights)

    def commit_trained(self, version: str) -> memory.Arena:
        """As `commit`, of an arena that this process goes on writing: that arena, which the caller owns."""
        self.complete()
        self._is_over = True
        arena = self._writer.seal(trained=True)
        try:
            self.generation = self._lease.commit_staged(arena.info, arena.fds, version, self._base)
        except BaseException:
            arena.close()
            raise
        return arena

    def commit(self, version: str) -> int:
        """Publish it as the current generation; its number.

        Raises:
            StaleError: another generation than `base` has become current.
            CommitUnknownError: it may be current: the companion did not answer.
            CompanionError: the companion does not take it. Nothing of it stays.
        """
        held, device = self._attachment.held.arena, self._attachment.device
        self.complete()
        summing = Summing(ArenaViews(self._writer, held.size_bytes, device), held.size_bytes, device)
        summing.extend(held.size_bytes)
        checksums = summing.checksums()
        self._is_over = True
        with contextlib.closing(self._writer.seal()) as arena:
            info = replace(arena.info, checksums=checksums)
            self.generation = self._lease.commit_staged(info, arena.fds, version, self._base)
        return self.generation

    def abort(self) -> None:
        """Forget what was written. Idempotent."""
        self._is_over = True
        self._writer.abort()

    def _check_open(self) -> None:
        check_open(self._is_over, self._attachment.label)


def check_version(version: str) -> None:
    """Raise `BadRequestError` unless weights can be known by it."""
    if not version:
        raise BadRequestError("New weights need a version, by which they are known.", remedy='Name one, e.g. "step-7".')
    codec.version_from_message(version)


@contextlib.contextmanager
def updating(
    attachment: Attachment, version: str, settings: Settings, *, base: int = 0, check_finite: bool = False
) -> Iterator[Update]:
    """The next generation of what `attachment` maps; committed at the end of `with`, unless that raises.

    The attachment advances to the current generation first, if another client has committed one meanwhile.

    Args:
        base: the generation that must be current, now and at the end; 0: whichever.
        check_finite: as of `Filling`.

    Raises:
        BadRequestError: no version, or one that cannot be shown.
        StaleError: another generation than `base` is current.
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it.
        CompanionError: as `Update.commit`.
    """
    check_version(version)
    with _staged(attachment, settings, base=base, check_finite=check_finite) as update:
        yield update
        if not update.generation:  # else the caller has done it
            update.commit(version)


@dataclass(frozen=True)
class Owned:
    """A generation that this process goes on writing.

    Attributes:
        arena: its memory, mapped once more beside the attachment's; it may be written to while its `writing` is open.
        generation: its number.
        before: the number of the one that was current before, of which it is a copy at first.
    """

    arena: memory.Arena
    generation: int
    before: int


def begin_training(attachment: Attachment, version: str, settings: Settings) -> Owned:
    """Make a copy of the current generation current, that this process goes on writing while others map it.

    `attachment` maps the copy afterwards, read-only as anybody: so this process counts as its user, and hands it back.

    Returns:
        The copy, whose arena the caller owns.

    Raises:
        BadRequestError: no version, or one that cannot be shown.
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it, or memory of this kind cannot be trained.
        CompanionError: as `Update.commit`.
    """
    check_version(version)
    with _staged(attachment, settings) as update:
        before = attachment.generation
        arena = update.commit_trained(version)
    try:
        attachment.advance(attachment.prepare(update.generation, settings))
    except BaseException:
        arena.close()
        raise
    return Owned(arena, update.generation, before)


@contextlib.contextmanager
def _staged(
    attachment: Attachment, settings: Settings, *, base: int = 0, check_finite: bool = False
) -> Iterator[Update]:
    """The next generation, that has to be committed inside of `with`; if that raises, nothing of it stays."""
    lease = attachment.current_lease
    try:
        lease.stage(base)  # which may have been heard, whatever it raises
        with contextlib.closing(attachment.prepare(0, settings)) as current:
            if not attachment.had(current.held):
                attachment.advance(current)
        update = Update(attachment, lease, check_finite=check_finite, base=base)
        try:
            yield update
        finally:
            update.abort()
    except BaseException:
        lease.abort_staged()
        raise
