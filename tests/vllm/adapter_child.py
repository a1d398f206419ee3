"""One real vLLM engine on CPU with adapters: for each line of standard input, a JSON object, one answer.

A line has a list of requests, which run at once: each a path of an adapter, or null, and a prompt. The answer is their
tokens, or the error of the first one that failed. Adapters that are to be removed are so when all requests have come.
Some are removed when the engine is about to load one, and published anew from a directory if there is one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.vllm.results import tell


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_companion_plugin import CompanionClient

    options = json.loads(sys.argv[1])
    llm = LLM(dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, **options)
    parameters = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)

    companion, core = CompanionClient("cpu"), llm.llm_engine.engine_core
    gone: dict[str, str | None] = {}

    def add_lora(request: Any, inner: Any = core.add_lora) -> Any:
        while gone:
            name, path = gone.popitem()
            companion.remove_adapter(name)
            if path:
                companion.register_adapter(name, path)
        return inner(request)

    core.add_lora = add_lora

    def answer(requests: list[Any], removed: list[str], replaced: dict[str, str | None]) -> dict[str, Any]:
        engine, tokens = llm.llm_engine, {}
        gone.update(replaced)
        for number, (path, prompt) in enumerate(requests):
            # As a user has them: the adapter's number says nothing.
            adapter = LoRARequest(path.partition(":")[2], 1, path) if path else None
            try:
                engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters, lora_request=adapter)
            except Exception as error:
                engine.abort_request([str(each) for each in range(number)])
                return {"error": [cls.__name__ for cls in type(error).__mro__], "text": str(error)}
        for name in removed:
            companion.remove_adapter(name)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        return {"tokens": [tokens[str(number)] for number in range(len(requests))]}

    tell({})
    for line in sys.stdin:
        tell(answer(**json.loads(line)))


if __name__ == "__main__":
    main()
