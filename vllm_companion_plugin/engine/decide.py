"""One decision per model and process: attach, load for all, or load alone.

Taken once, before vLLM measures free memory, and kept until `load_model`: the KV cache is sized by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.identity import CHECKPOINT, EntryKey
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, LoaderInfo, Progress
from vllm_companion_plugin.core.text import duration, short_name
from vllm_companion_plugin.engine import room
from vllm_companion_plugin.engine.decisions import Alone, Attach, Decision, Found, Load
from vllm_companion_plugin.engine.identity import checkpoint, code, key
from vllm_companion_plugin.engine.identity.digest import Digests, same_content
from vllm_companion_plugin.engine.progress import ProgressBar, Waiting, format_bytes
from vllm_companion_plugin.engine.session import client_name, current
from vllm_companion_plugin.engine.turns import Turn
from vllm_companion_plugin.engine.vllm import building, devices, drafts, sharing, sources, warming
from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    LeaseLostError,
    NotShareableError,
    OvertakenError,
    ParityError,
    TicketError,
)
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths, digests_directory
from vllm_companion_plugin.memory.tensors import checksum
from vllm_companion_plugin.settings import Settings

logger = init_logger("vllm.companion")

# Source formats that read no checkpoint.
_WITHOUT_CHECKPOINT = ("dummy",)


def settings_for(vllm_config: Any, settings: Settings) -> Settings:
    """`settings`, with a copy for an engine that writes to its weights while it serves."""
    return settings if sharing.must_own_reason(vllm_config) is None else replace(settings, share="copy")


def decide(vllm_config: Any, model_config: Any, settings: Settings) -> Decision:
    """The decision for this model, taken at the first call. Blocks while another engine loads.

    Raises:
        CompanionError: sharing is impossible and `fallback` is off.
    """
    known = current().decision(model_config)
    if known is None:
        try:
            if drafts.is_draft(vllm_config, model_config):
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
        current().decided(model_config, known)
    return known


def external_bytes(vllm_config: Any, settings: Settings) -> int:
    """Bytes of this engine's weights that the companion already holds on its device.

    vLLM subtracts them from the engine's memory budget, so that an attached engine gets the
    KV cache it would have got had it loaded the weights itself.
    """
    if settings_for(vllm_config, settings).share == "copy" or current().written is not None:
        return 0  # a headless process has no share of the device that weights could be a part of
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
    if not drafts.loads_draft_alike(vllm_config):
        return None
    draft = drafts.draft_config(vllm_config)
    if (known := current().decision(draft)) is not None:
        return known if isinstance(known, Attach) else None
    try:
        decision = _decide_draft(vllm_config, draft, settings, may_load=False)
    except Exception as error:
        logger.debug("Nothing is known of the draft yet: %s", error)
        return None
    if not isinstance(decision, Attach):
        return None
    current().decided(draft, decision)
    return decision


def _decide(vllm_config: Any, model_config: Any, settings: Settings) -> Decision:
    if reason := sharing.unshareable_reason(vllm_config):
        raise NotShareableError(reason)
    with Turn(settings.wait_timeout_s) as turn:
        device = devices.engine_device(settings.arena)
        turn.announce(device.id)
        checksum.prepare(device.torch_device)
        warming.load_kernels(device.torch_device)
        return _decide_target(device, vllm_config, model_config, settings, turn.wait)


def _decide_target(
    device: devices.EngineDevice,
    vllm_config: Any,
    model_config: Any,
    settings: Settings,
    wait_for_turn: Callable[[], None],
) -> Decision:
    found = find(vllm_config, model_config, settings)
    wanted = key.compute(vllm_config, model_config, device, sources.source_text(settings), found.path, found.content)
    _check_written(wanted)
    if settings.gc_freeze:  # by now the model's modules are imported, and nothing of its weights is here
        current().begin_load()
    draft = drafts.draft_config(vllm_config)
    fields = key.draft_fields(vllm_config, draft) if draft is not None else {}
    decision = _obtain(vllm_config, device, wanted, found, settings, wait_for_turn=wait_for_turn)
    if draft is not None:
        current().expect_draft(draft, fields, decision.key)
    # Before vLLM measures, and with the draft, which is in use from now on: nobody may drop it for us.
    together = [decision] if isinstance(decision, Load) else [decision, _draft_if_held(vllm_config, settings)]
    _make_room(decision, [each for each in together if isinstance(each, Attach)], vllm_config, settings)
    return decision


def _check_written(wanted: EntryKey) -> None:
    """Raise `NotShareableError` if this process is there to write another entry than that of its model."""
    written = current().written
    if written is not None and wanted.id != written.id:
        raise NotShareableError(
            f"What is held of {written.title} was loaded differently from what a headless process would load: "
            f"{wanted.nearest_text([written])}.",
            remedy="Give it the flags of the engine that loaded it: update(..., flags=[...]).",
        )


def _decide_draft(vllm_config: Any, draft: Any, settings: Settings, *, may_load: bool = True) -> Decision:
    """Of a draft. This process waits for no lock of its own: its target is loaded, or mapped, by then."""
    if not drafts.has_draft_weights(vllm_config):
        return Alone("its drafts come from the target, without weights of their own")
    noted = current().draft_of(draft)
    if noted is None:
        raise NotShareableError("a draft is shared together with its target, which is not")
    fields, target_key = noted
    found = find(vllm_config, draft, settings)
    wanted = key.compute_draft(fields, draft, target_key, sources.source_text(settings), found.path, found.content)
    device = devices.engine_device(settings.arena)
    return _obtain(vllm_config, device, wanted, found, settings, may_load=may_load)


def decide_variant(
    refused: Attach, error: ParityError, vllm_config: Any, model_config: Any, settings: Settings
) -> Attach | Load:
    """The decision for a model that differs from what is held under its key: attach to one like it, or load that.

    Raises:
        CompanionError: it cannot be shared.
    """
    wanted = key.variant(refused.wanted, error.where, error.here)
    held = current().connection(refused.device.id, settings).status().entries
    key.check_variants(wanted, error.where, [entry.key for entry in held])
    logger.info("%s is held, but differs: %s It is a variant of its own.", refused.key.short_title, error)
    return _obtain(vllm_config, refused.device, wanted, find(vllm_config, model_config, settings), settings)


def _obtain(
    vllm_config: Any,
    device: devices.EngineDevice,
    wanted: EntryKey,
    found: Found,
    settings: Settings,
    *,
    may_load: bool = True,
    wait_for_turn: Callable[[], None] = lambda: None,
) -> Attach | Load:
    own = sharing.must_own_reason(vllm_config)
    # Not by itself: publishing leaves a copy on the device that this engine has no use for.
    may_load = (
        may_load and current().written is None and (own is None or settings.share == "copy" or not settings.fallback)
    )
    try:
        decision = _ask(device, wanted, found, settings, may_load, wait_for_turn)
    except (CompanionUnavailableError, LeaseLostError, OvertakenError, TicketError) as error:
        # Between question and answer it may have ended, so another one can be started, or an engine has handed back.
        logger.info("Asking the companion of %s again: %s", device.id, error)
        if isinstance(error, CompanionUnavailableError):
            current().drop_connection(device.id)
            # A companion that was killed may accept connections for a moment longer.
            current().connection(device.id, settings, ask=True)
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
    device: devices.EngineDevice,
    wanted: EntryKey,
    found: Found,
    settings: Settings,
    may_load: bool,
    wait_for_turn: Callable[[], None],
) -> Attach | Load:
    """Attach to `wanted`, or to what has the same content; or be elected to load it."""
    started = time.perf_counter()
    connection = current().connection(device.id, settings)
    question = _Question(connection, device, wanted, found, settings, started)
    with contextlib.suppress(EntryNotFoundError):
        attached = question.ask(wanted, may_load=False)  # one round trip, if the entry is held
        assert isinstance(attached, Attach)
        return attached
    if _held(connection.status(), wanted, settings, (EntryState.READY,)) is None:
        wait_for_turn()  # what is there can be mapped by all ranks at once
    asked = _held(connection.status(), wanted, settings, (EntryState.READY, EntryState.LOADING)) or wanted
    while True:
        answer = question.ask(asked, may_load=may_load)
        if not isinstance(answer, EntryKey):
            return answer
        asked = answer


@dataclass
class _Question:
    """One engine's question for one model, which may have to be asked for several keys."""

    connection: CompanionConnection
    device: devices.EngineDevice
    wanted: EntryKey
    found: Found
    settings: Settings
    started: float

    def ask(self, asked: EntryKey, *, may_load: bool) -> Attach | Load | EntryKey:
        """Attach, or be elected; or the key of what somebody else has published meanwhile, to be asked for.

        Raises:
            EntryNotFoundError: nobody has it nor loads it, and we may not.
        """
        settings = self.settings
        lease = self.connection.attach(asked, may_load=may_load, client_name=client_name())
        election = None
        try:
            waiting = time.perf_counter()
            with _Watcher(asked, self.connection.paths, settings) as watcher:
                outcome = lease.wait(settings.wait_timeout_s, watcher.changed, watcher.silent)
            if isinstance(outcome, Ready) or outcome.parked is not None:
                return self._attached(asked, lease, outcome, time.perf_counter() - waiting)
            election = elect(self.device.id, asked, settings, outcome.publication)
            # Whoever loaded before us may have published the same content from another directory.
            status = self.connection.status()
            # Or somebody had loaded this, and handed it to the companion that followed the one that elected them.
            held = _held(status, self.wanted, settings, (EntryState.READY,))
            if held is None:
                _explain(status, self.wanted)
                logger.info("Elected to load %s (%s) for all engines on %s.", *self._names())
                return Load(self.device, asked, lease, outcome, election, self.found)
        except BaseException:
            if election is not None:
                election.release()
            lease.release()
            raise
        election.release()
        lease.release()
        return held

    def _names(self) -> tuple[str, str, str]:
        return self.wanted.short_title, self.wanted.rank, self.device.id

    def _attached(self, asked: EntryKey, lease: Lease, outcome: Ready | Granted, waited_s: float) -> Attach:
        device = self.device
        entry = outcome if isinstance(outcome, Ready) else outcome.parked.entry if outcome.parked else None
        if entry is not None and entry.published.version and not self.settings.follow_updates:
            raise NotShareableError(
                f"what is held of {entry.key.short_title} is {entry.published.version}, which a trainer has written, "
                """and not the checkpoint (--model-loader-extra-config '{"follow_updates": true}' takes it)"""
            )
        where = device.id, device.torch_device, lease
        if isinstance(outcome, Ready):
            attachment = Attachment.open(*where, outcome, stage=device.stage)
        else:
            verify = self.settings.verify
            attachment = Attachment.bring_back(*where, outcome, self.connection, verify=verify, stage=device.stage)
        seconds = time.perf_counter() - self.started
        return Attach(device, self.wanted, asked, attachment, seconds, waited_s, self.found)


def _make_room(decision: Attach | Load, attached: list[Attach], vllm_config: Any, settings: Settings) -> None:
    copy = settings_for(vllm_config, settings).share == "copy"  # which takes the memory once more
    room.make_room(
        current().connection(decision.device.id, settings),
        decision.device,
        vllm_config,
        [decision.key, *(each.key for each in attached)],
        load_bytes=decision.checkpoint_bytes if isinstance(decision, Load) else 0,
        mapped_bytes=0 if copy else sum(each.attachment.size_bytes for each in attached),
    )


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
    alike = (wanted.kind, wanted.role, wanted.rank) == (other.kind, other.role, other.rank)
    return alike and different == {CHECKPOINT}


def _explain(status: CompanionStatus, wanted: EntryKey) -> None:
    """Say why a model of this name that is held is not the one that is wanted."""
    ready = [entry.key for entry in status.entries if entry.state is EntryState.READY]
    same = [k for k in ready if (k.model, k.role, k.rank) == (wanted.model, wanted.role, wanted.rank)]
    if same:
        text = wanted.nearest_text(same)
        logger.info(
            "%s is held, but loaded differently, so it is loaded once more: %s.", short_name(wanted.model), text
        )


def find(vllm_config: Any, model_config: Any, settings: Settings) -> Found:
    """Where the checkpoint of a model is, and what it contains. Raises `CompanionError`."""
    digests = Digests(digests_directory(settings), settings.wait_timeout_s)
    path = _checkpoint(vllm_config, model_config, settings)
    if path is None:
        return Found(None, {}, (), digests)
    model_class = building.model_class(vllm_config, model_config)
    folders = tuple(code.folders(model_class, path)) if model_class is not None else ()
    return Found(path, checkpoint.identity(path, digests, folders), folders, digests)


def _checkpoint(vllm_config: Any, model_config: Any, settings: Settings) -> Path | None:
    if settings.source_format in _WITHOUT_CHECKPOINT:
        return None
    if reason := sources.elsewhere_reason(model_config, settings):
        raise NotShareableError(reason)
    load_config = vllm_config.load_config
    source = sources.source_loader(load_config, settings.source_format)
    return checkpoint.ensure_downloaded(source, model_config, load_config)


def elect(device_id: str, entry_key: EntryKey, settings: Settings, publication: Publication) -> LoaderElection:
    """The right to load on a device. While queued, forwards the current loader's progress to clients waiting for us."""
    election = LoaderElection(device_paths(device_id, settings))
    began = time.monotonic()
    waiting = Waiting(f"its turn to load {entry_key.short_title} on {device_id}", "", settings.wait_timeout_s)

    def on_wait(holder: str) -> None:
        pid = re.match(r"pid (\d+)", holder)
        remedy = _remedy(int(pid[1])) if pid else "`vllm-companion doctor` finds it."
        waiting.news(holder or "another process", f"{holder or 'it'}. {remedy}")
        publication.report(Progress(f"waiting for its turn ({time.monotonic() - began:.0f} s)"))

    election.acquire(
        settings.wait_timeout_s,
        f"pid {os.getpid()} loading {entry_key.model} ({entry_key.rank})",
        on_wait,
        waiting.beat,
    )
    return election


class _Watcher:
    """Shows the wait for a loader, as a bar and in the log. Use as a context."""

    def __init__(self, asked: EntryKey, paths: DevicePaths, settings: Settings) -> None:
        self._waiting = Waiting(
            f"weights of {asked.short_title}",
            f"the companion of {paths.device}; `vllm-companion doctor` names what repairs it.",
            settings.wait_timeout_s,
        )
        self._bar = ProgressBar("Waiting for weights")

    def __enter__(self) -> _Watcher:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def changed(self, loader: LoaderInfo) -> None:
        progress, pid = loader.progress, loader.pid
        age = duration(time.time() - loader.since_unix_s)
        who = f"pid {pid} ({loader.client})" if pid else loader.client
        text = f"{who} is {progress.phase or 'starting'} for {age}"
        if progress.done_bytes:
            text += f", {format_bytes(progress.done_bytes, progress.total_bytes)}"
        self._waiting.news(text, f"{who}. {_remedy(pid) if pid else 'If none comes, an engine that waits loads.'}")
        description = f"[companion] {f'pid {pid}' if pid else who} is {progress.phase or 'starting'} for {age}"
        self._bar.update(progress.done_bytes, progress.total_bytes, description)

    def silent(self, seconds: float) -> None:
        self._waiting.beat(seconds, quiet=self._bar.is_shown)


def _remedy(pid: int) -> str:
    return f"If it was stopped, let it go on: kill -CONT {pid}. If it hangs, end it: kill {pid}; the next engine loads."
