"""One decision per model and process: attach, load for all, or load alone.

Taken once, before vLLM measures free memory, and kept until `load_model`: the KV cache is
sized by it. What an engine maps it keeps mapped until no tensor views it any more.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.client.mirror import Held, Holder
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.identity import CHECKPOINT, EntryKey
from vllm_companion_plugin.core.logs import PrintableLines
from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.core.process import StartFreeze
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, LoaderInfo, Progress, Report
from vllm_companion_plugin.engine import room
from vllm_companion_plugin.engine.identity import checkpoint, code, key
from vllm_companion_plugin.engine.identity.digest import Digests, same_content
from vllm_companion_plugin.engine.progress import ProgressBar, format_bytes
from vllm_companion_plugin.engine.turns import Turn
from vllm_companion_plugin.engine.vllm import compat
from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    LeaseLostError,
    ManifestError,
    NotShareableError,
    ParityError,
    TicketError,
)
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths, digests_directory
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.tensors import checksum
from vllm_companion_plugin.memory.tensors.views import check_dtypes
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.manifest import check_manifest_fits, manifest_from_bytes

logger = init_logger("vllm.companion")
logger.addFilter(PrintableLines())

# Source formats that read no checkpoint.
_WITHOUT_CHECKPOINT = ("dummy",)


@dataclass
class Attach:
    """The weights are held: map them. Owns lease and arena.

    Attributes:
        wanted: the key of this engine's own checkpoint; `key` may be that of a copy.
    """

    device: compat.EngineDevice
    wanted: EntryKey
    key: EntryKey
    lease: Lease
    ready: Ready
    manifest: Manifest
    arena: arenas.Arena
    seconds: float
    """Since the question, of which `waited_s` for somebody else to load."""
    waited_s: float
    announced: bool = False
    """Whether vLLM subtracted it from this engine's memory budget."""
    checkpoint: Path | None = None
    """Where this engine would have loaded from."""

    def announce(self) -> int:
        """The bytes to subtract."""
        self.announced = True
        return self.arena.info.size_bytes

    def close(self) -> None:
        self.arena.close()
        self.lease.release()


@dataclass
class Load:
    """Elected: load, publish, keep. Owns lease and election."""

    device: compat.EngineDevice
    key: EntryKey
    lease: Lease
    granted: Granted
    election: LoaderElection
    checkpoint: Path | None
    content: dict[str, str]
    folders: tuple[str, ...] = ()
    digests: Digests = field(default_factory=Digests)

    @property
    def checkpoint_bytes(self) -> int:
        """For progress; 0 if not known."""
        try:
            return checkpoint.weight_bytes(self.checkpoint) if self.checkpoint else 0
        except OSError:
            return 0

    def check_unchanged(self) -> None:
        """Raise `NotShareableError` if what was loaded may not be what the key names."""
        if self.checkpoint is None:
            return
        now = checkpoint.identity(self.checkpoint, self.digests, self.folders)
        if now != self.content:
            names = sorted(name for name in now.keys() | self.content.keys() if now.get(name) != self.content.get(name))
            raise NotShareableError(f"{', '.join(names)} of {self.checkpoint} changed while it was loaded.")

    def close(self) -> None:
        self.election.release()
        self.lease.release()


@dataclass
class Alone:
    """Load normally, without the companion, for `reason`; `failure` is the code of the error, if it is one."""

    reason: str
    failure: str = ""


Decision = Attach | Load | Alone


@dataclass(frozen=True)
class Outcome:
    """What became of one model in this process.

    Attributes:
        what: "attached", "copied", "published" or "alone".
        model: as the engine names it.
        role: "target" or "draft".
        rank: as in its key; empty if alone.
        reason: why it is alone, or which variant it published; empty otherwise.
        size_bytes: of the arena, 0 if alone.
        seconds: from the decision's question to the finished model; of an attached one.
        ways: modules by the way in which their post-processing was run.
    """

    what: str
    model: str
    role: str = "target"
    rank: str = ""
    reason: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    ways: Mapping[str, int] = field(default_factory=dict)


# By id of the model config, until that is gone.
_decisions: dict[int, Decision] = {}
# By id of a draft's model config: fields of its key, noted before its target was built, and the target's key.
_drafts: dict[int, tuple[dict[str, str], EntryKey]] = {}
_target: weakref.ref[nn.Module] | None = None
_connections: dict[str, CompanionConnection] = {}
# What this process maps or published, by number: how to give it back. For as long as a tensor views it.
_kept: dict[int, tuple[str, Callable[[], None]]] = {}
_numbers = itertools.count()
_freeze = StartFreeze("vllm")
# Numbers of what no tensor views any more. Put there by whatever thread collects garbage, wherever it stands.
_unused: queue.SimpleQueue[int] = queue.SimpleQueue()
outcomes: list[Outcome] = []
"""Of every model loaded in this process, in order."""


def settings_for(vllm_config: Any, settings: Settings) -> Settings:
    """`settings`, with a copy for an engine that writes to its weights while it serves."""
    return settings if compat.must_own_reason(vllm_config) is None else replace(settings, share="copy")


def decide(vllm_config: Any, model_config: Any, settings: Settings) -> Decision:
    """The decision for this model, taken at the first call. Blocks while another engine loads.

    Raises:
        CompanionError: sharing is impossible and `fallback` is off.
    """
    known = _decisions.get(id(model_config))
    if known is None:
        try:
            if compat.is_draft(vllm_config, model_config):
                known = _decide_draft(vllm_config, model_config, settings)
            else:
                known = _decide(vllm_config, model_config, settings)
        except Exception as error:  # whatever it is, the engine can still load by itself
            if not settings.fallback:
                raise
            logger.debug("No decision", exc_info=True)
            known = (
                Alone(str(error), error.code)
                if isinstance(error, CompanionError)
                else Alone(f"{type(error).__name__}: {error}", CompanionError.code)
            )
        _note(_decisions, model_config, known)
    return known


def _note(table: dict[int, Any], config: Any, value: Any) -> None:
    """`table[id(config)] = value`, as long as `config` lives."""
    table[id(config)] = value
    weakref.finalize(config, _drop, table, id(config)).atexit = False


def _drop(table: dict[int, Any], number: int) -> None:
    """An engine has ended before it carried out what was decided: nobody shall wait for it."""
    value = table.pop(number, None)
    if isinstance(value, (Attach, Load)):
        value.close()


def forget(model_config: Any) -> None:
    """The decision was carried out or has failed; a later load decides anew."""
    _decisions.pop(id(model_config), None)


def keep(decision: Attach | Load, settings: Settings, held: Held, arena: arenas.Arena) -> None:
    """Hold the lease, whatever becomes of the companion, until no tensor views `arena`, or the process ends."""
    lease = decision.lease
    try:
        holder = Holder(decision.device.id, settings, held, lease, _client_name())
    except CompanionError as error:
        logger.warning("%s will be loaded again if its companion dies: %s", held.key.title, error)
        _keep_until_unused(arena, held.key.title, lease.release)
        return
    _keep_until_unused(arena, held.key.title, holder.close)
    if isinstance(decision, Load):
        # Whoever waits to load it will find it then, if the companion has ended while we loaded.
        holder.wait_known(settings.spawn_timeout_s)


def _keep_until_unused(arena: arenas.Arena, title: str, give_back: Callable[[], None]) -> None:
    number = next(_numbers)
    _kept[number] = title, give_back
    weakref.finalize(arena, _unused.put, number).atexit = False
    _start_giving_back()


@functools.cache
def _start_giving_back() -> None:
    threading.Thread(target=_give_back, name="companion-give-back", daemon=True).start()


def _give_back() -> None:
    """End the leases of models that are gone, as in a process that runs one engine after the other."""
    while True:
        title, give_back = _kept.pop(_unused.get())
        give_back()
        logger.info("%s is not in use here any more, and given back.", title)


def record(
    outcome: Outcome, *, device_id: str = "", key_id: str = "", attach_s: float = 0.0, failure: str = ""
) -> None:
    """Note what became of a model, and let its companion count it.

    Args:
        device_id: whose companion; empty for every one that was asked.
        attach_s: without waiting for others.
        failure: code of the error that prevented sharing.
    """
    outcomes.append(outcome)
    report(device_id, Report(key_id, outcome.what, attach_s, failure))


def report(device_id: str, text: Report) -> None:
    """Tell the companion of a device, or every one that was asked if it is empty."""
    for connection in _connections.values():
        if device_id in ("", connection.device):
            connection.report(text)


def not_shared(model: str, role: str, reason: str, failure: str) -> None:
    """This engine has weights of its own, and says why."""
    logger.warning("Weights of %s are not shared: %s", model if role == "target" else f"{model} ({role})", reason)
    record(Outcome("alone", model, role, reason=reason), failure=failure)


def set_target(model: nn.Module) -> None:
    """`model` is what a draft loaded later is a draft of."""
    global _target
    _target = weakref.ref(model)


def target() -> nn.Module | None:
    """The model that was loaded last and is no draft."""
    return _target() if _target is not None else None


def external_bytes(vllm_config: Any, settings: Settings) -> int:
    """Bytes of this engine's weights that the companion already holds on its device.

    vLLM subtracts them from the engine's memory budget, so that an attached engine gets the
    KV cache it would have got had it loaded the weights itself.
    """
    if settings_for(vllm_config, settings).share == "copy":
        return 0
    decision = decide(vllm_config, vllm_config.model_config, settings)
    if not isinstance(decision, Attach):
        return 0
    draft = _draft_if_held(vllm_config, settings)
    return decision.announce() + (draft.announce() if draft is not None else 0)


def _draft_if_held(vllm_config: Any, settings: Settings) -> Attach | None:
    """The decision for this engine's draft if somebody has it. Otherwise it is taken when the draft is loaded.

    Never elected here: the device's lock would be held while the target is loaded, which other ranks of
    this engine may wait for.
    """
    if not compat.loads_draft_alike(vllm_config):
        return None
    draft = compat.draft_config(vllm_config)
    if (known := _decisions.get(id(draft))) is not None:
        return known if isinstance(known, Attach) else None
    try:
        decision = _decide_draft(vllm_config, draft, settings, may_load=False)
    except Exception as error:
        logger.debug("Nothing is known of the draft yet: %s", error)
        return None
    if not isinstance(decision, Attach):
        return None
    _note(_decisions, draft, decision)
    return decision


def _decide(vllm_config: Any, model_config: Any, settings: Settings) -> Decision:
    if reason := compat.unshareable_reason(vllm_config):
        raise NotShareableError(reason)
    with Turn(settings.wait_timeout_s) as turn:
        device = compat.engine_device(vllm_config, settings.arena)
        turn.announce(device.id)
        checksum.prepare(device.torch_device)
        return _decide_target(device, vllm_config, model_config, settings, turn.wait)


def _decide_target(
    device: compat.EngineDevice,
    vllm_config: Any,
    model_config: Any,
    settings: Settings,
    wait_for_turn: Callable[[], None],
) -> Decision:
    found = _find(vllm_config, model_config, settings)
    wanted = key.compute(vllm_config, model_config, device, compat.source_text(settings), found.path, found.content)
    if settings.gc_freeze:  # by now the model's modules are imported, and nothing of its weights is here
        _freeze.begin()
    draft = compat.draft_config(vllm_config)
    fields = key.draft_fields(vllm_config, draft) if draft is not None else {}
    decision = _obtain(vllm_config, device, wanted, found, settings, wait_for_turn=wait_for_turn)
    if draft is not None:
        _note(_drafts, draft, (fields, decision.key))
    # Before vLLM measures, and with the draft, which is in use from now on: nobody may drop it for us.
    together = [decision] if isinstance(decision, Load) else [decision, _draft_if_held(vllm_config, settings)]
    _make_room(decision, [each for each in together if isinstance(each, Attach)], vllm_config, settings)
    return decision


def _decide_draft(vllm_config: Any, draft: Any, settings: Settings, *, may_load: bool = True) -> Decision:
    """Of a draft. This process waits for no lock of its own: its target is loaded, or mapped, by then."""
    if not compat.has_draft_weights(vllm_config):
        return Alone("its drafts come from the target, without weights of their own")
    if id(draft) not in _drafts:
        raise NotShareableError("a draft is shared together with its target, which is not")
    fields, target_key = _drafts[id(draft)]
    found = _find(vllm_config, draft, settings)
    wanted = key.compute_draft(fields, draft, target_key, compat.source_text(settings), found.path, found.content)
    device = compat.engine_device(vllm_config, settings.arena)
    return _obtain(vllm_config, device, wanted, found, settings, may_load=may_load)


def decide_variant(
    refused: Attach, error: ParityError, vllm_config: Any, model_config: Any, settings: Settings
) -> Attach | Load:
    """The decision for a model that differs from what is held under its key: attach to one like it, or load that.

    Raises:
        CompanionError: it cannot be shared.
    """
    wanted = key.variant(refused.wanted, error.where, error.here)
    logger.info("%s is held, but differs: %s It is a variant of its own.", refused.key.title, error)
    return _obtain(vllm_config, refused.device, wanted, _find(vllm_config, model_config, settings), settings)


def _obtain(
    vllm_config: Any,
    device: compat.EngineDevice,
    wanted: EntryKey,
    found: _Found,
    settings: Settings,
    *,
    may_load: bool = True,
    wait_for_turn: Callable[[], None] = lambda: None,
) -> Attach | Load:
    own = compat.must_own_reason(vllm_config)
    # Not by itself: publishing leaves a copy on the device that this engine has no use for.
    may_load = may_load and (own is None or settings.share == "copy" or not settings.fallback)
    try:
        decision = _ask(device, wanted, found, settings, may_load, wait_for_turn)
    except (CompanionUnavailableError, LeaseLostError, TicketError) as error:
        # It may have ended between our question and its answer: then another one can be started, once.
        logger.info("The companion of %s went away (%s); asking again.", device.id, error)
        if isinstance(error, CompanionUnavailableError):
            _connections.pop(device.id, None)  # its channel would wait in its backoff, whoever listens there by now
        decision = _ask(device, wanted, found, settings, may_load, wait_for_turn)
    except EntryNotFoundError:
        if own is None:
            raise
        raise NotShareableError(
            f"{own} while serving, and nobody holds them to be copied "
            """(`vllm-companion serve`, or --model-loader-extra-config '{"share": "copy"}', would)"""
        ) from None
    if own and isinstance(decision, Attach):
        logger.info("This engine copies the weights instead of mapping them: %s while serving.", own)
    return decision


def _ask(
    device: compat.EngineDevice,
    wanted: EntryKey,
    found: _Found,
    settings: Settings,
    may_load: bool,
    wait_for_turn: Callable[[], None],
) -> Attach | Load:
    """Attach to `wanted`, or to what has the same content; or be elected to load it."""
    started = time.perf_counter()
    connection = _connection(device.id, settings)
    if _held(connection.status(), wanted, settings, (EntryState.READY,)) is None:
        wait_for_turn()  # what is there can be mapped by all ranks at once
    asked = _held(connection.status(), wanted, settings, (EntryState.READY, EntryState.LOADING)) or wanted
    while True:
        lease = connection.attach(asked, may_load=may_load, client_name=_client_name())
        election = None
        try:
            waiting = time.perf_counter()
            with ProgressBar("Waiting for weights") as bar:
                outcome = lease.wait(settings.wait_timeout_s, lambda loader: _show_waiting(bar, loader))
            if isinstance(outcome, Ready):
                attached = _open(device, wanted, asked, lease, outcome, started, time.perf_counter() - waiting)
                attached.checkpoint = found.path
                return attached
            election = _elect(device.id, asked, settings, outcome.publication)
            # Whoever loaded before us may have published the same content from another directory.
            status = connection.status()
            # Or somebody had loaded this, and handed it to the companion that followed the one that elected them.
            held = _held(status, wanted, settings, (EntryState.READY,))
            if held is None:
                _explain(status, wanted)
                return Load(device, asked, lease, outcome, election, *vars(found).values())
        except BaseException:
            if election is not None:
                election.release()
            lease.release()
            raise
        election.release()
        lease.release()
        asked = held


def _make_room(decision: Attach | Load, attached: list[Attach], vllm_config: Any, settings: Settings) -> None:
    copy = settings_for(vllm_config, settings).share == "copy"  # which takes the memory once more
    room.make_room(
        _connections[decision.device.id],
        decision.device,
        vllm_config,
        [decision.key, *(each.key for each in attached)],
        load_bytes=decision.checkpoint_bytes if isinstance(decision, Load) else 0,
        mapped_bytes=0 if copy else sum(each.arena.info.size_bytes for each in attached),
    )


def _client_name() -> str:
    return f"vLLM {compat.versions()['vllm']}"


def _held(
    status: CompanionStatus, wanted: EntryKey, settings: Settings, states: tuple[EntryState, ...]
) -> EntryKey | None:
    """The key under which the companion has what `wanted` names: its own, or that of a copy of the checkpoint."""
    others = [entry.key for entry in status.entries if entry.state in states]
    if any(other.id == wanted.id for other in others):
        return wanted
    if not wanted.files:
        return None
    digests = Digests(digests_directory(settings), settings.wait_timeout_s)
    for other in others:
        if _differs_only_in_checkpoint(wanted, other) and same_content(wanted, other, digests):
            logger.info("%s has the content of %s, whose entry is used.", wanted.source, other.source)
            return other
    return None


def _differs_only_in_checkpoint(wanted: EntryKey, other: EntryKey) -> bool:
    names = wanted.fields.keys() | other.fields.keys()
    different = {name for name in names if wanted.fields.get(name) != other.fields.get(name)}
    return (wanted.role, wanted.rank, different) == (other.role, other.rank, {CHECKPOINT})


def _explain(status: CompanionStatus, wanted: EntryKey) -> None:
    """Say why a model of this name that is held is not the one that is wanted."""
    ready = [entry.key for entry in status.entries if entry.state is EntryState.READY]
    same = [k for k in ready if (k.model, k.role, k.rank) == (wanted.model, wanted.role, wanted.rank)]
    if same:
        text = wanted.nearest_text(same)
        logger.info("%s is held, but loaded differently, so it is loaded once more: %s.", wanted.model, text)


@dataclass
class _Found:
    """Where a checkpoint is and what it contains, as `Load` has it."""

    path: Path | None
    content: dict[str, str]
    folders: tuple[str, ...]
    digests: Digests


def _find(vllm_config: Any, model_config: Any, settings: Settings) -> _Found:
    digests = Digests(digests_directory(settings), settings.wait_timeout_s)
    path = _checkpoint(vllm_config, model_config, settings)
    if path is None:
        return _Found(None, {}, (), digests)
    model_class = compat.model_class(vllm_config, model_config)
    folders = tuple(code.folders(model_class, path)) if model_class is not None else ()
    return _Found(path, checkpoint.identity(path, digests, folders), folders, digests)


def _checkpoint(vllm_config: Any, model_config: Any, settings: Settings) -> Path | None:
    if settings.source_format in _WITHOUT_CHECKPOINT:
        return None
    if reason := compat.elsewhere_reason(model_config, settings):
        raise NotShareableError(reason)
    load_config = vllm_config.load_config
    source = compat.source_loader(load_config, settings.source_format)
    return checkpoint.ensure_downloaded(source, model_config, load_config)


def _connection(device_id: str, settings: Settings) -> CompanionConnection:
    known = _connections.get(device_id)
    if known is None or not is_listening(device_paths(device_id, settings)):
        known = _connections[device_id] = connect(device_id, settings, spawn=True)
    return known


def _open(
    device: compat.EngineDevice,
    wanted: EntryKey,
    entry_key: EntryKey,
    lease: Lease,
    ready: Ready,
    started: float,
    waited_s: float,
) -> Attach:
    manifest = manifest_from_bytes(ready.manifest)
    check_manifest_fits(manifest, ready.arena)
    check_dtypes(manifest)
    if manifest.stage is not device.stage:
        raise ManifestError(
            f"{entry_key.title} was published {manifest.stage.value}; {device.id} needs {device.stage.value}."
        )
    arena = arenas.open_arena(ready.arena, ready.redeem(), device.torch_device.index)
    return Attach(device, wanted, entry_key, lease, ready, manifest, arena, time.perf_counter() - started, waited_s)


def _elect(device_id: str, entry_key: EntryKey, settings: Settings, publication: Publication) -> LoaderElection:
    """The right to load on a device. Who waits for this load hears meanwhile that it gets on as the one before does."""
    election = LoaderElection(device_paths(device_id, settings))
    began, holders = time.monotonic(), [""]

    def on_wait(holder: str) -> None:
        if holder != holders[-1]:
            holders.append(holder)
            logger.info("Waiting to load on %s: %s", device_id, holder)
        publication.report(Progress(f"waiting for its turn ({time.monotonic() - began:.0f} s)"))

    election.acquire(
        settings.wait_timeout_s, f"pid {os.getpid()} loading {entry_key.model} ({entry_key.rank})", on_wait
    )
    return election


def _show_waiting(bar: ProgressBar, loader: LoaderInfo) -> None:
    progress = loader.progress
    age_s = max(0.0, time.time() - loader.since_unix_s)
    bar.update(
        progress.done_bytes,
        progress.total_bytes,
        f"Waiting for weights: pid {loader.pid} is {progress.phase} for {age_s:.0f} s",
    )
    logger.debug("Waiting: %s", format_bytes(progress.done_bytes, progress.total_bytes))
