"""Llamas whose loading does more than to fill parameters. Each forward pass uses what loading made."""

from __future__ import annotations

import collections
import decimal
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.models.llama import LlamaForCausalLM

SCALE = 1.0
"""Loading sets it."""

Weights = Iterable[tuple[str, torch.Tensor]]


class PlainPluginForCausalLM(LlamaForCausalLM):
    """Scales some weights while it loads them."""

    factor = 0.5

    def load_weights(self, weights: Weights) -> set[str]:
        found: set[str] = super().load_weights(
            (name, weight * self.factor if "down_proj" in name else weight) for name, weight in weights
        )
        return found


class TreePluginForCausalLM(LlamaForCausalLM):
    """Adds a module and a parameter, removes a buffer and ties two parameters while it loads."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.register_buffer("removed", torch.zeros(4), persistent=False)
        self.temperature: nn.Parameter | None = None

    def load_weights(self, weights: Weights) -> set[str]:
        found: set[str] = super().load_weights(weights)
        first = self.model.layers[0]
        scale = self.lm_head.weight.detach().abs().mean()
        self.temperature = nn.Parameter(scale.clone().reshape(1), requires_grad=False)
        self.extra = nn.Linear(4, 4, bias=False)
        self.extra.weight = nn.Parameter(self.lm_head.weight.detach()[:4, :4].clone(), requires_grad=False)
        first.post_attention_layernorm.weight = first.input_layernorm.weight
        del self.removed
        return found | {"temperature", "extra.weight"}

    def compute_logits(self, hidden: torch.Tensor, *args: Any) -> torch.Tensor | None:
        logits = super().compute_logits(hidden, *args)
        assert self.temperature is not None
        return None if logits is None else logits * self.temperature + self.extra.weight.sum()


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Box:
    def __init__(self, part: Any) -> None:
        self.part = part


class ValuesPluginForCausalLM(LlamaForCausalLM):
    """Has values of many kinds, which building makes one way and loading, from the weights, another."""

    has_loaded = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.derive(1.0)

    def derive(self, number: float) -> None:
        self.number = number
        self.pair = (number, [number])
        self.scalar = np.float32(number)
        self.array = np.array([number, 1.0], dtype=np.float32)
        self.complex = complex(number, 1.0)
        self.slots = Slots(number)
        self.deep = functools.reduce(lambda part, _: Box(part), range(7), number)
        self.partial = functools.partial(torch.mul, other=number)
        self.octets = bytearray(str(number).encode())
        self.decimal = decimal.Decimal(number)
        self.steps = range(int(number * 1e6))
        self.queue = collections.deque([number], maxlen=3)
        self.order = dict(sorted({"a": 1, "b": 2}.items(), reverse=number != 1.0))
        self.table = {"tensor": torch.full((4,), number)}
        self.modules_aside = {"scale": nn.Linear(1, 1, bias=False)}
        nn.init.constant_(self.modules_aside["scale"].weight, number)
        self.lm_head.weight.scale_of_rows = torch.full((2,), number)
        self.training_steps = int(number * 1e6)

    def load_weights(self, weights: Weights) -> set[str]:
        found: set[str] = super().load_weights(weights)
        global SCALE
        SCALE = float(self.lm_head.weight.detach().abs().mean())
        type(self).has_loaded = True
        self.derive(SCALE)
        return found

    def compute_logits(self, hidden: torch.Tensor, *args: Any) -> torch.Tensor | None:
        logits = super().compute_logits(hidden, *args)
        number: Any = self.deep
        while isinstance(number, Box):
            number = number.part
        number = number + self.slots.scale + self.pair[0] + float(self.scalar) + self.table["tensor"].sum()
        number = number + SCALE * self.has_loaded
        number = number + self.modules_aside["scale"].weight.detach().sum() + self.lm_head.weight.scale_of_rows.sum()
        return None if logits is None else self.partial(logits) * number
