"""The bytes of an adapter between processes: a file in the format of safetensors, which fills whole pages.

Its header holds PEFT's configuration, too. What makes pages whole is white space at the end of the header, which the
format allows; so the tensors end where the file does, as its readers demand.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_companion_plugin.errors import ManifestError

PAGE_BYTES = 4096
MAX_HEADER_BYTES = 64 << 20
_LENGTH_BYTES = 8
_CONFIG = "peft_config"


@dataclass(frozen=True)
class Part:
    """A tensor in the file: its name, its type as the format calls it, its shape, and how many bytes it has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def header_of(parts: Sequence[Part], config: Mapping[str, Any]) -> bytes:
    """All that comes before the tensors, which follow in this order without gaps and end with a page."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _CONFIG: json.dumps(config)}}
    end = 0
    for part in parts:
        begin, end = end, end + part.size_bytes
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = -(-(_LENGTH_BYTES + len(text) + end) // PAGE_BYTES) * PAGE_BYTES
    length = whole - end - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def read_text(fd: int, label: str) -> bytes:
    """The text of the header of the file behind a descriptor, as `parse` takes it. Raises `ManifestError`."""
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise ManifestError(f"{label} is no file of tensors: its header would have {length} bytes.")
    return os.pread(fd, length, _LENGTH_BYTES)


def read_header(fd: int, label: str) -> tuple[Mapping[str, Any], int]:
    """The header of the file behind a descriptor, and where its tensors begin. Raises `ManifestError`."""
    return parse(read_text(fd, label), label)


def parse(text: bytes, label: str) -> tuple[Mapping[str, Any], int]:
    """A header by its text, and where tensors begin in the file. Raises `ManifestError`."""
    try:
        header = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{label} is no file of tensors: {error}") from error
    if not isinstance(header, dict):
        raise ManifestError(f"{label} is no file of tensors: its header is no object.")
    return header, _LENGTH_BYTES + len(text)


@functools.lru_cache(maxsize=4)
def _parsed(text: bytes) -> Any:
    """Generations of an adapter have the same header. What is returned is shared, and must not be changed."""
    return json.loads(text)


def config_in(fd: int, label: str) -> dict[str, Any]:
    """PEFT's configuration of the adapter behind a descriptor. Raises `ManifestError` if it has none."""
    header, _ = read_header(fd, label)
    try:
        config = json.loads(header["__metadata__"][_CONFIG])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{label} has no configuration.") from error
    if not isinstance(config, dict):
        raise ManifestError(f"{label} has a configuration that is no object.")
    return config
