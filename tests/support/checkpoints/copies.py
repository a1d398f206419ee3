"""Copies of a checkpoint, whole or changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = "model.safetensors"


def flip(path: Path, offsets: Iterable[int]) -> None:
    """Change the bytes at `offsets`."""
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def copy_of(model: Path, name: str = "copied") -> Path:
    """One beside it."""
    return Path(shutil.copytree(model, model.with_name(name)))


def fine_tune_of(model: Path, offsets: Iterable[int]) -> Path:
    """A copy of the same shape: its weights differ at `offsets` of the file, and the header does not."""
    tuned = copy_of(model, "tuned")
    flip(tuned / WEIGHTS, offsets)
    return tuned
