"""Which files of a checkpoint are in the key, and which only lie there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.checkpoints.copies import WEIGHTS
from tests.support.deciding import Engines
from tests.support.keys import key_of
from vllm_companion_plugin.engine.identity import checkpoint, code

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_link_is_what_it_points_to(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").symlink_to(tiny)
    files = tmp_path / "files"
    files.mkdir()
    for file in tiny.iterdir():
        (files / file.name).symlink_to(file)
    assert key_of(tmp_path / "directory").id == key_of(files).id == key_of(tiny).id


class TestFilesOfACheckpoint:
    """What the loader reads is the model; what else lies there is not."""

    def test_quantization_files_count(self, first: Path) -> None:
        """vLLM reads them beside config.json; the difference is told by name, and copies need no comparing."""
        plain = key_of(first)
        (first / "hf_quant_config.json").write_text("{}")
        assert "file.hf_quant_config.json" in {line.split(" is ")[0] for line in key_of(first).differences(plain)}

    @pytest.mark.parametrize(
        "name",
        ["checkpoint-100/optimizer.pt", "lora/adapter_model.safetensors", "logs/loss.npy", "optimizer.pt", "notes.txt"],
    )
    def test_what_is_below_or_beside_is_not_the_models(self, first: Path, name: str) -> None:
        """A training goes on, or an adapter is put where the model is."""
        plain = key_of(first)
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(b"x")
        assert key_of(first).id == plain.id

    def test_code_names_few_folders(self, tmp_path: Path) -> None:
        """Of all that may lie below a model, only what its own code mentions."""
        from vllm.model_executor.models import jina, llama, qwen3_moe

        for name in ("adapters", "checkpoint-100", "lora", "logs", "original", "onnx", "onnx/adapters", "1_Pooling"):
            (tmp_path / name).mkdir()
        assert code.folders(llama.LlamaForCausalLM, tmp_path) == []
        assert code.folders(qwen3_moe.Qwen3MoeForCausalLM, tmp_path) == []
        assert code.folders(jina.JinaEmbeddingsV5Model, tmp_path) == ["adapters"]

    def test_a_link_to_a_large_directory_is_not_followed(self, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (first / "data").symlink_to("/")
        monkeypatch.setattr(os, "walk", lambda *args, **kwargs: pytest.fail("it was"))
        checkpoint.identity(first)

    def test_weights_that_are_only_below_are_found(self, first: Path) -> None:
        (first / "inner").mkdir()
        (first / WEIGHTS).rename(first / "inner" / WEIGHTS)
        assert list(checkpoint.identity(first)) == [f"inner/{WEIGHTS}"]

    def test_modules_of_sentence_transformers_count(self, first: Path) -> None:
        """Linked or not; each of its files is told by its name."""
        paths = ("", "1_Pooling", "2_Dense", "/etc", "../first")
        listed = [{"path": path, "type": "sentence_transformers.models.Other"} for path in paths]
        (first / "modules.json").write_text(json.dumps(listed))
        elsewhere = first.parent / "elsewhere"
        elsewhere.mkdir()
        (first / "2_Dense").symlink_to(elsewhere)
        for name, content in (("config.json", "{}"), (WEIGHTS, "x")):
            (elsewhere / name).write_text(content)
        plain = key_of(first)
        assert {"modules.json", "2_Dense/config.json", f"2_Dense/{WEIGHTS}"} <= plain.files.keys()
        (elsewhere / "config.json").write_text('{"bias": 1}')
        (first / "modules.json").write_text(json.dumps(listed[:4]))
        changed = [line.split(" is ")[0] for line in key_of(first).differences(plain)]
        assert changed == ["file.2_Dense/config.json", "file.modules.json"]

    def test_folders_that_the_models_code_names_count(self, engines: Engines, first: Path) -> None:
        """jina v5 merges an adapter while it loads; what another model finds in such a folder is not its own."""
        adapter = first / "adapters" / "retrieval"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
        (adapter / "adapter_model.safetensors").write_bytes(b"x")
        assert not any(name.startswith("adapters") for name in engines.load(first).found.content)
        made = json.loads((first / "config.json").read_text())
        jina = made | {"architectures": ["JinaEmbeddingsV5Model"], "model_type": "qwen3", "head_dim": 32}
        (first / "config.json").write_text(json.dumps(jina))
        loaded = engines.load(first, runner="pooling")
        assert {
            "adapters/retrieval/adapter_config.json",
            f"adapters/retrieval/adapter_{WEIGHTS}",
        } <= loaded.found.content.keys()
        (adapter / "adapter_config.json").write_text('{"lora_alpha": 64}')
        other = engines.decide(first, runner="pooling")
        assert [line.split(" is ")[0] for line in other.key.differences(loaded.key)] == [
            "file.adapters/retrieval/adapter_config.json"
        ]
