"""`python -m vllm_companion_plugin.engine.verify ROLE OUT MODEL [flags of vLLM]`: one engine, described.

ROLE is "reference" (a normal load) or "companion". OUT receives a JSON object: of each worker what
its model consists of, every tensor by its digest, and what the engine answered to fixed prompts.
Two such descriptions are equal if the models are.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.engine import compat, flags, session
from vllm_companion_plugin.engine.attach import process_privately
from vllm_companion_plugin.errors import SettingsError
from vllm_companion_plugin.module_tree.capture import Tree, capture, class_name
from vllm_companion_plugin.module_tree.pack import dtype_name, tensor_attributes
from vllm_companion_plugin.settings import resolve_extra_config
from vllm_companion_plugin.types import Stage

# Come after loading, and hold what requests left in them: the KV cache, and the slots of LoRA adapters.
_AFTER_LOADING = re.compile(r"(^|\.)kv_cache(\[\d+\])?$|(^|_)lora_[ab]_stacked|^adapter_enabled$")
_PROMPT_LENGTHS = (1, 7, 16, 40)
_MAX_TOKENS = 12
_LOGPROBS = 5
_SOUND_HZ = 16000


class WorkerExtension:
    """What vLLM mixes into its workers, so that the engine can ask them by name."""

    def companion_describe(self, role: str) -> dict[str, Any]:
        """The model of this worker, as JSON.

        Args:
            role: a reference on a device that shares unprocessed weights is loaded once more,
                because the engine's own cannot be compared after processing.
        """
        worker: Any = self
        device = compat.engine_device(worker.vllm_config)
        running: nn.Module = worker.model_runner.model
        report = {"rank": worker.rank, "outcomes": [asdict(outcome) for outcome in session.outcomes]}
        if role == "reference" and device.stage is Stage.UNPROCESSED:
            # Modules note and cache things while they run, so what the running model has besides counts as well.
            again = _load_again(worker.vllm_config, device)
            if worker.vllm_config.lora_config is not None:
                again = worker.model_runner.load_lora_model(again, worker.vllm_config, device.torch_device)
            loaded = describe(again)
            tree = capture(running, _opaque())
            besides = tensors_of(tree, without=loaded["tensors"])
            return report | loaded | {"running": modules_of(tree), "running_tensors": besides}
        return report | describe(running)


def describe(model: nn.Module) -> dict[str, Any]:
    """Modules and tensors of `model` as JSON; equal for equal models in any process."""
    tree = capture(model, _opaque())
    return {"modules": modules_of(tree), "tensors": tensors_of(tree)}


def _opaque() -> tuple[type, ...]:
    """What `capture` shall not look into; LoRA's bookkeeping changes with every request."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper import PunicaWrapperBase

    return (*compat.OPAQUE, LoRAModelManager, PunicaWrapperBase)


def tensors_of(tree: Tree, without: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """The tensors of `tree` by name, but for the names in `without`."""
    tensors: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for slot in tree.slots():
        if _AFTER_LOADING.search(slot.name):
            continue
        name, tensor = tree.describe(slot), slot.tensor
        tied_to = first.setdefault(id(tensor), name)
        if name in without:
            continue
        tensors[name] = {
            "kind": slot.kind.value,
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "class": class_name(type(tensor)),
            "requires_grad": tensor.requires_grad,
            "attributes": tensor_attributes(tensor),
            "tied_to": tied_to,
            "bytes": tensor.nbytes,
            "sha256": digest(tensor),
        }
    return tensors


def modules_of(tree: Tree) -> dict[str, dict[str, Any]]:
    """What `tree` has besides tensors, by module."""
    return {
        live.path: {
            "class": class_name(type(live.module)),
            "aliases": live.aliases,
            "attributes": {name: text for name, text in live.attributes.items() if not _AFTER_LOADING.search(name)},
            "floats": {name: number.value for name, number in live.floats.items()},
        }
        for live in tree.modules
    }


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the elements in logical order, as hexadecimal text."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None
    return hashlib.sha256(flat.cpu().numpy().data if flat is not None else b"").hexdigest()


def _load_again(vllm_config: Any, device: compat.EngineDevice) -> nn.Module:
    """A second model through vLLM's own loader, its private packing left out."""
    model_config = vllm_config.model_config
    loader = compat.source_loader(vllm_config.load_config, vllm_config.load_config.load_format)
    with compat.second_model(vllm_config, model_config, device.torch_device) as model:
        loader.load_weights(model, model_config)
        with process_privately(model, resolve_extra_config({})):
            compat.post_process(model, model_config, device.torch_device)
    return model.eval()


def answers(llm: Any) -> dict[str, Any]:
    """What the engine makes of fixed prompts: tokens with log probabilities, or vectors.

    A picture and a sound are among the prompts of a model that takes them. "left_out" says which are not, and why.
    """
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config.model_config
    numbers = random.Random(7)
    vocabulary = min(config.get_vocab_size(), 30000)
    longest = config.max_model_len - _MAX_TOKENS - 1

    def words(length: int) -> list[int]:
        return [numbers.randrange(3, vocabulary) for _ in range(min(length, longest))]

    # One at a time: how requests are batched decides the kernels, and depends on when they arrive.
    if config.runner_type == "pooling":
        tasks = llm.supported_tasks
        task = next(name for name in ("embed", "token_embed", "classify", *tasks) if name in tasks)

        def ask(prompt: dict[str, Any]) -> dict[str, list[Any]]:
            output = llm.encode(prompt, pooling_task=task, use_tqdm=False)[0]
            return {"values": output.outputs.data.double().flatten().tolist()}
    else:
        sampling = SamplingParams(
            max_tokens=_MAX_TOKENS, temperature=0, logprobs=_LOGPROBS, detokenize=False, ignore_eos=True
        )

        def ask(prompt: dict[str, Any]) -> dict[str, list[Any]]:
            output = llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0]
            values = [entry.logprob for step in output.logprobs for entry in step.values()]
            return {"tokens": list(output.token_ids), "values": values}

    given = [] if config.is_encoder_decoder else [ask({"prompt_token_ids": words(n)}) for n in _PROMPT_LENGTHS]
    media, left_out = [], ""
    if config.is_multimodal_model:
        try:
            for kind, prompt in _media(config, words, numbers):
                given.append(ask(prompt))
                media.append(kind)
        except Exception as error:  # no tokenizer or processor, or too little space for a picture
            left_out = f"{type(error).__name__}: {error}"
            if not given:
                raise
    asked = {"media": media, "left_out": left_out} if media or left_out else {}
    return {key: [answer[key] for answer in given] for key in given[0]} | asked


def _media(
    config: Any, words: Callable[[int], list[int]], numbers: random.Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A prompt with noise for each kind of input that the model takes and we can make."""
    from PIL import Image
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(config)
    noise: dict[str, Callable[[], Any]] = {
        "image": lambda: Image.frombytes("RGB", (64, 64), numbers.randbytes(64 * 64 * 3)),
        "audio": lambda: (torch.tensor([numbers.uniform(-0.5, 0.5) for _ in range(_SOUND_HZ)]).numpy(), _SOUND_HZ),
    }
    for kind, make in noise.items():
        if processor.info.allowed_mm_limits.get(kind):
            # The model's own placeholders for one such input, then words.
            placeholders = processor.info.get_tokenizer().encode(
                processor.dummy_inputs.get_dummy_text({kind: 1}), add_special_tokens=False
            )
            yield kind, {"prompt_token_ids": [*placeholders, *words(7)], "multi_modal_data": {kind: make()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the engine, describe it, end it. Raises what vLLM or the loader raises."""
    role, out, *rest = sys.argv[1:] if arguments is None else arguments
    from vllm import LLM

    args = flags.parse("verify", rest)
    if args.worker_extension_cls:
        raise SettingsError("verify: --worker-extension-cls is taken; verify without it.")
    args.worker_extension_cls = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    args = flags.without_companion(args) if role == "reference" else flags.through_companion(args)
    llm = LLM(**vars(args))
    report: dict[str, Any] = {"versions": compat.versions()}
    try:
        report["answers"] = answers(llm)
    except Exception as error:  # the tensors are what counts
        report["answers"] = None
        report["no_answers"] = f"{type(error).__name__}: {error}"
    report["workers"] = llm.collective_rpc("companion_describe", args=(role,))
    Path(out).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":  # vLLM spawns workers, which import this module again
    sys.exit(main())
