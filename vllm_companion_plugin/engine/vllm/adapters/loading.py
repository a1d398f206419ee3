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
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.core.adapters import Bound
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.adapters.requests import settings_of
from vllm_companion_plugin.errors import BadRequestError, CompanionError
from vllm_companion_plugin.wire.adapter_file import config_in

if TYPE_CHECKING:
    from vllm_companion_plugin.client.adapter_leases import AdapterFile, AdapterLeases
    from vllm_companion_plugin.memory.descriptors import Descriptors

MAX_KEPT = 256
"""Adapters whose descriptors a worker keeps; the one that was loaded longest ago goes first, and is fetched again."""


class _Kept:
    """What one worker has fetched of adapters, by their numbers."""

    def __init__(self, leases: AdapterLeases, device: torch.device, verify: str) -> None:
        self._leases = leases
        self._device = device
        self._verify = verify
        self._files: OrderedDict[int, tuple[Bound, AdapterFile]] = OrderedDict()

    def fetch(self, bound: Bound, number: int) -> AdapterFile:
        """An adapter's file; borrowed. Raises as `AdapterLeases.fetch`.

        Raises:
            IntegrityError: its bytes are not those that were published. A GPU proves them when they are staged.
        """
        known, file = self._files.pop(number, (None, None))
        if file is None or known != bound:
            if file is not None:  # another front end has given its adapter this number
                file.close()
            file = self._leases.fetch(bound)
            if self._device.type != "cuda":
                try:
                    file.check(self._verify, str(bound))
                except BaseException:
                    file.close()
                    raise
        self._files[number] = bound, file
        while len(self._files) > MAX_KEPT:
            self.forget(next(iter(self._files)))
        return file

    def staging(self, file: AdapterFile, label: str) -> Callable[..., dict[str, torch.Tensor]] | None:
        """Makes the tensors of a file as a GPU takes them, given their `dtype`; None: vLLM reads them itself."""
        if self._device.type != "cuda":
            return None
        from vllm_companion_plugin.engine.vllm.adapters.staging import stage

        return functools.partial(stage, file, device=self._device, verify=self._verify, label=label)

    def forget(self, number: int) -> None:
        """It is not needed any more. Idempotent."""
        _, file = self._files.pop(number, (None, None))
        if file is not None:
            file.close()


_stage: ContextVar[Callable[..., dict[str, torch.Tensor]] | None] = ContextVar("companion_adapter", default=None)
"""Makes the tensors of the adapter that is loaded in this context, if it comes from a companion to a GPU."""
_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
"""By the manager of a worker's adapters."""


def load_from_companions() -> None:
    """Of `vllm.lora.worker_manager`, which has just been imported."""
    patches.WORKERS_ADAPTERS.apply(_beginning)
    patches.LOADED_ADAPTERS.apply(_loading)
    patches.REMOVED_ADAPTERS.apply(_removing)
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
        bound = adapters.asked_by(lora_request.lora_path)
        if not isinstance(bound, Bound):
            raise BadRequestError(
                f"{bound} has to be one generation when it reaches a worker.",
                remedy="Give it with a request, or by add_lora of the engine.",
            )
        kept = _kept[self]
        file = kept.fetch(bound, lora_request.lora_int_id)
        with _directory_of(file.fds, bound) as directory:
            in_directory = copy.copy(lora_request)
            in_directory.lora_path = directory
            before = _stage.set(kept.staging(file, str(bound)))
            try:
                return inner(self, in_directory)
            except CompanionError:
                kept.forget(lora_request.lora_int_id)
                raise
            except Exception as error:
                raise BadRequestError(str(error).replace(directory, str(bound))) from error
            finally:
                _stage.reset(before)

    return _load_adapter


def _staging(inner: Callable[..., Any]) -> staticmethod[..., Any]:
    @functools.wraps(inner)
    def from_lora_tensors(*args: Any, **named: Any) -> Any:
        stage = _stage.get()
        if stage is not None and str(named.get("device")) == "cpu":
            staged = stage(dtype=named.get("dtype"))
            named["tensors"] = {name: staged[name] for name in named["tensors"]}
        return inner(*args, **named)

    return staticmethod(from_lora_tensors)


def _removing(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def remove_adapter(self: Any, adapter_id: int) -> Any:
        if (kept := _kept.get(self)) is not None:
            kept.forget(adapter_id)
        return inner(self, adapter_id)

    return remove_adapter


@contextmanager
def _directory_of(fds: Descriptors, bound: Bound) -> Iterator[str]:
    """While open, a directory as PEFT saves an adapter to, whose tensors are the memory behind the descriptor."""
    with tempfile.TemporaryDirectory(prefix="vllm-companion-adapter-") as directory:
        config = config_in(fds[0], str(bound))
        Path(directory, "adapter_config.json").write_text(json.dumps(config))
        os.symlink(f"/proc/self/fd/{fds[0]}", Path(directory, "adapter_model.safetensors"))
        yield directory
