"""A Llama whose own code copies a weight, as that of gpt-oss does with its sinks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM


class ByHandForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name == "model.norm.weight":
                    self.model.norm.weight.data.copy_(weight)
                else:
                    yield name, weight

        return {"model.norm.weight", *super().load_weights(others())}
