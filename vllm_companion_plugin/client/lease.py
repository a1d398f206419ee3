"""A client's lease: its open stream, and what the companion says on it.

A daemon thread reads the stream, so the end of the companion is noticed at once, also by a
client that waits for nothing. Only `Lease.wait` interprets what was read.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import LoaderInfo, Published
from vllm_companion_plugin.errors import (
    CommitUnknownError,
    CompanionError,
    LeaseLostError,
    ManifestError,
    WaitTimeoutError,
    from_code,
)
from vllm_companion_plugin.host.runtime_dir import DevicePaths
from vllm_companion_plugin.host.spawn import who_is_silent
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.wire import codec, fd_channel, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.manifest import MAX_MANIFEST_BYTES
from vllm_companion_plugin.wire.rpc import is_answer, typed_error
from vllm_companion_plugin.wire.schema import Stub
from vllm_companion_plugin.wire.signals import undisturbed

logger = logging.getLogger("vllm.companion.lease")

FD_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 30.0
WAKE_TIMEOUT_S = 5.0
"""Then whoever wakes attaches, and waits as that does."""
TICK_S = 1.0


@dataclass(frozen=True)
class Ready:
    """The entry is published. `manifest` has the length and sha256 that were announced.

    Attributes:
        key: of the entry, in full, also for a client that attached by query.
        published: to be given back with it, should its companion die.
    """

    key: EntryKey
    generation: int
    arena: ArenaInfo
    manifest: bytes
    published: Published
    _fd_socket: str
    _ticket: bytes

    def redeem(self) -> Descriptors:
        """The arena's descriptors, one a block, in order; the caller owns them. Works once.

        Raises:
            TicketError: spent, or more than 30 s after the lease became ready.
            CompanionUnavailableError, WaitTimeoutError: the companion does not answer.
        """
        return fd_channel.redeem(self._fd_socket, self._ticket, len(self.arena.block_sizes), FD_TIMEOUT_S)


@dataclass(frozen=True)
class Parked:
    """The entry is in host memory alone; what it was, and shall be again, is `entry`.

    Attributes:
        host: the copy, of the same bytes.
    """

    entry: Ready
    host: ArenaInfo

    def redeem(self) -> Descriptors:
        """The descriptors of the copy; as `Ready.redeem`."""
        return fd_channel.redeem(self.entry._fd_socket, self.entry._ticket, len(self.host.block_sizes), FD_TIMEOUT_S)


@dataclass(frozen=True)
class Granted:
    """This client is elected to load, or to bring back what is `parked`."""

    publication: Publication
    parked: Parked | None = None


class Lease:
    """A claim on an entry, from the request until `release`; ends by itself with this process.

    Attributes:
        lost: set when the companion ended the lease or died. Memory that is mapped stays valid.
        retired: whether the companion has said that the entry was dropped.
        current: the generation that clients get, as far as the companion has told; 0: it has told none yet.

    Args:
        known_manifest: one that the client has, and that is not sent again.
    """

    def __init__(
        self, stub: Stub, paths: DevicePaths, request: Any, label: str, *, known_manifest: bytes = b""
    ) -> None:
        self._pid = os.getpid()
        self.lost = threading.Event()
        self.current = 0
        self._stub = stub
        self._paths = paths
        self._label = label
        self._key_id: str = request.key.id  # "" of a query
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._callbacks: list[Callable[[CompanionError], None]] = []
        self._retired_callbacks: list[Callable[[], None]] = []
        self.retired = False
        self._error: CompanionError | None = None
        self._released = False
        self._publication: Publication | None = None
        self._known_manifest = self._known_sha256 = b""
        self._know(known_manifest)
        self._token = self._deposit_ticket = b""
        self._sleeps = False  # and has told it by the token
        if known_manifest:
            request.known_manifest_sha256 = self._known_sha256
        self._call = stub.Attach(request)
        self._thread = threading.Thread(target=self._read, name="companion-lease", daemon=True)
        self._thread.start()
        _open_leases.add(self)

    # ---- waiting

    def wait(
        self,
        timeout_s: float,
        on_waiting: Callable[[LoaderInfo], None] | None = None,
        on_silence: Callable[[float], None] | None = None,
    ) -> Granted | Ready:
        """Block until this client is elected to load or the entry is ready.

        Args:
            timeout_s: longest silence; every change in what the loader reports restarts it.
            on_waiting: called at each such change with who loads and how far.
            on_silence: called about every second without such a change, with the seconds since the last one.

        Raises:
            EntryNotFoundError, NotShareableError, ProtocolMismatchError, ...: what the companion says.
            LeaseLostError, CompanionUnavailableError: the companion went away.
            ManifestError: the manifest arrived damaged.
            WaitTimeoutError: says who was waited for. The lease stays; release it.
        """
        began = since = time.monotonic()
        loader: LoaderInfo | None = None
        while True:
            event = self._next(since + timeout_s, loader, began, timeout_s, on_silence)
            kind = event.WhichOneof("event")
            if kind == "waiting":
                news = codec.loader_from_message(event.waiting.loader)
                if news != loader:
                    loader, since = news, time.monotonic()
                    if on_waiting is not None:
                        on_waiting(news)
            elif kind == "granted":
                granted = event.granted
                self._publication = Publication(
                    self._stub,
                    self._paths.fd_socket,
                    granted.lease_token,
                    granted.deposit_ticket,
                    self._label,
                    granted.generation,
                )
                self._token = granted.lease_token
                parked = None
                if granted.HasField("parked"):
                    host, _ = codec.arena_from_message(granted.host)
                    parked = Parked(self._receive_ready(granted.parked, timeout_s), host)
                return Granted(self._publication, parked)
            elif kind == "ready":
                return self._receive_ready(event.ready, timeout_s)

    def _next(
        self,
        deadline: float,
        loader: LoaderInfo | None,
        began: float,
        timeout_s: float,
        on_silence: Callable[[float], None] | None = None,
    ) -> Any:
        try:
            while on_silence is not None and time.monotonic() + TICK_S < deadline:
                with contextlib.suppress(queue.Empty):
                    event = self._events.get(timeout=TICK_S)
                    break
                on_silence(time.monotonic() - (deadline - timeout_s))
            else:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            waited = time.monotonic() - began
            who = _who(loader) if loader is not None else f"no answer of {who_is_silent(self._paths)}"
            raise WaitTimeoutError(
                f"{self._label}: waited {waited:.0f} s in all, the last {timeout_s:g} s without progress: {who}"
            ) from None
        if event is None:
            self._events.put(None)  # for the next call, too
            raise self._error or LeaseLostError(f"{self._label}: the lease was released.")
        return event

    def _know(self, manifest: bytes) -> None:
        if manifest is not self._known_manifest:
            self._known_manifest, self._known_sha256 = manifest, hashlib.sha256(manifest).digest()

    def _receive_ready(self, ready: Any, timeout_s: float, key: EntryKey | None = None) -> Ready:
        """`key`: the entry's, if the companion leaves it out because the client has it."""
        chunks: list[bytes] = []
        missing = 0 if ready.manifest_known else ready.manifest_bytes
        if missing > MAX_MANIFEST_BYTES:
            raise ManifestError(
                f"{self._label}: a manifest of {missing} bytes; at most {MAX_MANIFEST_BYTES} are allowed."
            )
        while missing > 0:
            now = time.monotonic()
            event = self._next(now + timeout_s, None, now, timeout_s)
            chunks.append(event.manifest_chunk)
            if not chunks[-1]:
                break
            missing -= len(chunks[-1])
        manifest, digest = self._known_manifest, self._known_sha256
        if not ready.manifest_known:
            manifest = b"".join(chunks)
            digest = hashlib.sha256(manifest).digest()
        if missing != 0 or digest != ready.manifest_sha256:
            raise ManifestError(f"{self._label}: the manifest arrived damaged ({len(manifest)} bytes).")
        self._known_manifest, self._known_sha256 = manifest, digest
        arena, ticket = codec.arena_from_message(ready.arena)
        key = key or codec.key_from_message(ready.key)
        if self._key_id not in ("", key.id):
            raise ManifestError(f"{self._label}: asked for {self._key_id[:12]}, and got {key.id[:12]}.")
        published = codec.published_from_message(ready.published)
        self._token = ready.lease_token
        return Ready(
            *(key, ready.generation, arena, manifest, published),
            *(self._paths.fd_socket, ticket),
        )

    # ---- sleeping

    def fall_asleep(
        self, level: int, when_asleep: WhenAsleep, leave_copy: Callable[[], tuple[int, ArenaInfo, Descriptors]]
    ) -> str:
        """Tell the companion that this client is about to unmap the entry.

        Args:
            level: as vLLM counts.
            when_asleep: what becomes of the bytes if it is the last one.
            leave_copy: makes a copy of the current generation in host memory, if it has to leave one; with its number.

        Returns:
            Where the bytes are from now on: "device", "host" or "nowhere".

        Raises:
            CompanionUnavailableError, WaitTimeoutError, BadRequestError: as the companion says.
            ArenaError: from `leave_copy`.
        """
        request = messages.SleepRequest(lease_token=self._token, level=level, when_asleep=when_asleep.value)
        while ticket := (answer := self._call_with_token("Sleep", request)).deposit_ticket:
            try:
                request.host_generation, info, fds = leave_copy()
                with fds:
                    fd_channel.deposit(self._paths.fd_socket, ticket, fds, FD_TIMEOUT_S)
            except BaseException:
                with contextlib.suppress(CompanionError):  # it may be what failed
                    awake = messages.SleepRequest(lease_token=self._token, stays_awake=True)
                    self._call_with_token("Sleep", awake)
                raise
            request.host.CopyFrom(codec.arena_to_message(info))
        self._sleeps = True
        return str(answer.residence)

    def sleep_on(self, level: int) -> str:
        """Take `wake` back; where the bytes are. Raises `CompanionError`, as `fall_asleep`."""
        request = messages.SleepRequest(lease_token=self._token, level=level, sleeps_on=True)
        answer = self._call_with_token("Sleep", request)
        self._sleeps = True
        return str(answer.residence)

    def wake(self, key: EntryKey, manifest: bytes) -> tuple[Ready, Descriptors] | None:
        """Tell the companion that this client maps the entry again; what that is, and its descriptors.

        Not over gRPC, which cannot carry descriptors, and takes three times as long.

        Returns:
            None: the client sleeps on, and has to attach; or it sleeps by a lease that a companion does not know so.

        Args:
            key, manifest: the entry's, which this client has.

        Raises:
            CompanionError: the companion does not answer, or does not know that this client sleeps. It may take it for
                awake.
        """
        if not self._sleeps or self.lost.is_set():
            return None
        self._know(manifest)
        woken = fd_channel.wake(self._paths.fd_socket, self._token, self._known_sha256, WAKE_TIMEOUT_S)
        if woken is None:
            return None
        ready, fds = woken
        try:
            received = self._receive_ready(ready, FD_TIMEOUT_S, key)
        except BaseException:
            fds.close()
            raise
        self._sleeps = False
        return received, fds

    # ---- generations

    def stage(self, base: int = 0) -> int:
        """Become the one who writes the entry's next generation; the number that it will have.

        Args:
            base: the generation that must be current; 0: whichever.

        Raises:
            StaleError: another one is.
            EntryInUseError: somebody else does that.
            BadRequestError: this client does not map the entry.
            CompanionUnavailableError, WaitTimeoutError: the companion does not answer.
        """
        base = codec.generation_to_message(base)
        answer = self._call_with_token("Stage", messages.StageRequest(lease_token=self._token, base=base))
        self._deposit_ticket = answer.deposit_ticket
        return int(answer.generation)

    def abort_staged(self) -> None:
        """Stop writing. Never fails: a lease that has ended writes nothing either."""
        with contextlib.suppress(CompanionError):
            self._call_with_token("Stage", messages.StageRequest(lease_token=self._token, abort=True))

    def commit_staged(
        self, arena: ArenaInfo, fds: Sequence[int], version: str, base: int = 0, *, tensor_count: int = 0
    ) -> int:
        """Hand over what was written, as the current generation; its number.

        Args:
            tensor_count: of an entry without a layout; 0: as many as before.

        Raises:
            CommitUnknownError: it may be current: the companion did not answer.
            LayoutError: it is laid out differently.
            CompanionError: as `stage`. Nothing of it stays.
        """
        fd_channel.deposit(self._paths.fd_socket, self._deposit_ticket, fds, FD_TIMEOUT_S)
        request = messages.CommitStagedRequest(
            lease_token=self._token,
            arena=codec.arena_to_message(arena),
            version=version,
            base=base,
            tensor_count=tensor_count,
        )
        before = self.current
        try:
            return int(self._stub.CommitStaged(request, timeout=ANSWER_TIMEOUT_S).generation)
        except grpc.RpcError as error:
            typed = typed_error(error, f"{self._label}: committing {version}")
            if is_answer(error):
                raise typed from error
            raise commit_unknown(typed.what, version, before) from error

    def generation(self, number: int, manifest: bytes) -> Ready:
        """Another generation of the entry, to be mapped; 0: the current one.

        Args:
            manifest: the entry's, which this client has.

        Raises:
            EntryNotFoundError: it is not held.
        """
        number = codec.generation_to_message(number)
        request = messages.GetGenerationRequest(lease_token=self._token, generation=number)
        ready = self._call_with_token("GetGeneration", request)
        self._know(manifest)
        return self._receive_ready(ready, FD_TIMEOUT_S)

    def advanced(self, number: int) -> None:
        """This client maps another generation from now on. Raises as `stage`."""
        self._call_with_token("Advance", messages.AdvanceRequest(lease_token=self._token, generation=number))

    def _call_with_token(self, method: str, request: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise typed_error(error, f"{self._label}: {method}") from error

    # ---- the stream's thread

    def _read(self) -> None:
        error: CompanionError = LeaseLostError(f"{self._label}: the companion ended the lease.")
        try:
            for event in self._call:
                kind = event.WhichOneof("event")
                if kind == "failed":
                    error = from_code(event.failed.code, event.failed.message)
                elif kind == "retired":
                    self._retire()
                elif kind == "current":
                    self.current = event.current.generation
                else:
                    if kind in ("ready", "granted"):  # what is granted is current when it is published
                        self.current = getattr(event, kind).generation
                    self._events.put(event)
        except grpc.RpcError as rpc_error:
            error = typed_error(rpc_error, f"{self._label}: the companion's stream")
        declined = self._publication is not None and self._publication.declined
        with self._mutex:
            lost = not (self._released or declined)
            if lost:
                self._error = error
                self.lost.set()
            callbacks = self._callbacks if lost else []
            self._callbacks = []
        self._events.put(None)
        for callback in callbacks:
            callback(error)

    def on_lost(self, callback: Callable[[CompanionError], None]) -> None:
        """Call `callback(error)` once when the lease is lost, from another thread; now if it is already."""
        with self._mutex:
            error = self._error
            if error is None:
                self._callbacks.append(callback)
        if error is not None:
            callback(error)

    def forget(self, *callbacks: Callable[..., None]) -> None:
        """Do not call these any more, unless they are being called."""
        with self._mutex:
            self._callbacks = [each for each in self._callbacks if each not in callbacks]
            self._retired_callbacks = [each for each in self._retired_callbacks if each not in callbacks]

    def on_retired(self, callback: Callable[[], None]) -> None:
        """Call `callback()` once when the entry is unloaded, from another thread; now if it is already."""
        with self._mutex:
            if not self.retired:
                self._retired_callbacks.append(callback)
                return
        callback()

    def _retire(self) -> None:
        with self._mutex:
            self.retired = True
            callbacks, self._retired_callbacks = self._retired_callbacks, []
        for callback in callbacks:
            callback()

    # ---- the end

    def release(self, *, wait: bool = True) -> None:
        """End the lease, but not in a fork of its process. Idempotent; what is mapped stays mapped.

        Args:
            wait: return when its thread has ended; without, that happens some milliseconds later.
        """
        if self.is_inherited:
            return
        with self._mutex:
            self._released = True
        undisturbed(self._call.cancel)
        if wait:
            if self._thread is not threading.current_thread():
                self._thread.join(timeout=2)
            _open_leases.discard(self)

    @property
    def error(self) -> CompanionError | None:
        """Why it was lost; None if it was not."""
        return self._error

    @property
    def released(self) -> bool:
        return self._released

    @property
    def is_inherited(self) -> bool:
        """Whether it is the lease of a process that this one was forked from."""
        return os.getpid() != self._pid

    @property
    def is_over(self) -> bool:
        """Whether no companion knows of it any more: it was released, or lost."""
        return self._released or self.lost.is_set()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def commit_unknown(why: str, version: str, before: int) -> CommitUnknownError:
    """The error for a commit without an answer, when generation `before` was current."""
    return CommitUnknownError(
        f"{why} {version} is current by now, or nothing of it stays.",
        remedy=f"`vllm-companion generations` shows which. Or update again with base={before}: that raises StaleError "
        f"and writes nothing if {version} is current.",
    )


def _who(loader: LoaderInfo) -> str:
    if not loader.pid:
        return f"{loader.client} has it and did not hand it back."
    done, total = loader.progress.done_bytes / (1 << 30), loader.progress.total_bytes / (1 << 30)
    size = f", {done:.2f} of {total:.2f} GiB" if total else f", {done:.2f} GiB" if done else ""
    return (
        f"{loader.client} (pid {loader.pid}) is loading it (phase {loader.progress.phase!r}{size}). "
        f"If it hangs, end it: kill -9 {loader.pid}; the next one that waits loads it."
    )


_open_leases: weakref.WeakSet[Lease] = weakref.WeakSet()


@atexit.register
def _release_all() -> None:
    # Before the interpreter goes: a thread inside gRPC must not find it half gone.
    for lease in list(_open_leases):
        lease.release()
