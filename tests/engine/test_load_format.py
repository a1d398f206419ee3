"""vLLM's configuration keeps the load format, or the user hears that it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.configs import config
from vllm_companion_plugin.engine.register import register
from vllm_companion_plugin.engine.vllm import naming
from vllm_companion_plugin.errors import NotShareableError

pytestmark = pytest.mark.core


@pytest.fixture
def replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.27 does for bitsandbytes, which later versions do not know."""
    from vllm.engine.arg_utils import EngineArgs

    register()  # what it replaces is around vLLM's own
    make = EngineArgs.create_load_config
    monkeypatch.setattr(EngineArgs, "create_load_config", lambda self: replace(make(self), load_format="auto"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Not by a handler: vLLM sets its loggers up anew whenever it is imported first."""
    lines: list[str] = []
    monkeypatch.setattr(naming.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def load_format(tiny: Path, **options: Any) -> str:
    return str(config(tiny, **options).load_config.load_format)


def test_a_load_format_that_is_kept_is_not_talked_about(tiny: Path, said: list[str]) -> None:
    assert load_format(tiny) == "companion"
    assert not said


@pytest.mark.usefixtures("replacing")
def test_a_load_format_that_is_replaced_is(tiny: Path, said: list[str]) -> None:
    assert load_format(tiny, load_format="dummy") == "auto"
    assert not said
    assert load_format(tiny) == "auto"
    (line,) = said
    assert line.startswith(f"Weights of {tiny} are not shared: this version of vLLM loads such models with")


@pytest.mark.usefixtures("replacing")
def test_without_fallback_it_is_an_error(tiny: Path) -> None:
    with pytest.raises(NotShareableError, match="with --load-format auto, whatever is asked for"):
        load_format(tiny, model_loader_extra_config={"fallback": False})
