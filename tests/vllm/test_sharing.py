"""The main promise, with real engines: one copy, any number of engines, equal to a normal load."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import Place, until
from tests.support.publishing import damage
from tests.vllm.conftest import START_TIMEOUT_S, StartEngine, entries
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import CompanionError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[1, 2, 3, 4], [9, 8, 7], [11] * 20, [100, 200, 300, 400, 500]]
TEXTS = ["A cat sits on the mat.", "Ein Hund bellt im Garten.", "GPUs multiply matrices.", "x"]


def values(worker: dict[str, Any]) -> dict[str, Any]:
    """Name to dtype, shape, stride, kind and digest; the KV cache, which comes later, aside."""
    return {name: tensor["value"] for name, tensor in worker["tensors"].items() if not name.endswith(".kv_cache")}


def arena_pss_bytes(pid: int, least_bytes: int = 0) -> tuple[int, int]:
    """Proportional and private bytes of the arena's mappings in a process; of those with so many bytes at least."""
    pss = private = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            inside = "memfd:vllm-companion" in line and end - start >= least_bytes
            assert not inside or line.split()[1] == "r--s", line  # read-only and shared
        elif inside and line.startswith("Pss:"):
            pss += int(line.split()[1]) << 10
        elif inside and line.startswith("Anonymous:"):
            private += int(line.split()[1]) << 10
    return pss, private


def counted(place: Place) -> dict[str, float]:
    """What the companion counted, by name and the labels that are not the model's, sorted; without zeros."""
    with connect("cpu", place.settings, spawn=False) as connection:
        series = [one for one in connection.metrics()[1] if one.value]
    names = (
        [one.name, *(text for label, text in sorted(one.labels.items()) if label not in ("model", "rank", "role"))]
        for one in series
    )
    return {" ".join(name): one.value for name, one in zip(names, series, strict=True)}


def ready_entries(place: Place) -> int:
    """How many entries somebody is attached to; 0 if no companion answers."""
    with contextlib.suppress(CompanionError):
        return sum(entry.state is EntryState.READY and len(entry.leases) > 0 for entry in entries(place))
    return 0


def check_equal_and_shared(reference: dict[str, Any], *engines: dict[str, Any]) -> None:
    for engine in engines:
        for normal, worker in zip(reference["workers"], engine["workers"], strict=True):
            assert values(worker) == values(normal)
            outside = [
                name
                for name, tensor in worker["tensors"].items()
                if tensor["value"][3] == "parameter" and not tensor["in_arena"]
            ]
            assert outside == []


@pytest.mark.core
def test_two_engines_started_at_once_share_one_copy_that_equals_a_normal_load(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    options = {"model": tiny_llama, "load_format": "companion", "skip_tokenizer_init": True, "prompts": PROMPTS}
    first, second = (start_engine(many_processes=True, **options) for _ in range(2))
    results = [first.result(), second.result()]

    outputs = [first.output(), second.output()]
    assert sorted("Published weights of" in output for output in outputs) == [False, True]
    assert sorted("Attached to" in output for output in outputs) == [False, True]
    assert sorted("Loading weights took" in output for output in outputs) == [False, True]

    (entry,) = entries(place)
    pids = [result["workers"][0]["pid"] for result in results]
    assert sorted(lease.pid for lease in entry.leases) == sorted(pids)
    sizes = [arena_pss_bytes(pid) for pid in pids]
    assert sum(pss for pss, _ in sizes) == pytest.approx(entry.size_bytes, rel=0.02)
    assert [private for _, private in sizes] == [0, 0]

    found = counted(place)
    assert (found["outcomes published"], found["outcomes attached"], found["verifications full equal"]) == (1, 1, 1)
    assert min(found[f"{name}_seconds"] for name in ("load", "attach", "verify")) > 0

    second.kill()
    until(lambda: len(entries(place)[0].leases) == 1, 5, "the killed engine's lease ends")
    assert first.process.poll() is None

    first.stop()
    auto = start_engine(model=tiny_llama, load_format="auto", skip_tokenizer_init=True, prompts=PROMPTS).result()
    check_equal_and_shared(auto, *results)
    assert results[0]["tokens"] == results[1]["tokens"] == auto["tokens"]
    assert results[0]["kv_tokens"] == results[1]["kv_tokens"] == auto["kv_tokens"] > 0


def test_minilm_embeds_as_without_the_companion(start_engine: StartEngine, place: Place, minilm: Path) -> None:
    options = {"model": minilm, "runner": "pooling", "texts": TEXTS}
    auto = start_engine(load_format="auto", **options).result()
    loaded = start_engine(load_format="companion", **options)
    results = [loaded.result()]
    loaded.stop()
    attached = start_engine(load_format="companion", **options)
    results.append(attached.result())
    assert "Attached to" in attached.output()
    check_equal_and_shared(auto, *results)
    for result in results:
        for vector, normal in zip(result["vectors"], auto["vectors"], strict=True):
            assert vector == pytest.approx(normal, abs=1e-5)
    (entry,) = entries(place)
    assert entry.size_bytes > 80 << 20


@pytest.mark.core
def test_ties_are_kept_and_copies_and_packed_weights_give_the_same_tokens(
    start_engine: StartEngine, place: Place, tied_llama: Path
) -> None:
    options = {"model": tied_llama, "skip_tokenizer_init": True, "prompts": PROMPTS}
    auto = start_engine(load_format="auto", **options)
    reference = auto.result()
    auto.stop()
    loaded = start_engine(load_format="companion", **options).result()
    attached = start_engine(load_format="companion", **options).result()
    check_equal_and_shared(reference, loaded, attached)
    for result in (loaded, attached):
        tensors = result["workers"][0]["tensors"]
        assert len({tensors[name]["object"] for name in tensors if name.endswith("embed_tokens.weight")}) == 1

    copied = start_engine(load_format="companion", model_loader_extra_config={"share": "copy"}, **options)
    packed = start_engine(load_format="companion", model_loader_extra_config={"cpu_prepack": True}, **options)
    assert copied.result()["tokens"] == reference["tokens"]
    assert packed.result()["tokens"] == reference["tokens"]
    assert "Copied" in copied.output()
    assert not any(tensor["in_arena"] for tensor in copied.result()["workers"][0]["tensors"].values())
    assert loaded["tokens"] == attached["tokens"] == reference["tokens"]


def test_two_tensor_parallel_engines_started_at_once_share_each_rank_also_with_adapters(
    start_engine: StartEngine, place: Place, tiny_llama: Path, adapter: Path
) -> None:
    options = {"model": tiny_llama, "skip_tokenizer_init": True, "prompts": PROMPTS, "tensor_parallel_size": 2}
    options |= {"enable_lora": True, "max_lora_rank": 8, "adapter": str(adapter)}
    auto = start_engine(load_format="auto", **options)
    reference = auto.result()
    auto.stop()
    # At the same instant: each may be elected for one rank and wait for the other's.
    engines = [start_engine(load_format="companion", **options) for _ in range(2)]
    results = [engine.result() for engine in engines]
    output = "".join(engine.output() for engine in engines)
    assert (output.count("Published weights"), output.count("Attached to")) == (2, 2)
    assert sorted(entry.key.rank for entry in entries(place)) == ["tp0/2", "tp1/2"]
    check_equal_and_shared(reference, *results)
    assert [result["tokens"] for result in results] == [reference["tokens"]] * 2
    assert [result["adapted"] for result in results] == [reference["adapted"]] * 2
    assert all(plain != adapted for plain, adapted in zip(reference["tokens"], reference["adapted"], strict=True))


def test_another_checkpoint_of_the_same_shape_is_never_attached(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    first = start_engine(model=tiny_llama, load_format="companion", skip_tokenizer_init=True, prompts=PROMPTS)
    before = first.result()
    first.stop()
    weights = tiny_llama / "model.safetensors"
    original = weights.read_bytes()
    edited = bytearray(original)
    edited[-4096:] = bytes(4096)
    try:
        weights.write_bytes(edited)
        second = start_engine(model=tiny_llama, load_format="companion", skip_tokenizer_init=True, prompts=PROMPTS)
        after = second.result()
    finally:
        weights.write_bytes(original)
    assert "Published weights of" in second.output()
    assert values(after["workers"][0]) != values(before["workers"][0])
    assert [entry.state for entry in entries(place)] == [EntryState.READY] * 2


def test_an_engine_whose_companion_dies_while_it_loads_serves_all_the_same(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    engine = start_engine(model=tiny_llama, load_format="companion", skip_tokenizer_init=True, prompts=PROMPTS)
    log = Path(place.settings.runtime_dir, "cpu", "companion.log")
    until(lambda: log.exists() and ": loading" in log.read_text(), 120, "the engine is elected")
    os.kill(place.companion_pid(), signal.SIGKILL)
    assert all(len(tokens) == 24 for tokens in engine.result()["tokens"])
    # Whether it asks the next one to be elected, hands over what it has loaded, or hands it back depends on the moment.
    until(lambda: ready_entries(place) == 1, 20, "the next companion has it")


def test_an_engine_does_not_use_what_is_not_what_was_published(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    options = {"model": tiny_llama, "load_format": "companion", "skip_tokenizer_init": True, "prompts": PROMPTS}
    first = start_engine(**options)
    tokens = first.result()["tokens"]
    first.stop()
    with connect("cpu", place.settings, spawn=False) as connection:
        damage(connection)
    second = start_engine(**options)
    assert second.result()["tokens"] == tokens
    said = second.output()
    assert re.search(r"are not shared: 1 of 1 pieces of .*/llama \(single\) on cpu are not what was published", said)
    found = counted(place)
    assert (found["verifications full different"], found["failures integrity client"], found["outcomes alone"]) == (
        1,
        1,
        1,
    )
    assert not any(tensor["in_arena"] for tensor in second.result()["workers"][0]["tensors"].values())


def test_an_elected_engine_that_copies_keeps_nothing_of_what_it_published(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    engine = start_engine(
        model=tiny_llama,
        load_format="companion",
        skip_tokenizer_init=True,
        prompts=PROMPTS,
        model_loader_extra_config={"share": "copy"},
    )
    worker = engine.result()["workers"][0]
    assert "Published weights of" in engine.output()
    assert "memfd:vllm-companion" not in Path(f"/proc/{worker['pid']}/maps").read_text()
    (entry,) = entries(place)
    assert (entry.state, entry.leases) == (EntryState.READY, ())
    with connect("cpu", place.settings, spawn=False) as connection:
        assert len(connection.unload()) == 1


def test_a_killed_loader_is_replaced_by_the_one_that_waits(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    """The first engine is killed as soon as it is elected; the second loads and serves."""
    options = {"model": tiny_llama, "load_format": "companion", "skip_tokenizer_init": True}
    first = start_engine(**options)
    second = start_engine(prompts=PROMPTS, **options)
    deadline = time.monotonic() + START_TIMEOUT_S
    victim = None
    while victim is None and time.monotonic() < deadline:
        log = Path(place.settings.runtime_dir, "cpu", "companion.log")
        elected = re.findall(r"pid (\d+)\) asks for .*: loading", log.read_text()) if log.exists() else []
        victim = elected[0] if elected else None
    assert victim is not None
    loser, winner = (first, second) if f"pid={victim}" in first.output() else (second, first)
    loser.kill()
    winner.result()
    assert "Published weights of" in winner.output() or "Attached to" in winner.output()
