"""A model that is built without its weights, by vLLM's own code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.configs import config
from vllm_companion_plugin.engine.vllm import building
from vllm_companion_plugin.tree.building import DEFERRED_BYTES, WithoutWeights

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]


def test_what_a_model_imports_while_it_is_built_has_its_constants(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n's language model has one, and is imported by what contains it."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    (tmp_path / "imported_late.py").write_text("import torch\nEPS = torch.tensor(1.0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = LlamaForCausalLM.__init__

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        inner(self, vllm_config=vllm_config, prefix=prefix)
        importlib.import_module("imported_late")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    made = config(tiny)
    try:
        built = WithoutWeights(torch.device("cpu"))
        with building.model_without_weights(made, made.model_config, "", built) as model:
            assert all(parameter.is_meta for parameter in model.parameters() if parameter.nbytes >= DEFERRED_BYTES)
            assert not sys.modules["imported_late"].EPS.is_meta
    finally:
        sys.modules.pop("imported_late", None)
