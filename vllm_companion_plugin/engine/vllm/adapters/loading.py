"""How a worker of vLLM loads an adapter that a companion holds: as vLLM loads one from a directory.

That directory has PEFT's configuration and a link to the memory where the adapter is, so that each version of vLLM
reads, checks and places it by its own rules, without a copy in a file.

vLLM drops adapters that were not used for long, and loads them again in the middle of a step, where an error ends the
engine. So a worker keeps the descriptors of what it has loaded until the front end says that nothing is bound to it.

Every worker imports this, so what talks to companions is imported by those that have adapters.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.core.adapters import Bound
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.adapters.requests import settings_of
from vllm_companion_plugin.errors import BadRequestError, CompanionError, IntegrityError
from vllm_companion_plugin.wire.adapter_file import config_in

if TYPE_CHECKING:
    from vllm_companion_plugin.client.adapter_leases import AdapterFile, AdapterLeases
    from vllm_companion_plugin.engine.vllm.adapters.staging import Staging
    from vllm_companion_plugin.memory.descriptors import Descriptors

logger = logging.getLogger("vllm.companion.adapters")

MAX_KEPT = 256
"""Adapters whose descriptors a worker keeps; the one that was loaded longest ago goes first, and is fetched again."""


@dataclass
class _Fetched:
    """An adapter's file, which a worker has fetched.

    Attributes:
        device: of the worker.
        verify: the setting.
        is_proved: its bytes are those that were published, as far as the setting wants to know. They cannot change.
    """

    bound: Bound
    file: AdapterFile
    device: torch.device
    verify: str
    is_proved: bool = False
    _staging: Staging | None = None

    def prove(self) -> None:
        """Raise `IntegrityError` unless its bytes are those that were published. Once is enough."""
        if not self.is_proved:
            self.file.check(self.verify, str(self.bound))
            self.is_proved = True

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """While open, threads read the file for `stage`. Afterwards it may be closed."""
        if self.device.type == "cuda":
            from vllm_companion_plugin.engine.vllm.adapters.staging import CannotStage, Staging

            try:
                self._staging = Staging(self.file, self.device, str(self.bound))
            except CannotStage as error:
                logger.info("%s is read without the GPU: %s", self.bound, error)
        try:
            yield
        finally:
            staging, self._staging = self._staging, None
            if staging is not None:
                staging.close()

    def stage(self, names: Collection[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor] | None:
        """Tensors as a GPU takes them, proved; None: vLLM makes them itself, and nothing is proved.

        Raises as `Staging.tensors`.
        """
        staging, self._staging = self._staging, None
        if staging is None:
            return None
        from vllm_companion_plugin.engine.vllm.adapters.staging import CannotStage

        try:
            with closing(staging):
                staged = staging.tensors(names, dtype, "off" if self.is_proved else self.verify)
        except (CannotStage, torch.OutOfMemoryError) as error:
            logger.info("%s is read without the GPU: %s", self.bound, error)
            return None
        self.is_proved = True
        return staged


class _Kept:
    """What one worker has fetched of adapters, by their numbers."""

    def __init__(self, leases: AdapterLeases, device: torch.device, verify: str) -> None:
        self._leases = leases
        self._device = device
        self._verify = verify
        self._known: OrderedDict[int, _Fetched] = OrderedDict()

    def fetch(self, bound: Bound, number: int) -> _Fetched:
        """An adapter's file; borrowed. Raises as `AdapterLeases.fetch`.

        Raises:
            IntegrityError: its bytes are not those that were published. A GPU proves them when they are staged.
        """
        known = self._known.pop(number, None)
        if known is None or known.bound != bound:
            if known is not None:  # another front end has given its adapter this number
                known.file.close()
            known = _Fetched(bound, self._leases.fetch(bound), self._device, self._verify)
            if self._device.type != "cuda":
                try:
                    known.prove()
                except BaseException:
                    known.file.close()
                    raise
        self._known[number] = known
        while len(self._known) > MAX_KEPT:
            self.forget(next(iter(self._known)))
        return known

    def forget(self, number: int) -> None:
        """It is not needed any more. Idempotent."""
        known = self._known.pop(number, None)
        if known is not None:
            known.file.close()


_loaded: ContextVar[_Fetched | None] = ContextVar("companion_adapter", default=None)
"""The adapter of a companion that is loaded in this context."""
_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
"""By the manager of a worker's adapters."""


def load_from_companions() -> None:
    """Of `vllm.lora.worker_manager`, which has just been imported."""
    patches.WORKERS_ADAPTERS.apply(_beginning)
    patches.LOADED_ADAPTERS.apply(_loading)
    patches.REMOVED_ADAPTERS.apply(_removing)
    patches.ADDED_ADAPTERS.apply(_adding)
    patches.STAGED_ADAPTERS.apply(_staging)


def _beginning(inner: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inner)
    def __init__(self: Any, vllm_config: Any, device: torch.device, *rest: Any, **named: Any) -> None:
        from vllm_companion_plugin import memory as arenas
        from vllm_companion_plugin.client.adapter_leases import AdapterLeases

        inner(self, vllm_config, device, *rest, **named)
        index = torch.cuda.current_device() if device.type == "cuda" else 0
        name = arenas.cuda_device(index) if device.type == "cuda" else device.type
        settings = settings_of(vllm_config)
        its = torch.device(device.type, index)
        _kept[self] = _Kept(AdapterLeases(settings, "worker", first=name), its, settings.verify)

    return __init__


def _loading(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if not adapters.is_path(lora_request.lora_path):
            return inner(self, lora_request)
        from vllm_companion_plugin.engine.vllm.adapters.fitting import check_fits

        bound = adapters.asked_by(lora_request.lora_path)
        if not isinstance(bound, Bound):
            raise BadRequestError(
                f"{bound} has to be one generation when it reaches a worker.",
                remedy="Give it with a request, or by add_lora of the engine.",
            )
        kept, number, directory = _kept[self], lora_request.lora_int_id, ""
        known = kept.fetch(bound, number)
        before = _loaded.set(known)
        try:
            # vLLM reads and checks the names meanwhile.
            with known.reading_ahead(), _directory_of(known.file.fds, bound) as directory:
                in_directory = copy.copy(lora_request)
                in_directory.lora_path = directory
                made = inner(self, in_directory)
                check_fits(self._adapter_manager, made, bound)
            known.prove()  # if vLLM has come to its tensors in another way
        except Exception as error:
            try:
                if not isinstance(error, IntegrityError):
                    known.prove()  # or what is damaged would be the adapter's fault
            finally:
                kept.forget(number)
            if isinstance(error, CompanionError):
                raise
            text = str(error).replace(directory, str(bound)) if directory else str(error)
            raise BadRequestError(text) from error
        finally:
            _loaded.reset(before)
        return made

    return _load_adapter


def _staging(inner: Callable[..., Any]) -> staticmethod[..., Any]:
    @functools.wraps(inner)
    def from_lora_tensors(*args: Any, **named: Any) -> Any:
        if (known := _loaded.get()) is not None and str(named.get("device")) == "cpu" and "tensors" in named:
            named["tensors"] = known.stage(named["tensors"].keys(), named.get("dtype")) or named["tensors"]
        return inner(*args, **named)

    return staticmethod(from_lora_tensors)


def _removing(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def remove_adapter(self: Any, adapter_id: int) -> Any:
        if (kept := _kept.get(self)) is not None:
            kept.forget(adapter_id)
        return inner(self, adapter_id)

    return remove_adapter


def _adding(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def add_adapter(self: Any, lora_request: Any) -> Any:
        try:
            return inner(self, lora_request)
        except Exception:
            if adapters.is_path(lora_request.lora_path):
                self.remove_adapter(lora_request.lora_int_id)
            raise

    return add_adapter


@contextmanager
def _directory_of(fds: Descriptors, bound: Bound) -> Iterator[str]:
    """While open, a directory as PEFT saves an adapter to, whose tensors are the memory behind the descriptor."""
    with tempfile.TemporaryDirectory(prefix="vllm-companion-adapter-") as directory:
        config = config_in(fds[0], str(bound))
        Path(directory, "adapter_config.json").write_text(json.dumps(config))
        os.symlink(f"/proc/self/fd/{fds[0]}", Path(directory, "adapter_model.safetensors"))
        yield directory
