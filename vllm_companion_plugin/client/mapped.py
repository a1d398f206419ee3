"""What a client has of an entry that it maps: memory, lease, and what the next companion needs to know of it.

Engines and programs that are not vLLM open an entry in the same way, and give it back in the same way.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Granted, Lease, Ready
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.client.parked import bring_back
from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.errors import ArenaError, CompanionError, EntryNotFoundError, ManifestError
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews, check_dtypes, without_storage
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("vllm.companion.client")

T = TypeVar("T")


class Mapped:
    """An entry that this process maps, read-only, until `close` or the end of `with`.

    Args:
        device_id: whose companion holds it: a GPU's UUID, or "cpu".
        device: the same device, as PyTorch names it in this process.
        lease: on the entry; owned from now on.
        held: what the next companion is told if this one dies; an attribute, too.
        arena: mapped; owned from now on.
        manifest: the module tree that is in it; an attribute, too.
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
        self._clones: list[tuple[int, torch.Tensor]] = []
        self._processed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._with_it = ExitStack()

    @classmethod
    def open(
        cls, device_id: str, device: torch.device, lease: Lease, ready: Ready, *, stage: Stage | None = None
    ) -> Self:
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
    ) -> Self:
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
        """The mapped memory. Raises `ArenaError` once it was closed, and the last tensor that viewed it has gone."""
        arena = self._arena or self._weak_arena()
        if arena is None:
            raise ArenaError(f"{self.label} was closed, and is not mapped here any more.", remedy="Attach again.")
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
    def in_use(self) -> bool:
        """Whether a tensor may view the memory: it has not been closed, nor left by the last one."""
        return self._arena is not None or self._weak_arena() is not None

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

    def had(self, other: Ready | Held) -> bool:
        """Whether this process had that very generation: its number may be given again after a companion has died."""
        return (other.generation, other.published) == (self.generation, self.held.published)

    def keep_private(self, clones: Iterable[tuple[int, torch.Tensor]], processed: Iterable[torch.Tensor] = ()) -> None:
        """Remember what was cloned from the arena, for `renew`.

        Args:
            clones: the first byte in the arena of each, and the clone, of dtype uint8.
            processed: those that this process has made something else of, as it does of the same bytes each time.
        """
        self._clones += clones
        self._processed += [(clone, clone.clone()) for clone in processed]

    def renew(self) -> None:
        """Give what was cloned the arena's bytes again, as they are mapped now, or what this process makes of them."""
        self.views().renew(self._clones)
        for clone, as_processed in self._processed:
            clone.copy_(as_processed)

    def mirror(self, settings: Settings, client_name: str) -> None:
        """From now on, hand the entry back to the next companion if this one dies; the log says if it cannot be."""
        try:
            self._mirror = Mirror(self.device_id, settings, self.held, self.lease, client_name)
        except CompanionError as error:
            logger.warning("%s is not handed back if its companion dies: %s", self.held.key.short_title, error)

    @property
    def current_lease(self) -> Lease:
        """The lease on the companion that holds the entry now, which may have followed another one."""
        return self._mirror.lease if self._mirror is not None else self.lease

    def wait_known(self, timeout_s: float) -> None:
        """Return once a companion knows that this process maps the entry, or the time is over."""
        if self._mirror is not None:
            self._mirror.wait_known(timeout_s)

    def _ask(self, question: Callable[[Lease], T]) -> T:
        """Ask the companion, and the next one if it dies, unless the entry is not handed back then. Raises as that."""
        return question(self.lease) if self._mirror is None else self._mirror.ask(question)

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
        with ExitStack() as steps:  # from the last one on; each is taken, also if those before it were interrupted
            steps.callback(lambda: self._with_it.pop_all().close())
            steps.callback(self.lease.release)
            steps.callback(self._close_arena)
            if self._mirror is not None:
                steps.callback(self._mirror.close)  # before its descriptors go

    def _close_arena(self) -> None:
        arena, self._arena = self._arena or self._weak_arena(), None
        if arena is not None:
            arena.close()

    def __del__(self) -> None:
        """Nobody has closed it, and nobody can any more: it ends with the last tensor that views the memory."""
        arena, lease = getattr(self, "_arena", None), getattr(self, "lease", None)
        if arena is None or lease is None or sys.is_finalizing() or lease.is_inherited:
            return
        vars(self).pop("tensors", None)
        self.leave_to_tensors(self.close_later)

    def close_later(self) -> None:
        """Close it in a thread of its own: whoever collects garbage may stand anywhere, and waits for no lock."""
        threading.Thread(target=self.close, name="companion-end", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_manifest(ready: Ready, device_id: str, stage: Stage | None) -> Manifest:
    """The manifest of an entry that is about to be mapped.

    Raises:
        EntryNotFoundError: it is no model.
        ManifestError: as `Attachment.open`.
    """
    if ready.key.kind != WEIGHTS:
        raise EntryNotFoundError(
            f"The companion of {device_id} has no weights of {ready.key.model}, but an adapter of this name.",
            remedy="Engines serve it by its name.",
        )
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
