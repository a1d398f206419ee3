"""Entry point `vllm.general_plugins: companion`.

Runs in every vLLM process, several times, also before a fork: it only leaves callbacks for
when vLLM imports its loaders, its worker and its flags. No CUDA, no sockets, no threads, no vLLM import.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from vllm_companion_plugin.engine.imports import when_imported
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.settings import resolve_extra_config

LOAD_FORMAT = "companion"

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
    when_imported("vllm.engine.arg_utils", _watch_load_format)


def _register_loader(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.loader import CompanionModelLoader

    module.register_model_loader(LOAD_FORMAT)(CompanionModelLoader)


def _register_accounting(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.accounting import install_request_memory

    install_request_memory(module)


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
