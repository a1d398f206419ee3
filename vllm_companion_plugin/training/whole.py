"""Where a whole tensor is that was copied in pieces: one view that has all of them, if there is one.

vLLM fuses and slices what a checkpoint has: three copies may fill the rows of one parameter, or one tensor be the
transpose of another. Positions are all affine, so a tensor is a view exactly if one offset and one step for each of its
axes put every piece where it was copied to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_companion_plugin.core.placements import Placed, View


@dataclass(frozen=True, slots=True)
class _Side:
    """Elements of a tensor in a row: `count` along `axis`, every `step`th one; and their distance in the target."""

    axis: int
    count: int
    step: int
    target: int


@dataclass(frozen=True, slots=True)
class _Box:
    """A piece: its first element in the tensor and in the target, and its sides."""

    origin: tuple[int, ...]
    start: int
    sides: tuple[_Side, ...]

    @property
    def size(self) -> int:
        return math.prod(side.count for side in self.sides)


def whole_view(shape: Sequence[int], pieces: Iterable[Placed], item_bytes: int) -> View | None:
    """The view of the target that is the whole tensor, in elements of `item_bytes`; None if there is none.

    Args:
        shape: of the tensor.
        pieces: all that was copied from it, to places that do not overlap.
    """
    shape = tuple(shape)
    if 0 in shape:
        return None
    boxes = []
    for piece in pieces:
        if 0 in piece.shape:
            continue
        if piece.offset_bytes % item_bytes or (box := _box(shape, piece, piece.offset_bytes // item_bytes)) is None:
            return None
        boxes.append(box)
    # Of places that do not overlap, as many elements as the tensor has are all of them.
    if not boxes or sum(box.size for box in boxes) != math.prod(shape):
        return None
    stride = _strides(shape, boxes)
    if stride is None:
        return None
    offsets = {box.start - _dot(box.origin, stride) for box in boxes}
    if len(offsets) != 1 or (offset := offsets.pop()) < 0 or any(step < 0 for step in stride):
        return None
    return View(shape, stride, offset)


def _strides(shape: tuple[int, ...], boxes: Sequence[_Box]) -> tuple[int, ...] | None:
    """The distance in the target of neighbours along each axis; None if pieces contradict each other."""
    known: dict[int, int] = {}
    for box in boxes:
        for side in box.sides:
            if side.target % side.step or known.setdefault(side.axis, side.target // side.step) != (
                side.target // side.step
            ):
                return None
    missing = {axis for axis, size in enumerate(shape) if size > 1} - known.keys()
    while missing:  # along which every piece is one element wide: neighbours are different pieces
        found = _from_neighbours(known, missing, boxes)
        if found is None:
            return None
        known.update([found])
        missing.remove(found[0])
    stride: list[int] = []
    for axis in reversed(range(len(shape))):  # of an axis with one element any will do: as if contiguous
        stride.append(known.get(axis, stride[-1] * shape[axis + 1] if stride else 1))
    return tuple(reversed(stride))


def _from_neighbours(known: dict[int, int], missing: set[int], boxes: Sequence[_Box]) -> tuple[int, int] | None:
    first = boxes[0]
    for box in boxes[1:]:
        moved = [axis for axis in missing if box.origin[axis] != first.origin[axis]]
        if len(moved) != 1:
            continue
        by = box.origin[moved[0]] - first.origin[moved[0]]
        rest = sum(step * (box.origin[axis] - first.origin[axis]) for axis, step in known.items())
        distance, left = divmod(box.start - first.start - rest, by)
        return None if left else (moved[0], distance)
    return None


def _box(shape: tuple[int, ...], piece: Placed, start: int) -> _Box | None:
    """The part of a tensor that was copied; None if it is no box along the tensor's axes."""
    view, target = (piece.steps[-1], piece.stride) if piece.steps else (_contiguous(piece.shape), piece.stride)
    for before in reversed(piece.steps[:-1]):  # a view of a contiguous copy of what `before` shows
        sides = _sides(before.shape, view, target)
        if sides is None:
            return None
        origin, found = sides
        offset = before.offset + _dot(origin, before.stride)
        steps = tuple(side.step * before.stride[side.axis] for side in found)
        view, target = View(tuple(side.count for side in found), steps, offset), tuple(side.target for side in found)
    sides = _sides(shape, view, target)
    return None if sides is None else _Box(sides[0], start, tuple(sides[1]))


def _sides(shape: tuple[int, ...], view: View, target: Sequence[int]) -> tuple[tuple[int, ...], list[_Side]] | None:
    """A view of a contiguous tensor of `shape`, along the tensor's axes: its first element, and its sides.

    Args:
        target: the distance in another place of neighbours in each dimension of the view.
    """
    steps = _contiguous(shape).stride
    origin = tuple(view.offset // step % size if size else 0 for step, size in zip(steps, shape, strict=True))
    if _dot(origin, steps) != view.offset:
        return None
    sides: list[_Side] = []
    for count, step, distance in zip(view.shape, view.stride, target, strict=True):
        while count > 1:
            axis = _axis_of(step, steps, shape)
            if axis is None:
                return None
            by = step // steps[axis]
            here = count
            if by * (count - 1) >= shape[axis]:  # it goes on along the axis before: `count` is of two axes together
                here, left = divmod(shape[axis], by)
                if left or count % here:
                    return None
            sides.append(_Side(axis, here, by, distance))
            count, step, distance = count // here, step * here, distance * here
    last = list(origin)
    for side in sides:
        last[side.axis] += side.step * (side.count - 1)
    return (origin, sides) if all(end < size for end, size in zip(last, shape, strict=True)) else None


def _axis_of(step: int, steps: Sequence[int], shape: Sequence[int]) -> int | None:
    """The axis along which elements are `step` apart."""
    for axis, (one, size) in enumerate(zip(steps, shape, strict=True)):
        if one <= step < one * size and step % one == 0:
            return axis
    return None


def _contiguous(shape: Sequence[int]) -> View:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.append(stride[-1] * size)
    return View(tuple(shape), tuple(reversed(stride)) if shape else (), 0)


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))
