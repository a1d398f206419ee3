"""Writing the next generation of an entry by way of vLLM's own loading, for what cannot be written by copies alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.fitting import Weights, check_open, checked, misfit, refuse
from vllm_companion_plugin.client.handing import Giving
from vllm_companion_plugin.client.headless import Headless
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.memory.tensors.views import dtype_of
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.manifest import sources_from_bytes


class ProcessedUpdate:
    """The next generation of an entry: vLLM makes it of a whole checkpoint's tensors. Nothing is seen before the end.

    Args:
        attachment: of this process, to the current generation; borrowed.
        headless: has begun; borrowed.
        check_finite: as of `Filling`.

    Attributes:
        generation: the number of what was written; 0 before it is committed.

    Raises:
        ManifestError: the entry's manifest is damaged.
    """

    generation = 0

    def __init__(
        self, attachment: Attachment, headless: Headless, settings: Settings, *, check_finite: bool = False
    ) -> None:
        self._attachment = attachment
        self._check_finite = check_finite
        self._sources = sources_from_bytes(attachment.manifest.sources)
        self._handed: set[str] = set()
        self._is_over = False
        kind, size_bytes = attachment.held.arena.kind, settings.update_chunk_mib << 20
        self._giving = Giving(kind, size_bytes, attachment.device, headless.hand_over)

    @property
    def names(self) -> list[str]:
        """Nothing: vLLM's own tensors follow from the checkpoint's."""
        return []

    @property
    def checkpoint_names(self) -> list[str]:
        """Of all tensors that must be loaded, in the order in which the checkpoint was read."""
        return list(self._sources)

    @property
    def checkpoint_dtypes(self) -> dict[str, torch.dtype]:
        """The types that `checkpoint_names` have to have."""
        return {name: dtype_of(source.dtype) for name, source in self._sources.items()}

    @property
    def began(self) -> bool:
        """Whether anything was handed over."""
        return self._giving.began

    def check(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raise `BadRequestError` for what does not fit, all of it. Tensors on the meta device will do."""
        check_open(self._is_over, self._attachment.label)
        refuse((self._problem(name, tensor) for name, tensor in weights), self._attachment.label)

    def load(self, weights: Weights) -> int:
        """Take tensors by the checkpoint's names, in its shapes and dtypes; how many. May be called again.

        Of a module, parameters are taken, and buffers that the checkpoint has; of a mapping, all items. Both are looked
        at before anything is taken. Of an iterator each item is looked at when it comes. Tensors are copied, and may be
        changed afterwards; the copies are handed over whenever a chunk is full.

        Raises:
            BadRequestError: names, shapes or dtypes that do not fit, all of them, and those that came before; or the
                update is over.
            UpdateError: vLLM could not load them, or its process ended.
        """
        check_open(self._is_over, self._attachment.label)
        count = 0
        for name, tensor in checked(weights, self._sources.keys(), self._problem, self._attachment.label):
            self._handed.add(name)
            self._giving.add(name, tensor)
            count += 1
        return count

    def finish(self) -> None:
        """Hand over the rest.

        Raises:
            BadRequestError: tensors are missing that loading needs: vLLM fills layers as a whole.
            UpdateError: as `load`.
        """
        refuse(
            (f"weights without {name}" for name in self._sources if name not in self._handed), self._attachment.label
        )
        self._giving.flush()

    def close(self) -> None:
        """Forget what was taken and not handed over, and take nothing more. Idempotent."""
        self._is_over = True
        self._giving.close()

    def _problem(self, name: str, tensor: torch.Tensor) -> str:
        source = self._sources.get(name)
        if source is None:
            return f"{name}, which is no tensor that loading its checkpoint uses"
        if name in self._handed:
            return f"{name} again"
        return misfit(name, tensor, [source], check_finite=self._check_finite)


@contextlib.contextmanager
def processing(
    attachment: Attachment,
    start: Callable[[], Headless],
    version: str,
    settings: Settings,
    *,
    base: int = 0,
    check_finite: bool = False,
) -> Iterator[ProcessedUpdate]:
    """The next generation of what `attachment` maps, committed at the end of `with`, unless that raises.

    A headless process that was given something and did not finish has a model that is of no use: it is closed.

    Args:
        start: gives the headless process of the entry.
        base, check_finite: as of `updating`.

    Raises:
        StaleError: another generation than `base` is current.
        EntryInUseError: another client writes the next generation already.
        ArenaError: there is no memory for it, or this kind of memory cannot be replaced at its addresses.
        BadRequestError: nobody has observed how its checkpoint is loaded; or, at the end, tensors are missing.
        UpdateError: vLLM could not load them, or its process ended.
        CommitUnknownError: they may be current: the process ended, or did not answer, at the end.
        CompanionError: as `start`.
    """
    if not attachment.manifest.sources:
        raise BadRequestError(f"Which tensors vLLM loads into {attachment.label} was not observed by its publisher.")
    headless = start()
    headless.begin(version, base)
    update: ProcessedUpdate | None = None
    try:
        update = ProcessedUpdate(attachment, headless, settings, check_finite=check_finite)
        yield update
        update.finish()
        update.generation = headless.commit(version, attachment.generation)
    except BaseException:
        if update is not None and update.began:
            headless.close()
        elif not headless.ended:
            headless.abort()
        raise
    finally:
        if update is not None:
            update.close()
