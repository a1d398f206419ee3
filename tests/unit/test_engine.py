"""Decisions of the engine's side that need no engine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_companion_plugin.engine import checkpoint, compat, session
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.settings import resolve


def test_what_changed_on_disk_while_it_was_loaded_is_not_published(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_text("before")
    nobody: Any = None
    load = session.Load(nobody, nobody, nobody, nobody, nobody, tmp_path, checkpoint.identity(tmp_path))
    load.check_unchanged()
    weights.write_text("after!")
    with pytest.raises(NotShareableError, match=r"model.safetensors of .* changed while it was loaded"):
        load.check_unchanged()


@pytest.mark.parametrize("moe_layers", [True, False])
def test_what_an_engine_has_registered_comes_back(moe_layers: bool) -> None:
    """Not every vLLM keeps a list of MoE layers."""
    compilation = SimpleNamespace(static_forward_context={"a": 1})
    if moe_layers:
        compilation.static_all_moe_layers = ["a"]
    held = compilation.static_forward_context
    registered = compat._Registered(SimpleNamespace(compilation_config=compilation))
    registered.clear()
    assert held == {}
    held["b"] = 2
    registered.restore()
    assert compilation.static_forward_context is held
    assert held == {"a": 1}
    assert getattr(compilation, "static_all_moe_layers", ["a"]) == ["a"]


@pytest.mark.parametrize(("switch", "why"), [("enable_eplb", "EPLB"), ("enable_elastic_ep", "elastic")])
def test_an_engine_that_writes_to_its_weights_copies_them_by_itself(
    switch: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.companion")
    settings = resolve()
    plain = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=False, enable_elastic_ep=False))
    assert session.settings_for(plain, settings) is settings
    setattr(plain.parallel_config, switch, True)
    assert session.settings_for(plain, settings) == replace(settings, share="copy")
    assert session.external_bytes(plain, settings) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert why in said[0]
