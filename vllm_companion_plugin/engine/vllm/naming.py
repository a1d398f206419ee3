"""The name of the load format, as vLLM sees it where it decides something by that name.

Some formats read no checkpoint, some hold tied embeddings once, some are needed for an object store. With a companion
the checkpoint is read by another format than the one that was asked for, so vLLM is shown that one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.settings import resolve_extra_config

logger = logging.getLogger("vllm.companion")

LOAD_FORMAT = "companion"


@contextmanager
def named_as_source(load_config: Any) -> Iterator[None]:
    """While open, a load config of ours is that of the format that reads the checkpoint, with its options.

    A format that vLLM has put in its place by then is the source format from now on.

    Raises:
        SettingsError: the extra config is not what a companion understands.
    """
    if getattr(load_config, "load_format", None) != LOAD_FORMAT:
        yield
        return
    extra = load_config.model_loader_extra_config
    settings = resolve_extra_config(extra)
    load_config.load_format = settings.source_format
    load_config.model_loader_extra_config = settings.source_extra_config
    try:
        yield
    finally:
        used = load_config.load_format
        changed = {"source_format": used} if used != settings.source_format else {}
        load_config.load_format, load_config.model_loader_extra_config = LOAD_FORMAT, {**(extra or {}), **changed}


def replace_in_config() -> None:
    """Of `vllm.config.vllm`, which has just been imported."""
    patches.VLLM_CONFIG.apply(_named_after_source)


def replace_in_flags() -> None:
    """Of `vllm.engine.arg_utils`, which has just been imported."""
    patches.LOAD_CONFIG.apply(_completing_options_of_source)
    patches.ENGINE_CONFIG.apply(_watching_load_format)


def _named_after_source(inner: Callable[..., None]) -> Callable[..., None]:
    """vLLM's config decides by the name of the load format what it believes of a checkpoint, and where that may be."""

    @functools.wraps(inner)
    def __post_init__(self: Any, *args: Any) -> None:
        with named_as_source(self.load_config):
            inner(self, *args)

    return __post_init__


def _completing_options_of_source(inner: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM completes the options of some load formats, so it is given those of the one that reads the checkpoint."""

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

    return create_load_config


def _watching_load_format(inner: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM before 0.28 replaces it where the quantization is bitsandbytes, and says nothing."""

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

    return create_engine_config
