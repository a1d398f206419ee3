"""A small HTTP service in the shape of Tinker's: users train and sample adapters of their own, on one base model.

    python tinker_service.py MODEL [--port 8077] [--rank 16] [flags of vLLM, as --max-model-len 4096]

The base is in the device's memory once: vLLM's engine and the trained model use the same bytes. Calls are
answered when they are done; one call at a time uses the model.

    POST /api/v1/create_model              {"lora_config": {"rank": 8}}                    -> {"model_id"}
    POST /api/v1/forward_backward          {"model_id", "data": [{"tokens", "weights"}]}   -> {"loss"}
    POST /api/v1/optim_step                {"model_id", "adam_params": {"learning_rate"}}  -> {}
    POST /api/v1/save_weights_for_sampler  {"model_id"}                                    -> {"path"}
    POST /api/v1/sample                    {"model_path", "prompt", "sampling_params"}     -> {"sequences"}
    POST /api/v1/unload_model              {"model_id"}                                    -> {}
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from peft import LoraConfig
from pydantic import BaseModel, Field, FiniteFloat
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_companion_plugin.core.adapters import SCHEME
from vllm_companion_plugin.errors import BadRequestError, CompanionError, EntryNotFoundError
from vllm_companion_plugin.training import Colocated, colocated


class LoraParams(BaseModel):
    rank: int = 8


class CreateModel(BaseModel):
    lora_config: LoraParams = LoraParams()


class Datum(BaseModel):
    """Tokens, and how much each counts as a target; the first one is never one."""

    tokens: list[int] = Field(min_length=1)
    weights: list[FiniteFloat] | None = None


class ForwardBackward(BaseModel):
    model_id: str
    data: list[Datum] = Field(min_length=1)


class AdamParams(BaseModel):
    learning_rate: FiniteFloat = Field(1e-4, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: FiniteFloat = Field(1e-8, ge=0)


class OptimStep(BaseModel):
    model_id: str
    adam_params: AdamParams = AdamParams()


class OfModel(BaseModel):
    model_id: str


class Sampling(BaseModel):
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int | None = Field(None, ge=0, lt=1 << 63)


class Sample(BaseModel):
    model_path: str | None = Field(
        None, description="of save_weights_for_sampler; none: the base model", pattern=f"^{SCHEME}"
    )
    prompt: list[int] = Field(min_length=1)
    num_samples: int = Field(1, ge=1)
    sampling_params: Sampling = Sampling()


class Service:
    """All users' adapters, on one model and one engine."""

    def __init__(self, both: Colocated, most_rank: int) -> None:
        self._both = both
        self._most_rank = most_rank
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._lock = threading.Lock()  # the model has one active adapter, and the engine one caller

    def create_model(self, asked: CreateModel) -> dict[str, Any]:
        rank = asked.lora_config.rank
        if not 1 <= rank <= self._most_rank:
            raise HTTPException(400, f"rank is {rank}; this service allows 1 to {self._most_rank}")
        model_id = f"model-{uuid.uuid4().hex[:12]}"
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with self._lock:
            model = self._both.create_adapter(model_id, config)
            trained = [each for each in model.parameters() if each.requires_grad]
            self._optimizers[model_id] = torch.optim.AdamW(trained, weight_decay=0.0)
        return {"model_id": model_id}

    def forward_backward(self, asked: ForwardBackward) -> dict[str, Any]:
        """Add to the gradients of the adapter; the loss is the mean over the targets' weights."""
        with self._lock:
            self._both.activate(asked.model_id)
            model, total = self._both.model, 0.0
            for datum in asked.data:
                if datum.weights is not None and len(datum.weights) != len(datum.tokens):
                    raise HTTPException(400, "there is not one weight for each token")
                self._check_tokens(datum.tokens)
            model.train()
            for datum in asked.data:
                tokens = torch.tensor([datum.tokens], device=model.device)
                weights = torch.tensor(datum.weights or [1.0] * len(datum.tokens), device=model.device)
                logits = model(tokens).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
                loss = (losses * weights[1:]).sum() / weights[1:].sum().clamp_min(1e-6) / len(asked.data)
                loss.backward()
                total += float(loss.detach())
        return {"loss": total}

    def optim_step(self, asked: OptimStep) -> dict[str, Any]:
        with self._lock:
            self._both.activate(asked.model_id)
            optimizer, adam = self._optimizers[asked.model_id], asked.adam_params
            for group in optimizer.param_groups:
                group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
            optimizer.step()
            optimizer.zero_grad()
        return {}

    def save_weights_for_sampler(self, asked: OfModel) -> dict[str, Any]:
        """Every engine of the device can sample the adapter as it is now, by the path; the next save replaces it."""
        with self._lock:
            generation = self._both.publish(asked.model_id)
        return {"path": f"companion:{asked.model_id}?generation={generation}"}

    def sample(self, asked: Sample) -> dict[str, Any]:
        params = SamplingParams(n=asked.num_samples, logprobs=0, **asked.sampling_params.model_dump())
        request = LoRARequest("adapter", 1, asked.model_path) if asked.model_path else None
        self._check_tokens(asked.prompt)
        with self._lock:
            prompt = {"prompt_token_ids": asked.prompt}
            (output,) = self._both.engine.generate(prompt, params, lora_request=request, use_tqdm=False)
        return {"sequences": [sequence_of(each) for each in output.outputs]}

    def _check_tokens(self, tokens: list[int]) -> None:
        """An engine without a tokenizer would fail at others, and not be the same afterwards."""
        if not all(0 <= token < self._both.model.config.vocab_size for token in tokens):
            raise HTTPException(400, "there are tokens that the model does not have")

    def unload_model(self, asked: OfModel) -> dict[str, Any]:
        with self._lock:
            self._both.remove_adapter(asked.model_id)
            self._optimizers.pop(asked.model_id)
        return {}


def sequence_of(completion: Any) -> dict[str, Any]:
    """Tokens, and how likely each was."""
    both = zip(completion.token_ids, completion.logprobs, strict=True)
    return {"tokens": list(completion.token_ids), "logprobs": [found[token].logprob for token, found in both]}


def app_of(service: Service) -> FastAPI:
    app = FastAPI(title="Adapters on one base model")
    for name in (
        "create_model",
        "forward_backward",
        "optim_step",
        "save_weights_for_sampler",
        "sample",
        "unload_model",
    ):
        app.post(f"/api/v1/{name}")(getattr(service, name))

    @app.exception_handler(CompanionError)
    async def say(request: Request, error: CompanionError) -> JSONResponse:
        is_asked = error.expected or isinstance(error, BadRequestError)
        status = 404 if isinstance(error, EntryNotFoundError) else 400 if is_asked else 500
        return JSONResponse({"error": error.code, "detail": str(error)}, status)

    @app.exception_handler(ValueError)
    @app.exception_handler(VLLMValidationError)
    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "bad_request", "detail": str(error)}, 400)  # of vLLM, for what it does not take

    return app


def main() -> None:
    parser = FlexibleArgumentParser()
    parser.add_argument("base_model")
    parser.add_argument("--port", type=int, default=8077)
    parser.add_argument("--rank", type=int, default=16)
    EngineArgs.add_cli_args(parser)
    flags = vars(parser.parse_args())
    base, port, rank = flags["base_model"], flags["port"], flags["rank"]
    default = vars(parser.parse_args([base]))
    fields = {field.name for field in dataclasses.fields(EngineArgs)} & flags.keys()
    changed = {name: flags[name] for name in fields if flags[name] != default[name]}
    with colocated(base, {"max_loras": 4, **changed}, lora=LoraConfig(r=rank)) as both:
        uvicorn.run(app_of(Service(both, rank)), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
