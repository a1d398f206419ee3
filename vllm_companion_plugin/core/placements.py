"""Where tensors of a checkpoint go in an arena, for whoever writes new ones under their names."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """A part of a tensor, as `torch.as_strided` takes it: all in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One copy from a checkpoint's tensor into an arena.

    Attributes:
        steps: views to take one after the other, each of a contiguous copy of what the one before gave; the first of
            the tensor itself, which is contiguous.
        offset_bytes: of the first element in the arena.
        shape, stride, dtype: of the target.
    """

    steps: tuple[View, ...]
    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint that loading used, and all that it was copied to.

    Attributes:
        copies: empty if loading did not only copy it, so that it cannot be written without vLLM.
    """

    shape: tuple[int, ...]
    dtype: str
    copies: tuple[Placed, ...]


@functools.cache
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements fill what they span."""
    last = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != last:
            return False
        last *= size
    return True


def lies_whole(source: Source) -> bool:
    """Whether an arena has the bytes of a contiguous `source` one after the other, in one place."""
    if len(source.copies) != 1:
        return False
    (placed,) = source.copies
    count = math.prod(source.shape)
    views = [*placed.steps, View(placed.shape, placed.stride, 0)]
    return placed.dtype == source.dtype and all(
        view.offset == 0 and math.prod(view.shape) == count and _is_contiguous(view.shape, view.stride)
        for view in views
    )


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements follow each other in the order of their indices, without gaps."""
    last = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != last:
            return False
        last *= size
    return True
