"""Where tensors of a checkpoint go in an arena, for whoever writes new ones under their names."""

from __future__ import annotations

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
