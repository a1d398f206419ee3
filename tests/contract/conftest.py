"""The kinds of memory, as the contract's tests use them."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.keeper.client import allocate
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kind import Kind
from vllm_companion_plugin.settings import resolve


class Memory:
    """One arena kind, with the means to put bytes into its memory and to read them back."""

    def __init__(self, kind: str, index: int = 0) -> None:
        self.kind = kind
        self.index = None if arenas.KINDS[kind].device_type == "cpu" else index
        self.page = arenas.granularity(kind, self.index)
        self._kept: list[Any] = []

    def create(self, size_bytes: int) -> arenas.ArenaWriter:
        return arenas.create(self.kind, size_bytes, self.index, self._keeper)

    def _keeper(self, size_bytes: int) -> Descriptors:
        from vllm_companion_plugin.memory.cuda_driver import device_uuid

        assert self.index is not None
        return allocate(device_uuid(self.index), size_bytes, resolve())

    def source(self, content: bytes) -> int:
        """Address of `content` in this kind of memory."""
        if self.index is None:
            self._kept.append(ctypes.create_string_buffer(content, len(content)))
            return ctypes.addressof(self._kept[-1])
        import torch

        self._kept.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).cuda(self.index))
        return int(self._kept[-1].data_ptr())

    def read(self, arena: arenas.Arena, offset: int, size: int) -> bytes:
        if self.index is None:
            return ctypes.string_at(arena.address + offset, size)
        import torch

        from vllm_companion_plugin.memory.tensors.views import ArenaViews

        return bytes(
            ArenaViews(arena, arena.info.size_bytes, torch.device("cuda", self.index))
            .bytes_at(offset, size)
            .cpu()
            .numpy()
        )

    def filled(self, *contents: bytes) -> arenas.Arena:
        """A sealed arena of one block for each of `contents` (host memory: one block for all)."""
        writer = self.create(self.page * len(contents))
        for number, content in enumerate(contents):
            writer.add_block(self.page)
            writer.write(number * self.page, self.source(content), len(content))
        return writer.seal()


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[None]:
    """Where keepers of these tests are found, by children too. They end by themselves."""
    directory = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_RUNTIME_DIR", directory)
        yield
    shutil.rmtree(directory, ignore_errors=True)


def marked(kinds: Iterable[Kind]) -> list[Any]:
    """Their names as parameters: what is in a GPU's memory needs one."""
    return [pytest.param(kind.name, marks=[pytest.mark.gpu] * (kind.device_type == "cuda")) for kind in kinds]


@pytest.fixture(params=marked(arenas.KINDS.values()))
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)
