"""A Transformers model on the memory of an entry: equal to `from_pretrained`, and without a second copy."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import Unsupported
from transformers import modeling_utils

from tests.support.checkpoints import models
from tests.support.left import none_left_open
from tests.support.loading import packed_by_vllm
from tests.support.place import KEY, Place, until
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.adapter_leases import AdapterLeases
from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.client.peft import canonical
from vllm_companion_plugin.core.adapters import Asked
from vllm_companion_plugin.core.layout import layout_digest
from vllm_companion_plugin.core.placements import Source
from vllm_companion_plugin.errors import NotShareableError, NotSharedError, SharedWeightsError
from vllm_companion_plugin.host.files import file_identity
from vllm_companion_plugin.training import Sharing, from_companion, sharing_of
from vllm_companion_plugin.training.blueprint import _nothing_reserved
from vllm_companion_plugin.wire.adapter_file import read_header
from vllm_companion_plugin.wire.manifest import manifest_to_bytes, sources_from_bytes, sources_to_bytes

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]

FAMILIES = ("llama", "llama-tied", "qwen3", "phi3", "gemma3", "qwen3-moe", "mixtral")
TOKENS = torch.arange(3, 40).view(1, -1)
MADE: list[weakref.ref[Sharing]] = []
"""What tests have of companions, which end with them."""


@contextlib.contextmanager
def held(place: Place, path: Path, lost: str = "", dtype: str = "float32") -> Iterator[None]:
    """While open, a companion holds the model at `path` as vLLM has loaded it.

    Args:
        lost: a tensor of the checkpoint of which nothing says where it is.
    """
    manifest, arena = packed_by_vllm(path, dtype)
    if lost:
        sources = dict(sources_from_bytes(manifest.sources))
        sources[lost] = replace(sources[lost], copies=())
        manifest = replace(manifest, sources=sources_to_bytes(sources))
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        files = {file.name: file_identity(file) for file in path.glob("*.safetensors")}
        key = replace(KEY, model=str(path), source=str(path), files=files)
        outcome = connection.attach(key, may_load=True, client_name="loader").wait(30)
        assert isinstance(outcome, Granted)
        layout = layout_digest(manifest, arena.info.kind, arena.info.block_sizes)
        tensors = len(manifest.tensors)
        outcome.publication.publish(arena.info, arena.fds, manifest_to_bytes(manifest), tensors, layout=layout)
        arena.close()
        del arena
        gc.collect()
        try:
            yield
        finally:
            while MADE:
                if (sharing := MADE.pop()()) is not None:
                    sharing.close()


def on_companion(place: Place, path: Path, **options: Any) -> Any:
    model = from_companion(str(path), device="cpu", runtime_dir=place.settings.runtime_dir, **options)
    sharing = sharing_of(model)
    assert sharing is not None
    MADE.append(weakref.ref(sharing))
    return model


def of_files(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_from_pretrained_makes(family: str, place: Place, tmp_path: Path) -> None:
    """The same results to the last bit, every parameter in the entry's memory, and the entry's bytes mapped once."""
    models.make(family, tmp_path, tiny=True)
    with held(place, tmp_path):
        model, other = on_companion(place, tmp_path), of_files(tmp_path)
        assert torch.equal(logits(model), logits(other))
        sharing = sharing_of(model)
        assert sharing is not None
        assert sharing.copied == {}
        assert sharing.shared_bytes == sum(each.nbytes for each in other.parameters())
        start, end = mapped_arena(model)
        assert all(start <= each.data_ptr() < end for each in model.parameters())
        assert not any(each.requires_grad for each in model.parameters())
        assert {name: each.shape for name, each in model.named_parameters()} == {
            name: each.shape for name, each in other.named_parameters()
        }
        assert {name for name, _ in model.named_buffers()} == {name for name, _ in other.named_buffers()}


WHOLE = (
    *("dense", "qwen2", "gemma", "gemma2", "olmoe", "granite", "granitemoe", "stablelm", "gpt2", "gpt-j", "opt"),
    *("cohere", "cohere2", "glm4", "exaone4", "nemotron", "ernie4.5", "mistral", "qwen2-moe", "gemma3n", "gemma4"),
    *("qwen3-next", "qwen3-vl", "idefics3"),
)
WITH_COPIES = {
    "bloom": "query_key_value",  # which vLLM puts into another order
    "falcon": "query_key_value",
    "apertus": "act_fn.alpha",  # float32 in Transformers
    "falcon-h1": "A_log",  # of which vLLM keeps something else
    "mamba": "A_log",
    "nemotron-h": "A_log",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [*WHOLE, *WITH_COPIES])
def test_more_families(family: str, place: Place, tmp_path: Path) -> None:
    """Without a copy; or with copies of those parameters that vLLM keeps differently, and of no others."""
    models.make(family, tmp_path, tiny=True)
    auto = "AutoModelForImageTextToText" if family in ("qwen3-vl", "idefics3") else "AutoModelForCausalLM"
    auto_class = getattr(transformers, auto)
    with held(place, tmp_path):
        model = on_companion(place, tmp_path, auto_class=auto_class, copy=["*"] if family in WITH_COPIES else [])
        other = auto_class.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(logits(model), logits(other))
        theirs = other.state_dict()
        assert {name for name, each in model.state_dict().items() if not torch.equal(each, theirs[name])} == set()
        sharing = sharing_of(model)
        assert sharing is not None
        assert all(WITH_COPIES.get(family, "none") in name for name in sharing.copied)
        assert bool(sharing.copied) == (family in WITH_COPIES)


BIAS = "e_score_correction_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_of_a_checkpoint_are_as_from_pretrained_makes_them(
    place: Place, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The bias of DeepSeek's router is float32 in a checkpoint of bfloat16, in engines, and in Transformers."""
    models.make("deepseek-v3", tmp_path, tiny=True)
    file = tmp_path / "model.safetensors"
    weights = {name: each.float() if BIAS in name else each.to(dtype) for name, each in load_file(file).items()}
    weights |= {name: torch.linspace(-0.02, 0.02, len(each)) for name, each in weights.items() if BIAS in name}
    save_file(weights, file, {"format": "pt"})
    with held(place, tmp_path, dtype=str(dtype).removeprefix("torch.")):
        model, other = on_companion(place, tmp_path), of_files(tmp_path, dtype)
        mine, theirs = model.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        different = [n for n in mine if mine[n].dtype != theirs[n].dtype or not torch.equal(mine[n], theirs[n])]
        assert different == []
        assert any(BIAS in name for name in mine)


def test_a_buffer_that_has_no_place_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    models.make("deepseek-v3", tmp_path, tiny=True)
    lost = "model.layers.1.mlp.gate.e_score_correction_bias"
    with held(place, tmp_path, lost):
        with pytest.raises(NotShareableError, match=re.escape(lost)):
            on_companion(place, tmp_path)
        model = on_companion(place, tmp_path, copy=[lost])
        assert torch.equal(model.state_dict()[lost], of_files(tmp_path).state_dict()[lost])


def test_what_is_copied_is_what_engines_have_read(place: Place, tmp_path: Path) -> None:
    """No other file beside it, and not the same one when it has changed."""
    models.make("llama", tmp_path, tiny=True)
    lost, file = "model.layers.1.mlp.down_proj.weight", tmp_path / "model.safetensors"
    weights = load_file(file)
    with held(place, tmp_path, lost):
        save_file({lost: torch.zeros_like(weights[lost])}, tmp_path / "zz-old.safetensors", {"format": "pt"})
        model = on_companion(place, tmp_path, copy=[lost])
        assert torch.equal(model.get_parameter(lost), weights[lost].float())
        save_file({name: each + 1 for name, each in weights.items()}, file, {"format": "pt"})
        with pytest.raises(NotShareableError, match="has changed since engines read it"):
            on_companion(place, tmp_path, copy=[lost])


def test_a_copy_of_the_model_has_memory_of_its_own(place: Place, tiny: Path, tmp_path: Path) -> None:
    """Copied in memory, with an adapter too, or through a file."""
    with held(place, tiny):
        model = on_companion(place, tiny)
        expected = logits(model)
        copied = copy.deepcopy(model)
        start, end = mapped_arena(model)
        assert not any(start <= each.data_ptr() < end for each in copied.parameters())
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            copied.get_parameter("model.norm.weight").zero_()
        assert torch.equal(logits(model), expected)
        norm = model.get_parameter("model.norm.weight")
        torch.save(model.state_dict(), tmp_path / "state")
        assert torch.equal(torch.load(tmp_path / "state")["model.norm.weight"], norm)
        torch.save(model, tmp_path / "model")
        assert torch.equal(logits(torch.load(tmp_path / "model", weights_only=False)), expected)
        with_adapter = adapted(model)
        assert torch.equal(logits(copy.deepcopy(with_adapter)), logits(with_adapter))


def test_it_generates_as_the_checkpoint_says(place: Place, tmp_path: Path) -> None:
    models.make("llama", tmp_path, tiny=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.3, "do_sample": true}')
    with held(place, tmp_path):
        assert on_companion(place, tmp_path).generation_config.eos_token_id == [7, 9]


def mapped_arena(model: Any) -> tuple[int, int]:
    """Addresses of the arena of a model, which this process maps once."""
    (line,) = mappings_of(model.get_parameter("model.norm.weight"))
    start, end = line.split()[0].split("-")
    return int(start, 16), int(end, 16)


def mappings_of(tensor: torch.Tensor) -> list[str]:
    """The lines of /proc/self/maps for the file that the tensor's memory is of."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    address = tensor.data_ptr()
    (inode,) = (line[4] for line, (start, end) in zip(lines, ranges, strict=True) if start <= address < end)
    return [" ".join(line) for line in lines if line[4] == inode]


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def trained(model: Any, *, checkpointing: bool) -> list[float]:
    """Losses of some steps with an adapter."""
    made = adapted(model)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.enable_input_require_grads()
    made.train()
    optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = made(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_trained_on_it_as_on_any_model(place: Place, tiny: Path, checkpointing: bool) -> None:
    with held(place, tiny):
        losses = trained(on_companion(place, tiny), checkpointing=checkpointing)
        assert losses == trained(of_files(tiny), checkpointing=checkpointing)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("asked", [None, torch.float32])
def test_an_adapter_is_published_in_the_dtype_of_what_engines_serve(
    place: Place, tiny: Path, asked: torch.dtype | None
) -> None:
    """Unless another one is asked for. PEFT has trained it in float32."""
    with held(place, tiny, dtype="bfloat16"):
        model = adapted(on_companion(place, tiny))
        with (
            contextlib.closing(CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)) as client,
            contextlib.closing(AdapterLeases(place.settings, "reader")) as leases,
        ):
            client.publish_adapter("mine", model, dtype=asked)
            lease = leases.lease(Asked("mine"))
            with contextlib.closing(leases.fetch(lease.bound)) as file:
                header, _ = read_header(file.fds[0], "mine")
        kinds = {each["dtype"] for name, each in header.items() if name != "__metadata__"}
        assert kinds == {"F32" if asked else "BF16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_base_of_its_own_nothing_says_what_engines_compute_in(tiny: Path, dtype: torch.dtype) -> None:
    adapter = canonical(adapted(of_files(tiny, dtype)))
    assert adapter.dtype is None
    assert {each.dtype for each in adapter.tensors.values()} == {torch.float32}


def test_an_adapter_as_wide_as_its_base_is_left_alone(place: Place, tiny: Path) -> None:
    with held(place, tiny):
        assert canonical(adapted(on_companion(place, tiny))).dtype is None


def test_transformers_own_trainer_trains_it(place: Place, tiny: Path, tmp_path: Path) -> None:
    """With accelerate around it, a scheduler, clipped gradients, and a checkpoint that PEFT reads."""

    def losses(model: Any, directory: Path) -> list[float]:
        data = [{"input_ids": TOKENS[0] + number, "labels": TOKENS[0] + number} for number in range(4)]
        arguments = transformers.TrainingArguments(
            output_dir=str(directory),
            max_steps=4,
            per_device_train_batch_size=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            seed=0,
        )
        trainer = transformers.Trainer(model=adapted(model), args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with held(place, tiny):
        mine = losses(on_companion(place, tiny), tmp_path / "mine")
        assert mine == losses(of_files(tiny), tmp_path / "theirs")
        assert mine[-1] < mine[0]
        saved = peft.PeftModel.from_pretrained(on_companion(place, tiny), tmp_path / "mine")
        assert not torch.equal(logits(saved), logits(on_companion(place, tiny)))


def replaced_dtype(model: Any) -> None:
    model.to(torch.float64)


def assigned(model: Any) -> None:
    state = {name: each.clone() for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def merged_safely(model: Any) -> None:
    adapted(model).merge_and_unload(safe_merge=True)


def another_module(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)


KEPT: list[Any] = []
"""Modules that a test has taken out of a model."""


def another_module_beside_the_old_one(model: Any) -> None:
    KEPT.append(model.model.layers[0].mlp.up_proj)
    another_module(model)


def another_head(model: Any) -> None:
    KEPT.append(model.lm_head)
    model.set_output_embeddings(torch.nn.Linear(64, model.config.vocab_size, bias=False))


def a_copied_layer(model: Any) -> None:
    KEPT.append(model.model.layers[0])
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def wrapped_another_module(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False))


def quantized(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


def sharded(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.layers[1], mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("leave", "name"),
    [
        (replaced_dtype, "model.embed_tokens.weight"),
        (assigned, "model.embed_tokens.weight"),
        (merged_safely, "model.layers.0.self_attn.q_proj.weight"),
        (another_module, "model.layers.0.mlp.up_proj.weight"),
        (another_module_beside_the_old_one, "model.layers.0.mlp.up_proj.weight"),
        (another_head, "lm_head.weight"),
        (a_copied_layer, "model.layers.0.self_attn.q_proj.weight"),
        (wrapped_another_module, "model.layers.0.mlp.up_proj.weight"),
        (quantized, "model.layers.0.self_attn.q_proj.weight"),
        (sharded, "model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_what_leaves_the_shared_memory_is_an_error_at_the_next_step(
    place: Place, tiny: Path, leave: Callable[[Any], None], name: str
) -> None:
    with held(place, tiny):
        model = on_companion(place, tiny)
        leave(model)
        with pytest.raises(NotSharedError, match=re.escape(name)):
            model(TOKENS)
        KEPT.clear()


def test_a_part_of_a_model_is_looked_at_alone(place: Place, tiny: Path) -> None:
    with held(place, tiny):
        part = on_companion(place, tiny).model
        gc.collect()
        part.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
        with pytest.raises(NotSharedError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight left"):
            part(TOKENS)


def wrapped(model: Any) -> Any:
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    return model


def parametrized(model: Any) -> Any:
    torch.nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.parametrize(
    "change", [wrapped, parametrized, lambda model: model.model], ids=["wrapped", "parametrized", "part"]
)
def test_what_moves_in_the_model_has_not_left(place: Place, tiny: Path, change: Callable[[Any], Any]) -> None:
    """Nor has what is around the part of it that is kept."""
    with held(place, tiny):
        part = change(on_companion(place, tiny))
        gc.collect()
        assert part(TOKENS)[0].isfinite().all()


@pytest.mark.parametrize("around", [lambda model: model, adapted], ids=["alone", "with an adapter"])
def test_it_is_compiled_as_any_model(place: Place, tiny: Path, around: Callable[[Any], Any]) -> None:
    """And looked at before each call, too."""
    with held(place, tiny):
        model = on_companion(place, tiny)
        made = torch.compile(around(model), backend="eager")
        expected = logits(around(of_files(tiny)))
        for _ in range(2):
            assert torch.allclose(logits(made), expected, atol=1e-5)
        another_module(model)
        with pytest.raises(NotSharedError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            made(TOKENS)
        torch.compiler.reset()


def test_it_is_not_compiled_whole(place: Place, tiny: Path) -> None:
    """What guards it is Python; the error says what to do."""
    with held(place, tiny):
        model = on_companion(place, tiny)
        for part, given in ((model, TOKENS), (model.lm_head, torch.ones(1, model.config.hidden_size))):
            with pytest.raises(Unsupported, match="Compile the model without fullgraph=True"):
                torch.compile(part, backend="eager", fullgraph=True)(given)
        torch.compiler.reset()
        assert model(TOKENS)[0].isfinite().all()


def test_an_adapter_of_a_model_that_left_is_an_error_too(place: Place, tiny: Path) -> None:
    """PEFT does not call the model that it wraps, but its `forward`."""
    with held(place, tiny):
        made = adapted(on_companion(place, tiny))
        made.to(torch.float64)
        with pytest.raises(NotSharedError, match=r"model\.embed_tokens\.weight"):
            made(TOKENS)


def test_merging_in_place_is_refused_before_anything_is_written(place: Place, tiny: Path) -> None:
    with held(place, tiny):
        model = on_companion(place, tiny)
        before = logits(model)
        made = adapted(model)
        with pytest.raises(SharedWeightsError, match=r"layers\.0\.self_attn\.q_proj\.weight is read-only"):
            made.merge_and_unload()
        made.disable_adapter_layers()
        assert torch.equal(logits(made), before)
        with CompanionClient("cpu", runtime_dir=place.settings.runtime_dir).attach(str(tiny)) as attachment:
            attachment.verify("full")


def test_what_has_no_place_is_refused_by_name_or_copied_alone(place: Place, tiny: Path) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    with held(place, tiny, lost):
        size = of_files(tiny).get_parameter(lost).nbytes
        with pytest.raises(NotShareableError, match=rf"{re.escape(lost)} \({size} bytes\) was computed"):
            on_companion(place, tiny)
        with pytest.raises(NotShareableError, match=re.escape(lost)):
            on_companion(place, tiny, copy=["*.up_proj.weight"])
        model = on_companion(place, tiny, copy=["*.down_proj.weight"])
        sharing = sharing_of(model)
        assert sharing is not None
        assert sharing.copied == {lost: size}
        assert torch.equal(logits(model), logits(of_files(tiny)))


def test_it_ends_with_the_model(place: Place, tiny: Path) -> None:
    """No lease and no descriptor is left, and the memory stays as long as one parameter does."""
    with held(place, tiny), none_left_open(10):
        for _ in range(3):
            model = on_companion(place, tiny)
            weight = model.get_parameter("model.norm.weight")
            (entry,) = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir).status().entries
            assert [lease.client for lease in entry.leases if lease.client == "trainer"] == ["trainer"]
            del model
            assert float(weight.sum()) == float(weight.sum())
            del weight
        until(lambda: not leases(place), 10, "the leases have ended")


def leases(place: Place) -> list[str]:
    (entry,) = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir).status().entries
    return [lease.client for lease in entry.leases if lease.client == "trainer"]


DATA_PARALLEL = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.engine.test_from_companion import TOKENS, adapted
from vllm_companion_plugin.training import from_companion
path, runtime_dir, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=2)
model = DistributedDataParallel(adapted(from_companion(path, device="cpu", runtime_dir=runtime_dir)))
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
for step in range(3):
    loss = model(TOKENS + rank, labels=TOKENS + rank).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(sum(float(each.double().sum()) for each in model.parameters() if each.requires_grad))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_adapter_on_one_copy(place: Place, tiny: Path, tmp_path: Path) -> None:
    """DistributedDataParallel writes the first rank's parameters to the others, and none of these."""
    with held(place, tiny):
        command = [sys.executable, "-c", DATA_PARALLEL, str(tiny), place.settings.runtime_dir]
        ranks = [
            Popen([*command, str(rank), str(tmp_path / "store")], stdout=PIPE, stderr=PIPE, text=True)
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=100) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
        assert said[0][0] == said[1][0]


def test_transformers_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a GPU's memory ahead of loading is there, is not called meanwhile, and is back afterwards."""
    called: list[str] = []
    warmup = modeling_utils.caching_allocator_warmup
    assert callable(warmup)
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: called.append("reserved"))
    with _nothing_reserved():
        modeling_utils.caching_allocator_warmup(None, {}, None)
    assert called == []
    modeling_utils.caching_allocator_warmup(None, {}, None)
    assert called == ["reserved"]


def test_sources_are_shared_and_cannot_be_changed() -> None:
    """All who ask for those of one entry get the same object."""
    data = sources_to_bytes({"a": Source((2,), "float32", ())})
    sources = sources_from_bytes(data)
    assert sources_from_bytes(data) is sources
    with pytest.raises(TypeError):
        sources["a"] = Source((3,), "float32", ())  # type: ignore[index]
