"""Talking to a companion: connect, look, attach, unload. Synchronous; no torch, no CUDA.

with connect("cpu", settings, spawn=True) as companion:
    with companion.attach(key, may_load=True, client_name="engine") as lease:
        match lease.wait(timeout_s=600): ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.client.lease import Granted, Lease, Parked, Ready
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.metrics import Series
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, EntryStatus, Report
from vllm_companion_plugin.core.text import sendable
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionUnavailableError,
    ProtocolMismatchError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths, read_file
from vllm_companion_plugin.host.spawn import ensure_companion, who_is_silent
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire import codec, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import open_channel, typed_error
from vllm_companion_plugin.wire.schema import Stub
from vllm_companion_plugin.wire.signals import undisturbed

__all__ = ["CompanionConnection", "Granted", "Lease", "Parked", "Publication", "Ready", "Wanted", "connect"]

logger = logging.getLogger("vllm.companion.client")

CALL_TIMEOUT_S = 10.0
NO_KEY = "-"
"""No entry has it: whoever asks for this key is told of the companion alone."""


def _query(model: str, rank: str, role: str, key_id: str) -> Any:
    """What matches entries; empty texts match any."""
    query = {"rank": rank, "role": role, "key_id": key_id}
    return messages.EntryQuery(model=model_name(model), **{name: sendable(text) for name, text in query.items()})


def _where() -> str:
    """Where our pid means something, as part of our name: " in HOST" in a container, else nothing."""
    first = 0xEFFFFFFC  # PROC_PID_INIT_INO: the pid namespace that all others are in
    with contextlib.suppress(OSError):
        if os.stat("/proc/self/ns/pid").st_ino != first:
            return f" in {socket.gethostname()}"
    return ""


def connect(device: str, settings: Settings, *, spawn: bool, ask: bool = True) -> CompanionConnection:
    """A connection to the companion of `device`; the caller closes it.

    Args:
        device: GPU or MIG UUID, or "cpu".
        spawn: start a companion if there is none.
        ask: find out whether it answers, and in which protocol; without, the first call does.

    Raises:
        RuntimeDirError: the runtime directory is unsafe.
        CompanionUnavailableError: nobody answers, or none could be started.
        ProtocolMismatchError: it speaks another protocol version.
    """
    paths = device_paths(device, settings)
    deadline = time.monotonic() + settings.spawn_timeout_s
    while True:
        if spawn:
            ensure_companion(device, settings)
        connection = CompanionConnection(paths)
        if not ask:
            return connection
        try:
            connection.check_protocol()
            return connection
        except CompanionUnavailableError:
            connection.close()
            # It may have been on its way out when it was asked; then a new one is started.
            if not spawn or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        except BaseException:
            connection.close()
            raise


class Wanted:
    """A model that is waited for, and what there was instead when it was last looked for."""

    def __init__(self, model: str, rank: str | None, role: str) -> None:
        self._model, self._rank, self._role = model_name(model), rank, role
        self._latest = "nothing"

    def in_status(self, status: CompanionStatus) -> EntryStatus | None:
        """The READY entry of it; None if there is none."""
        for entry in status.entries:
            key = entry.key
            is_it = (key.kind, key.model, key.role) == (WEIGHTS, self._model, self._role)
            if is_it and self._rank in (None, key.rank) and entry.state is EntryState.READY:
                return entry
        held = (f"{e.key.model} ({e.key.which}, {e.state.value})" for e in status.entries)
        self._latest = ", ".join(held) or self._latest
        return None

    def missed(self, device: str, timeout_s: float) -> WaitTimeoutError:
        """The error that says what there was instead."""
        return WaitTimeoutError(
            f"{self._model} ({self._role}, {self._rank or 'any rank'}) was not published on {device} within "
            f"{timeout_s:g} s; the companion has: {self._latest}.",
            remedy=f"`vllm-companion serve {self._model}` loads it; `vllm-companion status` shows how far a load is.",
        )


class CompanionConnection:
    """One channel to one companion. Thread-safe. Closing it releases its leases, but not in a fork of its process."""

    def __init__(self, paths: DevicePaths) -> None:
        self._pid = os.getpid()
        self._paths = paths
        self._channel = open_channel(paths.grpc_socket)
        self._stub = Stub(self._channel)
        self._leases: list[Lease] = []
        self._mutex = threading.Lock()  # of the leases

    @property
    def device(self) -> str:
        return self._paths.device

    @property
    def paths(self) -> DevicePaths:
        return self._paths

    def recorded_pid(self) -> int:
        """Pid that the companion wrote into its lock file, for messages; it may be out of date. 0 if there is none."""
        try:
            # kill(1) means something else by negative ones.
            return max(0, int(read_file(self._paths.companion_lock, 20) or 0))
        except (OSError, ValueError):
            return 0

    def check_protocol(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Raises `ProtocolMismatchError` unless the companion speaks our protocol version."""
        # By the message, not by the mapped status: another version's states may be unknown here.
        status = self._call("Status", messages.StatusRequest(key_id=NO_KEY), timeout_s)
        if status.protocol_version == PROTOCOL_VERSION:
            return
        older = "companion" if status.protocol_version < PROTOCOL_VERSION else "client"
        remedy = (
            f"vllm-companion stop --device {self.device}"
            if older == "companion"
            else "pip install -U vllm-companion-plugin"
        )
        raise ProtocolMismatchError(
            f"The companion of {self.device} (pid {status.pid}, version {status.version}) speaks protocol "
            f"{status.protocol_version}, this client (version {__version__}) {PROTOCOL_VERSION}; "
            f"the {older} is older.",
            remedy=remedy,
        )

    # ---- looking

    def status(self, timeout_s: float = CALL_TIMEOUT_S, *, key_id: str = "") -> CompanionStatus:
        """What the companion holds.

        Args:
            key_id: of the entries that are asked for; empty: all. An older companion answers with all of them.

        Raises:
            CompanionUnavailableError: the companion is gone.
            WaitTimeoutError: it is silent.
        """
        request = messages.StatusRequest(key_id=key_id)
        return codec.companion_status_from_message(self._call("Status", request, timeout_s))

    def metrics(self, timeout_s: float = CALL_TIMEOUT_S) -> tuple[list[float], list[Series]]:
        """Bounds of all histograms, in seconds, and what the companion has counted. Raises as `status`."""
        answer = self._call("Metrics", messages.MetricsRequest(), timeout_s)
        return list(answer.bounds_s), [codec.series_from_message(series) for series in answer.series]

    def watch(
        self, timeout_s: float | None = None, own_linger_s: float | None = None, *, from_first_client: bool = False
    ) -> Iterator[CompanionStatus]:
        """The status now and after every change, until the companion ends or the caller stops iterating.

        Args:
            own_linger_s: the companion belongs to us while we iterate, and has this linger time; negative: for ever.
            from_first_client: that time begins with the first client that comes.

        Raises:
            CompanionUnavailableError: the companion is gone.
            LeaseLostError: it belonged to us, and was stopped.
            WaitTimeoutError: `timeout_s` is over.
            AlreadyRunningError: it belongs to somebody else.
        """
        request = messages.StatusRequest()
        if own_linger_s is not None:
            own = messages.StatusRequest.Own(
                pid=os.getpid(), linger_s=own_linger_s, from_first_client=from_first_client
            )
            request.own.CopyFrom(own)
        call = self._stub.Watch(request, timeout=timeout_s)
        try:
            while (message := undisturbed(lambda: next(call, None))) is not None:
                yield codec.companion_status_from_message(message)
        except grpc.RpcError as error:
            raise typed_error(error, f"Watching the companion of {self.device}") from error
        finally:
            undisturbed(call.cancel)

    def wait_ready(self, model: str, *, rank: str | None = None, role: str = "target", timeout_s: float) -> EntryStatus:
        """The READY entry of `model` (and `rank`), as soon as there is one; with MTP, a model is its own draft too.

        Raises:
            WaitTimeoutError: there was none for `timeout_s`.
            CompanionUnavailableError: the companion is gone.
        """
        wanted = Wanted(model, rank, role)
        with contextlib.suppress(WaitTimeoutError):
            for status in self.watch(timeout_s):
                if (entry := wanted.in_status(status)) is not None:
                    return entry
        raise wanted.missed(self.device, timeout_s)

    # ---- acting

    def report(self, report: Report) -> None:
        """Tell the companion what to count. Never blocks and never fails: it may be lost."""
        with contextlib.suppress(CompanionUnavailableError):  # the channel was closed
            call = self._stub.Report.future(codec.report_to_message(report), timeout=CALL_TIMEOUT_S)
            call.add_done_callback(_log_lost_report)

    def attach(
        self,
        key: EntryKey | None = None,
        *,
        model: str = "",
        rank: str = "",
        role: str = "",
        key_id: str = "",
        may_load: bool,
        client_name: str,
        held_generation: int = 0,
        passive: bool = False,
        asleep: int | None = None,
        known_manifest: bytes = b"",
    ) -> Lease:
        """Ask for the entry of `key`, or for the only one that model, rank, role and key id match.

        Returns at once; `Lease.wait` tells the outcome, errors too. The caller releases the lease.

        Args:
            may_load: may be elected to load it; needs a key.
            client_name: who we are, for `status` and other clients' messages.
            held_generation: this process maps that generation of the entry of `key`, and can publish it again.
            passive: it only holds the entry for the next companion, and keeps nobody from unloading it.
            asleep: this process sleeps on the entry of `key`, at this level; the lease only tells so.
            known_manifest: one that this process has: it is not sent if it is the entry's.
        """
        if key is not None and (model or rank or role or key_id):
            raise BadRequestError("Attach by key or by query, not by both.")
        request = messages.AttachRequest(protocol_version=PROTOCOL_VERSION, may_load=may_load, pid=os.getpid())
        request.client = sendable(client_name) + _where()
        request.held_generation = held_generation
        request.passive = passive
        if asleep is not None:
            request.asleep = asleep
        if key is not None:
            request.key.CopyFrom(codec.key_to_message(key))
        else:
            request.query.CopyFrom(_query(model, rank, role, key_id))
        name = key.model if key is not None else model or key_id or "the only entry"
        label = f"{name} on {self.device}"
        lease = Lease(self._stub, self._paths, request, label, known_manifest=known_manifest)
        with self._mutex:
            self._leases = [other for other in self._leases if not other.released] + [lease]
        return lease

    def unload(
        self, *, model: str = "", rank: str = "", role: str = "", key_id: str = "", force: bool = False
    ) -> tuple[EntryStatus, ...]:
        """Unload what matches (everything, by default); what it was.

        Raises:
            EntryNotFoundError: nothing matches.
            EntryInUseError: somebody uses it and `force` is false; nothing was unloaded.
        """
        query = _query(model, rank, role, key_id)
        response = self._call("Unload", messages.UnloadRequest(query=query, force=force))
        return tuple(codec.entry_status_from_message(entry) for entry in response.unloaded)

    def make_current(
        self, generation: int, *, model: str = "", rank: str = "", role: str = "", key_id: str = "", base: int = 0
    ) -> tuple[EntryStatus, ...]:
        """Make this generation of what matches the current one; what it is then.

        Args:
            base: the generation that must be current now; 0: whichever.

        Raises:
            EntryNotFoundError: nothing matches, or it is not held. Nothing has changed.
            StaleError: another generation than `base` is current. Nothing has changed.
            BadRequestError: what is given is no number of a generation.
        """
        query = _query(model, rank, role, key_id)
        generation, base = codec.generation_to_message(generation), codec.generation_to_message(base)
        response = self._call("MakeCurrent", messages.MakeCurrentRequest(query=query, generation=generation, base=base))
        return tuple(codec.entry_status_from_message(entry) for entry in response.entries)

    def make_room(self, size_bytes: int) -> tuple[EntryStatus, ...]:
        """Drop entries that nobody uses and that would expire, until they make so many bytes; what they were.

        The longest idle go first, and none if all together would not do. Their memory is free a moment later.
        """
        response = self._call("MakeRoom", messages.MakeRoomRequest(size_bytes=size_bytes))
        return tuple(codec.entry_status_from_message(entry) for entry in response.dropped)

    def shutdown(self, *, replaced: bool = False) -> int:
        """End the companion; its pid. Clients keep what they have mapped.

        Args:
            replaced: another one follows, to which clients shall hand it back.

        Raises:
            EntryInUseError: not now, as something is being loaded, or held by nobody who could hand it back.
        """
        return int(self._call("Shutdown", messages.ShutdownRequest(replaced=replaced)).pid)

    def _call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            typed = typed_error(error, f"{method} of the companion of {self.device}")
            if isinstance(typed, WaitTimeoutError):
                typed = WaitTimeoutError(f"{method}: waited {timeout_s:g} s for {who_is_silent(self._paths)}")
            raise typed from error

    @property
    def has_leases(self) -> bool:
        """Whether a companion knows of this process by a lease of this connection."""
        with self._mutex:
            return any(not lease.is_over for lease in self._leases)

    def close(self) -> None:
        """Release all leases and close the channel. Idempotent."""
        if os.getpid() != self._pid:  # the channel is its parent's, whose threads gRPC would wait for
            return
        with self._mutex:
            leases, self._leases = self._leases, []
        try:
            for lease in leases:
                lease.release()
        finally:  # it ends all that has not ended, if somebody interrupts this
            undisturbed(self._channel.close)

    def __enter__(self) -> CompanionConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _log_lost_report(call: Any) -> None:
    if call.code() is not grpc.StatusCode.OK:
        logger.debug("A report was not taken: %s", call.details())
