"""A quantization of linear layers while they are loaded, as `--quantization fp8` is: int8, a scale for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.utils import replace_parameter

NAME = "companion_test_int8"


class Int8Method(OnlineLinearBase):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        scale = layer.weight.abs().amax(1, keepdim=True).float() / 127
        replace_parameter(layer, "weight", (layer.weight / scale).round().to(torch.int8).t())
        replace_parameter(layer, "weight_scale", scale)
        layer._already_called_process_weights_after_loading = True

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight.t() * layer.weight_scale, bias)


@register_quantization_config(NAME)
class Int8Config(QuantizationConfig):
    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int8Config:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return Int8Method() if isinstance(layer, LinearBase) else None
