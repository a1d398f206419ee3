"""A model as data: its modules, its tensors and where they lie in an arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


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
