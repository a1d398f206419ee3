"""An engine that differs from what is held does not stay alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.place import Place
from tests.vllm.conftest import StartEngine, entries

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PLUGIN = """
import os
import torch
from vllm.model_executor.models.llama import LlamaForCausalLM

class KindForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.kind = getattr(torch, os.environ["_".join(("TEST", "KIND"))])
"""
REGISTER = """
def register():
    from vllm import ModelRegistry
    ModelRegistry.register_model("KindForCausalLM", "kind_model.model:KindForCausalLM")
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plugin whose model has a dtype that a variable of its own decides, which its code does not name."""
    folder = tmp_path / "plugin"
    for name, text in {
        "kind_model/model.py": PLUGIN,
        "kind_model/__init__.py": REGISTER,
        "kind_model-1.0.dist-info/entry_points.txt": "[vllm.general_plugins]\nkind_model = kind_model:register\n",
        "kind_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kind-model\nVersion: 1.0\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


LIMITED = """
from vllm.model_executor.models.llama import LlamaForCausalLM

class KindForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.kept = vllm_config
        self.most = vllm_config.scheduler_config.max_num_seqs
        self.share = 1 + vllm_config.scheduler_config.max_num_batched_tokens // 512
        self.scales = []

    def load_weights(self, weights):
        loaded = super().load_weights(weights)
        self.model.norm.weight.data.mul_(self.share + self.kept.model_config.seed)
        self.scales.append(self.most)
        return loaded

    def compute_logits(self, hidden, *args):
        logits = super().compute_logits(hidden, *args)
        return None if logits is None else logits.roll(self.scales[0], -1)
"""


def test_what_loading_makes_of_a_limit(start_engine: StartEngine, place: Place, tiny_llama: Path, plugin: Path) -> None:
    """An engine with another limit is a variant, and answers as if it had loaded alone."""
    (plugin / "kind_model/model.py").write_text(LIMITED)
    model = Path(shutil.copytree(tiny_llama, plugin / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["KindForCausalLM"]}))
    options = {"model": model, "skip_tokenizer_init": True, "prompts": [[3, 5, 7]]}
    environment = {"PYTHONPATH": str(plugin)}
    small = {"seed": 0, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    wanted = {
        "max_num_seqs=8": "Published",
        "seed=3": "Published",
        "max_num_seqs=9": "Published",
        "max_num_batched_tokens=256": "Attached to",
        "max_num_batched_tokens=512": "Published",
        "max_num_batched_tokens=768": "Attached to",
        "seed=3 ": "Attached to",
    }
    for change, said in wanted.items():
        name, _, value = change.partition("=")
        limits = small | {name: int(value)}
        tokens = []
        for load_format in ("auto", "companion"):
            engine = start_engine(environment=environment, load_format=load_format, **options, **limits)
            tokens.append(engine.result()["tokens"])
            assert load_format == "auto" or said in engine.output()
            engine.stop()
        assert tokens[0] == tokens[1]
    assert sorted(entry.key.variant for entry in entries(place)) == [
        "",
        "flag model.seed is 3",
        "flag scheduler.max_num_seqs is 9",
        "share is 2",
    ]


def test_variant_is_loaded_once(start_engine: StartEngine, place: Place, tiny_llama: Path, plugin: Path) -> None:
    """The first engine of another kind publishes a variant, the next one attaches to it, and the entry says why."""
    model = Path(shutil.copytree(tiny_llama, plugin / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["KindForCausalLM"]}))
    tokens = []
    for kind, said in (
        ("float32", "Published"),
        ("int8", "Published"),
        ("int8", "Attached to"),
        ("float32", "Attached"),
    ):
        environment = {"PYTHONPATH": str(plugin), "TEST_KIND": kind}
        engine = start_engine(
            environment=environment, model=model, load_format="companion", skip_tokenizer_init=True, prompts=[[3, 5, 7]]
        )
        tokens.append(engine.result()["tokens"])
        assert said in engine.output()
        engine.stop()
    assert tokens[1:] == tokens[:-1]
    assert sorted(entry.key.variant for entry in entries(place)) == ["", "kind is torch.int8"]


HIDDEN = """
import importlib
import os
from vllm.model_executor.models.llama import LlamaForCausalLM

class KindForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights):
        loaded = super().load_weights(weights)
        scale = importlib.import_module("_".join(("kind", "scale"))).SCALE
        self.model.norm.weight.data.mul_(scale * len(os.listdir(os.path.dirname(__file__) + "/../extra")))
        return loaded
"""


def test_code_and_folders_that_no_key_names_are_compared(
    start_engine: StartEngine, place: Place, tiny_llama: Path, plugin: Path
) -> None:
    """A module whose name is computed, and a folder that is listed: another engine's may differ."""
    model = Path(shutil.copytree(tiny_llama, plugin / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["KindForCausalLM"]}))
    (plugin / "kind_model" / "model.py").write_text(HIDDEN)
    scale, extra = plugin / "kind_scale.py", plugin / "extra"
    extra.mkdir()
    (extra / "a.bin").touch()
    for text, names, said in (
        ("1.0", 1, "Published"),
        ("2.0", 1, "Published"),
        ("2.0", 2, "Published"),
        ("1.0", 1, "Attached"),
    ):
        scale.write_text(f"SCALE = {text}\n")
        for number in range(names):
            (extra / f"{number}.txt").touch()
        for surplus in [path for path in extra.glob("*.txt") if int(path.stem) >= names]:
            surplus.unlink()
        engine = start_engine(
            environment={"PYTHONPATH": str(plugin)},
            model=model,
            load_format="companion",
            skip_tokenizer_init=True,
            prompts=[[3, 5, 7]],
        )
        engine.result()
        assert said in engine.output()
        engine.stop()
    variants = sorted(entry.key.variant.partition(" is ")[0] for entry in entries(place))
    assert variants == ["", f"file {extra}/", "file package:kind_scale.py"]
