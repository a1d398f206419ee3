"""vLLM's configuration keeps the load format, or the user hears that it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from vllm_companion_plugin.errors import NotShareableError

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama", path, tiny=True)
    return str(path)


@pytest.fixture
def replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.27 does for bitsandbytes, which later versions do not know."""
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_load_config
    monkeypatch.setattr(EngineArgs, "create_load_config", lambda self: replace(make(self), load_format="auto"))


def load_format(model: str, **options: Any) -> str:
    from vllm.engine.arg_utils import EngineArgs

    flags = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32", "load_format": "companion"}
    found = EngineArgs(model=model, **(flags | options)).create_engine_config().load_config.load_format
    return str(found)


def test_a_load_format_that_is_kept_is_not_talked_about(model: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_format(model) == "companion"
    assert "not shared" not in caplog.text


@pytest.mark.usefixtures("replacing")
def test_a_load_format_that_is_replaced_is(model: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_format(model, load_format="dummy") == "auto"
    assert "not shared" not in caplog.text
    assert load_format(model) == "auto"
    assert f"Weights of {model} are not shared: this version of vLLM loads such models with" in caplog.text


@pytest.mark.usefixtures("replacing")
def test_without_fallback_it_is_an_error(model: str) -> None:
    with pytest.raises(NotShareableError, match="with --load-format auto, whatever is asked for"):
        load_format(model, model_loader_extra_config={"fallback": False})
