"""One real vLLM engine on CPU, as a child process of the tests.

Reads a JSON object of options from argv, prints "RESULT {...}", and the tokens once more for each line of standard
input, until that closes: the parent can look at a living engine. A line that is not empty is a JSON object of
generations by model, to which the engine advances before; or of a method of the engine to call, with what it is given.
The model runs in worker processes of vLLM's own; `describe` and `reference` are sent there.
"""

from __future__ import annotations

import json
import os
import sys

from tests.vllm.results import tell

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def describe(worker) -> dict:
    """In a worker: every tensor of the model's tree, and whether it lies in the arena.

    Layers that LoRA wrapped have the names they were loaded with; what LoRA added is left out.
    """
    import hashlib
    import os
    from pathlib import Path

    import torch

    from vllm_companion_plugin.tree.capture import capture

    arena = [
        [int(address, 16) for address in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "memfd:vllm-companion" in line
    ]
    tree = capture(worker.model_runner.model)
    tensors = {}
    for slot in tree.slots():
        if is_lora(tree, slot):
            continue
        tensor = slot.tensor.detach()
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        tensors[tree.describe(slot).replace(".base_layer.", ".")] = {
            "value": [
                str(tensor.dtype),
                list(tensor.shape),
                list(tensor.stride()),
                slot.kind.value,
                hashlib.sha256(data).hexdigest(),
            ],
            "object": id(slot.tensor),
            "in_arena": any(start <= tensor.data_ptr() < stop for start, stop in arena),
        }
    return {"pid": os.getpid(), "tensors": tensors}


def is_lora(tree, slot) -> bool:
    return type(tree.modules[slot.module].module).__module__.startswith("vllm.lora.") or slot.name.startswith("lora_")


def reference(worker) -> dict:
    """In a worker: the tensors of a second model, loaded by vLLM's default loader alone.

    As they are before post-processing, which on CPU moves weights into handles that nothing
    can compare.
    """
    import types

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = worker.vllm_config
    layers = config.compilation_config.static_forward_context
    kept = dict(layers)
    layers.clear()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
    layers.clear()
    layers.update(kept)
    return describe(types.SimpleNamespace(model_runner=types.SimpleNamespace(model=model)))


def called(llm, call: str, args: list, kwargs: dict) -> dict:
    """What a method says, also one of the engine inside; or what it raises."""
    try:
        method = getattr(llm, call, None) or getattr(llm.llm_engine, call)
        return {"returned": method(*args, **kwargs)}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def main() -> None:
    options = json.loads(sys.argv[1])
    prompts = options.pop("prompts", None)
    texts = options.pop("texts", None)
    adapter = options.pop("adapter", None)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_companion_plugin.fleet import advance

    llm = LLM(dtype="float32", enforce_eager=True, max_model_len=128, **options)
    look = reference if options["load_format"] == "auto" else describe
    cache = llm.llm_engine.vllm_config.cache_config
    result = {"workers": llm.collective_rpc(look), "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size}
    requests = {"tokens": None} | ({"adapted": LoRARequest("adapter", 1, adapter)} if adapter else {})

    def tokens(request: LoRARequest | None = None) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            SamplingParams(max_tokens=24, temperature=0, detokenize=False, ignore_eos=True),
            lora_request=request,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    for name, request in requests.items() if prompts else ():
        result[name] = tokens(request)
    if texts:
        result["vectors"] = [output.outputs.embedding for output in llm.embed(texts)]
    tell(result)
    for line in sys.stdin:
        answer = {}
        if line.strip():
            asked = json.loads(line)
            if "call" in asked:
                tell(called(llm, **asked))
                continue
            if "fleet" in asked:
                answer["advanced"] = str(advance([llm], asked["fleet"]))
            else:
                try:
                    answer["updated"] = llm.collective_rpc("companion_update", kwargs={"generations": asked})
                except Exception as error:  # of the worker, by whatever way vLLM hands it on
                    answer["refused"] = str(error)
                assert llm.reset_prefix_cache()
        tell(answer | {"tokens": tokens()})


if __name__ == "__main__":
    main()
