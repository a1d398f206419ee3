"""Checksums of an arena: what they are, and that damage of every kind is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, PIECE_BYTES, ArenaInfo, Checksums
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.errors import BadRequestError, IntegrityError
from vllm_companion_plugin.memory.tensors.checksum import (
    ROW_BYTES,
    ROW_WORDS,
    ROWS,
    Summing,
    Verification,
    _chosen,
    _weights,
)
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.wire import codec

CPU = torch.device("cpu")


class Memory:
    """Writable memory where an arena is expected."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def sums(self) -> tuple[int, ...]:
        summing = Summing(ArenaViews(self, self.bytes.numel(), CPU), self.bytes.numel(), CPU)
        summing.extend(self.bytes.numel())
        return summing.values()


def test_the_checksum_is_the_weighted_sum_that_it_is_said_to_be() -> None:
    memory = Memory(3 * ROW_BYTES)
    rows, columns = _weights(CPU)
    data = memory.bytes.numpy().tobytes()
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    expected = sum(
        word * (int(rows[index // ROW_WORDS]) + int(columns[index % ROW_WORDS])) for index, word in enumerate(words)
    )
    assert memory.sums() == (expected % (1 << 64),)


def test_weights_are_odd_together_and_all_different() -> None:
    rows, columns = _weights(CPU)
    assert (len(rows), len(columns)) == (ROWS, ROW_WORDS)
    assert not (rows % 2).any()
    assert (columns % 2).all()
    assert len({*rows.tolist(), *columns.tolist()}) == ROWS + ROW_WORDS


def test_sums_do_not_depend_on_the_steps_in_which_they_are_made() -> None:
    memory = Memory(2 * PIECE_BYTES + 5 * ROW_BYTES)
    summing = Summing(ArenaViews(memory, memory.bytes.numel(), CPU), memory.bytes.numel(), CPU)
    for until in (ROW_BYTES, PIECE_BYTES + ROW_BYTES, memory.bytes.numel()):
        summing.extend(until)
    assert summing.values() == memory.sums()
    assert len(set(memory.sums())) == 3


def flip_a_bit(data: torch.Tensor, at: int, bit: int) -> None:
    data[at] ^= 1 << bit


def swap(data: torch.Tensor, first: int, second: int, size: int) -> None:
    kept = data[first : first + size].clone()
    data[first : first + size] = data[second : second + size]
    data[second : second + size] = kept


@pytest.mark.parametrize(
    "damage",
    [
        *(
            lambda data, at=at, bit=bit: flip_a_bit(data, at, bit)
            for at in (0, 12345, PIECE_BYTES - 1)
            for bit in (0, 7)
        ),
        lambda data: data[4096:8192].zero_(),
        lambda data: swap(data, 0, 8, 8),
        lambda data: swap(data, 0, 4096, 4096),
        lambda data: swap(data, 1 << 20, 2 << 20, 1 << 20),
        lambda data: swap(data, 0, PIECE_BYTES, PIECE_BYTES),
        lambda data: data.copy_(data.roll(8)),
    ],
)
def test_damage_is_found(damage: Callable[[torch.Tensor], None]) -> None:
    memory = Memory(2 * PIECE_BYTES)
    before = memory.sums()
    damage(memory.bytes)
    assert memory.sums() != before


def packed(seed: int = 0) -> tuple[arenas.Arena, ArenaViews, object]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 1024))
    prepared = prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, CPU)
    arena = copy(prepared, arenas.MEMFD, CPU, rebind=False, release=lambda: None)
    return arena, ArenaViews(arena, arena.info.size_bytes, CPU), prepared.manifest


def test_what_is_packed_carries_its_checksums_and_verifies() -> None:
    arena, views, manifest = packed()
    assert arena.info.checksums.algorithm == ARENA_CHECKSUM
    assert len(arena.info.checksums.values) == 2
    assert Verification(views, arena.info, "full", CPU).check(manifest, "m") == "verified 2 of 2 pieces"
    arrived, _ = codec.arena_from_message(codec.arena_to_message(arena.info))
    assert arrived == arena.info
    arena.close()


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_other_bytes_than_the_published_ones_are_refused_and_their_tensors_named(mode: str) -> None:
    arena, views, manifest = packed()
    other, *_ = packed(seed=1)
    first, last = arena.info.checksums.values
    wrong = ArenaInfo(arena.info.kind, arena.info.block_sizes, Checksums(ARENA_CHECKSUM, (first, last ^ 1)))
    with pytest.raises(IntegrityError, match=r"1 of 2 pieces of m are not .* the first holds .*1\.weight"):
        Verification(views, wrong, mode, CPU).check(manifest, "m")
    with pytest.raises(IntegrityError, match="2 of 2 pieces"):
        Verification(views, other.info, mode, CPU).check(manifest, "m")
    for opened in (arena, other):
        opened.close()


@pytest.mark.parametrize(
    ("mode", "checksums"),
    [("off", Checksums(ARENA_CHECKSUM, (1, 2))), ("full", Checksums()), ("full", Checksums("of-tomorrow", (1, 2)))],
)
def test_nothing_is_compared_if_it_is_off_or_the_algorithm_is_not_known(mode: str, checksums: Checksums) -> None:
    arena, views, manifest = packed()
    info = ArenaInfo(arena.info.kind, arena.info.block_sizes, checksums)
    assert Verification(views, info, mode, CPU).check(manifest, "m") == "not verified"
    arena.close()


def test_a_sample_is_a_sixteenth_and_another_one_each_time() -> None:
    count = 160
    info = ArenaInfo("memfd", (count * PIECE_BYTES,), Checksums(ARENA_CHECKSUM, (0,) * count))
    samples = [_chosen(info, "sample") for _ in range(400)]
    assert {len(sample) for sample in samples} == {10}
    assert set().union(*samples) == set(range(count))


def test_a_sample_is_not_chosen_by_the_seed_of_the_engine() -> None:
    """vLLM seeds Python's generator with the same number in each engine, and each shall look elsewhere."""
    info = ArenaInfo("memfd", (1600 * PIECE_BYTES,), Checksums(ARENA_CHECKSUM, (0,) * 1600))
    samples = []
    for _ in range(2):
        random.seed(0)
        samples.append(_chosen(info, "sample"))
    assert samples[0] != samples[1]
    random.seed(0)
    undisturbed = random.random()
    random.seed(0)
    _chosen(info, "sample")
    assert random.random() == undisturbed


def test_an_arena_with_too_few_checksums_is_no_arena() -> None:
    info = ArenaInfo("memfd", (PIECE_BYTES + 4096,), Checksums(ARENA_CHECKSUM, (1,)))
    with pytest.raises(BadRequestError, match="1 checksums"):
        codec.arena_from_message(codec.arena_to_message(info))
