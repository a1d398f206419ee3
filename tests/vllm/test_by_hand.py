"""Processed updates of models whose own code copies weights by hand: vLLM's reload loses what they copy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import models
from tests.support.place import Place
from tests.vllm.conftest import StartEngine
from tests.vllm.test_processed import checkpoint, held, tensors, trained, update
from vllm_companion_plugin import CompanionClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PLUGIN = {"PYTHONPATH": str(Path(__file__).parents[1] / "support" / "processing_plugin")}
"""Engines with it share processed weights."""
BESIDE = "Each update is loaded into a second model"
PROMPTS = [[1, 5, 9, 33], [7, 2, 101]]


@pytest.fixture
def client(
    place: Place, engine_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CompanionClient]:
    for name, value in (engine_environment | PLUGIN).items():
        monkeypatch.setenv(name, value)
    made = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir, update_chunk_mib=1)
    yield made
    made.close()


def write_model(path: Path, case: str, architecture: str) -> Path:
    models.make(case, path, tiny=True)
    if architecture:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return path


INT8 = {"quantization": "companion_test_int8"}


@pytest.mark.parametrize(
    ("case", "architecture", "options", "by_hand"),
    [
        pytest.param("gpt-oss", "", {}, "model.layers.0.attn.sinks", marks=pytest.mark.slow),
        ("llama", "ByHandForCausalLM", INT8, "model.norm.weight"),
        pytest.param("llama", "", INT8, "", marks=pytest.mark.slow),
    ],
    ids=["gpt-oss", "quantized", "ordinary"],
)
def test_an_update_has_the_bytes_of_a_fresh_load(
    case: str,
    architecture: str,
    options: dict[str, Any],
    by_hand: str,
    place: Place,
    start_engine: StartEngine,
    client: CompanionClient,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where it is quantized while it is loaded. Where vLLM's reload loses nothing, there is no second model."""
    model = write_model(tmp_path / "first", case, architecture)
    second = trained(model, tmp_path / "second", 1)
    options = options | {"skip_tokenizer_init": True, "load_format": "companion", "prompts": PROMPTS}
    engine, fresh = (start_engine(model=path, environment=PLUGIN, **options) for path in (model, second))
    before, after = engine.result()["tokens"], fresh.result()["tokens"]
    weights, loaded = checkpoint(second), tensors(place, model)
    update(client, model, {name: weight * 2 for name, weight in weights.items()}, mode="processed")
    update(client, model, weights, mode="processed")
    assert tensors(place, model) == tensors(place, second) != loaded
    said = capfd.readouterr().err
    assert (BESIDE in said, by_hand in said) == (bool(by_hand), True)
    assert held(place, model)[-1] == (3, "step")
    assert engine.tokens_now() == before
    assert engine.update()["tokens"] == after != before
