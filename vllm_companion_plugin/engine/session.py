"""What the engines of this process have decided, map and publish. vLLM's hooks find it by `current()`."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.logs import PrintableLines
from vllm_companion_plugin.core.process import StartFreeze
from vllm_companion_plugin.core.status import Report
from vllm_companion_plugin.core.text import short_name
from vllm_companion_plugin.engine.decisions import Attach, Decision, Load, Outcome
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.engine.switching import Switch
from vllm_companion_plugin.engine.vllm import deployment
from vllm_companion_plugin.errors import EntryNotFoundError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.settings import Settings

logger = init_logger("vllm.companion")
logger.addFilter(PrintableLines())


class EngineSession:
    """One a process; it may run several engines, one after the other.

    Attributes:
        outcomes: of every model that was loaded in this process, in order.
        written: the entry that this process is there to write, if it is headless: it runs no model, and uses no other.
    """

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.written: EntryKey | None = None
        # Other generations of its models, prepared and not mapped yet; or mapped, with the ways back.
        self._switch: Switch | None = None
        # By id of the model config, until that is gone.
        self._decisions: dict[int, Decision] = {}
        # By id of a draft's model config: fields of its key, noted before its target was built, and the target's key.
        self._drafts: dict[int, tuple[dict[str, str], EntryKey]] = {}
        self._target: weakref.ref[nn.Module] | None = None
        # Of each model that this process maps: which engine has it.
        self._engines: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        # Which engine has called something of vLLM's that knows no engines; None: nobody says.
        self._acting: Any = None
        self._connections: dict[str, CompanionConnection] = {}
        self._freeze = StartFreeze("vllm")
        # What this process maps or published, by number, for as long as a tensor views it.
        self._models: dict[int, LiveModel] = {}
        self._numbers = itertools.count()
        # Numbers of what no tensor views any more. Put there by whatever thread collects garbage, wherever it stands.
        self._unused: queue.SimpleQueue[int] = queue.SimpleQueue()

    def write_only(self, key: EntryKey) -> None:
        """This process is headless: it is there to write this entry."""
        self.written = key

    # ---- decisions

    def decision(self, model_config: Any) -> Decision | None:
        """What was decided for a model and not carried out yet."""
        return self._decisions.get(id(model_config))

    def decided(self, model_config: Any, decision: Decision) -> None:
        """Keep a decision until it is carried out; it is closed if `model_config` goes before."""
        _keep_with(self._decisions, model_config, decision)

    def forget(self, model_config: Any) -> None:
        """The decision was carried out or has failed; a later load decides anew."""
        self._decisions.pop(id(model_config), None)

    def expect_draft(self, draft: Any, fields: dict[str, str], target_key: EntryKey) -> None:
        """Note what the key of a draft needs of its target, before that is built."""
        _keep_with(self._drafts, draft, (fields, target_key))

    def draft_of(self, draft: Any) -> tuple[dict[str, str], EntryKey] | None:
        """What was noted for a draft; None if its target is not shared."""
        return self._drafts.get(id(draft))

    def begin_load(self) -> None:
        """The first model is about to be built: what exists by then is left out of garbage collection for a while."""
        self._freeze.begin()

    # ---- models

    def set_target(self, model: nn.Module) -> None:
        """`model` is what a draft loaded later is a draft of."""
        self._target = weakref.ref(model)

    def target(self) -> nn.Module | None:
        """The model that was loaded last and is no draft."""
        return self._target() if self._target is not None else None

    def attachments(self) -> list[Attachment]:
        """What this process maps, published or attached, in the order in which the models were loaded."""
        return [model.attachment for model in self.models()]

    def models(self, engine: Any = None) -> list[LiveModel]:
        """What this process maps, published or attached, in the order in which it was loaded.

        Args:
            engine: only what is this engine's, as `live.engine_of` says; None: the one that acts, or all.
        """
        wanted = engine if engine is not None else self._acting
        return [model for model in list(self._models.values()) if model.attachment.in_use and model.is_of(wanted)]

    def shared_models(self, engine: Any = None) -> list[LiveModel]:
        """Of these, what others were given, too."""
        return [model for model in self.models(engine) if not model.is_alone]

    def belongs_to(self, model: nn.Module, engine: Any) -> None:
        """`model` is this engine's."""
        self._engines[model] = weakref.ref(engine)

    def engine_of(self, model: nn.Module) -> Any:
        """Which engine's it is; None if that is not known."""
        found = self._engines.get(model)
        return found() if found is not None else None

    @contextmanager
    def acting(self, engine: Any) -> Iterator[None]:
        """While open, `models` are those of this engine, which has called something that knows no engines."""
        before, self._acting = self._acting, engine
        try:
            yield
        finally:
            self._acting = before

    def keep(self, model: LiveModel, *, published: bool = False) -> None:
        """Keep what a model is bound to, whatever becomes of the companion, until no tensor views it."""
        attachment, settings = model.attachment, model.settings
        if not attachment.is_private:
            attachment.mirror(settings, client_name())
        number = next(self._numbers)
        self._models[number] = model
        attachment.leave_to_tensors(functools.partial(self._unused.put, number))
        self._start_giving_back()
        if published:
            # Other loaders of it will find it then, if the companion has ended while we loaded.
            attachment.wait_known(settings.spawn_timeout_s)

    @functools.cache  # noqa: B019 - one session a process
    def _start_giving_back(self) -> None:
        threading.Thread(target=self._give_back, name="companion-give-back", daemon=True).start()

    def _give_back(self) -> None:
        """End the leases of models that are gone, as in a process that runs one engine after the other."""
        while True:
            attachment = self._models.pop(self._unused.get()).attachment
            try:
                attachment.close()
            except Exception:  # those that follow are given back all the same
                logger.exception("%s could not be given back", attachment.held.key.short_title)
                continue
            logger.info("%s is not in use here any more, and given back.", attachment.held.key.short_title)

    # ---- new weights

    def prepare_switch(self, generations: Mapping[str, int], token: str = "", engine: Any = None) -> Switch:
        """Other generations of all models of an engine, in place of what was prepared before.

        Raises:
            EntryNotFoundError: it has no model of a companion.
            CompanionError: as `Switch`.
        """
        self.forget_switch()
        if not (models := self.shared_models(engine)):
            raise EntryNotFoundError(
                "This engine has no model of a companion.", remedy="Its log says why its weights are not shared."
            )
        self._switch = Switch(models, generations, token)
        return self._switch

    def keep_switch(self, switch: Switch) -> None:
        """Keep one that was carried out and can go back, until it is taken or forgotten."""
        self._switch = switch

    @property
    def has_switch(self) -> bool:
        """Whether anything is prepared, or kept."""
        return self._switch is not None

    def take_switch(self, token: str | None = None) -> Switch | None:
        """What was prepared, or kept, for the caller to carry out, undo or close. None if it is another token's."""
        if self._switch is None or token not in (None, self._switch.token):
            return None
        switch, self._switch = self._switch, None
        return switch

    def forget_switch(self) -> None:
        """What was prepared is not wanted. Idempotent."""
        if (switch := self.take_switch()) is not None:
            switch.close()

    # ---- companions

    def connection(self, device_id: str, settings: Settings, *, ask: bool = False) -> CompanionConnection:
        """To the companion of a device, which is started if there is none.

        Args:
            ask: make sure that it answers. Without, the first question finds that out, and saves a round trip.

        Raises:
            CompanionUnavailableError: none could be started.
        """
        known = self._connections.get(device_id)
        if known is None or not is_listening(device_paths(device_id, settings)):
            known = self._connections[device_id] = connect(device_id, settings, spawn=True, ask=ask)
        return known

    def known_connection(self, device_id: str) -> CompanionConnection | None:
        """To the companion of a device, if this process has asked it before."""
        return self._connections.get(device_id)

    def drop_connection(self, device_id: str) -> None:
        """Forget a connection whose companion has gone: its channel waits in its backoff, whoever listens there."""
        self._connections.pop(device_id, None)

    def record(
        self, outcome: Outcome, *, device_id: str = "", key_id: str = "", attach_s: float = 0.0, failure: str = ""
    ) -> None:
        """Note what became of a model, and let its companion count it.

        Args:
            device_id: whose companion; empty for every one that was asked.
            attach_s: without waiting for others.
            failure: code of the error that prevented sharing.
        """
        self.outcomes.append(outcome)
        self.report(device_id, Report(key_id, outcome.what, attach_s, failure))

    def report(self, device_id: str, text: Report) -> None:
        """Tell the companion of a device, or every one that was asked if it is empty."""
        for connection in self._connections.values():
            if device_id in ("", connection.device):
                connection.report(text)

    def not_shared(self, model: str, role: str, reason: str, failure: str) -> None:
        """This engine has weights of its own, and says why."""
        short = short_name(model)
        logger.warning("Weights of %s are not shared: %s", short if role == "target" else f"{short} ({role})", reason)
        self.record(Outcome("alone", model, role, reason=reason), failure=failure)


@functools.cache
def current() -> EngineSession:
    """The session of this process."""
    return EngineSession()


def client_name() -> str:
    """How engines are called in `status` and in other clients' messages."""
    return f"vLLM {deployment.versions()['vllm']}"


def _keep_with(table: dict[int, Any], config: Any, value: Any) -> None:
    """`table[id(config)] = value`, as long as `config` lives."""
    table[id(config)] = value
    weakref.finalize(config, _drop, table, id(config)).atexit = False


def _drop(table: dict[int, Any], number: int) -> None:
    """An engine has ended before it carried out what was decided: nobody waits for it any more."""
    value = table.pop(number, None)
    if isinstance(value, (Attach, Load)):
        value.close()
