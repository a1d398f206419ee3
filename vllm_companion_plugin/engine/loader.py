"""`--load-format companion`: vLLM's model loader that maps weights instead of loading them.

It is registered in every process of vLLM. What it does is in `loading`, which is imported when it is asked for the
first time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_companion_plugin.settings import resolve_extra_config

if TYPE_CHECKING:
    from vllm_companion_plugin.engine.loading import Loading


class CompanionModelLoader(DefaultModelLoader):
    """Attaches to weights that a companion holds, or loads and publishes them for the others; `Loading` does the work.

    It derives from `DefaultModelLoader` because some of vLLM's code asks for one, and reads a checkpoint through it.
    vLLM makes several in a process and throws them away; what must stay is in `session`.

    Raises:
        SettingsError: an unknown key or bad value in `--model-loader-extra-config`.
    """

    def __init__(self, load_config: Any) -> None:
        BaseModelLoader.__init__(self, load_config)
        self._settings = resolve_extra_config(load_config.model_loader_extra_config)

    @functools.cached_property
    def _loading(self) -> Loading:
        from vllm_companion_plugin.engine.loading import Loading

        return Loading(self.load_config, self._settings)

    def download_model(self, model_config: Any) -> None:
        self._loading.source().download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self._loading.load_weights(model, model_config)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
        """The tensors of the checkpoint by name, as the source format's loader reads them."""
        source: Any = self._loading.source()
        return source.get_all_weights(model_config, model)

    def _get_weights_iterator(self, source: Any) -> Any:
        reader: Any = self._loading.source()
        return reader._get_weights_iterator(source)

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        reader: Any = self._loading.source()
        return reader._prepare_weights(*args, **kwargs)

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes of weights held by the companion (asked by vLLM 0.32 and later before it measures memory)."""
        return self._loading.external_bytes(vllm_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        return self._loading.load_model(vllm_config, model_config, prefix)
