"""Entry point `vllm.general_plugins: companion`.

Runs in every vLLM process, several times, also before a fork: it only leaves callbacks for
when vLLM imports its loaders, its worker and its flags. No CUDA, no sockets, no threads, no vLLM import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from vllm_companion_plugin.core.logs import mark
from vllm_companion_plugin.engine.vllm.imports import when_imported

_registered = False


def register() -> None:
    """Make `--load-format companion` known to this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    mark(logging.getLogger("vllm.companion"), "[companion]")
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported("vllm.v1.worker.utils", _register_budget)
    when_imported("vllm.engine.arg_utils", _calling("naming:replace_in_flags"))
    when_imported("vllm.distributed.weight_transfer.factory", _register_transfer)
    when_imported("vllm.v1.executor.multiproc_executor", _calling("answers:read_all_answers"))
    when_imported("vllm.config.vllm", _calling("naming:replace_in_config"))
    when_imported("vllm.v1.engine.async_llm", _calling("adapters.requests:bind_requests_of_servers"))
    when_imported("vllm.v1.engine.llm_engine", _calling("adapters.requests:bind_requests"))
    when_imported("vllm.v1.engine.output_processor", _calling("adapters.requests:keep_while_unfinished"))
    when_imported("vllm.lora.worker_manager", _calling("adapters.loading:load_from_companions"))
    when_imported("vllm.entrypoints.serve.engine.serving", _calling("adapters.serving:name_adapters"))
    when_imported("vllm.entrypoints.pooling.base.serving", _calling("adapters.serving:name_pooling_adapters"))


def _calling(function: str) -> Callable[[ModuleType], None]:
    """A callback that calls a function of a module of ours, which is imported no earlier than that."""
    module, _, name = function.partition(":")

    def call(_: ModuleType) -> None:
        getattr(import_module(f"vllm_companion_plugin.engine.vllm.{module}"), name)()

    return call


def _register_loader(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.loader import CompanionModelLoader
    from vllm_companion_plugin.engine.vllm import naming

    module.register_model_loader(naming.LOAD_FORMAT)(CompanionModelLoader)


def _register_transfer(module: ModuleType) -> None:
    """By names alone: what they name is imported when an engine or a trainer asks for it."""
    from vllm_companion_plugin.engine.vllm import sharing

    package = "vllm_companion_plugin.engine.vllm.transfer"
    module.WeightTransferEngineFactory.register_engine(
        sharing.TRANSFER_BACKEND, f"{package}.worker", "CompanionTransferEngine"
    )
    module.WeightTransferTrainerFactory.register_engine(
        sharing.TRANSFER_BACKEND, f"{package}.trainer", "CompanionTrainer"
    )


def _register_budget(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.vllm.budget import replace_request_memory

    replace_request_memory(module, _external_bytes)


def _external_bytes() -> int | None:
    """Bytes held by the companion for the engine being started; None if it does not use one."""
    from vllm.config import get_current_vllm_config

    from vllm_companion_plugin.engine.vllm import naming

    vllm_config = get_current_vllm_config()
    load_config = vllm_config.load_config
    if load_config is None or load_config.load_format != naming.LOAD_FORMAT:
        return None
    from vllm_companion_plugin.engine.loading import Loading  # here, not while vLLM times the load
    from vllm_companion_plugin.settings import resolve_extra_config

    return Loading(load_config, resolve_extra_config(load_config.model_loader_extra_config)).external_bytes(vllm_config)
