"""The project's data: keys, arenas, manifests, states. Plain values, no behaviour beyond them.

An *entry* is one published model of one rank: key, generation, manifest and arena. Arenas
know nothing of models; entries know nothing of CUDA.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

_HUB_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/[^/]+$")

_MAX_DIFFERENCES = 8
_KEY_ID = re.compile(r"[0-9a-f]{1,64}")
MAX_TEXT = 4096
MAX_KEY_CHARACTERS = 256 << 10
"""Of all texts of a key together; a checkpoint of 1000 files needs about half of it."""

PROTOCOL_VERSION = 2
"""Raised by every change that an older client or companion would misread."""

GENERATIONS = range(1, 1 << 53)
"""All that an entry can have; one that came from outside must leave room to count on."""


class TensorKind(Enum):
    """Where in a module a tensor lives."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    NON_PERSISTENT_BUFFER = "non_persistent_buffer"
    ATTRIBUTE = "attribute"


class Stage(Enum):
    """Which state of a model's tensors an entry holds.

    CUDA shares the processed (kernel) layout. On CPU vLLM packs processed weights into
    handles private to a process, so what the checkpoint loader wrote is shared there.
    """

    PROCESSED = "processed"
    UNPROCESSED = "unprocessed"


class EntryState(Enum):
    """Life of an entry: LOADING, then READY, then RETIRED until its last lease ends."""

    LOADING = "loading"
    READY = "ready"
    RETIRED = "retired"


class LeaseState(Enum):
    """Life of a lease: WAITING for a loader, LOADING as the elected one, or ATTACHED."""

    WAITING = "waiting"
    LOADING = "loading"
    ATTACHED = "attached"


def model_name(model: str) -> str:
    """One name for all ways to write a model: the hub id, or the real path of a local one.

    A path into the hub cache is its hub id again: offline, vLLM replaces the one by the other. What cannot be printed
    is escaped, so that the name can be shown anywhere, asked for as it was shown, and is the same in every locale.
    """
    path = os.path.abspath(model)
    if snapshot := _HUB_SNAPSHOT.search(path):
        name = snapshot["id"].replace("--", "/", 1)
    else:
        name = os.path.realpath(path) if model and os.path.exists(path) else model
    with contextlib.suppress(UnicodeEncodeError):  # no name of a file
        name = os.fsencode(name).decode("utf-8", "surrogateescape")
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


CHECKPOINT = "checkpoint"
"""The field that holds the digest of `EntryKey.files`; all others say what was made of them."""


VARIANT = "variant"
"""The field of a key that holds `EntryKey.variant`."""


@dataclass(frozen=True)
class EntryKey:
    """What makes two loads interchangeable.

    Attributes:
        id: hex sha256 over all `fields`; equal ids mean byte-equal tensors.
        model: name to show and to ask for: `model_name` of what the user wrote. Not part of the identity.
        role: "target" or "draft".
        rank: this rank among all parallel groups, e.g. "tp0/2"; "single" without any.
        fields: everything that went into `id`, for messages that explain a mismatch.
        source: where its loader found the checkpoint. Not part of the identity.
        files: identity of each file of the checkpoint, by relative name; `id` holds their digest.
    """

    id: str
    model: str
    role: str = "target"
    rank: str = "single"
    fields: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model, and what sets it apart: what it is for unless it is served, and that it is a variant."""
        notes = [self.role] if self.role != "target" else []
        notes += ["variant"] if self.variant else []
        return f"{self.model} ({', '.join(notes)})" if notes else self.model

    @property
    def variant(self) -> str:
        """How the model differs from what was published first under an otherwise equal key; empty for that one."""
        return self.fields.get(VARIANT, "")

    def problem(self) -> str | None:
        """What is wrong with a key that came from outside; None if nothing is. File names are made of ids."""
        texts = {name: getattr(self, name) for name in ("id", "model", "role", "rank")}
        for name, text in texts.items():
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT:
                return f"{name!r} is not a text of 1 to {MAX_TEXT} characters"
            if not text.isprintable():
                return f"{name!r} is {text[:200]!r}, which cannot be printed"
        if not _KEY_ID.fullmatch(self.id):
            return f"'id' is no hex digest but {self.id[:80]!r}"
        maps = (self.fields, self.files)
        if not all(isinstance(one, Mapping) for one in maps):
            return "'fields' or 'files' is no mapping"
        parts = [self.source, *texts.values(), *(part for one in maps for pair in one.items() for part in pair)]
        try:
            "".join(parts)
            "".join(self.fields.values()).encode()
        except (TypeError, UnicodeEncodeError):
            return "it holds something that is no text"
        if not all(map(str.isprintable, self.fields)):
            return "a field has a name that cannot be printed"
        if (total := sum(map(len, parts))) > MAX_KEY_CHARACTERS:
            return f"it has {total} characters; at most {MAX_KEY_CHARACTERS} are allowed"
        return None

    def is_draft_of(self, target: EntryKey) -> bool:
        """Whether this is a draft that was made for `target`: its fields hold the target's."""
        mine = {name: self.fields.get(f"target.{name}") for name in target.fields}
        return self.role == "draft" and mine == dict(target.fields)

    def differences(self, published: EntryKey) -> list[str]:
        """How `published` was loaded otherwise: each field and each file of weights with both values."""
        fields = self.fields.keys() | published.fields.keys()
        files = [name for name in self.files.keys() | published.files.keys() if f"file.{name}" not in fields]
        sides = (self.fields, published.fields), (_named(self, files), _named(published, files))
        changed = {
            name: f"{name} is {there.get(name, 'absent')!r} there and {here.get(name, 'absent')!r} here"
            for here, there in sides
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        }
        if len(changed) > 1 and any(name in changed for name in files):
            changed.pop(CHECKPOINT, None)
        return [changed[name] for name in sorted(changed)]

    def nearest_text(self, published: Sequence[EntryKey]) -> str:
        """How the most similar of `published` differs, in one line."""
        nearest = min(published, key=lambda key: len(self.differences(key)))
        lines = self.differences(nearest) or [f"its key is {nearest.id[:12]}"]
        rest = len(lines) - _MAX_DIFFERENCES
        return "; ".join(lines[:_MAX_DIFFERENCES] + ([f"and {rest} more"] if rest > 0 else []))


def _named(key: EntryKey, names: Sequence[str]) -> dict[str, str]:
    return {name: key.files[name] for name in names if name in key.files}


ARENA_CHECKSUM = "rows-columns-64"
PIECE_BYTES = 16 << 20
"""What one checksum of `ARENA_CHECKSUM` is about."""


def piece_count(size_bytes: int) -> int:
    """Pieces of an arena, the last one maybe shorter."""
    return -(-size_bytes // PIECE_BYTES)


@dataclass(frozen=True)
class Checksums:
    """What an arena's bytes were when they were published; empty if nobody computed them.

    Attributes:
        algorithm: `ARENA_CHECKSUM`, or one of another version, which cannot be compared here.
        values: unsigned 64-bit numbers, one a piece.
    """

    algorithm: str = ""
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class ArenaInfo:
    """Shape of an arena: data, not a handle; it owns nothing.

    Attributes:
        kind: "memfd", "cuda_vmm" or "cuda_ipc".
        block_sizes: bytes of each allocation, in address order; one descriptor each.
    """

    kind: str
    block_sizes: tuple[int, ...]
    checksums: Checksums = Checksums()

    @property
    def size_bytes(self) -> int:
        return sum(self.block_sizes)


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """One storage inside the arena. Tensors that share memory share a storage."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor object.

    Attributes:
        storage: index into `Manifest.storages`; -1 if the bytes are `inline`, or if there are none.
        storage_offset: in elements from the start of that storage.
        stride: in elements.
        dtype: torch's name without the prefix, e.g. "bfloat16".
        class_name: qualified name of the tensor's class.
        requires_grad: of a parameter.
        private: engines may write to it, so each clones it instead of mapping it.
        own: building the model made it and loading never wrote it: each engine keeps the one that it made. Without
            a storage nothing of it was published.
        meta: it has no data in the publisher's model either: vLLM leaves it so.
        conj: its elements are conjugated when they are read.
        neg: its elements are negated when they are read.
        inline: bytes of a small tensor that lives in host memory beside a device model, maybe none.
        attributes: what vLLM hung on the tensor, in canonical text.
    """

    storage: int
    storage_offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    class_name: str
    requires_grad: bool = False
    private: bool = False
    own: bool = False
    meta: bool = False
    conj: bool = False
    neg: bool = False
    inline: bytes | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A place in a module that holds a tensor. Ties are slots with the same `tensor`.

    Attributes:
        name: attribute path inside the module, e.g. "weight" or "impl.scales[0]".
        tensor: index into `Manifest.tensors`.
    """

    name: str
    kind: TensorKind
    tensor: int


@dataclass(frozen=True, slots=True)
class AddedSlot:
    """A tensor that loading put into a module where building the model had left none.

    Attributes:
        dtype, shape, stride, class_name, requires_grad: as of a `TensorInfo`, before post-processing.
    """

    name: str
    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    class_name: str
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """What the publisher saw loading and post-processing do to one module. Names are as in `ModuleInfo`.

    Attributes:
        values: values that loading changed: the text as built and the text after loading, None for none. What can
            be changed in place has a text as built only if loading changed that very object.
        added: tensors that loading added.
        removed: slots that loading removed.
        retied: slots that loading tied to another one, by its full name: the path of its module, a colon, its name.
        untouched: parameters and buffers that loading did not write.
        processed: names of values that post-processing changed.
        measured: post-processing read data of tensors into Python, so values may follow from it.
    """

    values: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    added: tuple[AddedSlot, ...] = ()
    removed: tuple[str, ...] = ()
    retied: Mapping[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    processed: tuple[str, ...] = ()
    measured: bool = False


NOTHING_OBSERVED = Observed()


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module object of the tree.

    Attributes:
        path: its first name from the root, "" for the root itself.
        aliases: further names of the same module object.
        class_name: qualified name of its class.
        attributes: values and the classes of objects, by name, in canonical text.
        observed: how its state came about.
    """

    path: str
    aliases: tuple[str, ...]
    class_name: str
    slots: tuple[SlotInfo, ...]
    attributes: Mapping[str, str]
    observed: Observed = NOTHING_OBSERVED


@dataclass(frozen=True, slots=True)
class Manifest:
    """A module tree described in full, with every tensor placed in an arena.

    Attributes:
        added_modules: classes of the modules that loading made, by path, a module before those in it.
        removed_modules: paths of modules that loading took out of the model.
        retied_modules: paths that loading gave to another module of the model, with that module's first path.
        files: digests of the small files that were read to build and load the model, by name.
        is_observed: somebody watched how the model came about. If not, all of it counts as made by loading.
    """

    stage: Stage
    storages: tuple[StorageInfo, ...]
    tensors: tuple[TensorInfo, ...]
    modules: tuple[ModuleInfo, ...]
    added_modules: Mapping[str, str] = field(default_factory=dict)
    removed_modules: tuple[str, ...] = ()
    retied_modules: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    is_observed: bool = False

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all storages, without padding."""
        return sum(storage.size_bytes for storage in self.storages)


@dataclass(frozen=True)
class Progress:
    """How far a loader is. `total_bytes` 0 means unknown."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class LoaderInfo:
    """Who loads, how far and since when; what waiters are shown.

    Attributes:
        changed_unix_s: when it last reported something new; 0 if the companion does not say.
    """

    pid: int
    client: str
    since_unix_s: float
    progress: Progress
    changed_unix_s: float = 0.0


@dataclass(frozen=True)
class LeaseStatus:
    """One attached, waiting or loading client."""

    pid: int
    client: str
    state: LeaseState
    since_unix_s: float


@dataclass(frozen=True)
class Published:
    """What the status shows of a publication.

    Attributes:
        ways: modules by the way in which engines restore them; empty if each processes its own.
        ready_unix_s: when it was published; 0 lets the companion say.
        load_s: from the election to the publication.
    """

    tensor_count: int
    ways: Mapping[str, int] = field(default_factory=dict)
    ready_unix_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True)
class EntryStatus:
    """One entry as `status` shows it.

    Attributes:
        ready_unix_s: 0 while it loads.
        load_s: from the election to the publication, 0 while it loads.
        ways: modules by the way in which engines restore them; empty if each processes its own.
        expires_at_unix_s: when it will be dropped if nobody attaches; 0 while somebody uses it, or if it stays.
    """

    key: EntryKey
    state: EntryState
    generation: int
    size_bytes: int
    tensor_count: int
    arena_kind: str
    ready_unix_s: float
    load_s: float
    loader: LoaderInfo | None
    leases: tuple[LeaseStatus, ...]
    ways: Mapping[str, int] = field(default_factory=dict)
    expires_at_unix_s: float = 0.0


@dataclass
class Series:
    """One series of what a companion counts.

    Attributes:
        value: the count; of a histogram the sum of what was observed.
        counts: of a histogram, how many in each bucket, the last one beyond all bounds; else empty.
    """

    name: str
    labels: Mapping[str, str]
    value: float
    counts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a client tells of itself, to be counted. Empty fields say nothing.

    Attributes:
        key_id: of the entry that it is about.
        outcome: "attached", "copied", "published" or "alone".
        seconds: that attaching or copying took.
        failure: code of the error that prevented sharing.
        verify: how checksums were compared: "full" or "sample".
        verified: "equal" or "different".
        verify_seconds: that comparing took.
    """

    key_id: str = ""
    outcome: str = ""
    seconds: float = 0.0
    failure: str = ""
    verify: str = ""
    verified: str = ""
    verify_seconds: float = 0.0


@dataclass(frozen=True)
class CompanionStatus:
    """One companion as `status` shows it.

    Attributes:
        device: GPU UUID, or "cpu".
        version: of the package that the companion runs.
        linger_s: seconds it stays with nobody attached; negative: until it is stopped.
        exits_at_unix_s: when it will exit if nobody comes; 0 if nothing is due.
        owner_pid: of the `serve` that it belongs to, which gives it its linger time; 0: nobody's.
    """

    device: str
    pid: int
    version: str
    protocol_version: int
    started_unix_s: float
    linger_s: float
    exits_at_unix_s: float
    entries: tuple[EntryStatus, ...]
    owner_pid: int = 0
