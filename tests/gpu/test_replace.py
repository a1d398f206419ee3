"""Captured CUDA graphs know addresses: they compute with whatever memory is mapped there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.starting import starter
from tests.gpu.test_turns import GRAPHS
from tests.support.place import Place
from tests.vllm.test_replace import check, pair
from vllm_companion_plugin import memory as arenas

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def test_graphs_replay_with_another_models_memory(place: Place, tmp_path: Path) -> None:
    """The tokens are that model's, and the engine's own again after the way back."""
    if not arenas.KINDS[arenas.best_kind("cuda", 0)].can_remap:
        pytest.skip("this GPU shares memory by CUDA IPC")
    check(starter(place, tmp_path), pair(tmp_path, tiny=False), flags=GRAPHS)
