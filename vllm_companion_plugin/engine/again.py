"""Loading a model once more, beside the one that sleeps: for whoever wakes when nobody has its weights any more."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import Granted, Lease
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine import decide, publish
from vllm_companion_plugin.engine.decisions import Load
from vllm_companion_plugin.engine.live import LoadAgain
from vllm_companion_plugin.engine.vllm import building, devices, sources
from vllm_companion_plugin.engine.vllm.naming import named_as_source
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.settings import Settings

logger = init_logger("vllm.companion")


def loader_of(
    device: devices.EngineDevice,
    key: EntryKey,
    content: dict[str, str],
    vllm_config: Any,
    model_config: Any,
    prefix: str,
    settings: Settings,
) -> LoadAgain:
    """What loads a model of this engine again.

    Args:
        key: under which it is published.
        content: identity of the checkpoint's files; if they are others by then, it raises.
    """
    # Of a draft vLLM keeps no configuration, and the model's layers would live as long as the engine's own one.
    ours = building.without_layers(vllm_config)

    def load(lease: Lease, granted: Granted) -> Attachment:
        logger.info("Nobody has the weights of %s any more: loading them again.", key.short_title)
        # What cannot be published is an error: a model of its own would be of no use.
        alone = replace(settings, fallback=False)
        found = decide.find(ours, model_config, alone)
        if found.content != content:
            raise NotShareableError(
                f"the checkpoint of {key.title} ({_name(found.path)}) has changed since it was loaded, so it cannot "
                "take the place of what it was. Start the engine anew."
            )
        election = decide.elect(device.id, key, alone, granted.publication)
        decision = Load(device, key, lease, granted, election, found)
        kept: list[Attachment] = []
        try:
            with (
                building.beside(ours, is_draft=key.role == "draft") as config,
                named_as_source(config.load_config),
                set_current_vllm_config(config),
            ):
                source = sources.source_loader(config.load_config, sources.source_format(alone.source_format, config))
                publish.load_and_publish(decision, source, config, model_config, prefix, alone, kept.append)
        except BaseException:
            decision.close()
            raise
        gc.collect()  # modules refer to each other, and have memory of their own
        return kept[0]

    return load


def _name(path: Path | None) -> str:
    return str(path) if path is not None else "without files"
