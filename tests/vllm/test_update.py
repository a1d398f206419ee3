"""A trainer gives two real engines new weights; each switches when it is told, and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import models
from tests.support.place import Place
from tests.vllm.conftest import StartEngine, entries
from vllm_companion_plugin import CompanionClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

OPTIONS = {"prompts": [[1, 2, 3, 4], [9, 8, 7]], "skip_tokenizer_init": True}


def trained(model: Path, directory: Path, seed: int) -> Path:
    """A checkpoint of other weights for the same model."""
    random = torch.Generator().manual_seed(seed)
    path = directory / f"trained-{seed}"
    shutil.copytree(model, path)
    weights = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=random)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_each_engine_has_the_tokens_of_the_weights_that_it_was_told_to_take(
    place: Place, start_engine: StartEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    """They are those of an engine that loads these weights by itself."""
    model, checkpoints = str(tiny_llama), [trained(tiny_llama, tmp_path, seed) for seed in (1, 2)]
    one, two = [], []
    for path, found in zip(checkpoints, (one, two), strict=True):
        found += start_engine(model=path, load_format="auto", **OPTIONS).result()["tokens"]

    def train(number: int) -> None:
        trainer = place.run("-m", "tests.vllm.trainer_child", model, str(checkpoints[number - 1]), f"step-{number}")
        said, log = trainer.communicate(timeout=300)
        assert trainer.returncode == 0, log[-3000:]
        layers = 3
        assert int(said) == 3 + 6 * layers

    first, second = (start_engine(model=model, load_format="companion", **OPTIONS) for _ in range(2))
    loaded = first.result()["tokens"]
    assert second.result()["tokens"] == loaded
    assert len({str(tokens) for tokens in (loaded, one, two)}) == 3

    train(1)
    assert first.tokens_now() == second.tokens_now() == loaded
    updated = first.update()
    assert (updated["updated"], updated["tokens"]) == ([{f"{model} (target)": 2}], one)
    assert second.tokens_now() == loaded
    assert first.update({model: 1})["tokens"] == loaded
    assert first.update()["tokens"] == one

    train(2)
    assert (first.tokens_now(), second.tokens_now()) == (one, loaded)
    assert second.update()["tokens"] == two
    assert first.tokens_now() == one
    assert first.update()["tokens"] == two
    assert second.update({model: 2})["tokens"] == one
    advanced = second.advance({model: 3})
    assert advanced["tokens"] == two
    assert "has step-2 (generation 3), after a pause of" in advanced["advanced"]
    assert second.advance({model: 2})["tokens"] == one
    (entry,) = entries(place)
    assert (entry.generation, entry.version) == (3, "step-2")
    assert [(each.number, each.version) for each in entry.generations] == [(2, "step-1"), (3, "step-2")]

    alone = start_engine(model=model, load_format="companion", **OPTIONS)
    assert alone.result()["tokens"] == loaded
    assert "is step-2, which a trainer has written, and not the checkpoint" in alone.output()
    follows = start_engine(
        model=model, load_format="companion", **OPTIONS, model_loader_extra_config={"follow_updates": True}
    )
    assert follows.result()["tokens"] == two


def test_an_engine_that_has_processed_its_experts_keeps_what_they_were_made_of(
    place: Place, start_engine: StartEngine, tmp_path: Path
) -> None:
    """On CPU kernels use copies of experts: with new weights around them it would answer for neither model."""
    path = tmp_path / "moe"
    models.make("qwen3-moe", path, tiny=True)
    publisher, attached = (start_engine(model=str(path), load_format="companion", **OPTIONS) for _ in range(2))
    loaded = publisher.result()["tokens"]
    assert attached.result()["tokens"] == loaded
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    with CompanionClient("cpu", runtime_dir=place.settings.runtime_dir).update(str(path), version="step-1") as new:
        new.load({"model.embed_tokens.weight": -embedding})
    for engine in (publisher, attached):
        answer = engine.update()
        assert "cannot advance to generation 2: its kernels use" in answer["refused"]
        assert answer["tokens"] == loaded
