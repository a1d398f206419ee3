"""An engine that a test puts to sleep, wakes and writes to. Answers each line of standard input by "RESULT {...}".

The argument is a JSON object: model, prompts, load_format, config (settings of the loader), flags, whether its
publication is refused, and perhaps another model, of a second engine in this process. A line is a JSON list: what to
do, and its arguments. The answer has "value", or "error" with the error's class and text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.vllm.results import tell
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.errors import LeaseLostError


def refuse(*_: Any) -> Any:
    """As a companion does that is told to forget an entry while it is loaded."""
    raise LeaseLostError("The companion ended the lease.")


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM, ModelRegistry

        ModelRegistry.register_model("GatedForCausalLM", "tests.vllm.gated_model:GatedForCausalLM")
        if options.get("refused"):
            Publication.publish = refuse  # type: ignore[method-assign]
        self.prompts = options["prompts"]
        self.llms = [
            LLM(
                model=options[model],
                load_format=options.get("load_format", "companion"),
                model_loader_extra_config=options.get("config", {}),
                dtype="float32",
                enforce_eager=True,
                max_model_len=128,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,  # what is cached was computed with the weights of before
                **options.get("flags", {}),
            )
            for model in ("model", "another")
            if model in options
        ]
        self.llm = self.llms[0]

    def use(self, number: int) -> None:
        """What follows is done to this one."""
        self.llm = self.llms[number]

    def tokens(self) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=16, temperature=0, detokenize=False, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in self.prompts], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def sleep(self, level: int) -> None:
        self.llm.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        self.llm.wake_up(tags)

    def reload(self) -> None:
        self.llm.collective_rpc("reload_weights")

    def reload_from(self, path: str) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def load(self, path: str) -> None:
        """As training frameworks do it: other weights, on the living model."""
        from safetensors.torch import load_file

        (model,) = self.llm.apply_model(lambda model: model)
        model.load_weights(tensor for file in Path(path).glob("*.safetensors") for tensor in load_file(file).items())

    def load_part(self, path: str) -> None:
        """The same of the model without its head."""
        from safetensors.torch import load_file

        (model,) = self.llm.apply_model(lambda model: model.model)
        tensors = [tensor for file in Path(path).glob("*.safetensors") for tensor in load_file(file).items()]
        begin = "model."
        model.load_weights([(name.removeprefix(begin), each) for name, each in tensors if name.startswith(begin)])

    def update(self) -> None:
        """To the current generation."""
        self.llm.collective_rpc("companion_update")

    def state(self) -> list[Any]:
        """Whether it sleeps, whether it is private, the generation, and where it is mapped."""
        from vllm_companion_plugin.engine.live import engine_of
        from vllm_companion_plugin.engine.session import current

        (model,) = current().models(engine_of(self.llm.llm_engine.vllm_config))
        attachment = model.attachment
        return [attachment.asleep, attachment.is_private, attachment.generation, attachment.arena.address]


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(engine, what)(*arguments)}
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        tell(answer)


if __name__ == "__main__":
    main()
