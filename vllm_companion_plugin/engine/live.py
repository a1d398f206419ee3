"""Models that this process serves from memory of a companion, and what vLLM does with them while they live.

Whoever is put to sleep lets go of the memory of all its models at once, and gets it back at the same addresses. All
that can fail comes first: an engine is asleep or awake, and never half.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease
from vllm_companion_plugin.core.residency import Residence, WhenAsleep
from vllm_companion_plugin.core.status import LoaderInfo
from vllm_companion_plugin.errors import ArenaError, CompanionError, SharedWeightsError
from vllm_companion_plugin.settings import Settings

logger = init_logger("vllm.companion")

_FROM = {
    "device": "from the device",
    "host": "from host memory",
    "checkpoint": "loaded again",
    "nowhere": "with memory of its own that holds anything",
}
Connect = Callable[[str, Settings], CompanionConnection]
"""To the companion of a device, which is started if there is none."""
_WHERE = {
    Residence.DEVICE.value: "stay on the device",
    Residence.HOST.value: "are in host memory",
    Residence.NOWHERE.value: "are gone until somebody loads them again",
}

LoadAgain = Callable[[Lease, Granted], Attachment]
"""Loads a model once more, and publishes it; what it returns is the caller's to close."""


@dataclass
class LiveModel:
    """One model of a living engine.

    Attributes:
        load: loads it again, if nobody has it any more when it wakes. Refers to nothing of the model.
        engine: which engine of this process it is of, as `engine_of` says; None: any.
        is_alone: nobody else was ever given it, so it takes no updates.
        unsleepable: whether the log has said why its memory cannot leave.
    """

    attachment: Attachment
    settings: Settings
    load: LoadAgain
    engine: weakref.ref[Any] | None = None
    is_alone: bool = False
    unsleepable: bool = False

    def is_of(self, engine: object) -> bool:
        """Whether it is a model of this engine, as `engine_of` says; None: of any."""
        return engine is None or self.engine is None or self.engine() is engine


def engine_of(vllm_config: Any) -> Any:
    """What tells the engines of a process apart: an object that an engine's configurations, its draft's too, share."""
    return vllm_config.device_config


@contextmanager
def falling_asleep(models: list[LiveModel], level: int, client_name: str) -> Iterator[list[LiveModel]]:
    """Put `models` to sleep at the end of `with`; if what is inside of it fails they stay awake.

    Args:
        level: as vLLM counts; 1 or 2.

    Yields:
        Those that will sleep. Models whose kind of memory cannot leave its addresses stay where they are.

    Raises:
        CompanionError: one of them cannot fall asleep. All are awake, as before.
    """
    told: list[LiveModel] = []
    try:
        for model in filter(_can_sleep, models):
            started = time.perf_counter()
            told.append(model)  # which may have been heard, whatever it raises
            where = model.attachment.fall_asleep(level, WhenAsleep(model.settings.when_asleep))
            logger.info(
                "%s falls asleep at level %d, after %.3f s: its %.2f GiB %s.",
                *(model.attachment.label, level, time.perf_counter() - started, model.attachment.size_bytes / 2**30),
                _WHERE[where],
            )
        yield told
    except BaseException:
        for model in told:
            _stay_awake(model)
        raise
    for model in told:
        model.attachment.let_go(model.settings, client_name)


def _can_sleep(model: LiveModel) -> bool:
    if model.attachment.asleep:
        return False
    if model.attachment.can_sleep:
        return True
    if not model.unsleepable:
        model.unsleepable = True
        logger.warning(
            "%s stays in the device's memory: memory of kind %s cannot leave its addresses.",
            *(model.attachment.label, model.attachment.held.arena.kind),
        )
    return False


def _stay_awake(model: LiveModel) -> None:
    try:
        model.attachment.stay_awake()
    except CompanionError as error:
        logger.warning("%s is mapped here, and its companion does not know: %s", model.attachment.label, error)


def wake(
    models: list[LiveModel],
    connect: Connect,
    client_name: str,
    on_waiting: Callable[[LoaderInfo], None] | None = None,
) -> list[LiveModel]:
    """Wake those of `models` that sleep; these.

    Raises:
        CompanionError: one of them cannot wake. All that slept sleep, and can be woken again.
    """
    awake: list[LiveModel] = []
    try:
        for model in [model for model in models if model.attachment.asleep]:
            started = time.perf_counter()
            attachment = model.attachment
            connection = connect(attachment.device_id, model.settings)
            source = attachment.wake(connection, model.settings, client_name, model.load, on_waiting)
            awake.append(model)
            logger.info(
                "%s is awake after %.3f s, %s: %.2f GiB, generation %d.",
                *(attachment.label, time.perf_counter() - started, _FROM[source]),
                *(attachment.size_bytes / 2**30, attachment.generation),
            )
    except BaseException:
        sleep_again(awake, client_name)
        raise
    return awake


def sleep_again(models: list[LiveModel], client_name: str) -> None:
    """Put models that have just been woken to sleep, as something else failed. What would be lost by that is awake."""
    for model in models:
        try:
            model.attachment.sleep_on()
        except CompanionError as error:
            if model.attachment.is_private:  # nobody else has its bytes
                logger.warning("%s stays mapped, as it cannot be copied: %s", model.attachment.label, error)
                continue
            logger.warning("The companion does not know that %s sleeps: %s", model.attachment.label, error)
        model.attachment.let_go(model.settings, client_name)


def privatize(
    model: LiveModel,
    connection: CompanionConnection | None,
    by: str,
    free_bytes: Callable[[torch.device], int | None],
) -> None:
    """Give a model memory of its own, because `by` is about to write to it.

    Raises:
        SharedWeightsError: the setting `on_write` refuses that. Nothing has changed.
        ArenaError: as `Attachment.privatize`.
    """
    attachment = model.attachment
    size_gib = attachment.size_bytes / 2**30
    if model.settings.on_write == "refuse":
        raise SharedWeightsError(
            f"{by} would write to weights of {attachment.label}, which other processes use too.",
            remedy="""Start the engine with --model-loader-extra-config '{"on_write": "privatize"}', or with """
            """'{"share": "copy"}'.""",
        )
    started = time.perf_counter()
    try:
        attachment.privatize(connection, free_bytes)
    except ArenaError as error:
        raise ArenaError(f"{by} cannot write to weights that are shared: {error.what}", remedy=error.remedy) from error
    logger.warning(
        "%s is about to write to weights of %s, so this engine has made a copy of its own (%.2f GiB, %.3f s), and "
        "shares them no more.",
        *(by, attachment.label, size_gib, time.perf_counter() - started),
    )


def renew(models: list[LiveModel]) -> None:
    """Give models the bytes that were published. One that sleeps gets them when it wakes."""
    for model in models:
        if model.attachment.asleep:
            model.attachment.is_stale = True
        else:
            model.attachment.renew()


def renew_stale(models: list[LiveModel]) -> None:
    """The same, of those that have woken with other bytes than they fell asleep with. Their own memory is there."""
    renew([model for model in models if model.attachment.is_stale])


def check_room(needed_bytes: int, free_bytes: int, what: str) -> None:
    """Raise `ArenaError` unless so many bytes are free."""
    if needed_bytes > free_bytes:
        raise ArenaError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB to wake, and {free_bytes / 2**30:.2f} GiB of the device are "
            "free. It sleeps, and can be woken when there is room."
        )
