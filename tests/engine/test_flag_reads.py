"""Flags that the key leaves out, and that a model's own code reads: here this file is such code."""

from __future__ import annotations

import copy
import dataclasses
import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import vllm.config
from vllm.config import MultiModalConfig, PoolerConfig
from vllm.config.utils import replace

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
from vllm_companion_plugin.engine.identity import flag_reads, outside
from vllm_companion_plugin.engine.identity.flag_reads import FlagReads
from vllm_companion_plugin.engine.vllm.threads import Threads
from vllm_companion_plugin.errors import ParityError

pytestmark = pytest.mark.usefixtures("one_rank")

Read = Callable[[Any], object]
LIMITS = {"max_model_len": 64, "max_num_seqs": 24, "enable_lora": True, "max_lora_rank": 32, "seed": 7}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}

COUNTED: dict[str, Read] = {
    "model.max_model_len": lambda c: c.model_config.max_model_len,
    "model.seed": lambda c: c.model_config.seed,
    "scheduler.max_num_seqs": lambda c: c.scheduler_config.max_num_seqs,
    "cache.block_size": lambda c: c.cache_config.block_size,
    "lora.max_lora_rank": lambda c: c.lora_config.max_lora_rank,
    "compilation.max_cudagraph_capture_size": lambda c: c.compilation_config.max_cudagraph_capture_size,
    "parallel.max_parallel_loading_workers": lambda c: c.parallel_config.max_parallel_loading_workers,
    "model.model": lambda c: c.model_config.model,
    "model.tokenizer": lambda c: c.model_config.tokenizer,
    "load.download_dir": lambda c: c.load_config.download_dir,
    "load.use_tqdm_on_load": lambda c: c.load_config.use_tqdm_on_load,
    "attention.flex_attn_block_m": lambda c: c.attention_config.flex_attn_block_m,
    "kernel.enable_jit_warmup": lambda c: c.kernel_config.enable_jit_warmup,
    "model.pooler_config.max_embed_len": lambda c: c.model_config.pooler_config.max_embed_len,
    "multimodal.video_pruning_rate": lambda c: c.model_config.multimodal_config.video_pruning_rate,
    "speculative.prompt_lookup_max": lambda c: c.speculative_config.prompt_lookup_max,
}


@pytest.fixture
def made(tiny: Path) -> Any:
    """With parts that only some models and engines have."""
    made = config(tiny, **LIMITS, speculative_config=SPECULATIVE)
    made.model_config.pooler_config = PoolerConfig(max_embed_len=48)
    made.model_config.multimodal_config = MultiModalConfig(video_pruning_rate=0.5)
    return made


def observed(**found: Any) -> Manifest:
    """Of a model whose loading was seen to do this to a module."""
    common = found.pop("common_values", ())
    module = ModuleInfo("", (), "a.Model", (), {}, Observed(**found))
    return Manifest(Stage.PROCESSED, (), (), (module,), common_values=common)


def nothing(made: Any) -> None:
    """Reads nothing."""


def flags(made: Any, manifest: Manifest, *, building: Read = nothing, loading: Read = nothing) -> dict[str, str]:
    reads, threads = FlagReads(), Threads()
    with threads.followed(), reads.watching(threads):
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


def in_thread(read: Read) -> Read:
    def start(made: Any) -> None:
        thread = threading.Thread(target=read, args=(made,))
        thread.start()
        thread.join(10)

    return start


def in_executor(read: Read) -> Read:
    def submit(made: Any) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(read, made).result(10)

    return submit


WAYS: dict[str, Read] = {
    "in a thread": in_thread(lambda c: c.scheduler_config.max_num_seqs),
    "in an executor": in_executor(lambda c: c.scheduler_config.max_num_seqs),
    "in a thread of a thread": in_thread(in_executor(lambda c: c.scheduler_config.max_num_seqs)),
    "all at once": lambda c: vars(c.scheduler_config)["max_num_seqs"],
    "its dictionary": lambda c: c.scheduler_config.__dict__["max_num_seqs"],
    "all fields": lambda c: dataclasses.asdict(c.scheduler_config),
    "of a copy": lambda c: copy.copy(c).scheduler_config.max_num_seqs,
    "of a deep copy": lambda c: copy.deepcopy(c.scheduler_config).max_num_seqs,
    "of another one": lambda c: replace(c.scheduler_config, max_model_len=48, is_encoder_decoder=False).max_num_seqs,
    "of one that dataclasses made": lambda c: (
        dataclasses.replace(c.scheduler_config, max_model_len=48, is_encoder_decoder=False).max_num_seqs
    ),
    "by name": lambda c: operator.attrgetter("scheduler_config.max_num_seqs")(c),
    "of a configuration for a part": lambda c: (
        c.with_hf_config(c.model_config.hf_config, architectures=["LlamaForCausalLM"]).scheduler_config.max_num_seqs
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_read(made: Any, way: str) -> None:
    found = flags(made, observed(), loading=WAYS[way])
    assert found["scheduler.max_num_seqs"] == "24"
    if way.startswith("of "):
        assert set(found) == {"scheduler.max_num_seqs"}


def test_what_a_configuration_reads_for_its_caller(made: Any) -> None:
    """It computes its answer of limits."""
    found = flags(made, observed(), loading=lambda c: c.uniform_decode_query_len + c.max_in_flight_tokens)
    assert "scheduler.max_num_batched_tokens" in found


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda c: dataclasses.replace(c.cache_config),
        lambda c: c.with_hf_config(c.model_config.hf_config),
        lambda c: f"{c} {c.scheduler_config}",
    ],
)
def test_who_copies_reads_nothing(made: Any, copied: Read) -> None:
    assert flags(made, observed(), loading=copied) == {}


@pytest.mark.parametrize("file", ["<string>", "/models/mine/copy.py"])
def test_a_models_own_file_may_be_called_like_pythons(made: Any, file: str) -> None:
    """As may code that it makes of a text, which is how Python makes what shows a configuration."""
    names: dict[str, Any] = {}
    exec(compile("def read(c): return c.scheduler_config.max_num_seqs", file, "exec"), names)
    assert [*flags(made, observed(), loading=names["read"])] == ["scheduler.max_num_seqs"]


def test_a_copy_reads_nothing_though_the_key_has_read_vllms_files(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has if somebody copied or edited them."""
    for path in Path(vllm.config.__file__).parent.glob("*.py"):
        monkeypatch.setitem(outside._read, str(path), ((), b""))
    assert flags(made, observed(), loading=lambda c: c.with_hf_config(c.model_config.hf_config)) == {}


def test_what_is_no_flag_is_not_compared(made: Any) -> None:
    """As layers that a configuration keeps."""
    made.compilation_config.static_forward_context["layer"] = object()
    found = flags(made, observed(), loading=lambda c: c.compilation_config.static_forward_context)
    assert found == {"compilation.static_forward_context": "not comparable"}


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
        lambda c: c.scheduler_config.compute_hash(),
        lambda c: (c.model_config.dtype, c.model_config.enforce_eager.real, c.cache_config.cache_dtype),
        lambda c: (c.parallel_config.tensor_parallel_size, c.model_config.revision, c.instance_id),
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
    """One that the load has not begun."""
    go = threading.Event()

    def read() -> None:
        go.wait(10)
        COUNTED["model.seed"](made)

    thread = threading.Thread(target=read)
    thread.start()

    def wait(made: Any) -> None:
        go.set()
        thread.join(10)

    assert flags(made, observed(), loading=wait) == {}
