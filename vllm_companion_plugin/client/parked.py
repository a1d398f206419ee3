"""Bringing back what is in host memory alone: from there to the device, proved, and to the companion as it was."""

from __future__ import annotations

import logging
import time

import torch

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Parked
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.core.status import Progress
from vllm_companion_plugin.errors import IntegrityError
from vllm_companion_plugin.memory.host_copy import HostCopy
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.wire.manifest import manifest_from_bytes

logger = logging.getLogger("vllm.companion.client")


def bring_back(
    connection: CompanionConnection,
    granted: Granted,
    parked: Parked,
    device: torch.device,
    verify: str,
    kept: HostCopy | None = None,
) -> tuple[Held, memory.Arena]:
    """Copy a parked entry to the device, and publish it as it was. The lease is attached from now on.

    Args:
        device: where the entry was.
        verify: as the setting.
        kept: what this process has kept of a copy of the same generation.

    Returns:
        What it is, and the arena, mapped somewhere; the caller owns it.

    Raises:
        ArenaError: there is not so much memory on the device; the entry stays parked.
        IntegrityError: the copy is damaged, and was dropped.
        CompanionError: the companion does not take it.
    """
    entry = parked.entry
    granted.publication.report(Progress("copying from host memory", 0, entry.arena.size_bytes))
    kind = memory.KINDS[entry.arena.kind]
    started = time.perf_counter()
    arena = kind.from_host(entry.arena, parked.host, parked.redeem(), device.index, kept)
    try:
        views = ArenaViews(arena, entry.arena.size_bytes, device)
        manifest = manifest_from_bytes(entry.manifest)
        label = f"{entry.key.title} ({entry.key.rank}) from host memory"
        if parked.host.kind != entry.arena.kind:  # else it is the same memory
            Verification(views, entry.arena, verify, device).check(manifest, label)
        publication = granted.publication
        publication.hand_back(entry.arena, arena.fds, entry.manifest, entry.published, entry.generation)
    except IntegrityError:
        arena.close()
        connection.unload(key_id=entry.key.id, force=True)
        raise
    except BaseException:
        arena.close()
        raise
    logger.debug("%s was brought back in %.3f s", label, time.perf_counter() - started)
    return Held.of(entry, arena.fds), arena
