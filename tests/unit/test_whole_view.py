"""One view that is a whole tensor, of the pieces in which it was copied; or none."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from vllm_companion_plugin.core.placements import Placed, View
from vllm_companion_plugin.training.whole import whole_view

ITEM = 4


def piece(source: torch.Tensor, target: torch.Tensor, *before: torch.Tensor) -> Placed:
    """The copy of `source` to `target`, both views of what they are parts of."""
    target.copy_(source)
    steps = tuple(View(tuple(each.shape), each.stride(), each.storage_offset()) for each in (*before, source))
    return Placed(steps, target.storage_offset() * ITEM, tuple(target.shape), target.stride(), "float32")


def seen(whole: View, memory: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(whole.shape, whole.stride, whole.offset)


@pytest.mark.parametrize("seed", range(60))
def test_what_was_copied_in_pieces_is_found_whole(seed: int) -> None:
    """Cut along some axes, and put into memory in another order of axes and with gaps."""
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(rng.randint(1, 4))]
    tensor = torch.randn(shape)
    order = rng.sample(range(len(shape)), len(shape))
    around = [shape[axis] + rng.choice([0, 0, 2]) for axis in order]
    memory = torch.full((math.prod(around) + 5,), math.nan)
    place = memory[5:].view(around)[tuple(slice(shape[axis]) for axis in order)]
    place = place.permute([order.index(axis) for axis in range(len(shape))])
    pieces = [piece(part, there) for part, there in cut(tensor, place, rng)]
    rng.shuffle(pieces)
    found = whole_view(shape, pieces, ITEM)
    assert found is not None
    assert torch.equal(seen(found, memory), tensor)
    if len(pieces) > 1:
        assert whole_view(shape, pieces[1:], ITEM) is None


def cut(tensor: torch.Tensor, place: torch.Tensor, rng: random.Random) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    axis = rng.randrange(tensor.ndim)
    if tensor.shape[axis] < 2 or rng.random() < 0.3:
        if rng.random() < 0.5:  # as views of other dimensions
            axes = rng.sample(range(tensor.ndim), tensor.ndim)
            return [(tensor.permute(axes).unsqueeze(0), place.permute(axes).unsqueeze(0))]
        return [(tensor, place)]
    at = rng.randint(1, tensor.shape[axis] - 1)
    sizes = [at, tensor.shape[axis] - at]
    both = zip(tensor.split(sizes, axis), place.split(sizes, axis), strict=True)
    return [part for one, there in both for part in cut(one, there, rng)]


def test_axes_that_were_taken_together() -> None:
    """As heads and their rows, of a tensor that is copied flat."""
    tensor, memory = torch.randn(6, 4, 5), torch.zeros(200)
    pieces = [piece(tensor.view(24, 5), memory[10:130].view(24, 5))]
    found = whole_view((6, 4, 5), pieces, ITEM)
    assert found == View((6, 4, 5), (20, 5, 1), 10)


def test_an_axis_that_was_taken_apart() -> None:
    tensor, memory = torch.randn(6, 5), torch.zeros(40)
    found = whole_view((6, 5), [piece(tensor.view(2, 3, 5), memory[:30].view(2, 3, 5))], ITEM)
    assert found == View((6, 5), (5, 1), 0)


def test_a_part_of_a_contiguous_copy() -> None:
    """As Transformers takes merged experts apart: gate and up of all experts, copied, and of them one expert."""
    merged, memory = torch.randn(3, 8, 5), torch.zeros(150)
    pieces = []
    for half, columns in enumerate((merged[:, :4], merged[:, 4:])):
        copied = columns.contiguous()
        for expert in range(3):
            target = memory[10:130].view(3, 8, 5)[expert, 4 * half : 4 * half + 4]
            pieces.append(piece(copied[expert], target, columns))
    found = whole_view((3, 8, 5), pieces, ITEM)
    assert found is not None
    assert torch.equal(seen(found, memory), merged)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_element(shape: tuple[int, ...]) -> None:
    tensor, memory = torch.randn(shape), torch.zeros(8)
    found = whole_view(shape, [piece(tensor, memory[3:4].view(shape))], ITEM)
    assert found is not None
    assert torch.equal(seen(found, memory), tensor)


def test_no_elements_are_no_view() -> None:
    tensor = torch.zeros(4, 0)
    assert whole_view((4, 0), [piece(tensor, torch.zeros(4, 0))], ITEM) is None


def test_halves_that_changed_places_are_no_view() -> None:
    tensor, memory = torch.randn(4, 3), torch.zeros(12)
    pieces = [piece(tensor[:2], memory[6:].view(2, 3)), piece(tensor[2:], memory[:6].view(2, 3))]
    assert whole_view((4, 3), pieces, ITEM) is None


def test_rows_in_another_order_are_no_view() -> None:
    tensor, memory = torch.randn(3, 4), torch.zeros(12)
    pieces = [piece(tensor[row], memory.view(3, 4)[place]) for row, place in enumerate((0, 2, 1))]
    assert whole_view((3, 4), pieces, ITEM) is None


def test_a_tensor_that_was_spread_is_no_view() -> None:
    """One value in many places, or a part alone, as of a rank among others."""
    memory = torch.zeros(12)
    assert whole_view((1, 3), [piece(torch.randn(1, 3).expand(4, 3), memory.view(4, 3))], ITEM) is None
    assert whole_view((4, 3), [piece(torch.randn(4, 3)[:2], memory[:6].view(2, 3))], ITEM) is None
    assert whole_view((4, 3), [], ITEM) is None


def test_a_place_between_elements_is_no_view() -> None:
    placed = Placed((View((2,), (1,), 0),), 2, (2,), (1,), "float32")
    assert whole_view((2,), [placed], ITEM) is None
