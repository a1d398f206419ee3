"""One real vLLM engine on CPU with adapters: for each line of standard input, a JSON object, one answer.

A line is a list of requests, which run at once: each a path of an adapter, or null, and a prompt. The answer is their
tokens, or the error of the first one that failed.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = json.loads(sys.argv[1])
    llm = LLM(dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, **options)
    parameters = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)

    def answer(asked: list[Any]) -> dict[str, Any]:
        # As a user has them: the number says nothing.
        requests = [path and LoRARequest(path.partition(":")[2], 1, path) for path, _ in asked]
        prompts = [{"prompt_token_ids": prompt} for _, prompt in asked]
        try:
            outputs = llm.generate(prompts, parameters, lora_request=requests, use_tqdm=False)
        except Exception as error:
            return {"error": [cls.__name__ for cls in type(error).__mro__], "text": str(error)}
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    print("RESULT " + json.dumps({}), flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
