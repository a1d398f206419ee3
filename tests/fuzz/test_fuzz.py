"""Each decoder for a moment, and all that fuzzing has found. By hand for longer: `python -m tests.fuzz.run`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fuzz import targets
from tests.fuzz.run import fuzz
from tests.fuzz.targets import KEY, TARGETS, framed, parsed, wire
from tests.support.manifests import change, type_of
from vllm_companion_plugin.client.lease import Lease
from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, ArenaInfo
from vllm_companion_plugin.errors import ManifestError
from vllm_companion_plugin.wire import codec, fd_channel, messages

SECONDS = {"manifest": 1.5, "restore": 1.5}


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")  # of text that is nearly Python
@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_gives_what_it_promises_or_its_error(name: str) -> None:
    def fail(data: bytes, error: Exception) -> None:
        raise AssertionError(f"{name}: {error!r} of {data[:2000]!r}") from error

    fuzz(name, SECONDS.get(name, 0.5), 1, fail)


def manifest(edit: Callable[[Any], object]) -> bytes:
    message = parsed(messages.Manifest, targets.manifest_seeds()[1])
    edit(message)
    return wire(message)


def tensor(**values: Any) -> Callable[[Any], None]:
    """Change the inline tensor: three float32."""

    def edit(message: Any) -> None:
        change(message, next(one for one in message.tensors if one.inline), **values)

    return edit


def empty_storage(message: Any) -> None:
    message.storages.add(offset_bytes=message.storages[-1].offset_bytes + message.storages[-1].size_bytes)
    last = len(message.storages) - 1
    change(message, message.tensors[0], shape=[0], stride=[1], storage=last, storage_offset=0)


def misaligned(message: Any) -> None:
    for storage in message.storages:
        storage.offset_bytes += 1


def far_too_long(message: Any) -> None:
    found = next(one for one in message.tensors if is_vector(type_of(message, one)) and not one.inline)
    change(message, found, shape=[1 << 62], stride=[0])


def is_vector(of: Any) -> bool:
    return bool(of.dtype == "float32" and len(of.shape) == 1)


def new_attribute(name: str, text: str) -> Callable[[Any], None]:
    return lambda message: message.modules[0].attributes.update({name: text})


def named_slot(name: str) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        next(slot for slot in message.module_types[0].slots if slot.kind == "buffer").name = name

    return edit


def key(**changes: Any) -> bytes:
    return wire(codec.key_to_message(dataclasses.replace(KEY, **changes)))


def status(edit: Callable[[Any], object]) -> bytes:
    message = parsed(messages.CompanionStatus, targets.status_message())
    edit(message)
    return wire(message)


def holder(name: str = "", **changes: Any) -> bytes:
    fields = {**dataclasses.asdict(KEY), **changes}
    return framed([(name or f"{KEY.id}.1").encode(), json.dumps(fields).encode()])


def of_no_pages() -> bytes:
    checksums = messages.Checksums(algorithm=ARENA_CHECKSUM, values=(7,))
    arena = messages.ArenaDescriptor(kind="memfd", block_sizes=(100,), checksums=checksums)
    digest = targets.hashlib.sha256(b"").digest()
    ready = messages.Ready(key=codec.key_to_message(KEY), arena=arena, manifest_sha256=digest)
    return framed([b"E" + wire(messages.AttachEvent(ready=ready))])


def one_time(seconds: float) -> bytes:
    ready = messages.Ready(
        key=codec.key_to_message(KEY),
        arena=codec.arena_to_message(ArenaInfo("memfd", (1,))),
        manifest_sha256=targets.hashlib.sha256(b"").digest(),
        published=messages.Published(load_s=seconds),
    )
    return framed([b"E" + wire(messages.AttachEvent(ready=ready))])


def pipe() -> bytes:
    from vllm_companion_plugin.engine.identity.checkpoint import file_identity

    path = targets.scratch() / "pipe"
    if not path.exists():
        os.mkfifo(path)
    return framed([bytes(path.parent), b"pipe", file_identity(path).encode()])


WITH_TWO = bytes([2]) + fd_channel.pack_fds(2)
FOUND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a tensor without elements in a storage without bytes": ("manifest", lambda: manifest(empty_storage)),
    "tensors at addresses that their dtype cannot have": ("manifest", lambda: manifest(misaligned)),
    "an inline tensor with gaps": ("manifest", lambda: manifest(tensor(stride=[2]))),
    "an inline tensor without elements, of another stride": (
        "manifest", lambda: manifest(tensor(inline=b"", shape=[0, 3], stride=[1, 7])),
    ),
    "lengths beside a zero that overflow": (
        "manifest", lambda: manifest(tensor(inline=b"", shape=[0, 1 << 62, 1 << 62], stride=[1, 1, 1])),
    ),
    "more bytes than a number counts, at stride 0": ("manifest", lambda: manifest(far_too_long)),
    "no module": ("manifest", lambda: manifest(lambda m: m.modules.__delitem__(slice(None)))),
    "no module that is the model": ("manifest", lambda: manifest(lambda m: setattr(m.modules[0], "path", "a"))),
    "an attribute with a meaning for Python": ("restore", lambda: manifest(new_attribute("__deepcopy__", "1"))),
    "a buffer with a meaning for Python": ("restore", lambda: manifest(named_slot("__class__"))),
    "a module inside of itself": ("restore", lambda: manifest(lambda m: m.retied_modules.update({"first": ""}))),
    "an attribute of nested text": ("plain", lambda: b"-" * 9000 + b"1"),
    "an attribute of text that no value has": ("plain", lambda: b"{[]: 1}"),
    "an attribute that is written otherwise": ("plain", lambda: b"0x10"),
    "an id that names another file": ("key", lambda: key(id="../../x")),
    "an id that is too long for a file": ("key", lambda: key(id="a" * 4000)),
    "an id that no file can have": ("companion", lambda: targets.framed([*_attached(key(id="a\0b"))])),
    "an age that is no number": ("status", lambda: status(lambda m: _set(m.entries[0].leases[0], float("nan")))),
    "an age without end": ("status", lambda: status(lambda m: _set(m.entries[0].leases[0], float("inf")))),
    "a linger time that JSON has not": ("status", lambda: status(lambda m: setattr(m, "linger_s", float("inf")))),
    "a load time that is no number": ("attach", lambda: one_time(float("nan"))),
    "checksums of an arena that is not made of pages": ("attach", of_no_pages),
    "descriptors where an OK was due": ("descriptors", lambda: framed([b"D\1", WITH_TWO, WITH_TWO])),
    "a tag that is no socket": ("tag", lambda: b""),
    "descriptors beside a keeper's refusal": ("keeper_answer", lambda: framed([b"\1Fno memory"])),
    "a number that is too large for a float": ("settings", lambda: b'{"linger_s": ' + b"9" * 400 + b"}"),
    "a NUL in a setting": ("settings", lambda: b'{"runtime_dir": "/tmp/a\\u0000b"}'),
    "half a character in a setting": ("settings", lambda: b'{"source_format": "\\ud800"}'),
    "a holder of a generation that no message carries": ("held", lambda: holder(f"{KEY.id}.{1 << 70}")),
    "a holder of a negative generation": ("held", lambda: holder(f"{KEY.id}.-1")),
    "a holder's key that is no text": ("held", lambda: holder(model=None)),
    "a holder's key of half a character": ("held", lambda: holder(source="\ud800")),
    "a holder of another entry": ("held", lambda: holder("x.1")),
    "a holder's file of brackets": ("held", lambda: framed([f"{KEY.id}.1".encode(), b"[" * 60000])),
    "an index that was cut short": ("checkpoint", lambda: b'{"weight_map": {"w": "a.safe'),
    "an index that is no object": ("checkpoint", lambda: b"[]"),
    "an index of shards that are no names": ("checkpoint", lambda: b'{"weight_map": {"w": 5, "v": {}}}'),
    "a shard with a name that is too long": ("checkpoint", lambda: b'{"weight_map": {"w": "' + b"a" * 300 + b'"}}'),
    "a directory with a NUL": ("digest", lambda: framed([b"/a\0b", b"a", b"stat 1:2:3:4:6"])),
    "a pipe in place of a checkpoint's file": ("digest", pipe),
    "a pid that means all processes": ("names", lambda: b"-1"),
    "an index of a device with 5000 digits": ("names", lambda: b"7" * 5000),
}  # fmt: skip


def test_a_manifest_of_absurd_size_is_refused_before_it_is_received() -> None:
    ready = messages.AttachEvent(ready=messages.Ready(manifest_bytes=1 << 40))
    stub: Any = SimpleNamespace(Attach=lambda request: targets._Stream([ready]))
    lease = Lease(stub, targets.paths(), messages.AttachRequest(), "test")
    with lease, pytest.raises(ManifestError, match="at most"):
        lease.wait(30)


def _set(lease: Any, since: float) -> None:
    lease.since_unix_s = since


def _attached(data: bytes) -> list[bytes]:
    """Ask for a key, publish it, and unload it."""
    attach, *rest = targets.unframed(targets.conversations()[0])
    request = parsed(messages.AttachRequest, attach[1:])
    request.key.CopyFrom(parsed(messages.EntryKey, data))
    return [b"A" + wire(request), *rest]


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_mended(what: str) -> None:
    name, data = FOUND[what]
    TARGETS[name].run(data())


def test_a_generation_leaves_room_to_count_on() -> None:
    TARGETS["companion"].run(targets.conversations()[-1])
