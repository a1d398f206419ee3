"""Where tensors of a checkpoint go: observed while vLLM loads them, and proved by writing them once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import models
from tests.support.loading import packed_by_vllm
from vllm_companion_plugin import memory
from vllm_companion_plugin.client.filling import Filling, is_placed
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.wire.manifest import sources_from_bytes

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]

CPU = torch.device("cpu")
FAMILIES = ("llama", "llama-tied", "qwen3", "phi3", "gemma3", "qwen3-moe", "mixtral", "deepseek-v3", "mamba", "hybrid")


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def filled(manifest: Manifest, like: memory.Arena, weights: dict[str, torch.Tensor]) -> tuple[Filling, torch.Tensor]:
    """Weights in an arena that is empty but for them, byte by byte."""
    size_bytes = like.info.size_bytes
    writer = memory.create(memory.MEMFD, size_bytes)
    writer.add_block(size_bytes)
    filling = Filling(writer, size_bytes, manifest, CPU, "it")
    filling.load({name: tensor for name, tensor in weights.items() if name in filling.sources})
    return filling, bytes_of(writer.seal())


def bytes_of(arena: memory.Arena) -> torch.Tensor:
    from vllm_companion_plugin.memory.tensors.views import ArenaViews

    return ArenaViews(arena, arena.info.size_bytes, CPU).bytes_at(0, arena.info.size_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_written_by_its_names_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    """In an arena that had none of them: of every shared tensor, all that vLLM made of the checkpoint."""
    models.make(family, tmp_path, tiny=True)
    manifest, arena = packed_by_vllm(tmp_path)
    weights = checkpoint(tmp_path)
    filling, found = filled(manifest, arena, weights)
    # What loading computes from a tensor it does not copy: Mamba's A is -exp(A_log).
    missing = {name for name in weights if name not in filling.sources}
    assert all(name.endswith("A_log") for name in missing)
    known = sources_from_bytes(manifest.sources)
    assert missing <= known.keys()
    assert is_placed(manifest) == (not missing)
    if family in ("llama-tied", "gemma3"):
        assert "lm_head.weight" not in filling.sources
    wanted = bytes_of(arena)
    for tensor in manifest.tensors:
        if tensor.storage < 0 or tensor.private:
            continue
        storage = manifest.storages[tensor.storage]
        part = slice(storage.offset_bytes, storage.offset_bytes + storage.size_bytes)
        same = torch.equal(found[part], wanted[part])
        assert same or (missing and not found[part].any()), (family, tensor)


def test_other_shapes_and_names_are_refused_together(tmp_path: Path) -> None:
    models.make("llama", tmp_path, tiny=True)
    manifest, arena = packed_by_vllm(tmp_path)
    weights = checkpoint(tmp_path)
    first, second = sorted(weights)[:2]
    bad = {first: weights[first][:-1], second: weights[second].double(), "nobody's": weights[first]}
    writer = memory.create(memory.MEMFD, arena.info.size_bytes)
    writer.add_block(arena.info.size_bytes)
    filling = Filling(writer, arena.info.size_bytes, manifest, CPU, "it")
    with pytest.raises(BadRequestError) as raised:
        filling.load(bad)
    assert all(name in str(raised.value) for name in bad)
    assert not bytes_of(writer.seal()).any()


def changes_what_it_reads(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """A tensor is changed before it is copied: the copy alone would lose that."""

    def changed() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            yield name, tensor.add_(1) if name == NORM else tensor

    return load(model, changed())


def computes_beside(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """A tensor is copied to its place, and something else is computed from it."""

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name == NORM:
                model.register_buffer("doubled", tensor * 2)
            yield name, tensor

    return load(model, watched())


def computes_afterwards(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """Something is computed from what was loaded, and stays beside it."""
    loaded = load(model, weights)
    model.register_buffer("absorbed", model.model.norm.weight.detach() * 2)
    return loaded


def changes_what_it_loaded(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """Another operation writes to the same memory, after the copy."""
    loaded = load(model, weights)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return loaded


def looks_at_it(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """Python reads a value: what it does then may be anything."""

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name == NORM:
                model.first = float(tensor[0])
            yield name, tensor

    return load(model, watched())


def copies_a_number_over_it(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """As loaders of scales do: what is copied is no tensor."""
    loaded = load(model, weights)
    with torch.no_grad():
        model.model.norm.weight.copy_(2.0)
    return loaded


def reads_bits_as_another_type(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """As loaders of scales do that checkpoints have as bytes. A copy would convert the numbers that these bytes are."""
    return load(model, ((name, tensor.view(torch.int32) if name == NORM else tensor) for name, tensor in weights))


def clones_bits_as_another_type(model: Any, weights: Any, load: Callable[..., Any]) -> Any:
    """Of another size, too: what is taken of it is counted in other elements."""

    def cloned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.int64).clone().view(torch.float32)

    return load(model, ((name, cloned(tensor) if name == NORM else tensor) for name, tensor in weights))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "how",
    [
        *(changes_what_it_reads, computes_beside, computes_afterwards, changes_what_it_loaded, looks_at_it),
        *(copies_a_number_over_it, reads_bits_as_another_type, clones_bits_as_another_type),
    ],
    ids=lambda how: how.__name__,
)
def test_what_is_more_than_a_copy_has_no_source(how: Callable[..., Any], tmp_path: Path) -> None:
    """Copying a new tensor to the same place would leave a part of the model as it was, or another value."""
    models.make("llama", tmp_path, tiny=True)
    from vllm.model_executor.models.llama import LlamaForCausalLM

    inner: Any = LlamaForCausalLM.load_weights
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "load_weights", lambda self, weights: how(self, weights, inner))
        manifest, arena = packed_by_vllm(tmp_path)
    filling, _ = filled(manifest, arena, {})
    assert NORM not in filling.sources
    with pytest.raises(BadRequestError, match=f"{NORM}, which it does not have, or not by a copy"):
        filling.load({NORM: checkpoint(tmp_path)[NORM]})
    assert NORM in sources_from_bytes(manifest.sources)
    assert not is_placed(manifest)
    assert "model.layers.0.input_layernorm.weight" in filling.sources
