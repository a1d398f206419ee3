"""The two kinds of memory, as the contract's tests use them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from vllm_companion_plugin import arena as arenas


class Memory:
    """One arena kind, with the means to put bytes into its memory and to read them back."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.index = 0 if kind == arenas.CUDA_VMM else None
        self.page = arenas.granularity(kind, self.index)
        self._kept: list[Any] = []

    def source(self, content: bytes) -> int:
        """Address of `content` in this kind of memory."""
        if self.index is None:
            self._kept.append(ctypes.create_string_buffer(content, len(content)))
            return ctypes.addressof(self._kept[-1])
        import torch

        self._kept.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda())
        return int(self._kept[-1].data_ptr())

    def read(self, arena: arenas.Arena, offset: int, size: int) -> bytes:
        if self.index is None:
            return ctypes.string_at(arena.address + offset, size)
        import torch

        from vllm_companion_plugin.module_tree.views import ArenaViews

        return bytes(ArenaViews(arena, torch.device("cuda", 0)).bytes_at(offset, size).cpu().numpy())

    def filled(self, *contents: bytes) -> arenas.Arena:
        """A sealed arena of one block for each of `contents` (host memory: one block for all)."""
        writer = arenas.create(self.kind, self.page * len(contents), self.index)
        for number, content in enumerate(contents):
            writer.add_block(self.page)
            writer.write(number * self.page, self.source(content), len(content))
        return writer.seal()


@pytest.fixture(params=[arenas.MEMFD, pytest.param(arenas.CUDA_VMM, marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)
