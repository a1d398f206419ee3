"""Flags that the key leaves out, and that a model's own code reads: here this file is such code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.configs import config
from vllm_companion_plugin.core.module_tree import (
    AddedSlot,
    CommonValue,
    Manifest,
    ModuleInfo,
    Observed,
    Stage,
    TensorKind,
)
from vllm_companion_plugin.engine.identity import flag_reads
from vllm_companion_plugin.engine.identity.flag_reads import FlagReads
from vllm_companion_plugin.errors import ParityError

pytestmark = pytest.mark.usefixtures("one_rank")

Read = Callable[[Any], object]
LIMITS = {"max_model_len": 64, "max_num_seqs": 24, "enable_lora": True, "max_lora_rank": 32, "seed": 7}

COUNTED: dict[str, Read] = {
    "model.max_model_len": lambda c: c.model_config.max_model_len,
    "model.seed": lambda c: c.model_config.seed,
    "scheduler.max_num_seqs": lambda c: c.scheduler_config.max_num_seqs,
    "cache.block_size": lambda c: c.cache_config.block_size,
    "lora.max_lora_rank": lambda c: c.lora_config.max_lora_rank,
}


@pytest.fixture
def made(tiny: Path) -> Any:
    return config(tiny, **LIMITS)


def observed(**found: Any) -> Manifest:
    """Of a model whose loading was seen to do this to a module."""
    common = found.pop("common_values", ())
    module = ModuleInfo("", (), "a.Model", (), {}, Observed(**found))
    return Manifest(Stage.PROCESSED, (), (), (module,), common_values=common)


def nothing(made: Any) -> None:
    """Reads nothing."""


def flags(made: Any, manifest: Manifest, *, building: Read = nothing, loading: Read = nothing) -> dict[str, str]:
    reads = FlagReads()
    with reads.watching():
        building(made)
        reads.begin_loading()
        loading(made)
        reads.end_loading()
        for read in COUNTED.values():  # as each engine's own post-processing does
            read(made)
    for read in COUNTED.values():
        read(made)
    return reads.flags(manifest, made, made.model_config)


@pytest.mark.parametrize("name", COUNTED)
def test_what_loading_reads(made: Any, name: str) -> None:
    found = flags(made, observed(), loading=COUNTED[name])
    assert [*found] == [name]
    flag_reads.check(found, made, made.model_config)


def test_another_value_is_another_variant(tiny: Path, made: Any) -> None:
    found = flags(made, observed(), loading=COUNTED["scheduler.max_num_seqs"])
    other = config(tiny, **LIMITS | {"max_num_seqs": 25, "max_model_len": 65})
    with pytest.raises(
        ParityError, match=r"scheduler\.max_num_seqs, which the model's code loads by, is 24 there and 25"
    ) as raised:
        flag_reads.check(found, other, other.model_config)
    assert (raised.value.where, raised.value.here) == ("flag scheduler.max_num_seqs", "25")
    flag_reads.check(found, config(tiny, **LIMITS | {"max_model_len": 65}), made.model_config)


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c.scheduler_config.verify_max_model_len(64),  # vLLM's code reads
        lambda c: (c.model_config.dtype, c.model_config.enforce_eager.real, c.cache_config.cache_dtype),
        lambda c: (c.parallel_config.tensor_parallel_size, c.model_config.model, c.model_config.revision),
    ],
    ids=["by vLLM", "in the key", "by itself"],
)
def test_other_reads_count_for_nothing(made: Any, read: Read) -> None:
    assert set(flags(made, observed(), loading=read)) <= {"model.enforce_eager"}


ADDED = AddedSlot("table", TensorKind.ATTRIBUTE, "float32", (2, 24), (24, 1), "torch.Tensor", False)
LEFT: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "as a number": ({"values": {"most": ("0", "24")}}, True),
    "as a float": ({"values": {"most": ("0.0", "24.0")}}, True),
    "in a container": ({"values": {"most": ("[]", "[1, 24]")}}, True),
    "as a size": ({"added": (ADDED,)}, True),
    "beside the model": ({"common_values": (CommonValue("a.module", "MOST", "0", "24"),)}, True),
    "other numbers": ({"values": {"most": ("24", "240")}}, False),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_building_reads_and_loading_leaves(made: Any, kind: str) -> None:
    """Of what building reads, each engine makes its own. But loading may have kept it."""
    left, counts = LEFT[kind]
    found = flags(made, observed(**left), building=COUNTED["scheduler.max_num_seqs"])
    assert found == ({"scheduler.max_num_seqs": "24"} if counts else {})


def test_another_thread_reads_for_itself(made: Any) -> None:
    def elsewhere(made: Any) -> None:
        thread = threading.Thread(target=COUNTED["model.seed"], args=(made,))
        thread.start()
        thread.join()

    assert flags(made, observed(), loading=elsewhere) == {}
