"""Real engines of a plugin whose loading changes what an engine that attaches would not see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.place import Place
from tests.vllm.conftest import StartEngine, entries

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SOURCES = {
    "setting_model/__init__.py": """
def register():
    from vllm import ModelRegistry
    for name in ("Variable", "Imported", "Nothing"):
        ModelRegistry.register_model(f"{name}ForCausalLM", f"setting_model.model:{name}ForCausalLM")
""",
    "setting_model/state.py": "SCALES = []\n",
    "setting_model/model.py": """
import os
from vllm.model_executor.models.llama import LlamaForCausalLM

class VariableForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights):
        os.environ["SCALE_OF_THIS_MODEL"] = "2"
        return super().load_weights(weights)

class ImportedForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights):
        from setting_model import state
        state.SCALES.append(2.0)
        return super().load_weights(weights)

class NothingForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights):
        from setting_model import state
        os.environ["SCALE_OF_THIS_MODEL"] = "2"
        del os.environ["SCALE_OF_THIS_MODEL"]
        return super().load_weights(weights)
""",
    "setting_model-1.0.dist-info/entry_points.txt": "[vllm.general_plugins]\nsetting = setting_model:register\n",
    "setting_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: setting-model\nVersion: 1.0\n",
}


def test_each_is_named_and_not_shared(
    start_engine: StartEngine, place: Place, tiny_llama: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "plugin"
    for name, text in SOURCES.items():
        (plugin / name).parent.mkdir(parents=True, exist_ok=True)
        (plugin / name).write_text(text)
    engines = {}
    for kind in ("Variable", "Imported", "Nothing"):
        model = Path(shutil.copytree(tiny_llama, tmp_path / kind))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": [f"{kind}ForCausalLM"]}))
        engines[kind] = start_engine(
            environment={"PYTHONPATH": str(plugin)},
            model=model,
            load_format="companion",
            skip_tokenizer_init=True,
            prompts=[[3, 5, 7]],
        )
    tokens = [engine.result()["tokens"] for engine in engines.values()]
    assert tokens == [tokens[0]] * 3
    assert (
        "loading set the variable SCALE_OF_THIS_MODEL, which all of this process sees" in engines["Variable"].output()
    )
    assert (
        "loading changed setting_model.state.SCALES, which all models of this code share"
        in engines["Imported"].output()
    )
    assert [entry.key.model for entry in entries(place)] == [str(tmp_path / "Nothing")]
