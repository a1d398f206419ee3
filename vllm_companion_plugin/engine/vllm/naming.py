"""The name of the load format, as vLLM sees it where it decides something by that name.

Some formats read no checkpoint, some hold tied embeddings once, some are needed for an object store. With a companion
the checkpoint is read by another format than the one that was asked for, so vLLM is shown that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_companion_plugin.settings import resolve_extra_config

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
