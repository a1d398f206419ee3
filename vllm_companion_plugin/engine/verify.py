"""`python -m vllm_companion_plugin.engine.verify ROLE OUT MODEL [flags of vLLM]`: one engine, described.

ROLE is "reference" (a normal load) or "companion". OUT receives a JSON object: of each worker what
its model consists of, every tensor by its digest, and what the engine answered to fixed prompts.
Two such descriptions are equal if the models are.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Callable, Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.engine import compat, draft, flags, session
from vllm_companion_plugin.engine.attach import process_privately
from vllm_companion_plugin.errors import CompanionError, SettingsError
from vllm_companion_plugin.module_tree.capture import Tree, capture, tensor_attributes
from vllm_companion_plugin.module_tree.pack import dtype_name
from vllm_companion_plugin.module_tree.values import class_name
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

    def companion_describe(self, role: str, directory: str) -> None:
        """Write what the model of this worker is to `directory`, as JSON: calls return one replica's results only.

        Under "draft" is that of speculative decoding, if it has one.

        Args:
            role: a reference on a device that shares unprocessed weights is loaded once more,
                because the engine's own cannot be compared after processing.
        """
        worker: Any = self
        device = compat.engine_device(worker.vllm_config)
        running = {"target": worker.model_runner.model, "draft": compat.running_draft(worker.model_runner)}
        running = {name: model for name, model in running.items() if model is not None}
        if role == "reference" and device.stage is Stage.UNPROCESSED:
            again = _load_again(worker, device, running)
            if worker.vllm_config.lora_config is not None:
                runner, config = worker.model_runner, worker.vllm_config
                again["target"] = runner.load_lora_model(again["target"], config, device.torch_device)
            models = {name: _describe_both(again[name], model) for name, model in running.items()}
        else:
            models = {name: describe(model) for name, model in running.items()}
        place = {"replica": worker.vllm_config.parallel_config.data_parallel_index, "rank": worker.rank}
        report = place | {"outcomes": [asdict(outcome) for outcome in session.outcomes]}
        report |= models.pop("target") | models
        Path(directory, "{replica}-{rank}.json".format(**place)).write_text(json.dumps(report))


def describe(model: nn.Module) -> dict[str, Any]:
    """Modules and tensors of `model` as JSON; equal for equal models in any process."""
    tree = capture(model, _opaque())
    return {"modules": modules_of(tree), "tensors": tensors_of(tree)}


def _describe_both(loaded: nn.Module, running: nn.Module) -> dict[str, Any]:
    """`loaded`, with what `running` has besides: modules note and cache things while they run."""
    described, tree = describe(loaded), capture(running, _opaque())
    besides = tensors_of(tree, without=described["tensors"])
    return described | {"running": modules_of(tree), "running_tensors": besides}


def _opaque() -> tuple[type, ...]:
    """What `capture` shall not look into.

    LoRA's bookkeeping changes with every request; a quantization's config holds lists in the order of a set, and times.
    """
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper import PunicaWrapperBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    return (QuantizationConfig, LoRAModelManager, PunicaWrapperBase)


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
            "device": tensor.device.type,
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
        }
        for live in tree.modules
    }


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the elements in logical order, as hexadecimal text."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None
    return hashlib.sha256(flat.cpu().numpy().data if flat is not None else b"").hexdigest()


def _load_again(worker: Any, device: compat.EngineDevice, running: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The models of a worker once more, as `_load_one_again` does; the draft with the parts that are the target's."""
    config, runner = worker.vllm_config, worker.model_runner
    again = {"target": _load_one_again(config, config.model_config, "", device)}
    if "draft" in running:
        again["draft"] = _load_one_again(*compat.draft_recipe(runner), device)
        places = {id(module): path for path, module in running["target"].named_modules()}
        common = {path: places[id(m)] for path, m in running["draft"].named_modules() if id(m) in places and path}
        draft.put_in(again["draft"], {p: again["target"].get_submodule(there) for p, there in common.items()})
    return again


def _load_one_again(vllm_config: Any, model_config: Any, prefix: str, device: compat.EngineDevice) -> nn.Module:
    """A second model through vLLM's own loader, its private packing left out."""
    loader = compat.source_loader(vllm_config.load_config, vllm_config.load_config.load_format)
    with compat.second_model(vllm_config, model_config, prefix, device.torch_device) as model:
        loader.load_weights(model, model_config)
        with process_privately(model, resolve_extra_config({})):
            compat.post_process(model, model_config, device.torch_device)
    return model.eval()


class _Engine:
    """vLLM's `LLM`: an engine with one replica of the model."""

    def __init__(self, args: Any) -> None:
        from vllm import LLM

        self._llm = LLM(**vars(args))
        self.config = self._llm.llm_engine.vllm_config
        self.tasks: Sequence[str] = self._llm.supported_tasks

    def generate(self, prompt: Any, sampling: Any, replica: int) -> Any:
        return self._llm.generate(prompt, sampling, use_tqdm=False)[0]

    def encode(self, prompt: Any, task: Any) -> Any:
        return self._llm.encode(prompt, pooling_task=task, use_tqdm=False)[0]

    def call(self, method: str, *arguments: Any) -> None:
        self._llm.collective_rpc(method, args=arguments)

    def close(self) -> None:
        """It ends with the process."""


class _Replicas:
    """Data parallel replicas, which `LLM` refuses."""

    def __init__(self, args: Any) -> None:
        self._loop = asyncio.new_event_loop()  # the client's tasks live in the loop in which it was made
        self._llm = self._loop.run_until_complete(self._start(args))
        self.config = self._llm.vllm_config
        self.tasks: Sequence[str] = self._loop.run_until_complete(self._llm.get_supported_tasks())
        self._asked = 0

    @staticmethod
    async def _start(args: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**vars(args) | {"disable_log_stats": True}))

    def generate(self, prompt: Any, sampling: Any, replica: int) -> Any:
        return self._last(self._llm.generate(prompt, sampling, self._name(), data_parallel_rank=replica))

    def encode(self, prompt: Any, task: Any) -> Any:
        """By whichever replica vLLM chooses: it takes turns, and nobody can name one."""
        from vllm import PoolingParams

        return self._last(self._llm.encode(prompt, PoolingParams(task=task), self._name()))

    def call(self, method: str, *arguments: Any) -> None:
        self._loop.run_until_complete(self._llm.collective_rpc(method, args=arguments))

    def close(self) -> None:
        self._llm.shutdown()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _name(self) -> str:
        self._asked += 1
        return f"verify-{self._asked}"

    def _last(self, outputs: AsyncIterator[Any]) -> Any:
        async def last() -> Any:
            return [output async for output in outputs][-1]

        return self._loop.run_until_complete(last())


def answers(engine: _Engine | _Replicas) -> dict[str, Any]:
    """What the replicas make of fixed prompts: tokens with log probabilities, or vectors; of one after the other.

    A picture and a sound are among the prompts of a model that takes them. "left_out" says which are not, and why.
    """
    replicas = [_answers(engine, replica) for replica in range(engine.config.parallel_config.data_parallel_size)]
    together = {
        key: [answer for one in replicas for answer in one[key]] for key in ("tokens", "values") if key in replicas[0]
    }
    return replicas[0] | together


def _answers(engine: _Engine | _Replicas, replica: int) -> dict[str, Any]:
    from vllm import SamplingParams

    config = engine.config.model_config
    numbers = random.Random(7)
    vocabulary = min(config.get_vocab_size(), 30000)
    longest = config.max_model_len - _MAX_TOKENS - 1

    def words(length: int) -> list[int]:
        return [numbers.randrange(3, vocabulary) for _ in range(min(length, longest))]

    # One at a time: how requests are batched decides the kernels, and depends on when they arrive.
    if config.runner_type == "pooling":
        task = next(name for name in ("embed", "token_embed", "classify", *engine.tasks) if name in engine.tasks)

        def ask(prompt: dict[str, Any]) -> dict[str, list[Any]]:
            output = engine.encode(prompt, task)
            return {"values": output.outputs.data.double().flatten().tolist()}
    else:
        sampling = SamplingParams(
            max_tokens=_MAX_TOKENS, temperature=0, logprobs=_LOGPROBS, detokenize=False, ignore_eos=True
        )

        def ask(prompt: dict[str, Any]) -> dict[str, list[Any]]:
            output = engine.generate(prompt, sampling, replica).outputs[0]
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


def workers(engine: _Engine | _Replicas, role: str, directory: Path) -> list[dict[str, Any]]:
    """The reports of all workers, in the order of replicas and ranks; they are written to a new `directory`.

    Raises:
        CompanionError: some did not report.
    """
    parallel = engine.config.parallel_config
    expected = parallel.data_parallel_size * parallel.world_size
    directory.mkdir()
    engine.call("companion_describe", role, str(directory))
    reports = [json.loads(path.read_text()) for path in directory.iterdir()]
    if len(reports) != expected:
        raise CompanionError(f"{len(reports)} of {expected} workers reported; verify needs all of them on this host.")
    return sorted(reports, key=lambda report: (report["replica"], report["rank"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the engine, describe it, end it. Raises what vLLM or the loader raises."""
    role, out, *rest = sys.argv[1:] if arguments is None else arguments
    args = flags.parse("verify", rest)
    if args.worker_extension_cls:
        raise SettingsError("verify: --worker-extension-cls is taken; verify without it.")
    args.worker_extension_cls = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    args = flags.without_companion(args) if role == "reference" else flags.through_companion(args)
    engine = _Replicas(args) if args.data_parallel_size > 1 else _Engine(args)
    try:
        report: dict[str, Any] = {"versions": compat.versions()}
        try:
            report["answers"] = answers(engine)
        except Exception as error:  # the tensors are what counts
            report["answers"] = None
            report["no_answers"] = f"{type(error).__name__}: {error}"
        report["workers"] = workers(engine, role, Path(f"{out}.workers"))
    finally:
        engine.close()
    Path(out).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":  # vLLM spawns workers, which import this module again
    sys.exit(main())
