"""Entry point `vllm.general_plugins: companion`.

Runs in every vLLM process, several times, also before a fork: it only leaves callbacks for
when vLLM imports its loaders, its worker and its flags. No CUDA, no sockets, no threads, no vLLM import.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from vllm_companion_plugin.engine.vllm.imports import when_imported
from vllm_companion_plugin.engine.vllm.naming import LOAD_FORMAT, named_as_source
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.settings import resolve_extra_config

logger = logging.getLogger("vllm.companion")

_registered = False


def register() -> None:
    """Make `--load-format companion` known to this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported("vllm.v1.worker.utils", _register_accounting)
    when_imported("vllm.engine.arg_utils", _prepare_source)
    when_imported("vllm.engine.arg_utils", _watch_load_format)
    when_imported("vllm.config.vllm", _name_source)


def _register_loader(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.loader import CompanionModelLoader

    module.register_model_loader(LOAD_FORMAT)(CompanionModelLoader)


def _register_accounting(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.vllm.accounting import install_request_memory

    install_request_memory(module)


def _name_source(module: ModuleType) -> None:
    """vLLM's config decides by the name of the load format what it believes of a checkpoint, and where that may be."""
    inner = module.VllmConfig.__post_init__

    @functools.wraps(inner)
    def __post_init__(self: Any, *args: Any) -> None:
        with named_as_source(self.load_config):
            inner(self, *args)

    module.VllmConfig.__post_init__ = __post_init__


def _prepare_source(module: ModuleType) -> None:
    """vLLM completes the options of some load formats, so it is given those of the one that reads the checkpoint."""
    inner = module.EngineArgs.create_load_config

    @functools.wraps(inner)
    def create_load_config(self: Any) -> Any:
        wanted, extra = self.load_format, self.model_loader_extra_config
        if str(wanted).lower() != LOAD_FORMAT:
            return inner(self)
        settings = resolve_extra_config(extra)
        self.load_format, self.model_loader_extra_config = settings.source_format, dict(settings.source_extra_config)
        try:
            config = inner(self)
        finally:
            self.load_format, self.model_loader_extra_config = wanted, extra
        if config.load_format == settings.source_format:  # else vLLM insists on another one
            completed = config.model_loader_extra_config
            changed = {"source_extra_config": completed} if completed != settings.source_extra_config else {}
            config.load_format, config.model_loader_extra_config = LOAD_FORMAT, {**(extra or {}), **changed}
        return config

    module.EngineArgs.create_load_config = create_load_config


def _watch_load_format(module: ModuleType) -> None:
    """vLLM before 0.28 replaces it where the quantization is bitsandbytes, and says nothing."""
    inner = module.EngineArgs.create_engine_config

    @functools.wraps(inner)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted, settings = self.load_format, self.model_loader_extra_config
        config = inner(self, *args, **kwargs)
        used = config.load_config.load_format
        if str(wanted).lower() == LOAD_FORMAT != used:
            self.load_format = wanted  # it is replaced here as well, and we may be asked again
            reason = f"this version of vLLM loads such models with --load-format {used}, whatever is asked for."
            if not resolve_extra_config(settings).fallback:
                raise NotShareableError(f"{self.model}: {reason}")
            logger.warning("Weights of %s are not shared: %s", self.model, reason)
        return config

    module.EngineArgs.create_engine_config = create_engine_config
