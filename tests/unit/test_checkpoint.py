"""What a checkpoint is, before anything of it is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_companion_plugin.engine.identity import checkpoint
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host.models import model_name

pytestmark = pytest.mark.core

COMMIT = "a" * 40


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Hub:
    """A hub cache in which a model is partly there; downloading brings the rest."""

    def __init__(self, root: Path) -> None:
        self.cache = root
        self.snapshot = root / "models--org--m" / "snapshots" / COMMIT
        write(root / "models--org--m" / "refs" / "main", COMMIT)
        write(self.snapshot / "config.json", "{}")
        self.downloads = 0

    def download_model(self, model_config: Any) -> None:
        self.downloads += 1
        index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
        write(self.snapshot / "model.safetensors.index.json", json.dumps(index))
        for shard in index["weight_map"].values():
            write(self.snapshot / shard)

    def ensure(self) -> Path:
        model = SimpleNamespace(model="org/m", revision=None)
        return checkpoint.ensure_downloaded(self, model, SimpleNamespace(download_dir=str(self.cache)))


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


def test_a_model_whose_config_alone_is_in_the_hub_cache_is_downloaded(hub: Hub) -> None:
    assert hub.ensure() == hub.snapshot
    assert hub.downloads == 1
    assert len(checkpoint.identity(hub.snapshot)) == 3


def test_a_model_of_which_a_shard_is_missing_is_downloaded(hub: Hub) -> None:
    hub.download_model(None)
    (hub.snapshot / "2.safetensors").unlink()
    hub.ensure()
    assert hub.downloads == 2
    hub.ensure()
    assert hub.downloads == 2


def test_a_link_into_nothing_is_no_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").symlink_to("/nonexistent")
    assert list(checkpoint.identity(tmp_path)) == ["model.safetensors"]


def test_a_directory_without_weights_has_no_identity(tmp_path: Path) -> None:
    write(tmp_path / "config.json")
    with pytest.raises(NotShareableError, match="no weight files"):
        checkpoint.identity(tmp_path)


def test_a_file_edited_in_place_is_another_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "before")
    before = checkpoint.identity(tmp_path)
    path.write_text("after!")
    assert checkpoint.identity(tmp_path) != before


def test_what_was_decided_on_is_read_though_the_branch_has_moved(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.download_model(None)
    decided = hub.ensure()
    other = write(hub.snapshot.parent / ("b" * 40) / "model.safetensors").parent
    write(hub.cache / "models--org--m" / "refs" / "main", "b" * 40)
    model = SimpleNamespace(model="org/m", revision=None)
    source = DefaultModelLoader(LoadConfig(load_format="safetensors", download_dir=str(hub.cache)))

    def directory() -> str:
        return source._prepare_weights(model.model, None, model.revision, False, None)[0]

    with checkpoint.pinned(model, decided):
        assert directory() == str(decided)
    assert model.revision is None
    assert directory() == str(other)


def test_a_local_directory_is_not_pinned(tmp_path: Path) -> None:
    model = SimpleNamespace(model=str(tmp_path / "snapshots" / "m"), revision="v1")
    write(tmp_path / "snapshots" / "m" / "config.json")
    with checkpoint.pinned(model, tmp_path / "snapshots" / "m"):
        assert model.revision == "v1"


def test_a_model_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m" / "config.json")
    (tmp_path / "alias").symlink_to("m")
    monkeypatch.chdir(tmp_path)
    for written in ("m", "m/", "./m", "alias", str(tmp_path / "m")):
        assert model_name(written) == str(tmp_path / "m")
    assert model_name("org/model") == "org/model"
    assert model_name(f"/x/hub/models--org--a--b/snapshots/{COMMIT}") == "org/a--b"
    assert model_name("") == ""
