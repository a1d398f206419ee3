"""A trainer and vLLM's engine in one process, both on one copy of the weights; adapters that are sampled at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import peft
import torch
import vllm
from peft.tuners.lora import LoraLayer
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.client.peft import check_config
from vllm_companion_plugin.core.adapters import Asked, check_name
from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.status import EntryState, EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionUnavailableError,
    EntryNotFoundError,
    NotShareableError,
)
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.settings import Given
from vllm_companion_plugin.training.base import from_companion

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PEFT_HAS = (torch.nn.ModuleDict(), torch.nn.ParameterDict())
"""What PEFT's layers keep adapters in, by their ids."""
_IN_THIS_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class Colocated:
    """An engine, and a model that is trained, in this process. Not for several threads at once.

    Args:
        engine: which loaded its weights through the companion that `client` asks; an attribute, too.
        model: on the same memory.
        client: owned from now on; an attribute, too.

    Attributes:
        model: what is trained: a `PeftModel` as long as there is an adapter.
    """

    def __init__(self, engine: Any, model: Any, client: CompanionClient, lora: peft.LoraConfig | None = None) -> None:
        self.engine = engine
        self.model = model
        self.client = client
        self._lora = lora
        self._published: dict[str, _Published] = {}

    @property
    def adapters(self) -> list[str]:
        """The ids of those that were made here."""
        return list(self.model.peft_config) if isinstance(self.model, peft.PeftModel) else []

    def create_adapter(self, id: str, config: peft.LoraConfig | None = None) -> Any:
        """A new adapter, which is active and trained from now on; the `PeftModel`.

        Args:
            config: None: what `colocated` was given.

        Raises:
            BadRequestError: there is one of this id, PEFT or engines can have none of it, or there is no configuration.
        """
        if "." in check_name(id) or id.startswith("lora_") or any(hasattr(kind, id) for kind in _PEFT_HAS):
            raise BadRequestError(
                f"{id} is no id of an adapter that PEFT can have: its layers have adapters as attributes, and "
                "tensors whose names begin with lora_."
            )
        config = config or self._lora
        if config is None:
            raise BadRequestError(f"Adapter {id} has no configuration.", remedy="Give a LoraConfig.")
        if id in self.adapters:
            raise BadRequestError(f"There is an adapter {id} already.", remedy="Remove it first.")
        check_config(config, f"Adapter {id}")  # before PEFT changes the base of all others for it
        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(id, config)
        else:
            self.model = peft.get_peft_model(self.model, config, adapter_name=id)
        self.activate(id)
        if variant := self._variant(id):
            self.remove_adapter(id)
            raise BadRequestError(
                f"PEFT would compute adapter {id} in its way of {variant}, which vLLM does not.",
                remedy="Train plain LoRA.",
            )
        return self.model

    def activate(self, id: str) -> None:
        """Train this adapter from now on. Raises `EntryNotFoundError` if it was not made here."""
        self._check_made(id)
        self.model.set_adapter(id)

    def remove_adapter(self, id: str) -> None:
        """Forget it, here and in engines. If it is active another one is afterwards, as long as there is one.

        Raises:
            EntryNotFoundError: it was not made here.
        """
        self._check_made(id)
        others = [each for each in self.adapters if each != id]
        if not others:
            self.model = self.model.unload()
        else:
            if id in self.model.active_adapters:  # PEFT would have none active, and then take no other one
                self.activate(others[-1])
            self.model.delete_adapter(id)
        if self._published.pop(id, None) is not None:
            with contextlib.suppress(EntryNotFoundError):  # somebody else has removed it
                self.client.remove_adapter(id)

    def list_adapters(self) -> tuple[EntryStatus, ...]:
        """All that engines of this companion can sample, of whichever trainer."""
        return self.client.list_adapters()

    def _dtype(self) -> torch.dtype | None:
        """What the engine casts adapters to, as others of this base do."""
        config = self.engine.llm_engine.vllm_config.lora_config
        dtype = None if config is None else config.lora_dtype
        return dtype if isinstance(dtype, torch.dtype) else None

    def publish(self, id: str, version: str = "") -> int:
        """Have all engines of the companion use the adapter as it is now; the number of its generation.

        Raises:
            EntryNotFoundError: it was not made here.
            CompanionError: as `CompanionClient.publish_adapter`.
        """
        self._check_made(id)
        with self._alone(id):
            number = self.client.publish_adapter(id, self.model, version=version, dtype=self._dtype())
        self._published[id] = _Published(number, self._state(id))
        return number

    def sample(self, id: str | None, prompts: Any, sampling_params: Any = None, **options: Any) -> list[Any]:
        """The engine's outputs with an adapter, as it is now: published first if it has changed since.

        Args:
            id: also of one that was published elsewhere; None: without any.
            prompts, sampling_params, options: of `LLM.generate`.

        Raises:
            EntryNotFoundError: nobody has published it.
        """
        if id is None:
            return list(self.engine.generate(prompts, sampling_params, **options))
        wanted = Asked(id)
        if id in self.adapters:
            known = self._published.get(id)
            is_it = known is not None and self._state(id).equals(known.state) and self._is_current(id, known.generation)
            number = known.generation if known is not None and is_it else self.publish(id)
            wanted = Asked(id, number)  # others may publish under this id, too
        request = LoRARequest(id, 1, wanted.path)
        return list(self.engine.generate(prompts, sampling_params, lora_request=request, **options))

    @contextlib.contextmanager
    def training(self) -> Iterator[Any]:
        """While open, the engine has no KV cache, if it has vLLM's `enable_sleep_mode`. Yields the model.

        The weights stay where they are, since the model uses them.
        """
        sleeps = bool(self.engine.llm_engine.vllm_config.model_config.enable_sleep_mode)
        if sleeps:
            self.engine.sleep(level=1)
        try:
            yield self.model
        finally:
            if sleeps:
                self.engine.wake_up()

    def close(self) -> None:
        """End the engine, and hold no adapters any more. The model goes on as long as it is used."""
        self.client.close()
        self.engine.llm_engine.engine_core.shutdown()

    def __enter__(self) -> Colocated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _variant(self, id: str) -> str:
        """PEFT's name for its way to compute an adapter; empty of plain LoRA. Only layers that are made say so."""
        variants = (getattr(each, "lora_variant", {}).get(id) for each in self.model.modules())
        return next((type(each).__name__ for each in variants if each is not None), "")

    def _check_made(self, id: str) -> None:
        if id not in self.adapters:
            raise EntryNotFoundError(f"No adapter {id} was made here; there are: {', '.join(self.adapters) or 'none'}.")

    @contextlib.contextmanager
    def _alone(self, id: str) -> Iterator[None]:
        """While open, no other adapter is active. PEFT makes all of what it activates trainable; that is undone."""
        active = list(self.model.active_adapters)
        if active == [id]:
            yield
            return
        trained = {each: each.requires_grad for each in self.model.parameters()}
        self.model.set_adapter(id)
        try:
            yield
        finally:
            self.model.base_model.set_adapter(active)
            self.model.active_adapter = active[0]
            for parameter, is_trained in trained.items():
                parameter.requires_grad_(is_trained)

    def _is_current(self, id: str, generation: int) -> bool:
        """Whether nobody has removed this generation, or put another one in its place."""
        try:
            there = [each for each in self.client.list_adapters() if each.key.model == id]
        except CompanionUnavailableError:  # one that follows is handed what is published; the engine waits for that
            return True
        return any((each.generation, each.state) == (generation, EntryState.READY) for each in there)

    def _state(self, id: str) -> _State:
        tensors = peft.get_peft_model_state_dict(self.model, adapter_name=id, save_embedding_layers=False).values()
        layers = (each for each in self.model.modules() if isinstance(each, LoraLayer))
        scalings = tuple(each.scaling[id] for each in layers if id in each.scaling)
        return _State(torch.cat([each.detach().reshape(-1).view(torch.uint8) for each in tensors]), scalings)


@dataclass(frozen=True, eq=False)
class _State:
    """What an adapter is: a copy of its values, as nothing tells of writes through `.data`, and its scalings."""

    values: torch.Tensor
    scalings: tuple[float, ...]

    def equals(self, other: _State) -> bool:
        return self.scalings == other.scalings and torch.equal(self.values, other.values)


@dataclass(frozen=True)
class _Published:
    """The generation of an adapter that was published last, and what it is."""

    generation: int
    state: _State


def colocated(
    model: str,
    engine_args: Mapping[str, Any] | None = None,
    *,
    lora: peft.LoraConfig | None = None,
    copy: Collection[str] = (),
    auto_class: Any = None,
    options: Mapping[str, Any] | None = None,
    **settings: Unpack[Given],
) -> Colocated:
    """Start vLLM's engine in this process, and make a model on the same memory.

    Under torchrun each process has an engine and a model of its own GPU. Torch's process group is made, unless the
    trainer has done so.

    Args:
        engine_args: of `vllm.LLM`, beside `model`.
        lora: of adapters that are made without a configuration; its rank is what the engine allows at most, unless
            `engine_args` says `max_lora_rank`.
        copy, auto_class, options: as of `from_companion`.
        settings: of the engine, too.

    Raises:
        NotShareableError: the engine does not share its weights, or parameters of the model cannot be views.
        CompanionError: as `from_companion`.
    """
    arguments: dict[str, Any] = {"enable_lora": True, **(engine_args or {}), "load_format": "companion"}
    # The engine and the trainer ask one companion, whichever of both was told where it is.
    known: Any = {**(arguments.get("model_loader_extra_config") or {}), **settings}
    arguments["model_loader_extra_config"] = known
    if lora is not None and arguments["enable_lora"]:
        arguments.setdefault("max_lora_rank", _allowed_rank(max([lora.r, *(lora.rank_pattern or {}).values()])))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        arguments.setdefault("distributed_executor_backend", "external_launcher")
        if not torch.distributed.is_initialized():  # vLLM would make a group of its own processes alone
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    before = os.environ.get(_IN_THIS_PROCESS)
    os.environ[_IN_THIS_PROCESS] = "0"
    try:
        engine = vllm.LLM(model=model, **arguments)
    finally:
        os.environ.pop(_IN_THIS_PROCESS)
        if before is not None:
            os.environ[_IN_THIS_PROCESS] = before
    with contextlib.ExitStack() as undo:
        undo.callback(engine.llm_engine.engine_core.shutdown)
        client = CompanionClient(_device(), **known)
        made = from_companion(
            model,
            device=client.device,
            key_id=_shared_by_this_process(client, model),
            copy=copy,
            auto_class=auto_class,
            options=options,
            **known,
        )
        undo.pop_all()
    return Colocated(engine, made, client, lora)


def _allowed_rank(rank: int) -> int:
    """The least rank that vLLM can be told to allow."""
    return next((allowed for allowed in sorted(get_args(MaxLoRARanks)) if allowed >= rank), rank)


def _device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _shared_by_this_process(client: CompanionClient, model: str) -> str:
    """The key of the entry that the engine of this process uses."""
    name = model_name(model)
    for entry in client.status().entries:
        is_it = (entry.key.kind, entry.key.model, entry.key.role) == (WEIGHTS, name, "target")
        if is_it and any(lease.pid == os.getpid() for lease in entry.leases):
            return entry.key.id
    raise NotShareableError(
        f"The engine of this process does not share the weights of {model} on {client.device}.",
        remedy="Its lines in the log say why.",
    )
