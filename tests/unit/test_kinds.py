"""The table of kinds of memory: who reads it, and what it may not bring along."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import ArenaError, BadRequestError
from vllm_companion_plugin.memory.kinds import names
from vllm_companion_plugin.settings import BY_NAME
from vllm_companion_plugin.wire import codec

COMPANION = """
import os, sys
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.holder.service.descriptors import check_descriptors, memory_is_lost
from vllm_companion_plugin.memory.kinds import KINDS
fd = os.open(os.devnull, os.O_RDONLY)
for name in KINDS:
    try:
        check_descriptors(ArenaInfo(name, (4096,)), [fd])
        print(name, memory_is_lost(ArenaInfo(name, (4096,)), [fd]))
    except BadRequestError as error:
        print(name, "refused")
    try:
        check_descriptors(ArenaInfo(name, (4096, 4096)), [fd])
    except BadRequestError as error:
        print(error)
print([module for module in ("torch", "cuda", "numpy") if module in sys.modules])
"""


class TestTable:
    def test_companion_checks_without_cuda(self) -> None:
        """What the companion asks of every kind imports neither CUDA nor torch."""
        done = subprocess.run(
            [sys.executable, "-c", COMPANION], capture_output=True, text=True, timeout=100, check=True
        )
        count = "The arena has 2 blocks, and 1 descriptors."
        assert done.stdout.splitlines() == [
            *("memfd refused", count),
            *("cuda_vmm False", count),
            *("cuda_ipc refused", count),
            "[]",
        ]

    def test_names(self) -> None:
        """Each kind is found by the name that it has on the wire."""
        assert [kind.name for kind in arenas.KINDS.values()] == list(arenas.KINDS)
        assert list(arenas.KINDS) == [arenas.MEMFD, arenas.CUDA_VMM, arenas.CUDA_IPC]

    def test_readers(self) -> None:
        """Settings offer the kinds of a GPU; the wire knows all of them, and no other."""
        assert BY_NAME["arena"].choices == ("auto", *names("cuda")) == ("auto", "cuda_vmm", "cuda_ipc")
        for name in arenas.KINDS:
            info = ArenaInfo(name, (4096,))
            assert codec.arena_from_message(codec.arena_to_message(info))[0] == info
        with pytest.raises(BadRequestError, match="'tape' is unknown; known: cuda_ipc, cuda_vmm, memfd"):
            codec.arena_from_message(codec.arena_to_message(ArenaInfo("tape", (4096,))))

    def test_unknown(self) -> None:
        """A kind that this version does not know is refused by name, and what was given is closed."""
        fds = arenas.Descriptors([])
        with pytest.raises(ArenaError, match="'tape'; this version knows memfd, cuda_vmm, cuda_ipc"):
            arenas.open_arena(ArenaInfo("tape", ()), fds)
        assert fds.closed

    def test_best_kind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first kind that the device supports; without any, the one that asks for least."""
        reasons = {0: None, 1: "no export"}
        arenas.best_kind.cache_clear()
        monkeypatch.setattr(type(arenas.KINDS["cuda_vmm"]), "unsupported_reason", lambda self, index: reasons[index])
        assert [arenas.best_kind("cuda", index) for index in reasons] == ["cuda_vmm", "cuda_ipc"]
        assert arenas.best_kind("cpu") == "memfd"
        arenas.best_kind.cache_clear()
