"""An engine in this process whose arena another model's takes the place of, and the way back. Prints "RESULT {...}".

The argument is a JSON object: models (its own, and one of the same shape; a companion holds both), prompts, flags, and
"device" if it is not a CPU.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    from vllm_companion_plugin import CompanionClient
    from vllm_companion_plugin.engine.session import current

    own, other = options["models"]
    llm = LLM(
        model=own,
        load_format="companion",
        max_model_len=128,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # what is cached was computed with the weights of before
        **options["flags"],
    )

    def tokens() -> list[list[int]]:
        sampling = SamplingParams(max_tokens=16, temperature=0, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in options["prompts"]], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]

    (attachment,) = current().attachments()
    arena = attachment.arena
    address, found = arena.address, [tokens()]
    client = CompanionClient(options.get("device", "cpu"))
    with client.attach(other) as theirs, client.attach(own) as ours:
        assert theirs.manifest.storages == ours.manifest.storages
        arena.replace(theirs.arena.info, theirs.arena.fds.dup())
        found.append(tokens())
        arena.replace(ours.arena.info, ours.arena.fds.dup())
        found.append(tokens())
        arena.unmap()
        arena.map_again(theirs.arena.info, theirs.arena.fds.dup())
    found.append(tokens())
    attachment.unmap()
    attachment.map_again()
    attachment.renew()
    found.append(tokens())
    assert arena.address == address
    print("RESULT " + json.dumps(found), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
