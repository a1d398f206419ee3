"""A Llama with what engines process for themselves where weights are shared unprocessed: buffers, and by own code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.models.llama import LlamaForCausalLM

ARCHITECTURE = "GatedForCausalLM"
LARGE = 1 << 19
"""Numbers of a buffer that is shared."""


class Method(QuantizeMethodBase):
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        pass

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class GateMethod(Method):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.gain.exp_()
        layer.shift = layer.shift.exp()
        layer.large.mul_(2)


class UnquantizedLinearMethod(Method):
    """Not the one of vLLM that has this name."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data.mul_(3)


class OwnAttention(Attention):  # type: ignore[misc]
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.own.data.mul_(2)


class Gate(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.zeros(size))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("large", torch.zeros(LARGE))
        self.quant_method = GateMethod()


class GatedForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        size = vllm_config.model_config.get_hidden_size()
        self.gate = Gate(size)
        self.named = nn.Linear(size, 1, bias=False)
        self.named.quant_method = UnquantizedLinearMethod()
        attention = self.model.layers[0].self_attn.attn
        attention.__class__ = OwnAttention
        attention.own = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = super().forward(*args, **kwargs)
        own = self.model.layers[0].self_attn.attn.own
        return hidden * self.gate.gain * own + self.gate.shift * self.named.weight[0] + self.gate.large.mean()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name == "model.layers.0.input_layernorm.weight":
                    steps = torch.linspace(-1, 1, weight.numel())
                    self.gate.gain.copy_(weight.float() * steps)
                    self.gate.shift.copy_(weight.float() * steps.flip(0))
                    self.gate.large.copy_(weight.float().mean().expand(LARGE))
                    self.named.weight.data.copy_((weight.float() * steps)[None])
                    self.model.layers[0].self_attn.attn.own.data.copy_(weight.float() + steps)
                yield name, weight

        added = {"gate.gain", "gate.shift", "gate.large", "named.weight", "model.layers.0.self_attn.attn.own"}
        return added | super().load_weights(others())
