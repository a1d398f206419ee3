"""What the loader of `--load-format companion` does: decide how a model comes by its weights, and have it done."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.engine import again
from vllm_companion_plugin.engine.attach import attach_model
from vllm_companion_plugin.engine.decide import decide, decide_variant, external_bytes, settings_for
from vllm_companion_plugin.engine.decisions import Alone, Attach, Decision, Load
from vllm_companion_plugin.engine.live import LiveModel, engine_of
from vllm_companion_plugin.engine.publish import load_and_publish
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import budget, drafts, sources
from vllm_companion_plugin.engine.vllm.naming import named_as_source
from vllm_companion_plugin.engine.vllm.sleep import let_sleep
from vllm_companion_plugin.engine.vllm.updating import let_update
from vllm_companion_plugin.engine.vllm.writing import about_to_write, let_write
from vllm_companion_plugin.errors import CompanionError, ParityError
from vllm_companion_plugin.settings import Settings

logger = init_logger("vllm.companion")


class Loading:
    """The work of one `CompanionModelLoader`.

    Args:
        load_config: of vLLM, with the load format `companion`.
        settings: of this engine, before `settings_for`.
    """

    def __init__(self, load_config: Any, settings: Settings) -> None:
        self._load_config = load_config
        self._settings = settings

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Read the checkpoint into `model`, which gets memory of its own first. Raises as `about_to_write`."""
        about_to_write("load_weights", current().engine_of(model))
        self.source().load_weights(model, model_config)

    def external_bytes(self, vllm_config: Any) -> int:
        """How many bytes of weights the companion holds for this engine."""
        return external_bytes(vllm_config, self._settings)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model with its weights: attached, loaded for all, or loaded alone."""
        before = current().attachments()
        with named_as_source(vllm_config.load_config):
            model = self._load_model(vllm_config, model_config, prefix)
        for attachment in current().attachments():
            if attachment not in before and current().written is None:
                let_sleep(attachment.device)
                current().belongs_to(model, engine_of(vllm_config))
                let_write(model)
        if current().written is None:
            let_update()
        if not drafts.is_draft(vllm_config, model_config):
            current().set_target(model)
        return model

    def _load_model(self, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        decision = decide(vllm_config, model_config, self._settings)
        self._settings = settings_for(vllm_config, self._settings)
        current().forget(model_config)
        while isinstance(decision, Attach):
            try:
                model = attach_model(decision, vllm_config, model_config, prefix, self._settings)
            except CompanionError as error:
                decision = self._refused(decision, error, vllm_config, model_config)
            else:
                self._keep(decision, vllm_config, model_config, prefix)
                return model
        if isinstance(decision, Load):
            try:
                source = self.source(vllm_config)
                key, settings = decision.key, self._settings
                load_again = again.loader_of(
                    decision.device, key, decision.found.content, vllm_config, model_config, prefix, settings
                )

                def keep(attachment: Attachment) -> None:
                    engine = weakref.ref(engine_of(vllm_config))
                    live = LiveModel(attachment, settings, load_again, engine, is_alone=attachment.is_private)
                    current().keep(live, published=True)

                model = load_and_publish(decision, source, vllm_config, model_config, prefix, settings, keep)
            except BaseException:
                decision.close()
                raise
            return model
        role = "draft" if drafts.is_draft(vllm_config, model_config) else "target"
        current().not_shared(model_config.model, role, decision.reason, decision.failure)
        source = self.source(vllm_config)
        alone: nn.Module = source.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return alone

    def source(self, vllm_config: Any = None) -> BaseModelLoader:
        """What reads the checkpoint."""
        wanted = self._settings.source_format
        used = wanted if vllm_config is None else sources.source_format(wanted, vllm_config)
        if used != wanted:
            logger.info("Reading with %s instead of %s, which needs all ranks at once.", used, wanted)
        return sources.source_loader(self._load_config, used)

    def _keep(self, decision: Attach, vllm_config: Any, model_config: Any, prefix: str) -> None:
        if self._settings.share == "copy":
            decision.close()
            return
        attachment = decision.attachment
        key, content = attachment.held.key, decision.found.content
        load = again.loader_of(decision.device, key, content, vllm_config, model_config, prefix, self._settings)
        current().keep(LiveModel(attachment, self._settings, load, weakref.ref(engine_of(vllm_config))))
        if not decision.announced:
            budget.adjust_budget(-attachment.size_bytes, attachment.held.published.ready_unix_s)

    def _refused(self, decision: Attach, error: CompanionError, vllm_config: Any, model_config: Any) -> Decision:
        """What to do instead of an attach that failed: another variant of the entry, or a normal load."""
        self._give_up(decision)
        reason = str(error)
        if isinstance(error, ParityError) and error.where:
            try:
                return decide_variant(decision, error, vllm_config, model_config, self._settings)
            except CompanionError as other:
                reason = f"{reason} It becomes no variant: {other}"
        if not self._settings.fallback:
            raise error
        return Alone(reason, error.code)

    def _give_up(self, decision: Attach) -> None:
        """Undo an attach that failed, so that whatever comes next finds the memory that it needs."""
        external = decision.attachment.size_bytes
        gc.collect()  # the half-built model must not view the arena any more
        decision.close()
        if decision.announced:
            budget.adjust_budget(external)
        if decision.device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
