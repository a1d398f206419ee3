"""Types to messages and back; and every way in which a manifest can lie."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.manifests import change, set_field
from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, ArenaInfo, Checksums
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import (
    NOTHING_OBSERVED,
    AddedSlot,
    CommonValue,
    Manifest,
    ModuleInfo,
    Observed,
    SlotInfo,
    Stage,
    StorageInfo,
    TensorInfo,
    TensorKind,
)
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
)
from vllm_companion_plugin.errors import BadRequestError, ManifestError
from vllm_companion_plugin.wire import codec, messages
from vllm_companion_plugin.wire.manifest import MAX_TENSORS

KEY = EntryKey(
    "ab", "Qwen/Qwen3-8B", "target", "tp0/2", {"dtype": "bfloat16", "é": "ü"}, "/models/q", {"a.safetensors": "stat 1"}
)
LOADER = LoaderInfo(7, "engine", 12.5, Progress("reading", 5, 9))
ENTRY = EntryStatus(
    KEY, EntryState.LOADING, 2, 4096, 17, "memfd", 3.5, 1.25, LOADER,
    (LeaseStatus(7, "engine", LeaseState.LOADING, 1.5),), {"hide": 2},
)  # fmt: skip


OBSERVED = Observed(
    values={"scale": ("1.0", "0.5"), "gone": ("1", None), "new": (None, "[]")},
    added=(AddedSlot("bias", TensorKind.PARAMETER, "float32", (4,), (1,), "torch.nn.parameter.Parameter", True),),
    removed=("old",),
    retied={"weight": "embed:weight"},
    untouched=("scale",),
    processed=("kernel",),
    measured=True,
)


def tensor(storage: int = 0, **changes: Any) -> TensorInfo:
    base = TensorInfo(storage, 0, "bfloat16", (4, 8), (8, 1), "torch.nn.parameter.Parameter")
    return dataclasses.replace(base, **changes)


def manifest() -> Manifest:
    return Manifest(
        Stage.PROCESSED,
        (StorageInfo(0, 64), StorageInfo(256, 128)),
        (
            tensor(0, requires_grad=True, attributes={"output_dim": "int:0"}),
            tensor(1, storage_offset=32, stride=(1, 4)),
            tensor(-1, dtype="float32", shape=(), stride=(), inline=b"\0\0\x80?", private=True),
            tensor(0, shape=(0, 8)),
            tensor(0, shape=(9, 32), stride=(0, 1)),
            tensor(-1, shape=(8, 0), stride=(1, 1)),
            tensor(-1, shape=(8, 0), stride=(1, 1), inline=b""),
            tensor(-1, private=True, own=True),
            tensor(0, private=True, meta=True, conj=True, neg=True),
        ),
        (
            ModuleInfo("", (), "Model", (), {"training": "bool:False"}, OBSERVED),
            ModuleInfo(
                "embed", ("lm_head",), "Embedding",
                (SlotInfo("weight", TensorKind.PARAMETER, 0), SlotInfo("tied[0]", TensorKind.ATTRIBUTE, 0)), {},
            ),
            *(
                ModuleInfo(
                    f"layers.{number}", (), "Norm", (SlotInfo("weight", TensorKind.PARAMETER, number),),
                    {"size": "8", "prefix": f"'layers.{number}'"}, observed,
                )
                for number, observed in enumerate((OBSERVED, OBSERVED, NOTHING_OBSERVED, NOTHING_OBSERVED))
            ),
        ),
        {"extra": "torch.nn.modules.linear.Linear"}, ("vision",), {"lm_head": "embed"}, {"config.json": "ab"},
        is_observed=True, emptied_modules=("head",), moved_modules={"layers.0.inner": "layers.0"},
        common_values=(CommonValue("plugin.model", "WARNED", "False", "True"), CommonValue("a:B.C", "new", None, "''")),
    )  # fmt: skip


def test_a_manifest_survives_the_wire_in_full() -> None:
    data = codec.manifest_to_bytes(manifest())
    assert codec.manifest_from_bytes(data) == manifest()
    assert codec.manifest_to_bytes(codec.manifest_from_bytes(data)) == data


def _edited(edit: Callable[[Any], object]) -> bytes:
    message = messages.Manifest.FromString(codec.manifest_to_bytes(manifest()))
    edit(message)
    return bytes(message.SerializeToString())


def _set(name: str, index: int, **values: Any) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        item = getattr(message, name)[index]
        if name == "tensors":
            change(message, item, **values)
            return
        for field, value in values.items():
            set_field(item, field, value)

    return edit


LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "unknown stage": (lambda m: setattr(m, "stage", "raw"), "unknown stage 'raw'"),
    "unknown kind": (lambda m: setattr(m.module_types[1].slots[0], "kind", "magic"), "unknown kind 'magic'"),
    "overlapping storages": (_set("storages", 1, offset_bytes=63), "before the previous one ends"),
    "unordered storages": (_set("storages", 0, offset_bytes=512), "before the previous one ends"),
    "absurd storage": (_set("storages", 1, size_bytes=1 << 60), "no arena is larger"),
    "storage index too large": (_set("tensors", 0, storage=2), "storage 2 of 2"),
    "storage index negative": (_set("tensors", 0, storage=-2), "storage -2 of 2"),
    "no storage and no bytes": (_set("tensors", 0, storage=-1), "without inline bytes"),
    "no storage, no bytes, and elements": (_set("tensors", 5, shape=[8, 1]), "without inline bytes"),
    "storage and bytes": (_set("tensors", 0, inline=b"x"), "with inline bytes"),
    "tensor beyond its storage": (_set("tensors", 0, shape=[4, 9]), "reaches byte 66 of storage 0, which has 64"),
    "stride beyond the storage": (_set("tensors", 0, stride=[9, 1]), "reaches byte 70"),
    "offset beyond the storage": (_set("tensors", 0, storage_offset=1), "reaches byte 66"),
    "empty tensor beyond its storage": (_set("tensors", 3, storage_offset=33), "reaches byte 66"),
    "larger dtype": (_set("tensors", 0, dtype="float32"), "reaches byte 128"),
    "unknown dtype": (_set("tensors", 0, dtype="float7"), "unknown dtype 'float7'"),
    "negative stride": (_set("tensors", 0, stride=[-8, 1]), "negative stride"),
    "missing stride": (_set("tensors", 0, stride=[1]), "2 dimensions and 1 strides"),
    "absurd shape": (_set("tensors", 0, shape=[1 << 40, 1 << 40]), "absurd shape"),
    "inline bytes too short": (_set("tensors", 2, inline=b"x"), "needs 4 inline bytes"),
    "empty storage": (_set("storages", 1, size_bytes=0), "Storage 1 is empty"),
    "misaligned storage": (_set("storages", 0, offset_bytes=1), "from byte 1: misaligned"),
    "inline bytes with gaps": (_set("tensors", 2, shape=[2], stride=[2], inline=b"\0" * 8), "inline with gaps"),
    "absurd shape of nothing": (_set("tensors", 3, shape=[0, 1 << 62]), "absurd shape"),
    "type that is not there": (lambda m: setattr(m.tensors[0], "type", 8), "Tensor 0 is of type 8 of 8"),
    "too many tensors": (lambda m: m.tensors.extend([m.tensors[0]] * MAX_TENSORS), "of 1000009 tensors"),
    "too many types": (
        lambda m: m.types.extend([messages.TensorType()] * MAX_TENSORS),
        "of 1000008 tensors, modules or types",
    ),
    "no root": (lambda m: m.modules.__delitem__(0), "not the model itself"),
    "slot of a tensor that is not there": (lambda m: m.modules[1].tensors.__setitem__(0, 9), "tensor 9 of 9"),
    "two modules of one path": (_set("modules", 1, path=""), "Two modules"),
    "an alias that is a path": (_set("modules", 1, aliases=[""]), "Two modules"),
    "added slot of an unknown kind": (
        lambda m: setattr(m.module_types[0].observed.added[0], "kind", "magic"),
        "'bias' that loading added has the unknown kind 'magic'",
    ),
    "added slot of an absurd shape": (
        lambda m: m.module_types[0].observed.added[0].shape.__setitem__(0, 1 << 60),
        "'bias' that loading added: absurd shape",
    ),
    "module type that is not there": (_set("modules", 1, type=3), "Module 'embed' is of type 3 of 3"),
    "a slot without a tensor": (lambda m: m.modules[1].tensors.pop(), "'embed' has 1 tensors for 2 slots"),
    "too many module types": (
        lambda m: m.module_types.extend([messages.ModuleType()] * MAX_TENSORS),
        "of 1000003 tensors, modules or types",
    ),
    "two slots of one name": (lambda m: setattr(m.module_types[1].slots[1], "name", "weight"), "share a name"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies_is_refused(name: str) -> None:
    edit, text = LIES[name]
    with pytest.raises(ManifestError, match=text):
        codec.manifest_from_bytes(_edited(edit))


def test_modules_of_one_type_say_what_they_do_not_have_in_common() -> None:
    message = messages.Manifest.FromString(codec.manifest_to_bytes(manifest()))
    norms = message.modules[2:]
    assert [module.type for module in norms] == [2] * 4
    assert [dict(module.attributes) for module in norms] == [{}, *({"prefix": f"'layers.{i}'"} for i in (1, 2, 3))]
    assert [module.HasField("observed") for module in norms] == [False, False, True, True]


def test_attributes_are_counted_as_often_as_modules_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_companion_plugin.wire.manifest.MAX_ATTRIBUTES", 5)
    with pytest.raises(ManifestError, match="more than 5 attributes"):
        codec.manifest_from_bytes(codec.manifest_to_bytes(manifest()))


def test_of_slots_that_are_refused_no_objects_are_made() -> None:
    data = _edited(lambda message: message.module_types[1].slots.extend([messages.Slot()] * 200_000))
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match="unknown kind ''"):
            codec.manifest_from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_bytes_that_are_no_manifest_are_refused() -> None:
    with pytest.raises(ManifestError, match="cannot be decoded"):
        codec.manifest_from_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(ManifestError):
        codec.manifest_from_bytes(codec.manifest_to_bytes(manifest())[:-3])
    with pytest.raises(ManifestError, match="unknown stage"):
        codec.manifest_from_bytes(b"")


def test_a_manifest_fits_an_arena_that_holds_its_last_byte() -> None:
    codec.check_manifest_fits(manifest(), ArenaInfo("memfd", (300, 84)))
    with pytest.raises(ManifestError, match="byte 384 of an arena of 383"):
        codec.check_manifest_fits(manifest(), ArenaInfo("memfd", (300, 83)))


def test_a_hundred_thousand_tensors_are_read_without_quadratic_cost() -> None:
    count = 100_000
    slots = tuple(SlotInfo(f"w{i}", TensorKind.PARAMETER, i) for i in range(count))
    large = Manifest(
        Stage.PROCESSED,
        tuple(StorageInfo(i * 256, 64) for i in range(count)),
        tuple(tensor(i) for i in range(count)),
        (ModuleInfo("", (), "Model", slots, {}),),
    )
    data = codec.manifest_to_bytes(large)
    began = time.process_time()
    assert len(codec.manifest_from_bytes(data).tensors) == count
    assert time.process_time() - began < 3  # about 0.4 s; the rest is room for a slow machine


def test_status_survives_the_wire() -> None:
    ready = dataclasses.replace(ENTRY, state=EntryState.READY, loader=None, leases=())
    status = CompanionStatus("cpu", 4, "0.1", 1, 1.5, -1.0, 0.0, (ENTRY, ready))
    message = codec.companion_status_to_message(status)
    assert codec.companion_status_from_message(type(message).FromString(message.SerializeToString())) == status


def test_arena_and_handle_survive_the_wire() -> None:
    arena = ArenaInfo("cuda_vmm", (1 << 21, 1 << 36))
    trained = dataclasses.replace(arena, trained=True)
    assert codec.arena_from_message(codec.arena_to_message(trained)) == (trained, b"")
    assert codec.arena_from_message(codec.arena_to_message(arena, b"ticket")) == (arena, b"ticket")


@pytest.mark.parametrize(
    "arena",
    [ArenaInfo("tape", (1,)), ArenaInfo("memfd", ()), ArenaInfo("memfd", (1, 0)), ArenaInfo("memfd", (1,) * 4097),
     ArenaInfo("memfd", (1 << 51,)), ArenaInfo("memfd", (4096,), Checksums(ARENA_CHECKSUM, (1,)), trained=True)],
    ids=["unknown-kind", "no-block", "empty-block", "too-many-blocks", "too-large", "trained-with-checksums"],
)  # fmt: skip
def test_an_impossible_arena_is_refused(arena: ArenaInfo) -> None:
    with pytest.raises(BadRequestError):
        codec.arena_from_message(codec.arena_to_message(arena))


@pytest.mark.parametrize("name", ["id", "model", "role", "rank"])
def test_a_key_without_its_parts_is_refused(name: str) -> None:
    with pytest.raises(BadRequestError, match=name):
        codec.key_from_message(codec.key_to_message(dataclasses.replace(KEY, **{name: ""})))


def test_an_unknown_state_is_a_typed_error() -> None:
    message = codec.entry_status_to_message(ENTRY)
    message.state = "dreaming"
    with pytest.raises(BadRequestError, match="dreaming"):
        codec.entry_status_from_message(message)
