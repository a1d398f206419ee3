"""Entry point `vllm.general_plugins: companion`.

Runs in every vLLM process, several times, also before a fork: it only leaves callbacks for
when vLLM imports its loaders and its worker. No CUDA, no sockets, no threads, no vLLM import.
"""

from __future__ import annotations

from types import ModuleType

from vllm_companion_plugin.engine.imports import when_imported

LOAD_FORMAT = "companion"

_registered = False


def register() -> None:
    """Make `--load-format companion` known to this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported("vllm.v1.worker.utils", _register_accounting)


def _register_loader(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.loader import CompanionModelLoader

    module.register_model_loader(LOAD_FORMAT)(CompanionModelLoader)


def _register_accounting(module: ModuleType) -> None:
    from vllm_companion_plugin.engine.accounting import install_request_memory

    install_request_memory(module)
