"""Writing the next generation of an entry, while engines serve the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.filling import Filling, Weights
from vllm_companion_plugin.client.lease import Lease
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.settings import Settings


class Update:
    """The next generation of an entry: a copy of the current one, of which tensors are overwritten by name.

    Only the changed ones need to be written. Nothing is seen of it before `commit`.

    Args:
        attachment: of the writer, to the current generation; borrowed.
        lease: of that attachment, which is the entry's writer.
        check_finite: refuse tensors with values that are infinite or no numbers.

    Raises:
        ArenaError: there is no memory for a second generation.
    """

    def __init__(self, attachment: Attachment, lease: Lease, *, check_finite: bool = False) -> None:
        self._attachment = attachment
        self._lease = lease
        held = attachment.held.arena
        self._writer = memory.create(held.kind, held.size_bytes, attachment.device.index)
        try:
            self._filling = Filling(
                *(self._writer, held.size_bytes, attachment.manifest, attachment.device, attachment.label),
                check_finite=check_finite,
            )
            offset = 0
            for size_bytes in held.block_sizes:
                self._writer.add_block(size_bytes)
                self._writer.write(offset, attachment.arena.address + offset, size_bytes)
                offset += size_bytes
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
    def writer(self) -> memory.ArenaWriter:
        """Of its memory; borrowed."""
        return self._writer

    def load(self, weights: Weights) -> int:
        """As `Filling.load`."""
        return self._filling.load(weights)

    def commit(self, version: str) -> int:
        """Publish it as the current generation; its number.

        Raises:
            CompanionError: the companion does not take it. Nothing of it stays.
        """
        held, device = self._attachment.held.arena, self._attachment.device
        self._writer.flush()
        summing = Summing(ArenaViews(self._writer, held.size_bytes, device), held.size_bytes, device)
        summing.extend(held.size_bytes)
        checksums = summing.checksums()
        with contextlib.closing(self._writer.seal()) as arena:
            return self._lease.commit_staged(replace(arena.info, checksums=checksums), arena.fds, version)

    def abort(self) -> None:
        """Forget what was written. Idempotent."""
        self._writer.abort()


@contextlib.contextmanager
def updating(
    attachment: Attachment, version: str, settings: Settings, *, check_finite: bool = False
) -> Iterator[Update]:
    """The next generation of what `attachment` maps; committed at the end of `with`, unless that raises.

    The attachment advances to the current generation first, if another client has committed one meanwhile.

    Raises:
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it.
        CompanionError: as `Update.commit`.
    """
    lease = attachment.current_lease
    lease.stage()
    try:
        with contextlib.closing(attachment.prepare(0, settings)) as current:
            if current.ready.generation != attachment.generation:
                attachment.advance(current)
        update = Update(attachment, lease, check_finite=check_finite)
        try:
            yield update
            update.commit(version)
        finally:
            update.abort()
    except BaseException:
        lease.abort_staged()
        raise
