"""Which adapters fit a model that vLLM has built, as vLLM's own manager of adapters sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support import lora
from tests.support.checkpoints import models
from tests.support.configs import config
from vllm_companion_plugin.client import peft
from vllm_companion_plugin.core.adapters import Bound
from vllm_companion_plugin.engine.vllm.adapters import loading
from vllm_companion_plugin.engine.vllm.adapters.fitting import check_fits
from vllm_companion_plugin.errors import BadRequestError

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]

BOUND = Bound("mine", 1, "0" * 16)
NUMBER = 7
TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
SHARED = "model.layers.0.mlp.experts"


class Worker:
    """vLLM's manager of a worker's adapters, and the model that it has changed for them."""

    def __init__(self, path: Path, change: Callable[[Any], None] | None = None, **options: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
        from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
        from vllm.utils.torch_utils import set_default_torch_dtype

        self.made = config(path, load_format="dummy", enable_lora=True, max_lora_rank=8, **options)
        with set_current_vllm_config(self.made), set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=self.made, model_config=self.made.model_config)
            process_weights_after_loading(model, self.made.model_config, torch.device("cpu"))
            if change is not None:
                change(model)
            self.manager = LRUCacheWorkerLoRAManager(self.made, torch.device("cpu"), model.embedding_modules)
            self.manager.create_lora_manager(model, self.made)

    def read(self, adapter: peft.Adapter, path: Path) -> Any:
        """As vLLM reads an adapter from a directory."""
        from vllm.config import set_current_vllm_config

        (path / "adapter_config.json").write_text(json.dumps(adapter.config))
        tensors = {name: each.contiguous() for name, each in adapter.tensors.items()}
        save_file(tensors, path / "adapter_model.safetensors")
        with set_current_vllm_config(self.made):
            return self.manager._load_adapter(SimpleNamespace(lora_path=str(path), lora_int_id=NUMBER, **ONE_BY_ONE))

    def check(self, adapter: peft.Adapter, path: Path) -> Any:
        read = self.read(adapter, path)
        check_fits(self.manager._adapter_manager, read, BOUND)
        return read


ONE_BY_ONE = {"is_3d_lora_weight": False}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / family
        models.make(family, path, tiny=True)
        return path

    return make


@pytest.fixture(scope="module")
def llama(path_of: Callable[[str], Path]) -> Worker:
    return Worker(path_of("llama"))


def adapter_of(path: Path, **options: Any) -> peft.Adapter:
    """Of the model in a directory, as PEFT makes one."""
    kind = "AutoModelForImageTextToText" if "vl" in path.name else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(transformers.AutoConfig.from_pretrained(path))
    return peft.canonical(lora.adapted(model, 0, **{"target_modules": TEXT} | options))


def renamed(adapter: peft.Adapter, before: str, after: str) -> peft.Adapter:
    return peft.Adapter({name.replace(before, after): each for name, each in adapter.tensors.items()}, adapter.config)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": [*TEXT, "embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": [*TEXT, "embed_tokens", "lm_head"]}),
        ("phi3", {}),
        ("gemma3", {}),
        ("hybrid", {"target_modules": "all-linear"}),
        ("deepseek-v3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
        ("qwen3-vl", {"target_modules": r".*language_model.*_proj"}),
    ],
)
def test_what_peft_makes(family: str, options: Any, path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """All of it has a place, whatever vLLM calls it, and ends there."""
    path = path_of(family)
    flags = models.CASES[family].flags | models.CASES[family].tiny_flags
    worker = Worker(path, **{name: flag for name, flag in flags.items() if name != "skip_tokenizer_init"})
    adapter = adapter_of(path, **options)
    read = worker.check(adapter, tmp_path)
    assert 2 * len(read.loras) == len(adapter.tensors)
    manager = worker.manager._adapter_manager
    manager.add_adapter(read)
    manager.activate_adapter(NUMBER)
    found = sum(amount(b @ a) for module in manager.modules.values() for a, b in slots_of(module))
    pairs = [(a, adapter.tensors[name.replace("_A", "_B")]) for name, a in adapter.tensors.items() if "_A" in name]
    assert found == pytest.approx(sum(amount(b @ a) for a, b in pairs), rel=1e-4)


def test_what_attention_has_made_weights_of(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """MLA calls that layer only where prompts are long; what was never trained changes nothing."""
    path = path_of("deepseek-v3")
    flags = models.CASES["deepseek-v3"].flags | models.CASES["deepseek-v3"].tiny_flags
    worker = Worker(path, **{name: flag for name, flag in flags.items() if name != "skip_tokenizer_init"})
    adapter = adapter_of(path, target_modules=["q_b_proj", "kv_b_proj"])
    with pytest.raises(BadRequestError, match=r"attention of this engine's model computes .*kv_b_proj"):
        worker.check(adapter, tmp_path)
    untrained = {name: each * ("kv_b_proj" not in name) for name, each in adapter.tensors.items()}
    worker.check(peft.Adapter(untrained, adapter.config), tmp_path)


def amount(change: torch.Tensor) -> float:
    return float(change.abs().sum())


def slots_of(module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each part of a module, as vLLM computes with them."""
    sides = [module.lora_a_stacked, module.lora_b_stacked]
    if isinstance(sides[0], list):  # of experts
        return
    for a, b in zip(*(side if isinstance(side, tuple) else (side,) for side in sides), strict=True):
        yield a[0].T if a.ndim == 3 else a[0, 0], b[0, 0]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("layers.1.", "layers.99.", "7 of its 14 modules .*layers.99.mlp.down_proj"),
        ("layers.1.self_attn", "layers.1.attn", "4 of its 14"),
        ("model.model.", "model.", "14 of its 14 modules .*: layers.0"),
        (
            "layers.1.mlp.up_proj",
            "layers.1.self_attn.up_proj",
            "1 of its 14 modules .*: model.layers.1.self_attn.up_proj",
        ),
    ],
)
def test_modules_that_are_not_there(
    llama: Worker, path_of: Callable[[str], Path], tmp_path: Path, before: str, after: str, text: str
) -> None:
    """vLLM would leave them out without a word, so it is no adapter of this model."""
    adapter = adapter_of(path_of("llama"))
    llama.check(adapter, tmp_path)
    with pytest.raises(BadRequestError, match=f"Adapter mine, generation 1: {text}"):
        llama.check(renamed(adapter, before, after), tmp_path)


def test_modules_that_were_never_trained(llama: Worker, path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Left out they change nothing, as the pooler that PEFT finds in a BERT which takes means."""
    adapter = renamed(adapter_of(path_of("llama")), "layers.1.", "layers.99.")
    for name, tensor in adapter.tensors.items():
        if ".99." in name and "lora_B" in name:
            adapter.tensors[name] = torch.zeros_like(tensor)
    llama.check(adapter, tmp_path)


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_other_widths(llama: Worker, path_of: Callable[[str], Path], tmp_path: Path, module: str, side: str) -> None:
    """vLLM would copy them into a part of their place, or raise after it has copied others."""
    adapter = adapter_of(path_of("llama"), target_modules=["v_proj", module])
    mark = "lora_embedding_" if module == "embed_tokens" else "lora_"
    name = next(name for name in adapter.tensors if f"{module}.{mark}{side}" in name)
    right = adapter.tensors[name]
    narrow, axis = 8, 1 if side == "A" else 0
    for other in (right.narrow(axis, 0, narrow), torch.cat([right, right], axis)):
        adapter.tensors[name] = other
        if (module, side) == ("embed_tokens", "A"):  # the one width that vLLM compares
            with pytest.raises(RuntimeError, match="vocabulary size"):
                llama.check(adapter, tmp_path)
            continue
        with pytest.raises(BadRequestError, match=f"does not fit .*: .*{module} has .* inputs and .* outputs"):
            llama.check(adapter, tmp_path)


def experts(count: int, hidden: int, width: int, rank: int = 2) -> peft.Adapter:
    """Of each expert by itself."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(count):
        for name in ("gate_proj", "up_proj", "down_proj"):
            inner, outer = (width, hidden) if name == "down_proj" else (hidden, width)
            module = f"base_model.model.{SHARED}.{number}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inner)
            tensors[f"{module}.lora_B.weight"] = torch.randn(outer, rank)
    return peft.canonical(tensors, {"r": rank, "lora_alpha": rank})


def test_experts(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Each of them, and in the order in which vLLM has an expert's projections."""
    path = path_of("qwen3-moe")
    worker, its = Worker(path), json.loads((path / "config.json").read_text())
    count, hidden, width = its["num_experts"], its["hidden_size"], its["moe_intermediate_size"]
    worker.check(experts(count, hidden, width), tmp_path)
    with pytest.raises(BadRequestError, match=rf"{SHARED}\.0\.gate_proj has {hidden} inputs and {width // 2} outputs"):
        worker.check(experts(count, hidden, width // 2), tmp_path)
    part = experts(count, hidden, width)
    for name in [name for name in part.tensors if "experts.3.down_proj" in name]:
        del part.tensors[name]
    with pytest.raises(BadRequestError, match=rf"{SHARED}\.3\.down_proj is missing of {SHARED}, and vLLM adapts all"):
        worker.check(part, tmp_path)
    with pytest.raises(BadRequestError, match=r"layers\.99\.mlp\.experts\.0\.gate_proj"):
        worker.check(renamed(experts(count, hidden, width), "layers.0", "layers.99"), tmp_path)


def test_experts_in_one_tensor(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM would give each expert the ranks of two."""
    path = path_of("qwen3-moe")

    def as_one(model: Any) -> None:
        model.is_3d_moe_weight = True

    worker, its = Worker(path, as_one), json.loads((path / "config.json").read_text())
    count, hidden, width = its["num_experts"], its["hidden_size"], its["moe_intermediate_size"]
    name = f"base_model.model.{SHARED}"

    def fused(count: int) -> peft.Adapter:
        tensors = {
            f"{name}.base_layer.lora_A.weight": torch.randn(2 * count, hidden),
            f"{name}.base_layer.lora_B.weight": torch.randn(2 * width, 2 * count),
            f"{name}.lora_A.weight": torch.randn(2 * count, width),
            f"{name}.lora_B.weight": torch.randn(hidden, 2 * count),
        }
        return peft.canonical(tensors, {"r": 2, "lora_alpha": 2})

    worker.check(fused(count), tmp_path)
    with pytest.raises(BadRequestError, match=rf"{SHARED} has {4 * count} ranks, and the model {count} experts with 2"):
        worker.check(fused(2 * count), tmp_path)


def test_values_that_the_engines_type_does_not_have(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM casts what was published; what becomes infinite would reach requests of other adapters as NaN."""
    worker = Worker(path_of("llama"), lora_dtype="float16")
    adapter = adapter_of(path_of("llama"))
    worker.check(adapter, tmp_path)
    name = next(name for name in adapter.tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    adapter.tensors[name][0, 0] = 1e5
    with pytest.raises(BadRequestError, match=r"1\.self_attn\.q_proj has values that are infinite in torch.float16"):
        worker.check(adapter, tmp_path)


def test_layers_of_another_rank(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In a pipeline they are there, and what no rank has is not."""
    from vllm.model_executor.models.utils import PPMissingLayer

    def halve(model: Any) -> None:
        model.model.layers[0] = PPMissingLayer()
        model.model.embed_tokens = PPMissingLayer()

    worker = Worker(path_of("llama"), halve)
    adapter = adapter_of(path_of("llama"), target_modules=[*TEXT, "lm_head"])
    worker.check(adapter, tmp_path)
    with pytest.raises(BadRequestError, match=r"7 of its 15 modules .*: model.layers.9.mlp"):
        worker.check(renamed(adapter, "layers.1.", "layers.9."), tmp_path)


def test_what_the_engine_was_told_to_leave_out(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """By vLLM's `--lora-target-modules`, and nothing that the model does not have."""
    worker = Worker(path_of("llama"), lora_target_modules=["o_proj", "up_proj"])
    adapter = adapter_of(path_of("llama"))
    worker.check(adapter, tmp_path)
    with pytest.raises(BadRequestError, match=r"7 of its 14 modules .*: model.layers.9.mlp.down_proj"):
        worker.check(renamed(adapter, "layers.1.", "layers.9."), tmp_path)


def test_other_parts_than_the_language_model(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM adapts them if it is told to; otherwise it would answer about images with a part of the adapter."""
    path = path_of("qwen3-vl")
    worker = Worker(path, limit_mm_per_prompt={"image": 1, "video": 0}, max_model_len=1024, max_num_batched_tokens=2048)
    with pytest.raises(BadRequestError, match=r"visual\.blocks\.0.*--enable-tower-connector-lora"):
        worker.check(adapter_of(path, target_modules="all-linear"), tmp_path)


def test_what_was_added_in_part_is_removed(llama: Worker, path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM counts it as loaded, and would compute the next request with it."""
    adapter = adapter_of(path_of("llama"))
    name = next(name for name in adapter.tensors if "down_proj.lora_B" in name)
    adapter.tensors[name] = torch.cat([adapter.tensors[name]] * 2)
    request = SimpleNamespace(lora_path=BOUND.path, lora_int_id=NUMBER, load_inplace=False, **ONE_BY_ONE)
    manager = llama.manager
    add = loading._adding(type(manager).add_adapter)
    manager._load_adapter = lambda _: llama_read(adapter)  # type: ignore[method-assign]

    def llama_read(adapter: peft.Adapter) -> Any:
        del manager._load_adapter
        try:
            return llama.read(adapter, tmp_path)
        finally:
            manager._load_adapter = lambda _: llama_read(adapter)  # type: ignore[method-assign]

    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="must match"):
                add(manager, request)
            assert NUMBER not in manager.list_adapters()
    finally:
        del manager._load_adapter


def test_experts_that_share_tensors(path_of: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM's own form of adapters: one tensor for each projection, and one A for all experts of it."""
    flags = models.CASES["qwen3-moe"].flags | models.CASES["qwen3-moe"].tiny_flags
    flags = {name: flag for name, flag in flags.items() if name != "skip_tokenizer_init"}
    worker = Worker(path_of("qwen3-moe"), enable_moe_shared_loras=True, **flags)
    experts = next(each for name, each in worker.manager._adapter_manager.modules.items() if name == SHARED)
    count, width = experts.moe_config.num_experts, experts.moe_config.hidden_dim
    tensors = {
        f"base_model.model.{SHARED}.{part}.lora_{side}.weight": torch.ones(
            (1, 4, width) if side == "A" else (count, width, 4)
        )
        for part in ("w1", "w2", "w3")
        for side in "AB"
    }
    adapter = peft.Adapter(tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["experts"]})
    assert len(worker.check(adapter, tmp_path).loras) == 3
    other = renamed(adapter, "layers.0", "layers.99")
    with pytest.raises(BadRequestError, match=r"3 of its 3 modules have no place"):
        worker.check(other, tmp_path)
