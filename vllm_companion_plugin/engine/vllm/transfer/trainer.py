"""vLLM's trainer side of the backend `companion`: write the next generation once a device, and have engines take it.

A trainer's process loads no plugins of vLLM, so importing this makes the backend known there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import distributed
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from vllm_companion_plugin.client.api import CompanionClient, Mode
from vllm_companion_plugin.client.casting import cast
from vllm_companion_plugin.client.processed import ProcessedUpdate
from vllm_companion_plugin.client.update import Update
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import EntryState, EntryStatus
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.engine.register import register
from vllm_companion_plugin.engine.vllm.sharing import TRANSFER_BACKEND
from vllm_companion_plugin.engine.vllm.transfer.engines import Engines
from vllm_companion_plugin.errors import (
    BadRequestError,
    CommitUnknownError,
    CompanionError,
    EntryNotFoundError,
    UpdateRefusedError,
)
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.settings import Given

register()

Value = TypeVar("Value")
_SHOWN = 8
"""Most names in an error."""


@dataclass
class CompanionTrainerInitInfo(TrainerInitInfo):
    """What one process of a trainer writes.

    Attributes:
        rank: of this process, from 0; by keyword. Rank 0 tells the engines.
        model: as the engines name it.
        devices: whose companions this process writes to, as `CompanionClient` names them; None: of PyTorch's current
            device, or the CPU's without CUDA. Empty: of none; it only takes part when weights are gathered.
        key_ids: of the entries, as `status` shows them; empty: all of the model that are there.
        settings: by name, as of `CompanionClient`.
        mode: as of `CompanionClient.update`.
        flags: of vLLM, as of `CompanionClient.update`.
    """

    backend: ClassVar[str] = TRANSFER_BACKEND

    model: str
    devices: Sequence[str] | None = None
    key_ids: Sequence[str] = ()
    settings: Given = field(default_factory=lambda: Given())
    mode: Mode = "auto"
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class _Written:
    """What this process has written of one entry: its generation, and the one that was current before."""

    companion: CompanionClient
    key: EntryKey
    before: int
    generation: int

    def make_current(self) -> None:
        self.companion.make_current(self.key.model, self.generation, key_id=self.key.id, base=self.before)

    def take_back(self) -> None:
        self.companion.make_current(self.key.model, self.before, key_id=self.key.id, base=self.generation)


class CompanionTrainer(TrainerWeightTransferEngine):
    """One process of a trainer; made by `WeightTransferTrainerFactory.trainer_init`.

    All processes call the same methods in the same order; where several wait for each other they use PyTorch's default
    group, as vLLM's own backends on the trainer's device do.

    Attributes:
        written: the generations that were written last, by all processes: by device and by id of the key.
        version: how they are called.
    """

    init_info_cls = CompanionTrainerInitInfo
    config_cls = WeightTransferConfig

    def __init__(self, init_info: CompanionTrainerInitInfo, *, client: Any, source: Any, config: Any = None) -> None:
        # vLLM 0.26 takes a config, and 0.33 a rank.
        known = {
            **{"config": config, "client": client, "source": source},
            **{"is_sender": init_info.is_sender, "rank": init_info.rank},
        }
        taken = inspect.signature(TrainerWeightTransferEngine.__init__).parameters
        super().__init__(**{name: value for name, value in known.items() if name in taken})
        self._engines = client if isinstance(client, Engines) else Engines([client])
        self._model = model_name(init_info.model)
        devices: Sequence[str | None] = [None] if init_info.devices is None else list(init_info.devices)
        self._companions = [CompanionClient(device, **init_info.settings) for device in devices]
        self._key_ids = init_info.key_ids
        self._mode, self._flags = init_info.mode, init_info.flags
        self._count = 0
        self._own: list[_Written] = []
        self._is_taken_back = False
        self.written: dict[str, dict[str, int]] = {}
        self.version = ""

    @classmethod
    def trainer_init(
        cls, init_info: CompanionTrainerInitInfo, *, client: Any, source: Any = None, config: Any = None
    ) -> CompanionTrainer:
        """Look whether the engines serve the model from companions.

        Args:
            client: of the engines: one of vLLM's, or `Engines` of several.
            source: vLLM's `WeightSource`, whose names are those of the checkpoint or of vLLM's tensors.
            config: of vLLM 0.26; nothing in it is needed.

        Raises:
            BadRequestError: no source.
            UpdateRefusedError: an engine does not.
        """
        if source is None:
            raise BadRequestError("A trainer of the backend companion needs a source of weights.")
        made = cls(init_info, client=client, source=source, config=config)
        with _on_all_ranks():
            if made.is_sender:
                made._engines.init_weight_transfer_engine({"model": made._model})
        return made

    def send_weights(self, version: str = "") -> None:
        """`write_weights` and `switch_engines`, with what they take and raise."""
        self.write_weights(version)
        self.switch_engines()

    def write_weights(self, version: str = "") -> None:
        """Write the source's weights as the next generation into the companions, while engines serve the current one.

        Args:
            version: your name for them; empty: "update-" and a number.

        Raises:
            BadRequestError: names or shapes do not fit, or the source did not yield all that it describes.
            EntryNotFoundError: a companion has nothing of the model.
            EntryInUseError: another trainer writes.
            CommitUnknownError: as `CompanionClient.update`. They are taken back if the companion answers again.
            CompanionError: as `CompanionClient.update`. Nothing of the new weights stays on this process's devices.
            UpdateRefusedError: another process of this trainer could not; nothing stays anywhere.
        """
        self._count += 1
        version = version or f"update-{self._count}"
        begun: list[tuple[CompanionClient, EntryStatus, Update | ProcessedUpdate]] = []
        with ExitStack() as open_updates:
            with _on_all_ranks():
                for companion in self._companions:
                    for entry in self._entries_of(companion):
                        writing = self._update(companion, entry, version)
                        begun.append((companion, entry, open_updates.enter_context(writing)))
                for _, _, update in begun:
                    update.check(cast(_described(self.source), update.checkpoint_dtypes))
            with _on_all_ranks():
                _fill([update for _, _, update in begun], _checked(self.source))
            try:
                with _on_all_ranks():
                    open_updates.close()  # which commits one after the other
            except BaseException as error:
                maybe = _found(begun, version) if isinstance(error, CommitUnknownError) else []
                for each in _committed(begun) + maybe:
                    with suppress(CompanionError):  # a companion that has died knows nothing any more
                        each.take_back()
                raise
        self._own = _committed(begun)
        self._is_taken_back = False
        written: dict[str, dict[str, int]] = {}
        for own in _of_all_ranks([(each.companion.device, each.key.id, each.generation) for each in self._own]):
            for device, key_id, generation in own:
                written.setdefault(device, {})[key_id] = generation
        self.written, self.version = written, version

    def switch_engines(self) -> None:
        """Have all engines serve what was written last: each prepares, and when all have, each switches.

        What engines have computed with older weights in their KV caches is yours to reset, or to keep: pause them
        before, and resume afterwards.

        Raises:
            BadRequestError: nothing has been written.
            UpdateRefusedError: an engine cannot prepare: none has changed, and what was current before is so again. Or
                one cannot switch; the message says which. This may be called again, as long as companions hold what
                was written.
        """
        with _on_all_ranks():
            if not self.written:
                raise BadRequestError(f"No weights of {self._model} have been written.")
            for own in self._own if self._is_taken_back else ():
                own.make_current()
        self._is_taken_back = False
        try:
            with _on_all_ranks():
                if self.is_sender:
                    self._engines.start_weight_update()
                    self._engines.update_weights({"generations": self.written, "version": self.version})
        except UpdateRefusedError:
            # An engine that starts or wakes would have other weights than those that serve.
            self._is_taken_back = True
            for own in self._own:
                own.take_back()
            raise
        with _on_all_ranks():
            if self.is_sender:
                self._engines.finish_weight_update(self.version)

    def shutdown(self) -> None:
        """End what processes weights for this trainer; another update would start it again. Idempotent."""
        for companion in self._companions:
            companion.close()

    def _update(
        self, companion: CompanionClient, entry: EntryStatus, version: str
    ) -> AbstractContextManager[Update | ProcessedUpdate]:
        return companion.update(
            self._model,
            version,
            role=entry.key.role,
            key_id=entry.key.id,
            base=entry.generation,
            name="trainer",
            mode=self._mode,
            flags=self._flags,
        )

    def _entries_of(self, companion: CompanionClient) -> list[EntryStatus]:
        status = companion.status()
        found = [
            entry
            for entry in status.entries
            if (entry.key.model, entry.key.role) == (self._model, "target")
            and entry.state in (EntryState.READY, EntryState.PARKED)
            and (not self._key_ids or entry.key.id in self._key_ids)
        ]
        if not found:
            held = ", ".join(f"{entry.key.title} ({entry.state.value})" for entry in status.entries) or "nothing"
            raise EntryNotFoundError(
                f"The companion of {companion.device} has no weights of {self._model}; it has {held}.",
                remedy="Start an engine with --load-format companion first.",
            )
        return found


def _committed(begun: list[tuple[CompanionClient, EntryStatus, Update | ProcessedUpdate]]) -> list[_Written]:
    return [
        _Written(companion, entry.key, entry.generation, update.generation)
        for companion, entry, update in begun
        if update.generation
    ]


def _found(begun: list[tuple[CompanionClient, EntryStatus, Update | ProcessedUpdate]], version: str) -> list[_Written]:
    """What was committed though the answer was lost, where a companion still answers."""
    found: list[_Written] = []
    for companion, entry, update in begun:
        with suppress(CompanionError):
            found += [
                _Written(companion, entry.key, entry.generation, now.generation)
                for now in companion.status().entries
                if now.key.id == entry.key.id and now.version == version and not update.generation
            ]
    return found


def _described(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, shapes and dtypes of all that a source yields, without memory."""
    metadata = source.metadata
    for each in metadata() if callable(metadata) else metadata:  # a method until vLLM 0.32
        yield each.name, torch.empty(each.shape, dtype=each.dtype, device="meta")


def _checked(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a source yields. At the end raises `BadRequestError` if it was not all that it describes."""
    missing = dict.fromkeys(name for name, _ in _described(source))
    for name, tensor in source.iter_full() if hasattr(source, "iter_full") else source:
        if tensor is not None:  # which only another rank has
            missing.pop(name, None)
            yield name, tensor
    if missing:
        raise BadRequestError(
            f"The source did not yield {several(list(missing), _SHOWN)}.",
            remedy="Each process that writes needs all weights, gathered.",
        )


def _fill(updates: list[Update | ProcessedUpdate], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    dtypes = [update.checkpoint_dtypes for update in updates]
    if len(updates) == 1:
        updates[0].load(cast(weights, dtypes[0]))
        return
    for pair in weights:
        for update, types in zip(updates, dtypes, strict=True):
            update.load(cast([pair], types))


def _of_all_ranks(value: Value) -> list[Value]:
    """What each process of the trainer gives."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def _on_all_ranks() -> Iterator[None]:
    """What is inside of `with` succeeds in all processes of the trainer, or an error is raised in all.

    Raises:
        UpdateRefusedError: another process failed.
    """
    try:
        yield
    except BaseException as error:
        _of_all_ranks(f"{type(error).__name__}: {error}")
        raise
    failures = [each for each in _of_all_ranks("") if each]
    if failures:
        raise UpdateRefusedError(f"Another process of this trainer failed: {failures[0]}")
