"""Publishing LoRA adapters: each is an entry of its own, in host memory, which engines serve by its name.

A client holds what it has published, and hands it to the next companion if this one dies, until the adapter is removed
or the client closed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Granted, Lease
from vllm_companion_plugin.client.mirror import DIES_S, KNOWN_TIMEOUT_S, Held, Mirror
from vllm_companion_plugin.client.peft import AT_ONCE_BYTES, Adapter, in_groups
from vllm_companion_plugin.client.spare import Spare
from vllm_companion_plugin.core import adapters
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.entry_kinds import ADAPTER, WEIGHTS
from vllm_companion_plugin.core.status import EntryStatus, Published
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import (
    BadRequestError,
    CommitUnknownError,
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
)
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds.memfd import SharedWriter, new_memfd
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import Flat, host_bytes
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire import codec
from vllm_companion_plugin.wire.adapter_file import Part, header_of, read_header

logger = logging.getLogger("vllm.companion.adapters")

_CPU = torch.device("cpu")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that an adapter's tensors can have, by the names of the file's format."""
_SHOWN = 4
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class AdapterHolds:
    """What one client has published, and holds. Threads may publish at once, those of one name in turns.

    Args:
        device: whose companion has them; their memory is the host's, whichever that is.
    """

    def __init__(self, device: str, settings: Settings) -> None:
        self._device = device
        self._settings = settings
        self._holds: dict[str, _Hold] = {}
        self._pid = 0
        self._begin()

    def _begin(self) -> None:
        """Have locks and memory of this process: those of the process that it was forked from are of no use here."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._turns: dict[str, threading.Lock] = {}
            self._spare = Spare()

    def publish(
        self,
        name: str,
        adapter: Adapter,
        version: str,
        connect: Callable[[], CompanionConnection],
        *,
        dtype: torch.dtype | None = None,
        check_finite: bool = True,
    ) -> int:
        """Publish an adapter, or its next generation; the number of that.

        Args:
            version, dtype, check_finite: as of `CompanionClient.publish_adapter`.
            connect: to the companion; asked unless this client holds the adapter already.
        """
        self._begin()
        key = adapters.key_of(name)
        codec.version_from_message(version)
        info, fds = file_of(
            adapter,
            dtype or adapter.dtype,
            label=f"Adapter {name}",
            check_finite=check_finite,
            memory_of=self._spare.memory,
        )
        with fds, self._turns.setdefault(name, threading.Lock()):
            version = version or adapters.content_of(info)[:8]
            count = len(adapter.tensors)
            if (own := self._own(name)) is not None:
                number = own.replace(info, fds, count, version)
                self._spare.prepare(info.size_bytes)  # it is trained, so another one will come
                return number
            with ExitStack() as undo:
                connection = undo.enter_context(connect())
                _check_free(connection, name)
                lease = connection.attach(key, may_load=True, client_name="trainer")
                outcome = lease.wait(self._settings.wait_timeout_s)
                if isinstance(outcome, Granted):
                    number = outcome.publication.publish(info, fds, adapters.MANIFEST, count, version=version)
                    published = outcome.publication.published
                else:
                    number, published = _commit(lease, info, fds, count, version)
                held = Held(key, number, info, fds, adapters.MANIFEST, published)
                mirror = Mirror(self._device, self._settings, held, lease, "trainer")
                self._holds[name] = _Hold(mirror, held, undo.pop_all())
        return number

    def _own(self, name: str) -> _Hold | None:
        """Our hold on an adapter, if a companion knows of it."""
        hold = self._holds.get(name)
        if hold is None:
            return None
        hold.mirror.wait_known(KNOWN_TIMEOUT_S)
        if hold.mirror.ended or hold.mirror.lost:
            self.let_go(name)
            return None
        return hold

    def let_go(self, name: str) -> None:
        """Hold it no more. Idempotent."""
        self._begin()
        if (hold := self._holds.pop(name, None)) is not None:
            hold.close()
        if not self._holds:
            self._spare.clear()

    def close(self) -> None:
        """Hold nothing more. Idempotent."""
        self._begin()
        for name in list(self._holds):
            self.let_go(name)
        self._spare.close()


class _Hold:
    """An adapter that this client has published."""

    def __init__(self, mirror: Mirror, held: Held, with_it: ExitStack) -> None:
        self.mirror = mirror
        self._held = held
        self._with_it = with_it

    def replace(self, info: ArenaInfo, fds: Descriptors, count: int, version: str) -> int:
        """Publish the next generation, and hold that instead; its number. To the next companion, if this one dies."""

        def commit(lease: Lease) -> tuple[int, Published]:
            try:
                return _commit(lease, info, fds, count, version)
            except CommitUnknownError as error:
                if lease.lost.wait(DIES_S):  # what was committed has gone with it
                    raise CompanionUnavailableError(error.what) from error
                raise

        number, published = self.mirror.ask(commit)
        self._held = replace(self._held, generation=number, arena=info, fds=fds, published=published)
        with _noting_after_commit(number):
            self.mirror.hold_instead(self._held)
        return number

    def close(self) -> None:
        self.mirror.close()
        self._with_it.close()


@contextlib.contextmanager
def _noting_after_commit(number: int) -> Iterator[None]:
    """What fails now takes nothing of the publication back: engines have the generation."""
    try:
        yield
    except CompanionError as error:
        logger.warning(
            "Generation %d of an adapter is published, and not held for the next companion: %s", number, error
        )


def _commit(lease: Lease, info: ArenaInfo, fds: Descriptors, count: int, version: str) -> tuple[int, Published]:
    """The file is the adapter's current generation, which this client holds from now on."""
    try:
        lease.stage()  # which may have been heard, whatever it raises
        number = lease.commit_staged(info, fds, version, tensor_count=count)
    except CommitUnknownError as error:
        lease.abort_staged()
        raise CommitUnknownError(error.what, remedy="Publish it again: engines use what came last.") from error
    except BaseException:
        lease.abort_staged()
        raise
    with _noting_after_commit(number):
        lease.advanced(number)
    return number, Published(count, {}, time.time(), 0.0, "", version)


def _check_free(connection: CompanionConnection, name: str) -> None:
    """Raise `BadRequestError` if a model has the name: engines answer with the model itself where it is asked for."""
    if any(entry.key.kind == WEIGHTS and entry.key.model == name for entry in connection.status().entries):
        raise BadRequestError(
            f"Adapter {name} has the name of a model that the companion of {connection.device} holds, and servers "
            "would answer with the model alone.",
            remedy="Publish it under another name.",
        )


def remove(connection: CompanionConnection, name: str) -> None:
    """Have the companion forget an adapter. Raises `EntryNotFoundError` if it has none of this name."""
    try:
        connection.unload(key_id=adapters.key_of(name).id, force=True)
    except EntryNotFoundError as error:
        raise EntryNotFoundError(f"The companion of {connection.device} has no adapter {name}.") from error


def listed(entries: Sequence[EntryStatus]) -> tuple[EntryStatus, ...]:
    """The adapters among these entries."""
    return tuple(entry for entry in entries if entry.key.kind == ADAPTER)


def file_of(
    adapter: Adapter,
    dtype: torch.dtype | None = None,
    *,
    label: str = "The adapter",
    check_finite: bool = True,
    memory_of: Callable[[int], contextlib.AbstractContextManager[SharedWriter]] = new_memfd,
) -> tuple[ArenaInfo, Descriptors]:
    """The adapter's file in host memory, sealed, with the checksums of its bytes; the caller owns the descriptor.

    What is on a GPU is joined and summed there, for which it takes as much memory of it as the file has, and 64 MiB or
    the largest tensor's if a type changes.

    Args:
        dtype: of its tensors in the file; None: as they are.
        label: of the adapter, for errors.
        check_finite: refuse values that are not finite, which a cast may have made.
        memory_of: as `new_memfd`.

    Raises:
        BadRequestError: a type of tensors that the file's format has no name for; values that are not finite.
        ArenaError: there is no memory for it.
    """
    types = {name: dtype or tensor.dtype for name, tensor in adapter.tensors.items()}
    # Wider ones first, so that most begin at multiples of their own width: the last one ends with a page.
    tensors = sorted(adapter.tensors.items(), key=lambda pair: (-types[pair[0]].itemsize, str(pair[1].dtype), pair[0]))
    if unknown := [f"{name} of {types[name]}" for name, _ in tensors if types[name] not in _NAMES]:
        raise BadRequestError(
            f"{label} cannot have {several(unknown, _SHOWN)}.", remedy=f"Publish it as one of {', '.join(DTYPES)}."
        )
    sizes = {name: tensor.numel() * types[name].itemsize for name, tensor in tensors}
    header = header_of(
        [Part(name, _NAMES[types[name]], tuple(each.shape), sizes[name]) for name, each in tensors], adapter.config
    )
    size_bytes = len(header) + sum(sizes.values())
    device = next((tensor.device for _, tensor in tensors if tensor.device.type == "cuda"), _CPU)
    with memory_of(size_bytes) as memory:
        there = host_bytes(memory.address, size_bytes)
        whole = there if device.type == "cpu" else torch.empty(size_bytes, dtype=torch.uint8, device=device)
        whole[: len(header)].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        offset, are_finite = len(header), list[torch.Tensor]()
        for (before, after), group in itertools.groupby(tensors, key=lambda pair: (pair[1].dtype, types[pair[0]])):
            flat = [tensor.detach().to(device).resolve_neg().contiguous().reshape(-1) for _, tensor in group]
            target = whole[offset : offset + sum(each.numel() for each in flat) * after.itemsize]
            if before == after:
                torch.cat([each.view(torch.uint8) for each in flat], out=target)
            else:  # then all have one type, and begin at multiples of its width
                _cast(flat, target.view(after))
            # All at once, unless they begin between two places of their type. NaN if one is NaN; waited for below.
            written = [target.view(after)] if not target.storage_offset() % after.itemsize else flat
            if check_finite:
                are_finite += [torch.stack(each.aminmax()).isfinite().all() for each in written]
            offset += target.nbytes
        if are_finite and not torch.stack(are_finite).all():
            _refuse_values(((name, tensor.to(types[name])) for name, tensor in tensors), label)
        summing = Summing(Flat(whole), size_bytes, device)
        summing.extend(size_bytes)
        if whole is not there:
            there.copy_(whole)
        checksums = summing.checksums()
        info, fds = memory.seal()
    return replace(info, checksums=checksums), fds


def _cast(flat: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    """Copy tensors of one type behind each other into memory of another type; many at a time, which `cat` does not."""
    done = 0
    for some in in_groups(flat, lambda tensor: tensor.nbytes, AT_ONCE_BYTES):
        joined = torch.cat(list(some))
        target[done : done + joined.numel()].copy_(joined)
        done += joined.numel()


def _refuse_values(tensors: Iterable[tuple[str, torch.Tensor]], label: str) -> None:
    wrong = [f"{name} in {each.dtype}" for name, each in tensors if not torch.isfinite(each).all()]
    raise BadRequestError(
        f"{label} has values that are not finite: {several(wrong, _SHOWN)}.",
        remedy="Nothing was published. Look for NaN or infinity in what the trainer computes.",
    )


def read_directory(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration of an adapter that PEFT has saved. Raises `BadRequestError` if there is none."""
    directory = Path(path)
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        file, pickled = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
        if file.exists() or not pickled.exists():
            return _read_tensors(file), config
        return torch.load(pickled, map_location="cpu", weights_only=True), config
    except (OSError, ValueError, TypeError, LookupError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        why = str(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else repr(error)
        raise BadRequestError(f"{path} is no directory of an adapter that PEFT has saved: {why}") from error


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as opened:
        header, begin = read_header(opened.fileno(), str(file))
        opened.seek(begin)
        data = bytearray(opened.read())
    tensors: dict[str, torch.Tensor] = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        start, stop = info["data_offsets"]
        if info["dtype"] not in DTYPES or not 0 <= start < stop <= len(data):
            raise BadRequestError(f"{file} has {name} as {info['dtype']}, or is cut off.")
        flat = torch.frombuffer(data, dtype=torch.uint8, offset=start, count=stop - start).clone()
        tensors[name] = flat.view(DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors
