"""An engine in this process whose arena another model's takes the place of, and the way back. Prints "RESULT {...}".

The argument is a JSON object: models (its own, and one of the same shape; a companion holds both), prompts, flags, and
"device" if it is not a CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.vllm.results import tell


def laid_out_as(ours: Any, theirs: Any) -> Any:
    """The arena of `theirs`, in the layout of `ours`.

    On a GPU it has that. On a CPU, offsets keep how PyTorch happened to align the originals, so it is copied.
    """
    from vllm_companion_plugin import memory as arenas

    if theirs.manifest.storages == ours.manifest.storages:
        return theirs.arena
    assert ours.arena.info.kind == arenas.MEMFD
    writer = arenas.create(arenas.MEMFD, ours.arena.info.size_bytes)
    for name, tensor in ours.tensors.items():
        source = theirs.tensors[name]
        assert (source.shape, source.stride(), source.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        writer.write(tensor.data_ptr() - ours.arena.address, source.data_ptr(), source.nbytes)
    return writer.seal()


def main() -> None:
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    from vllm_companion_plugin import CompanionClient
    from vllm_companion_plugin.engine import live
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
        alike = laid_out_as(ours, theirs)
        arena.replace(alike.info, alike.fds.dup())
        found.append(tokens())
        arena.replace(ours.arena.info, ours.arena.fds.dup())
        found.append(tokens())
        arena.unmap()
        arena.map_again(alike.info, alike.fds.dup())
        found.append(tokens())
        (model,) = current().models()
        with live.falling_asleep([model], 1, "test"):  # `ours` is awake: what is mapped here becomes nobody's copy
            pass
        assert attachment.asleep
        live.wake([model], current().connection, "test")
        found.append(tokens())
    assert arena.address == address
    tell(found)
    sys.stdin.read()


if __name__ == "__main__":
    main()
