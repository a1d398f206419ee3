"""Every place where bytes or text from outside become values, each as a function of bytes.

A target returns if its decoder gave a value that keeps its promises, or raised the documented error. All else
is a finding: another exception, a broken promise, a descriptor left open. Seeds come from real messages.
"""

from __future__ import annotations

import array
import asyncio
import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import math
import mmap
import os
import random
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tests.fuzz.mutate import mutate_message, mutated_bytes
from tests.support.left import none_left_open
from tests.support.manifests import type_of
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.devices import devices_named
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.lease import Granted, Lease
from vllm_companion_plugin.client.mapped import tensors_by_name
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.core.plans import Plan, done_answer, error_answer, plans_answer, read_answer
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
    Published,
)
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    IntegrityError,
    ManifestError,
    RuntimeDirError,
    SettingsError,
    TicketError,
)
from vllm_companion_plugin.holder.service.fd_server import FdServer, Woken
from vllm_companion_plugin.holder.service.service import CompanionService
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.host.runtime_dir import DevicePaths, check_device
from vllm_companion_plugin.keeper import client as keeper_client
from vllm_companion_plugin.keeper.process import Keeper
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds import ipc_tag
from vllm_companion_plugin.memory.tensors.checksum import Verification
from vllm_companion_plugin.memory.tensors.views import ArenaViews, without_storage
from vllm_companion_plugin.settings import TABLE, resolve, resolve_extra_config, to_environment
from vllm_companion_plugin.tree import pack
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.restore import Restorer, Source, Strategy
from vllm_companion_plugin.tree.values import text_of, value_of
from vllm_companion_plugin.wire import codec, fd_channel, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.manifest import (
    ITEM_SIZES,
    MAX_STORAGE_END,
    check_manifest_fits,
    manifest_from_bytes,
    manifest_to_bytes,
)
from vllm_companion_plugin.wire.rpc import ERROR_METADATA, typed_error

KEY = EntryKey(
    "ab" * 32, "org/model", "target", "tp0/2", {"dtype": "bfloat16"}, "/models/m", {"a.safetensors": "stat 1:2:3:4:5"}
)
LOADER = LoaderInfo(7, "engine", 12.5, Progress("reading", 5, 9))
CPU = torch.device("cpu")
_LENGTH = struct.Struct("!H")


@dataclass(frozen=True)
class Target:
    """A decoder under test.

    Attributes:
        run: raises for a finding.
        seeds: real data.
        messages: class of the protobuf message by the byte before it, b"" if the data is the message alone.
        is_framed: the data are several pieces.
    """

    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    messages: dict[bytes, Any] = field(default_factory=dict)
    is_framed: bool = False

    def mutated(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        """A variant of `data`: of the fields of its messages, or of its bytes."""
        if not self.is_framed:
            return self._mutated_piece(rng, data, other)
        pieces = list(unframed(data)) or [b""]
        at, change = rng.randrange(len(pieces)), rng.randrange(8)
        if change == 0:
            pieces.insert(at, rng.choice(list(unframed(other)) or [b""]))
        elif change == 1:
            del pieces[at]
        else:
            pieces[at] = self._mutated_piece(rng, pieces[at], other)
        return framed(pieces)

    def _mutated_piece(self, rng: random.Random, data: bytes, other: bytes) -> bytes:
        tag = data[:1] if b"" not in self.messages else b""
        if tag in self.messages and rng.randrange(4):
            with contextlib.suppress(Exception):  # its bytes were mutated before
                message = self.messages[tag].FromString(data[len(tag) :])
                mutate_message(rng, message)
                return tag + bytes(message.SerializeToString())
        return mutated_bytes(rng, data, other)


def framed(pieces: Sequence[bytes]) -> bytes:
    return b"".join(_LENGTH.pack(len(piece[:65535])) + piece[:65535] for piece in pieces)


def unframed(data: bytes) -> Iterator[bytes]:
    """The pieces of `framed`, at most 64; the last one may be cut short."""
    at = 0
    for _ in range(64):
        if at + _LENGTH.size > len(data):
            return
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield data[at : at + size]
        at += size


@functools.cache
def scratch() -> Path:
    """A private directory of this process."""
    path = tempfile.mkdtemp(prefix="companion-fuzz-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def paths() -> DevicePaths:
    return DevicePaths("cpu", str(scratch()))


def wire(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def parsed(kind: Any, data: bytes) -> Any:
    """The message in `data`, or None: then gRPC refuses it before we see it."""
    try:
        return kind.FromString(data)
    except Exception:
        return None


# ---- manifests


class Kernel:
    """A helper object that holds a reference to a parameter, as kernels do."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.scale = 2.0


class Model(nn.Module):
    """One of each that a manifest describes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.tied = self.first
        self.turned = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16).t(), requires_grad=False)
        self.turned.output_dim = 0
        self.quantized = nn.Parameter(torch.zeros(16, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("cache", torch.linspace(0, 1, 5), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.parts = [torch.ones(3), {"x": torch.zeros(2, dtype=torch.complex64)}]
        self.kernel = Kernel(self.first.weight)
        self.limit = 0.5
        self.mode = "fast"


@functools.cache
def published() -> tuple[Manifest, arenas.Arena]:
    packed = pack.prepare(capture(Model()), Stage.UNPROCESSED, arenas.MEMFD, CPU)
    return packed.manifest, pack.copy(packed, arenas.MEMFD, CPU, rebind=False, release=lambda: None)


def manifest_seeds() -> list[bytes]:
    # As a device model has them: small host tensors travel inline.
    inline = parsed(messages.Manifest, manifest_to_bytes(published()[0]))
    for tensor in inline.tensors:
        if list(type_of(inline, tensor).shape) == [3]:
            tensor.storage, tensor.storage_offset, tensor.inline = -1, 0, b"\0" * 12
    return [manifest_to_bytes(published()[0]), wire(inline)]


class _Reserved:
    """Address space that stands for an arena of any manifest that fits in. Only mapped, never touched."""

    SIZE = 64 << 20

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


@functools.cache
def reserved() -> _Reserved:
    return _Reserved()


def manifest(data: bytes) -> None:
    try:
        found = manifest_from_bytes(data)
    except ManifestError:
        return
    again = manifest_to_bytes(found)
    assert manifest_to_bytes(manifest_from_bytes(again)) == again
    end = 0
    for storage in found.storages:
        assert storage.size_bytes > 0
        assert end <= storage.offset_bytes < storage.offset_bytes + storage.size_bytes <= MAX_STORAGE_END
        end = storage.offset_bytes + storage.size_bytes
    check_manifest_fits(found, ArenaInfo("memfd", (end,)))
    assert found.modules[0].path == ""
    for module in found.modules:
        assert all(0 <= slot.tensor < len(found.tensors) for slot in module.slots)
    if end <= _Reserved.SIZE:
        _check_tensors(found)


def _check_tensors(found: Manifest) -> None:
    arena: Any = reserved()
    tensors_by_name(found, ArenaViews(arena, _Reserved.SIZE, CPU))
    views = ArenaViews(arena, _Reserved.SIZE, CPU)
    for info in found.tensors:
        if info.storage >= 0:
            storage = found.storages[info.storage]
            tensor = views.tensor(info, storage)
            first = tensor.data_ptr() - arena.address
            reach = sum((n - 1) * step for n, step in zip(info.shape, info.stride, strict=True)) * tensor.itemsize
            if tensor.numel():
                assert first >= storage.offset_bytes
                assert first + reach + tensor.itemsize <= storage.offset_bytes + storage.size_bytes
                assert first % tensor.itemsize == 0
        else:
            tensor = without_storage(info, CPU)
            assert bytes(tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b"") or not (
                info.inline
            )
        assert tensor.shape == info.shape
        assert tensor.stride() == info.stride
        assert tensor.itemsize == ITEM_SIZES[info.dtype]
        assert tensor.numel() * tensor.itemsize < 1 << 63


def restore(data: bytes) -> None:
    """What an engine does with a manifest that decodes: the published model, or a typed refusal."""
    try:
        found = manifest_from_bytes(data)
        check_manifest_fits(found, published()[1].info)
    except ManifestError:
        return
    with torch.device("meta"):
        model = Model()
    known = {id(module): set(dir(module)) for module in model.modules()}
    try:
        arena = published()[1]
        views = ArenaViews(arena, arena.info.size_bytes, CPU)
        restorer = Restorer(model, Source(found, views, CPU, copy=False), CPU)
        restorer.bind_early(lambda module: Strategy.HIDE)
        restorer.finish()
    except CompanionError:
        pass
    else:
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.first is model.tied
    for module in model.modules():
        assert not any(name.startswith("__") for name in set(dir(module)) - known[id(module)])


def plain(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        found = value_of(text)
    except ValueError:
        return
    again = text_of(found)
    assert again is not None
    assert text_of(value_of(again)) == again


# ---- messages


def key(data: bytes) -> None:
    message = parsed(messages.EntryKey, data)
    if message is None:
        return
    try:
        found = codec.key_from_message(message)
    except BadRequestError:
        return
    assert codec.key_from_message(parsed(messages.EntryKey, wire(codec.key_to_message(found)))) == found
    place = notes._path(paths(), found, 1)
    assert os.path.dirname(os.path.normpath(place)) == paths().holders
    assert len(os.path.basename(place)) <= 255
    notes.dismiss(paths(), found, 1)
    found.nearest_text([KEY])


def status_message() -> bytes:
    leases = (LeaseStatus(7, "engine", LeaseState.LOADING, 1.5),)
    loading = EntryStatus(KEY, EntryState.LOADING, 2, 4096, 17, "", 0.0, 0.0, LOADER, leases)
    ready = EntryStatus(KEY, EntryState.READY, 2, 4096, 17, "memfd", 3.5, 1.25, None, (), {"hide": 2})
    found = CompanionStatus("cpu", 4, "0.1", 1, 1.5, -1.0, 0.0, (loading, ready))
    return wire(codec.companion_status_to_message(found))


def status(data: bytes) -> None:
    message = parsed(messages.CompanionStatus, data)
    if message is None:
        return
    try:
        found = codec.companion_status_from_message(message)
    except BadRequestError:
        return
    table.to_text([found], 1e9)
    json.dumps(table.to_json([found]), allow_nan=False)


def attach_events() -> list[bytes]:
    data = manifest_seeds()[0]
    ready = messages.Ready(
        key=codec.key_to_message(KEY),
        generation=3,
        arena=codec.arena_to_message(published()[1].info, b"t" * 16),
        manifest_bytes=len(data),
        manifest_sha256=hashlib.sha256(data).digest(),
        published=codec.published_to_message(Published(9, {"hide": 2}, 5.0, 1.5)),
    )
    granted = messages.Granted(lease_token=b"l" * 16, deposit_ticket=b"d" * 16)
    events = [
        messages.AttachEvent(waiting=messages.Waiting(loader=codec.loader_to_message(LOADER))),
        messages.AttachEvent(ready=ready),
        messages.AttachEvent(manifest_chunk=data[:1000]),
        messages.AttachEvent(manifest_chunk=data[1000:]),
        messages.AttachEvent(retired=messages.Retired()),
        messages.AttachEvent(failed=messages.Failed(code="in_use", message="no")),
    ]
    pieces = [b"E" + wire(event) for event in events]
    return [framed(pieces), framed([pieces[0], b"E" + wire(messages.AttachEvent(granted=granted)), pieces[-1]])]


class _Stream(list[Any]):
    def cancel(self) -> None:
        """As of a call that has ended."""


def attach(data: bytes) -> None:
    """What a companion says on the stream of a lease."""
    events = [parsed(messages.AttachEvent, piece[1:]) for piece in unframed(data)]
    stub: Any = SimpleNamespace(Attach=lambda request: _Stream(event for event in events if event is not None))
    with Lease(stub, paths(), messages.AttachRequest(), "fuzz") as lease:
        try:
            outcome = lease.wait(30)
        except CompanionError:
            return
    if not isinstance(outcome, Granted):
        size_bytes = outcome.arena.size_bytes
        if size_bytes <= _Reserved.SIZE:
            views = ArenaViews(reserved(), _Reserved.SIZE, CPU)  # type: ignore[arg-type]
            with contextlib.suppress(IntegrityError, ManifestError):
                verification = Verification(views, outcome.arena, "sample", CPU)
                verification.check(manifest_from_bytes(outcome.manifest), "fuzz")
        assert 1 <= len(outcome.arena.block_sizes) <= codec.MAX_BLOCKS
        assert math.isfinite(outcome.published.load_s)
        codec.published_to_message(outcome.published)
        codec.key_to_message(outcome.key)


# ---- the companion


class _Aborted(Exception):
    """What gRPC raises in a handler that aborts."""


class _Context:
    """Server side of a call: all that is written must be encodable."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def write(self, message: Any) -> None:
        message.SerializeToString()
        self.sent.append(message)

    async def abort(self, code: Any, text: str, trailing_metadata: Any) -> None:
        text.encode()
        raise _Aborted


def conversations() -> list[bytes]:
    data = b"m" * 100
    attach_request = messages.AttachRequest(
        protocol_version=PROTOCOL_VERSION, key=codec.key_to_message(KEY), may_load=True, pid=5, client="engine"
    )
    by_name = messages.AttachRequest(
        protocol_version=PROTOCOL_VERSION, query=messages.EntryQuery(model=KEY.model), pid=6, client="reader"
    )
    held = parsed(messages.AttachRequest, wire(attach_request))
    held.held_generation = 4
    greatest = parsed(messages.AttachRequest, wire(attach_request))
    greatest.held_generation = (1 << 64) - 1
    commit = messages.PublishRequest.Commit(
        arena=codec.arena_to_message(ArenaInfo("memfd", (4096,))),
        published=codec.published_to_message(Published(9, {"hide": 2}, 5.0, 1.5)),
    )
    returned = parsed(messages.PublishRequest.Commit, wire(commit))
    returned.generation = 4
    last_one = parsed(messages.PublishRequest.Commit, wire(commit))
    last_one.generation = greatest.held_generation
    last_of_all = b"P" + wire(messages.PublishRequest(commit=last_one))
    begin = b"P" + wire(messages.PublishRequest(begin=messages.PublishRequest.Begin(lease_token=b"t")))
    steps = [
        begin,
        b"P" + wire(messages.PublishRequest(progress=codec.progress_to_message(LOADER.progress))),
        b"P" + wire(messages.PublishRequest(manifest_chunk=data)),
    ]
    last = b"P" + wire(messages.PublishRequest(commit=commit))
    handed_back = b"P" + wire(messages.PublishRequest(commit=returned))
    declined = b"P" + wire(messages.PublishRequest(declined=messages.Failed(code="not_shareable", message="why")))
    unload = b"U" + wire(messages.UnloadRequest(query=messages.EntryQuery(model=KEY.model), force=True))
    room = b"R" + wire(messages.MakeRoomRequest(size_bytes=4096))
    return [
        framed([b"A" + wire(attach_request), *steps, last, room, b"A" + wire(by_name), unload]),
        framed([b"A" + wire(held), *steps, handed_back, b"A" + wire(attach_request)]),
        framed([b"A" + wire(attach_request), begin, declined, unload]),
        framed([b"A" + wire(greatest), *steps, last_of_all, unload, b"A" + wire(attach_request), *steps, last]),
    ]


@functools.cache
def sealed_memfd() -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 15)
    return fd


def companion(data: bytes) -> None:
    """What clients say to a companion: whatever it was, it still answers, and leaves no descriptor."""
    sealed_memfd()
    loop = _loop()
    with none_left_open():
        service = CompanionService("cpu", 60.0, functools.partial(notes.dismiss, paths()))
        loop.run_until_complete(_converse(service, list(unframed(data))))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


async def _converse(service: CompanionService, pieces: list[bytes]) -> None:
    streams: list[tuple[asyncio.Task[None], _Context]] = []
    try:
        await _say(service, pieces, streams)
    finally:
        service.close()
        for task, _ in streams:
            task.cancel()
        outcomes = await asyncio.gather(*(task for task, _ in streams), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _say(service: CompanionService, pieces: list[bytes], streams: list[Any]) -> None:
    requests: list[Any] = []
    for piece, following in zip(pieces, [*pieces[1:], b""], strict=False):
        tag, rest = piece[:1], piece[1:]
        if tag == b"A" and (request := parsed(messages.AttachRequest, rest)) is not None:
            context = _Context()
            streams.append((asyncio.ensure_future(service.Attach(request, context)), context))
        elif tag == b"P":
            if (request := parsed(messages.PublishRequest, rest)) is not None:
                requests.append(request)
            if following[:1] != b"P":
                await _publish(service, requests, streams)
                requests = []
        elif tag == b"U" and (request := parsed(messages.UnloadRequest, rest)) is not None:
            with contextlib.suppress(_Aborted):
                (await service.Unload(request, _Context())).SerializeToString()
        elif tag == b"R" and (request := parsed(messages.MakeRoomRequest, rest)) is not None:
            (await service.MakeRoom(request, _Context())).SerializeToString()
        for _ in range(3):
            await asyncio.sleep(0)
        (await service.Status(messages.StatusRequest(), _Context())).SerializeToString()


async def _publish(service: CompanionService, requests: list[Any], streams: list[Any]) -> None:
    """A publication by whoever was elected last, with descriptors and a hash that fit."""
    granted = [m.granted for _, context in streams for m in context.sent if m.WhichOneof("event") == "granted"]
    manifest_bytes = b"".join(request.manifest_chunk for request in requests)
    for request in requests:
        if granted and request.begin.lease_token:
            request.begin.lease_token = granted[-1].lease_token
        if request.WhichOneof("step") == "commit":
            request.commit.manifest_bytes = len(manifest_bytes)
            request.commit.manifest_sha256 = hashlib.sha256(manifest_bytes).digest()
            if granted:
                fd = os.dup(sealed_memfd())
                try:
                    service.check_deposit(granted[-1].deposit_ticket, 1)([fd])
                except CompanionError:
                    os.close(fd)

    async def stream() -> Any:
        for request in requests:
            yield request

    with contextlib.suppress(_Aborted):
        (await service.Publish(stream(), _Context())).SerializeToString()


# ---- descriptors


@functools.cache
def null() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def _send_pieces(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    """Each piece is a packet behind one byte, which says how many descriptors go with it, and in what company."""
    sock.settimeout(1.0)
    for piece in pieces:
        count = piece[0] & 15 if piece else 0
        rights = array.array("i", [null()] * count).tobytes()
        ancillary: list[Any] = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else []
        if piece and piece[0] & 16:
            credentials = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
            ancillary.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials))
        with contextlib.suppress(OSError):
            sock.sendmsg([piece[1:]], ancillary)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def _collect(sock: socket.socket) -> None:
    """Read until the other side has closed; what comes with it is dropped by the kernel."""
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


@contextlib.contextmanager
def _answering(path: str, pieces: Sequence[bytes]) -> Iterator[None]:
    """A server at `path` that says `pieces` to one client, whatever it asks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(2.0)

        def answer() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                _send_pieces(peer, pieces)
                _collect(peer)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def descriptors(data: bytes) -> None:
    """What a companion answers on the fd socket. The first piece says what was asked for."""
    pieces = list(unframed(data)) or [b""]
    null()
    count = pieces[0][1] % 6 if len(pieces[0]) > 1 else 1
    with none_left_open(), _answering(paths().fd_socket, pieces[1:]):
        try:
            if pieces[0][:1] == b"R":
                fds = fd_channel.redeem(paths().fd_socket, b"t" * 16, count, 1.0)
                assert len(fds) == count
                fds.close()
            elif pieces[0][:1] == b"W":
                woken = fd_channel.wake(paths().fd_socket, b"t" * 16, b"s" * 32, 1.0)
                if woken is not None:
                    assert len(woken[1]) == len(woken[0].arena.block_sizes)
                    woken[1].close()
            else:
                fd_channel.deposit(paths().fd_socket, b"t" * 16, [null()] * count, 1.0)
        except CompanionError:
            pass


def descriptor_seeds() -> list[bytes]:
    two = bytes([2]) + fd_channel.pack_fds(2)
    one = bytes([1]) + fd_channel.pack_fds(1)
    error = b"\0" + fd_channel.pack_error(TicketError("spent"))
    ok = b"\0" + fd_channel.OK
    ready = messages.Ready(arena=messages.ArenaDescriptor(block_sizes=[7, 7])).SerializeToString()
    told, sleeps = (b"\0" + fd_channel.pack_ready(each)[0] for each in (ready, b""))
    seeds = ([b"R\2", two], [b"R\3", two, one], [b"R\1", error], [b"D\1", ok, ok], [b"W", told, two], [b"W", sleeps])
    return [framed(pieces) for pieces in seeds]


def fd_socket(data: bytes) -> None:
    """What clients say on the fd socket of a companion."""
    pieces = list(unframed(data))
    null()
    loop = _loop()
    with none_left_open():
        loop.run_until_complete(_serve_descriptors(pieces))


def fd_socket_seeds() -> list[bytes]:
    redeem, deposit = b"\0" + fd_channel.REDEEM + b"r" * 16, b"\0" + fd_channel.pack_deposit(b"d" * 16, 3)
    wake = b"\0" + fd_channel.WAKE + b"w" * 16 + b"s" * 32
    two, one = (bytes([n]) + fd_channel.pack_fds(n) for n in (2, 1))
    return [framed(pieces) for pieces in ([redeem], [deposit, two, one], [deposit], [one], [wake])]


async def _serve_descriptors(pieces: Sequence[bytes]) -> None:
    def redeem(ticket: bytes) -> Callable[[], Sequence[int]]:
        if ticket != b"r" * 16:
            raise TicketError("unknown")
        return lambda: [null()] * 3

    def check_deposit(ticket: bytes, count: int) -> Callable[[Sequence[int]], None]:
        redeem(ticket.replace(b"d", b"r"))
        return lambda fds: Descriptors(fds).close()

    def wake(token: bytes, known_manifest: bytes) -> Woken:
        return Woken(known_manifest, redeem(token.replace(b"w", b"r")))

    server = FdServer(paths().fd_socket, redeem=redeem, check_deposit=check_deposit, wake=wake)
    server.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(paths().fd_socket)
        _send_pieces(sock, pieces)
        while not server._tasks:  # noqa: ASYNC110  (until it has accepted)
            await asyncio.sleep(0)
        for outcome in await asyncio.gather(*server._tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
    await server.close()


def tag(data: bytes) -> None:
    """What waits in the descriptor of a cuda_ipc arena; without any, it is no socket at all."""
    null()
    with none_left_open():
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with mine, theirs:
            mine.sendall(data)
            try:
                found = ipc_tag.read(theirs.fileno() if data else null())
            except ArenaError:
                return
            assert len(found.handle) == 64
            assert ipc_tag.read(theirs.fileno()) == found


def tag_seeds() -> list[bytes]:
    null()
    sock, fd = ipc_tag.make(ipc_tag.Tag(1 << 30, 77, b"h" * 64))
    with sock, socket.socket(fileno=fd) as theirs:
        return [theirs.recv(4096), b""]


def keeper_answer(data: bytes) -> None:
    """What a keeper answers."""
    null()
    with none_left_open(), _answering(paths().keeper_socket, list(unframed(data))):
        try:
            fds = keeper_client._ask(paths(), 4096)
        except ArenaError:
            return
        if fds is not None:
            assert len(fds) == 1
            fds.close()


@functools.cache
def _keeper() -> tuple[Keeper, str]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = str(scratch() / "keeper-asked.sock")
    listener.bind(path)
    listener.listen(8)

    def allocate(size_bytes: int) -> tuple[int, bytes]:
        if not 0 < size_bytes <= 1 << 40:
            raise ArenaError(f"no {size_bytes} bytes")
        return 1, b"h" * 64

    return Keeper(listener, allocate, lambda address: None), path


def keeper_request(data: bytes) -> None:
    """What loaders ask a keeper for."""
    keeper, path = _keeper()
    null()
    with none_left_open():
        thread = threading.Thread(target=keeper.run, args=(0.002,))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            _send_pieces(sock, list(unframed(data)))
            thread.start()
            _collect(sock)
        thread.join()
    assert keeper._used == {}


def errors(data: bytes) -> None:
    """Errors that a companion sends, by either way."""
    assert isinstance(fd_channel.unpack_error(data), CompanionError)
    code, _, text = data.partition(b"\0")
    call: Any = SimpleNamespace(
        trailing_metadata=lambda: ((ERROR_METADATA, code.decode(errors="replace")),) if code else None,
        details=lambda: text.decode(errors="replace") or None,
        code=lambda: list(grpc.StatusCode)[len(data) % len(grpc.StatusCode)],
    )
    assert isinstance(typed_error(call, "fuzzing"), CompanionError)
    with contextlib.suppress(BadRequestError):
        verb, ticket, rest = fd_channel.unpack_request(data)
        assert verb in (fd_channel.REDEEM, fd_channel.DEPOSIT, fd_channel.WAKE)
        assert len(ticket) == fd_channel.TICKET_BYTES
        assert verb != fd_channel.DEPOSIT or fd_channel.count_of(rest) >= 0


# ---- texts: settings, files, names


def settings(data: bytes) -> None:
    """Extra config, flags and environment."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return
    environment = {setting.env: "" for setting in TABLE}
    with patch.dict(os.environ):
        for name in environment:
            os.environ.pop(name, None)
        with contextlib.suppress(SettingsError):
            resolve_extra_config(given)
        if not isinstance(given, dict):
            return
        with contextlib.suppress(ValueError, TypeError):  # what no environment can hold
            os.environ.update({f"COMPANION_{name}".upper(): str(value) for name, value in given.items()})
        with contextlib.suppress(SettingsError):
            resolve()
        for name in environment:
            os.environ.pop(name, None)
        try:
            found = resolve(given)
        except SettingsError:
            return
        os.environ.update(to_environment(found))
        assert resolve() == found
        assert found.linger_s >= 0


def setting_seeds() -> list[bytes]:
    several = [
        {"linger_s": 5, "share": "copy", "fallback": False, "runtime_dir": "/tmp/somewhere", "log_level": "DEBUG"},
        {"wait_timeout_s": "1.5", "spawn_timeout_s": 1e3, "source_format": "safetensors", "cpu_prepack": "true"},
        {"arena": "cuda_ipc"},
    ]
    return [json.dumps(one).encode() for one in several]


def held(data: bytes) -> None:
    """Files of holders: the first piece is a name, the second what is in it."""
    pieces = [*unframed(data), b"", b""]
    directory = Path(paths().holders)
    directory.mkdir(mode=0o700, exist_ok=True)
    name = pieces[0].replace(b"/", b"").replace(b"\0", b"")[:200]
    path = os.fsencode(directory) + b"/" + (b"x" if name in (b"", b".", b"..") else name)
    with none_left_open():
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.write(fd, pieces[1])
            fcntl.flock(fd, fcntl.LOCK_SH)
            for found, generation in notes.held(paths()):
                wire(codec.key_to_message(found))
                assert codec.key_from_message(codec.key_to_message(found)) == found
                wire(messages.EntryStatus(generation=generation))
                assert generation > 0
                assert os.fsencode(notes._path(paths(), found, generation)) == path
        finally:
            os.close(fd)
            os.unlink(path)


def held_seeds() -> list[bytes]:
    return [framed([f"{KEY.id}.{n}".encode(), json.dumps(asdict(KEY)).encode()]) for n in (1, 40)]


def names(data: bytes) -> None:
    """Names of devices and models, and what a lock file says."""
    text = data.decode(errors="surrogateescape")
    with contextlib.suppress(RuntimeDirError):
        assert os.path.basename(check_device(text).replace("/", "_")) not in ("", ".", "..")
    with contextlib.suppress(RuntimeDirError, SettingsError):
        devices_named(text)
    assert model_name(model_name(text)) == model_name(text)
    for path in (paths().companion_lock, paths().loader_lock + ".holder"):
        Path(path).write_bytes(data)
    assert len(LoaderElection(paths()).holder()) <= 500
    asked: Any = SimpleNamespace(_paths=paths())
    assert CompanionConnection.recorded_pid(asked) >= 0


def name_seeds() -> list[bytes]:
    uuid = b"GPU-12345678-1234-1234-1234-123456789abc"
    return [
        b"cpu",
        uuid,
        b"MIG-" + uuid + b"/1/2",
        b"0",
        b"all",
        b"4242",
        b"/c/models--a--b/snapshots/123",
        b"org/model",
    ]


def checkpoint(data: bytes) -> None:
    """The index of a checkpoint."""
    from vllm_companion_plugin.engine.identity.checkpoint import is_complete

    directory = scratch() / "checkpoint"
    directory.mkdir(exist_ok=True)
    (directory / "a.safetensors").touch()
    (directory / "model.safetensors.index.json").write_bytes(data)
    assert is_complete(directory) in (True, False)


def checkpoint_seeds() -> list[bytes]:
    import vllm_companion_plugin.engine.identity.checkpoint  # noqa: F401  (vLLM takes seconds, which are not the decoder's)

    weights = {"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}, "metadata": {"total_size": 3}}
    return [json.dumps(weights).encode(), b'{"weight_map": {"w": "missing.safetensors"}}']


def digest(data: bytes) -> None:
    """Kept digests, and where another process says that its checkpoint is."""
    from vllm_companion_plugin.engine.identity.digest import Digests, same_content

    pieces = [piece.decode(errors="replace") for piece in unframed(data)] + [""] * 4
    directory = scratch() / "digests"
    directory.mkdir(exist_ok=True)
    digests = Digests(str(directory), 1.0)
    digests._at(pieces[2]).write_bytes(pieces[3].encode())
    known = digests.known(pieces[2])
    assert known is None or (len(known) == 64 and int(known, 16) >= 0)
    mine = EntryKey("ab", "m", source=str(directory), files={pieces[1]: "stat 1:2:3:4:5"})
    other = EntryKey("cd", "m", source=pieces[0], files={pieces[1]: pieces[2]})
    assert same_content(mine, other, digests) in (True, False)


def digest_seeds() -> list[bytes]:
    import vllm_companion_plugin.engine.identity.digest  # noqa: F401

    return [
        framed([b"/models/m", b"a.safetensors", b"stat 1:2:3:4:6", b"ab" * 32]),
        framed([b"/models/m", b"sub/a.safetensors", b"stat 1:2:3:4:6"]),
    ]


def answer(data: bytes) -> None:
    """What a rank of a fleet answers: plans of text and numbers, or an error of ours."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        plans = read_answer(told)
    except CompanionError:
        return
    again = plans_answer(plans)["plans"]
    assert again.keys() == told["plans"].keys()
    assert all(again[title].items() <= told["plans"][title].items() for title in again), "others may have more fields"


def answer_seeds() -> list[bytes]:
    plans = {f"org/model ({role})": Plan(7, "step-7", 6, "") for role in ("target", "draft")}
    answers = [plans_answer(plans), done_answer(), error_answer(ArenaError("No memory.", remedy="Free some."))]
    return [json.dumps(each).encode() for each in answers]


TARGETS: dict[str, Target] = {
    "answer": Target(answer, answer_seeds),
    "manifest": Target(manifest, manifest_seeds, {b"": messages.Manifest}),
    "restore": Target(restore, manifest_seeds, {b"": messages.Manifest}),
    "plain": Target(plain, lambda: [b"'fast'", b"7", b"-7", b"None", b"True", b"b'x'", b"builtins.dict of 0"]),
    "key": Target(key, lambda: [wire(codec.key_to_message(KEY))], {b"": messages.EntryKey}),
    "status": Target(status, lambda: [status_message()], {b"": messages.CompanionStatus}),
    "attach": Target(attach, attach_events, {b"E": messages.AttachEvent}, is_framed=True),
    "companion": Target(
        companion,
        conversations,
        {
            b"A": messages.AttachRequest,
            b"P": messages.PublishRequest,
            b"U": messages.UnloadRequest,
            b"R": messages.MakeRoomRequest,
        },
        is_framed=True,
    ),
    "descriptors": Target(descriptors, descriptor_seeds, is_framed=True),
    "fd_socket": Target(fd_socket, fd_socket_seeds, is_framed=True),
    "tag": Target(tag, tag_seeds),
    "keeper_answer": Target(keeper_answer, lambda: [framed([b"\1O"]), framed([b"\0Fno memory"])], is_framed=True),
    "keeper_request": Target(keeper_request, lambda: [framed([b"\0" + struct.pack("!Q", 4096)])], is_framed=True),
    "errors": Target(errors, lambda: [fd_channel.pack_error(TicketError("spent")), b"R" + b"t" * 16, b"no\0text"]),
    "settings": Target(settings, setting_seeds),
    "held": Target(held, held_seeds, is_framed=True),
    "names": Target(names, name_seeds),
    "checkpoint": Target(checkpoint, checkpoint_seeds),
    "digest": Target(digest, digest_seeds, is_framed=True),
}

logging.getLogger("vllm_companion_plugin").setLevel(logging.CRITICAL)
