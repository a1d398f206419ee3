"""A model as data: its modules, its tensors and their places in an arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class TensorKind(Enum):
    """The place in a module where a tensor lives."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    NON_PERSISTENT_BUFFER = "non_persistent_buffer"
    ATTRIBUTE = "attribute"


class Stage(Enum):
    """The state of a model's tensors that an entry holds.

    Engines on CUDA share the processed (kernel) layout. On CPU vLLM packs processed weights into
    handles private to a process, so engines there share what the checkpoint loader wrote.
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
        requires_grad: this flag of a parameter.
        private: engines may write to this tensor, so each engine clones the tensor instead of mapping it.
        own: building the model made this tensor and loading never wrote it: each engine keeps its own one. If the
            tensor has no storage, the publisher published no bytes of it.
        meta: the tensor has no data in the publisher's model either, because vLLM leaves it on the meta device.
        conj: its elements are conjugated when they are read.
        neg: its elements are negated when they are read.
        inline: bytes (maybe none) of a small tensor that lives in host memory beside a model on a device.
        attributes: attributes that vLLM set on the tensor, in canonical text.
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
    """A place in a module that holds a tensor. Tied slots have the same `tensor`.

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
        dtype, shape, stride, class_name, requires_grad: as in `TensorInfo`, before post-processing.
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
    """What loading and post-processing did to one module, as the publisher observed. Names are as in `ModuleInfo`.

    Attributes:
        values: values that loading changed: the text as built and the text after loading, None for no value. A value
            that can change in place has a text as built only if loading changed that very object.
        added: tensors that loading added.
        removed: slots that loading removed.
        retied: slots that loading tied to another slot, with the other slot's module path, a colon and its name.
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
        observed: what the publisher observed of the module.
    """

    path: str
    aliases: tuple[str, ...]
    class_name: str
    slots: tuple[SlotInfo, ...]
    attributes: Mapping[str, str]
    observed: Observed = NOTHING_OBSERVED


@dataclass(frozen=True, slots=True)
class CommonValue:
    """A plain value that all models of some code have in common, and that loading set.

    Attributes:
        holder: name of the module that has it; for a class the module, a colon, and the class.
        before: its canonical text after building the model; None if there was nothing of that name.
        after: its canonical text after loading.
    """

    holder: str
    name: str
    before: str | None
    after: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A full description of a module tree, with the place of every tensor in an arena.

    Attributes:
        added_modules: classes of the modules that loading made, by path; a module precedes the modules inside it.
        removed_modules: paths of modules that loading took out of the model.
        retied_modules: paths that loading gave to another module of the model, with that module's first path.
        files: digests by name of the small files that the publisher read to build and load the model.
        sources: where tensors of the checkpoint went, as `wire.manifest.sources_from_bytes` reads it; empty if it was
            not observed.
        is_observed: the publisher observed building and loading. Otherwise the whole model counts as made by loading.
        emptied_modules: paths where loading put None in the place of a module.
        moved_modules: paths that loading gave to a module in whose place it put another one, with the path where that
            module was built.
        common_values: what loading set outside of the model.
        flags: texts of vLLM's settings that the key leaves out and the model's code loads by, by name.
        used: texts of values that building gave to modules and the model's code loads by, by the path of the module, a
            colon, and the name.
        set_by_building: texts of values that building set beside the model, in classes and modules of the model's own
            code, by the holder's name, as of `CommonValue`, a "#", and the name.
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
    sources: bytes = b""
    emptied_modules: tuple[str, ...] = ()
    moved_modules: Mapping[str, str] = field(default_factory=dict)
    common_values: tuple[CommonValue, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    used: Mapping[str, str] = field(default_factory=dict)
    set_by_building: Mapping[str, str] = field(default_factory=dict)
