"""A Llama whose own code writes weights, as that of gpt-oss does with its sinks: it copies one and computes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM

COPIED, COMPUTED = "model.norm.weight", "model.layers.0.post_attention_layernorm.weight"


class ByHandForCausalLM(LlamaForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name == COPIED:
                    self.model.norm.weight.data.copy_(weight)
                elif name == COMPUTED:
                    self.model.layers[0].post_attention_layernorm.weight.data.copy_(weight * 1.5)
                else:
                    yield name, weight

        return {COPIED, COMPUTED, *super().load_weights(others())}
