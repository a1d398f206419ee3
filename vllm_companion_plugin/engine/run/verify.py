"""`python -m vllm_companion_plugin.engine.run.verify ROLE OUT [--adapter DIR] MODEL [flags]` describes one engine.

ROLE is "reference" (a normal load) or "companion". OUT receives a JSON object: all that each worker's model leads to,
every tensor by its digest, and the engine's answers to fixed prompts. Equal models have equal descriptions.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine import draft
from vllm_companion_plugin.engine.attach import process_privately
from vllm_companion_plugin.engine.run import reachable
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import building, deployment, devices, drafts, flags, processing, sources
from vllm_companion_plugin.errors import CompanionError, SettingsError
from vllm_companion_plugin.settings import resolve, resolve_extra_config

_PROMPT_LENGTHS = (1, 7, 16, 40)
_MAX_TOKENS = 12
_LOGPROBS = 5
_SOUND_HZ = 16000
_ROUNDS = 3
"""How often prompts are asked together. The arrival of requests decides the batches, and these decide the kernels. So
even a normal engine gives other values each time."""


class WorkerExtension:
    """A class that vLLM mixes into its workers, so that the engine can call this method by name."""

    def companion_describe(self, role: str, directory: str) -> None:
        """Write a description of this worker's model to `directory`, as JSON. Calls return one replica's results only.

        The key "draft" holds the draft of speculative decoding, if the worker has one.

        Args:
            role: on a device that shares unprocessed weights, a reference loads its model once more, because the
                engine's own model cannot be compared after processing.
        """
        worker: Any = self
        device = devices.engine_device()
        running = {"target": worker.model_runner.model, "draft": drafts.running_draft(worker.model_runner)}
        running = {name: model for name, model in running.items() if model is not None}
        models = {name: describe(model) for name, model in running.items()}
        if role == "reference" and device.stage is Stage.UNPROCESSED:
            again = _load_again(worker, device, running)
            if worker.vllm_config.lora_config is not None:
                runner, config = worker.model_runner, worker.vllm_config
                again["target"] = runner.load_lora_model(again["target"], config, device.torch_device)
            # Modules note and cache things while they run. A model that never ran has none of these.
            models = {name: describe(again[name]) | {"running": model} for name, model in models.items()}
        place = {"replica": worker.vllm_config.parallel_config.data_parallel_index, "rank": worker.rank}
        report = place | {"outcomes": [asdict(outcome) for outcome in current().outcomes]}
        report |= models.pop("target") | models
        Path(directory, "{replica}-{rank}.json".format(**place)).write_text(json.dumps(report))


def describe(model: nn.Module) -> dict[str, Any]:
    """Return all that `model` leads to, as JSON; equal for equal models in any process."""
    return vars(reachable.walk(model))


def _load_again(worker: Any, device: devices.EngineDevice, running: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Load the models of a worker again, by `_load_one_again`. The draft gets the parts that belong to the target."""
    config, runner = worker.vllm_config, worker.model_runner
    again = {"target": _load_one_again(config, config.model_config, "", device)}
    if "draft" in running:
        again["draft"] = _load_one_again(*drafts.draft_recipe(runner), device)
        places = {id(module): path for path, module in running["target"].named_modules()}
        common = {path: places[id(m)] for path, m in running["draft"].named_modules() if id(m) in places and path}
        draft.put_in(again["draft"], {p: again["target"].get_submodule(there) for p, there in common.items()})
    return again


def _load_one_again(vllm_config: Any, model_config: Any, prefix: str, device: devices.EngineDevice) -> nn.Module:
    """Load a second model by vLLM's own loader, without vLLM's private packing."""
    loader = sources.source_loader(vllm_config.load_config, vllm_config.load_config.load_format)
    with building.second_model(vllm_config, model_config, prefix, device.torch_device) as model:
        loader.load_weights(model, model_config)
        with process_privately(model, resolve_extra_config({})):
            processing.post_process(model, model_config, device.torch_device)
    return model.eval()


class _Engine:
    """An engine with one replica of the model, vLLM's `LLM`."""

    def __init__(self, args: Any) -> None:
        from vllm import LLM

        self._llm = LLM(**vars(args))
        self.config = self._llm.llm_engine.vllm_config
        self.tasks: Sequence[str] = self._llm.supported_tasks

    def generate(self, prompts: list[Any], sampling: Any, replica: int, adapters: list[Any]) -> list[Any]:
        found: list[Any] = self._llm.generate(
            prompts, sampling, use_tqdm=False, lora_request=adapters if any(adapters) else None
        )
        return found

    def encode(self, prompts: list[Any], task: Any) -> list[Any]:
        found: list[Any] = self._llm.encode(prompts, pooling_task=task, use_tqdm=False)
        return found

    def forget(self) -> None:
        """Empty the prefix cache, so that earlier prompts do not shorten the computation of the same prompt."""
        self._llm.reset_prefix_cache()

    def call(self, method: str, *arguments: Any) -> None:
        self._llm.collective_rpc(method, args=arguments)

    def close(self) -> None:
        """Do nothing: the engine ends with the process."""


class _Replicas:
    """An engine with data parallel replicas, which `LLM` refuses."""

    def __init__(self, args: Any) -> None:
        self._loop = asyncio.new_event_loop()  # the client's tasks live in the loop that made the client
        self._llm = self._loop.run_until_complete(self._start(args))
        self.config = self._llm.vllm_config
        self.tasks: Sequence[str] = self._loop.run_until_complete(self._llm.get_supported_tasks())
        self._asked = 0

    @staticmethod
    async def _start(args: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**vars(args) | {"disable_log_stats": True}))

    def generate(self, prompts: list[Any], sampling: Any, replica: int, adapters: list[Any]) -> list[Any]:
        streams = [
            self._llm.generate(prompt, sampling, self._name(), lora_request=adapter, data_parallel_rank=replica)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        return self._all(streams)

    def encode(self, prompts: list[Any], task: Any) -> list[Any]:
        """Encode the prompts on the replicas that vLLM chooses in turn; a caller cannot name one."""
        from vllm import PoolingParams

        return self._all([self._llm.encode(prompt, PoolingParams(task=task), self._name()) for prompt in prompts])

    def forget(self) -> None:
        self._loop.run_until_complete(self._llm.reset_prefix_cache())

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

    def _all(self, streams: list[AsyncIterator[Any]]) -> list[Any]:
        """Return the last output of each stream; all streams run at once."""

        async def last(outputs: AsyncIterator[Any]) -> Any:
            return [output async for output in outputs][-1]

        async def gathered() -> list[Any]:
            return await asyncio.gather(*map(last, streams))

        return self._loop.run_until_complete(gathered())


def answers(engine: _Engine | _Replicas, adapter: str | None = None) -> dict[str, Any]:
    """Ask the replicas one after the other; return their answers: tokens with log probabilities, or vectors.

    The prompts are fixed. One prompt is long enough to be read in several pieces. A model that takes pictures or sound
    also gets a picture or a sound; "left_out" says which of these are missing, and why. "at_once" holds values of other
    prompts of these kinds that are asked together: for each prompt its values each time.

    Args:
        adapter: a LoRA adapter with which some prompts are asked as well.
    """
    replicas = [
        _answers(engine, replica, adapter) for replica in range(engine.config.parallel_config.data_parallel_size)
    ]
    together = {
        key: [answer for one in replicas for answer in one[key]]
        for key in ("tokens", "values", "at_once")
        if key in replicas[0]
    }
    return replicas[0] | together


def _answers(engine: _Engine | _Replicas, replica: int, adapter: str | None) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    config, numbers = engine.config.model_config, random.Random(7)
    adapters = [None] + ([LoRARequest("adapter", 1, adapter)] if adapter else [])
    task = next((name for name in ("embed", "token_embed", "classify", *engine.tasks) if name in engine.tasks), None)
    sampling = SamplingParams(
        max_tokens=_MAX_TOKENS, temperature=0, logprobs=_LOGPROBS, detokenize=False, ignore_eos=True
    )

    def ask(*asked: tuple[dict[str, Any], Any]) -> list[dict[str, list[Any]]]:
        prompts, named = [prompt for prompt, _ in asked], [name for _, name in asked]
        if config.runner_type == "pooling":
            return [{"values": o.outputs.data.double().flatten().tolist()} for o in engine.encode(prompts, task)]
        found = []
        for output in (outputs.outputs[0] for outputs in engine.generate(prompts, sampling, replica, named)):
            steps = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in output.logprobs]
            values = [value for step in steps for value in step[:_LOGPROBS]]
            found.append({"tokens": list(output.token_ids), "values": values})
        return found

    # Ask one prompt at a time: batches depend on the arrival of requests, and decide the kernels.
    given = [ask(one)[0] for one in itertools.product(_texts(engine.config, numbers), adapters)]
    media, left_out = [], ""
    if config.is_multimodal_model:
        try:
            for kind, prompt in _media(engine.config, numbers):
                given += ask((prompt, None))
                media.append(kind)
        except Exception as error:  # the model has no tokenizer or processor, or too little space for a picture
            left_out = f"{type(error).__name__}: {error}"
            if not given:
                raise
    others = [*itertools.product(_texts(engine.config, numbers), adapters)]
    others += [(prompt, None) for _, prompt in (_media(engine.config, numbers) if media else ())][: len(media)]
    # Other kernels make other last bits, which in the end make other tokens. So only the first token is compared.
    rounds = []
    for _ in range(_ROUNDS):
        engine.forget()
        rounds.append([sorted(a["values"][:_LOGPROBS]) if "tokens" in a else a["values"] for a in ask(*others)])
    at_once = [list(times) for times in zip(*rounds, strict=True)]
    asked = {"media": media, "left_out": left_out} if media or left_out else {}
    return {key: [answer[key] for answer in given] for key in given[0]} | {"at_once": at_once} | asked


def _words(config: Any, numbers: random.Random, length: int) -> list[int]:
    """Make the tokens of a prompt that fits together with its answer."""
    vocabulary = min(config.model_config.get_vocab_size(), 30000)
    longest = config.model_config.max_model_len - _MAX_TOKENS - 1
    return [numbers.randrange(3, vocabulary) for _ in range(min(length, longest))]


def _texts(config: Any, numbers: random.Random) -> list[dict[str, Any]]:
    """Make short prompts, and one that a scheduler with chunked prefill reads in three pieces."""
    if config.model_config.is_encoder_decoder:
        return []
    scheduler = config.scheduler_config
    long = scheduler.max_num_batched_tokens
    long += long + 7 if scheduler.enable_chunked_prefill else 0
    return [{"prompt_token_ids": _words(config, numbers, length)} for length in (*_PROMPT_LENGTHS, long)]


def _media(config: Any, numbers: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a prompt with noise for each kind of input that the model takes and this module can make."""
    from PIL import Image
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    noise: dict[str, Callable[[], Any]] = {
        "image": lambda: Image.frombytes("RGB", (64, 64), numbers.randbytes(64 * 64 * 3)),
        "audio": lambda: (torch.tensor([numbers.uniform(-0.5, 0.5) for _ in range(_SOUND_HZ)]).numpy(), _SOUND_HZ),
    }
    for kind, make in noise.items():
        if processor.info.allowed_mm_limits.get(kind):
            # The prompt holds the model's own placeholders for one such input, then words.
            placeholders = processor.info.get_tokenizer().encode(
                processor.dummy_inputs.get_dummy_text({kind: 1}), add_special_tokens=False
            )
            tokens = [*placeholders, *_words(config, numbers, 7)]
            yield kind, {"prompt_token_ids": tokens, "multi_modal_data": {kind: make()}}


def workers(engine: _Engine | _Replicas, role: str, directory: Path) -> list[dict[str, Any]]:
    """Return the reports of all workers, in the order of replicas and ranks. Workers write them to a new `directory`.

    Raises:
        CompanionError: some workers did not report.
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
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--adapter")
    asked, rest = parser.parse_known_args(rest)
    args = flags.parse("verify", rest)
    if args.worker_extension_cls:
        raise SettingsError("verify: --worker-extension-cls is taken.", remedy="Verify without that flag.")
    args.worker_extension_cls = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    if role == "reference":
        args = flags.without_companion(args)
    else:  # whatever the flags say, the next engine must find what this one publishes, and nobody else must
        ours = resolve()
        args = flags.through_companion(args, runtime_dir=ours.runtime_dir, linger_s=ours.linger_s)
    engine = _Replicas(args) if args.data_parallel_size > 1 else _Engine(args)
    try:
        report: dict[str, Any] = {"versions": deployment.versions()}
        try:
            report["answers"] = answers(engine, asked.adapter)
            report["dtype"] = str(engine.config.model_config.dtype)
        except Exception as error:  # the tensors count more than the answers
            report["answers"] = None
            report["no_answers"] = f"{type(error).__name__}: {error}"
        report["workers"] = workers(engine, role, Path(f"{out}.workers"))
    finally:
        engine.close()
    Path(out).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":  # vLLM spawns workers, which import this module again
    sys.exit(main())
