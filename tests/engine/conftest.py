"""vLLM in the test's own process, without an engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import models
from tests.support.deciding import Engines
from tests.support.place import Place
from vllm_companion_plugin.engine import session
from vllm_companion_plugin.engine.identity import digest


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The parallel groups of a single worker."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        address = f"file://{tmp_path_factory.mktemp('group')}/store"
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama", path, tiny=True)
    return path


@pytest.fixture
def first(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "first"))


@pytest.fixture
def engines(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """Engines beside a companion of their own."""
    place.companion()
    monkeypatch.setattr(session.current(), "_connections", {})
    monkeypatch.setattr(session.current(), "_drafts", {})
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)  # files of a test are always new
    made = Engines(place)
    yield made
    made.close()
    for connection in session.current()._connections.values():
        connection.close()
