"""The gRPC service: conversations on one side, the registry's transitions on the other.

Policy lives in `state`; here are streams, limits and the mapping of errors. The handlers write
through the context instead of yielding: a cancelled handler is then told where it waits, while
an abandoned generator would keep its lease until it is collected.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import grpc

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import MAX_TEXT, EntryKey
from vllm_companion_plugin.core.metrics import BOUNDS_S, OUTCOMES, VERIFY_MODES, VERIFY_RESULTS, subject
from vllm_companion_plugin.core.status import CompanionStatus
from vllm_companion_plugin.core.text import printable, sendable
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    BY_CODE,
    AlreadyRunningError,
    BadRequestError,
    CompanionError,
    CompanionReplacedError,
    CompanionUnavailableError,
    LeaseLostError,
    LimitError,
    ProtocolMismatchError,
    TicketError,
)
from vllm_companion_plugin.holder.registry.entries import (
    Event,
    FailedEvent,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.selection import Query
from vllm_companion_plugin.holder.registry.state import Registry
from vllm_companion_plugin.holder.service.descriptors import check_descriptors, close_aside, memory_is_lost
from vllm_companion_plugin.holder.service.incoming import IncomingManifest
from vllm_companion_plugin.holder.service.tickets import Tickets
from vllm_companion_plugin.wire import codec, fd_channel, messages
from vllm_companion_plugin.wire.rpc import ERROR_METADATA

logger = logging.getLogger(__name__)

MAX_WATCHES = 256
MAX_PUBLICATIONS = 256
MAX_MANIFESTS_BYTES = 1 << 30
"""Of all manifests, published or on their way."""
MAX_ERROR_TEXT = 1500  # gRPC percent-encodes it into metadata, which has 8 KiB


class CompanionService:
    """Servicer of one companion. All methods run on one event loop, so nothing is locked.

    Attributes:
        stop: set it to end the process.
        exits_at_unix_s: when the process will exit if nobody comes, or 0; for the status.
        owner_pid: of the client that we belong to, or 0.

    Args:
        dismiss: of this generation of the entry, nothing shall be handed back.
        hide: no new client shall find us.
    """

    def __init__(
        self,
        device: str,
        linger_s: float,
        dismiss: Callable[[EntryKey, int], None] = lambda key, generation: None,
        hide: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self.linger_s = linger_s
        self._dismiss = dismiss
        self._hide = hide
        self.owner_pid = 0
        self.stop = asyncio.Event()
        self.registry = Registry(
            close_fds=close_aside,
            on_event=self._on_event,
            on_change=self._on_change,
            # Half of them are left for connections.
            max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2,
        )
        self.tickets = Tickets()
        self.exits_at_unix_s = 0.0
        self._started_unix_s = time.time()
        self._tokens: dict[bytes, Lease] = {}
        self._receiving: set[IncomingManifest] = set()
        self._watches = 0
        self._wake: dict[int, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._version = 0
        self._ended_by: type[CompanionError] = LeaseLostError
        self._ending = False

    # ---- what the registry and the fd socket call

    def _on_event(self, lease: Lease) -> None:
        wake = self._wake.get(lease.id)
        if wake is not None:
            wake.set()

    def _on_change(self) -> None:
        self._version += 1
        # Every watcher waits on the event of its time; the next ones wait on a new one.
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout_s: float | None = None) -> None:
        """Return at the next change of the status, or after `timeout_s`."""
        # Two classes before Python 3.11.
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def redeem(self, ticket: bytes) -> Callable[[], Sequence[int]]:
        """The descriptors behind a ticket, to be asked for anew each time: they end with their entry."""
        lease = self._spend(fd_channel.REDEEM, ticket)

        def current() -> Sequence[int]:
            if not lease.entry.fds:
                raise TicketError(f"{lease.entry.key.model} was unloaded before its descriptors were fetched.")
            return lease.entry.fds

        return current

    def check_deposit(self, ticket: bytes, count: int) -> Callable[[Sequence[int]], None]:
        lease = self._spend(fd_channel.DEPOSIT, ticket)
        self.registry.announce(lease, count)
        return partial(self.registry.deposit, lease)

    def _spend(self, verb: bytes, ticket: bytes) -> Lease:
        try:
            return self.tickets.spend(verb, ticket)
        except TicketError as error:
            self._count_failure("companion", error)
            raise

    def _count_failure(self, side: str, error: CompanionError) -> None:
        self.registry.counters.count("failures", side, error.code)

    def status(self) -> CompanionStatus:
        return CompanionStatus(
            device=self.device,
            pid=os.getpid(),
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            started_unix_s=self._started_unix_s,
            linger_s=self.linger_s,
            exits_at_unix_s=self.exits_at_unix_s,
            entries=self.registry.status(self._entry_linger_s),
            owner_pid=self.owner_pid,
        )

    @property
    def _entry_linger_s(self) -> float:
        """What belongs to somebody stays, or goes as a whole."""
        return -1.0 if self.owner_pid else self.linger_s

    def expire(self) -> float | None:
        """Drop what nobody has used for the linger time; seconds until something else will be due."""
        dropped, next_s = self.registry.expire(self._entry_linger_s)
        for entry in dropped:
            self._dismiss(entry.key, entry.generation)
            logger.info(
                "Nobody has used %s (%s) for %g s: dropped, %.2f GiB are free.",
                *(entry.key.title, entry.key.rank, self.linger_s, entry.size_bytes / (1 << 30)),
            )
        return next_s

    # ---- RPCs

    async def Attach(self, request: Any, context: Any) -> None:
        """Errors are events here, as their texts may be too long for a gRPC status."""
        lease: Lease | None = None
        try:
            lease = self._attach(request)
            await self._serve_lease(lease, context)
        except CompanionError as error:
            self._count_failure("companion", error)
            await context.write(_failed(error))
        finally:
            if lease is not None:
                self._wake.pop(lease.id, None)
                self._tokens = {token: x for token, x in self._tokens.items() if x is not lease}
                if not lease.ended:
                    logger.info("%s (pid %d) left %s.", lease.client, lease.pid, lease.entry.key.model)
                self.registry.end_lease(lease)

    def _attach(self, request: Any) -> Lease:
        if request.protocol_version != PROTOCOL_VERSION:
            older = "client" if request.protocol_version < PROTOCOL_VERSION else "companion"
            raise ProtocolMismatchError(
                f"The client speaks protocol {request.protocol_version}, the companion of {self.device} "
                f"(pid {os.getpid()}, version {__version__}) speaks {PROTOCOL_VERSION}. Upgrade the {older}: "
                "install the same vllm-companion-plugin everywhere, then `vllm-companion stop`."
            )
        if self._ending:
            raise self._end_error()
        selected = request.WhichOneof("select")
        if selected is None:
            raise BadRequestError("An attach needs a key or a query.")
        select = codec.key_from_message(request.key) if selected == "key" else _query(request.query)
        client = printable(request.client[:200]) or "client"
        self._retire_lost()
        holds = codec.generation_from_message(request.held_generation) if selected == "key" else 0
        lease = self.registry.attach(
            select,
            may_load=request.may_load,
            pid=request.pid,
            client=client,
            holds=holds,
            passive=request.passive,
        )
        logger.info("%s (pid %d) asks for %s: %s.", client, request.pid, lease.entry.key.model, lease.state.value)
        return lease

    def _retire_lost(self) -> None:
        for entry in self.registry.retire(memory_is_lost):
            logger.warning("Nobody can map %s any more, because its keeper has ended.", entry.key.model)

    async def _serve_lease(self, lease: Lease, context: Any) -> None:
        wake = self._wake[lease.id] = asyncio.Event()
        while True:
            while lease.events:
                if await self._tell(lease, lease.events.popleft(), context):
                    return
            if lease.ended:
                return
            await wake.wait()
            wake.clear()

    async def _tell(self, lease: Lease, event: Event, context: Any) -> bool:
        """Send `event`; True if it is the last one."""
        if isinstance(event, WaitingEvent):
            waiting = messages.Waiting(loader=codec.loader_to_message(event.loader))
            await context.write(messages.AttachEvent(waiting=waiting))
        elif isinstance(event, GrantedEvent):
            token = secrets.token_bytes(16)
            self._tokens[token] = lease
            ticket = self.tickets.issue(fd_channel.DEPOSIT, lease)
            granted = messages.Granted(lease_token=token, deposit_ticket=ticket, generation=event.generation)
            await context.write(messages.AttachEvent(granted=granted))
        elif isinstance(event, ReadyEvent):
            await self._tell_ready(lease, context)
        elif isinstance(event, RetiredEvent):
            await context.write(messages.AttachEvent(retired=messages.Retired()))
        elif isinstance(event, FailedEvent):
            await context.write(_failed(event.error))
            return True
        return False

    async def _tell_ready(self, lease: Lease, context: Any) -> None:
        entry = lease.entry
        assert entry.arena is not None
        assert entry.manifest is not None
        ticket = self.tickets.issue(fd_channel.REDEEM, lease)
        ready = messages.Ready(
            key=codec.key_to_message(entry.key),
            generation=entry.generation,
            arena=codec.arena_to_message(entry.arena, ticket),
            manifest_bytes=entry.manifest.size_bytes,
            manifest_sha256=entry.manifest.sha256,
            published=codec.published_to_message(entry.published),
        )
        await context.write(messages.AttachEvent(ready=ready))
        for chunk in entry.manifest.chunks:
            await context.write(messages.AttachEvent(manifest_chunk=chunk))

    async def Publish(self, requests: AsyncIterator[Any], context: Any) -> Any:
        async with self._errors(context):
            if len(self._receiving) >= MAX_PUBLICATIONS:
                raise LimitError(f"The companion receives {MAX_PUBLICATIONS} publications already.")
            manifest = IncomingManifest()
            self._receiving.add(manifest)
            try:
                return await self._publish(requests, manifest)
            finally:
                self._receiving.discard(manifest)

    async def _publish(self, requests: AsyncIterator[Any], manifest: IncomingManifest) -> Any:
        lease: Lease | None = None
        async for request in requests:
            step = request.WhichOneof("step")
            if (step == "begin") != (lease is None):
                raise BadRequestError("A publication begins with exactly one begin.")
            if lease is None:
                lease = self._tokens.get(request.begin.lease_token)
                if lease is None:
                    raise BadRequestError("The lease token is unknown; the lease has ended.")
            elif step == "progress":
                self.registry.progress(lease, codec.progress_from_message(request.progress))
            elif step == "manifest_chunk":
                self._check_room(len(request.manifest_chunk))
                manifest.add(request.manifest_chunk)
            elif step == "commit":
                return self._commit(lease, request.commit, manifest)
            elif step == "declined":
                self._decline(lease, request.declined)
                return messages.PublishResponse()
            else:
                raise BadRequestError("A publication step without content.")
        # The loader reported progress and hung up; it comes back to commit.
        return messages.PublishResponse()

    def _check_room(self, size_bytes: int) -> None:
        stored = sum(entry.manifest.size_bytes for entry in self.registry.entries if entry.manifest)
        if stored + sum(x.size_bytes for x in self._receiving) + size_bytes > MAX_MANIFESTS_BYTES:
            raise LimitError(f"All manifests together would be larger than {MAX_MANIFESTS_BYTES} bytes.")

    def _commit(self, lease: Lease, commit: Any, manifest: IncomingManifest) -> Any:
        arena, _ = codec.arena_from_message(commit.arena)
        stored = manifest.finish(commit)
        # The loader's lease may have ended while chunks were on their way; the registry says so.
        if not lease.ended:
            check_descriptors(arena, lease.deposited)
        published = codec.published_from_message(commit.published)
        generation = self.registry.commit(lease, arena, stored, published, commit.generation)
        self._log_commit(lease, arena, generation)
        return messages.PublishResponse(
            generation=generation, published=codec.published_to_message(lease.entry.published)
        )

    def _log_commit(self, lease: Lease, arena: ArenaInfo, generation: int) -> None:
        entry = lease.entry
        logger.info(
            "%s (pid %d) %s %s (%s, %s), generation %d: %.2f GiB of %s, loaded in %.1f s.",
            *(lease.client, lease.pid, "handed back" if lease.holds else "published"),
            *(entry.key.model, entry.key.role, entry.key.rank, generation),
            *(arena.size_bytes / (1 << 30), arena.kind, entry.published.load_s),
        )

    def _decline(self, lease: Lease, declined: Any) -> None:
        reason = printable(" ".join(declined.message[:MAX_ERROR_TEXT].split())) or "no reason given"
        self.registry.decline(lease, reason)
        logger.info("%s (pid %d) keeps %s: %s", lease.client, lease.pid, lease.entry.key.model, reason)

    async def Status(self, request: Any, context: Any) -> Any:
        self._retire_lost()
        return codec.companion_status_to_message(self.status())

    async def Watch(self, request: Any, context: Any) -> None:
        owned = request.HasField("own")
        async with self._errors(context):
            with self._owned(request.own) if owned else nullcontext(), self._watching():
                while not self._ending:
                    version = self._version
                    await context.write(codec.companion_status_to_message(self.status()))
                    while version == self._version and not self._ending:
                        await self._changed.wait()
        # To its owner alone it matters how it ends.
        await _abort(context, self._end_error(self._ended_by if owned else CompanionUnavailableError))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self._watches >= MAX_WATCHES:
            raise LimitError(f"{MAX_WATCHES} clients watch the companion already.")
        self._watches += 1
        try:
            yield
        finally:
            self._watches -= 1

    @contextmanager
    def _owned(self, own: Any) -> Iterator[None]:
        """While open, we belong to a client, and stay as long as it says."""
        if self.owner_pid:
            raise AlreadyRunningError(
                f"A companion of {self.device} runs already (pid {os.getpid()}), for `vllm-companion serve` "
                f"(pid {self.owner_pid}). End it: vllm-companion stop --device {self.device}"
            )
        if own.pid <= 0 or not math.isfinite(own.linger_s):
            raise BadRequestError("An owner has a pid and a finite linger time.")
        before, self.owner_pid, self.linger_s = self.linger_s, own.pid, own.linger_s
        self._on_change()
        try:
            yield
        finally:
            self.owner_pid, self.linger_s = 0, before
            self.registry.restart_idle_time()
            self._on_change()
            if not self._ending:
                logger.warning(
                    "Its owner (pid %d) has gone: this companion stays as if an engine had started it.", own.pid
                )

    async def Unload(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            unloaded = self.registry.unload(_query(request.query), force=request.force)
            for entry in unloaded:
                self._dismiss(entry.key, entry.generation)
                logger.info("Unloaded %s, generation %d.", entry.key.model, entry.generation)
            return messages.UnloadResponse(unloaded=[codec.entry_status_to_message(entry) for entry in unloaded])

    async def MakeRoom(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            dropped = self.registry.make_room(request.size_bytes, self._entry_linger_s)
            for entry in dropped:
                self._dismiss(entry.key, entry.generation)
                logger.info(
                    "Dropped %s (%s), which nobody uses, because somebody needs its %.2f GiB.",
                    *(entry.key.title, entry.key.rank, entry.size_bytes / (1 << 30)),
                )
            return messages.MakeRoomResponse(dropped=[codec.entry_status_to_message(entry) for entry in dropped])

    async def Shutdown(self, request: Any, context: Any) -> Any:
        if request.replaced:
            async with self._errors(context):
                self.registry.check_replaceable()
        logger.info("Shutdown was asked for%s.", "; another companion follows" if request.replaced else "")
        self.end(replaced=request.replaced)
        return messages.ShutdownResponse(pid=os.getpid())

    async def Report(self, request: Any, context: Any) -> Any:
        """Texts become labels only where they are of those that we know."""
        async with self._errors(context):
            report, counters = codec.report_from_message(request), self.registry.counters
            of = subject(next((e.key for e in self.registry.entries if e.key.id == report.key_id), None))
            if report.outcome in OUTCOMES:
                counters.count("outcomes", *of, report.outcome)
            if report.outcome in ("attached", "copied"):
                counters.observe("attach_seconds", report.seconds, *of)
            if report.failure in BY_CODE:
                counters.count("failures", "client", report.failure)
            if report.verify in VERIFY_MODES and report.verified in VERIFY_RESULTS:
                counters.count("verifications", *of, report.verify, report.verified)
                counters.observe("verify_seconds", report.verify_seconds, *of)
            return messages.ReportResponse()

    async def Metrics(self, request: Any, context: Any) -> Any:
        series = map(codec.series_to_message, self.registry.counters.all())
        return messages.MetricsResponse(bounds_s=BOUNDS_S, series=series)

    @asynccontextmanager
    async def _errors(self, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except CompanionError as error:
            self._count_failure("companion", error)
            logger.warning("Refused: %s", str(error)[:MAX_ERROR_TEXT])
            await _abort(context, error)

    def end(self, *, replaced: bool = False) -> None:
        """Let nobody in any more, and set `stop` when answers that are being written are on their way.

        Args:
            replaced: another companion follows, to which clients shall hand back what they map.
        """
        self._ending = True
        self._ended_by = CompanionReplacedError if replaced else LeaseLostError
        self._hide()
        asyncio.get_running_loop().call_later(0.02, self.stop.set)

    def _end_error(self, kind: type[CompanionError] | None = None) -> CompanionError:
        text = f"The companion of {self.device} (pid {os.getpid()}) has shut down. Mapped memory stays valid."
        return (kind or self._ended_by)(text)

    def close(self) -> None:
        """Tell all clients and close all descriptors."""
        self._ending = True
        if self._ended_by is LeaseLostError:
            for entry in self.registry.status():
                try:
                    self._dismiss(entry.key, entry.generation)
                except OSError as error:
                    logger.warning("Those who map %s may hand it back: %s", entry.key.title, error)
        self.registry.close(self._end_error())


def _query(message: Any) -> Query:
    if max(map(len, (message.model, message.rank, message.role, message.key_id))) > MAX_TEXT:
        raise BadRequestError(f"A query with more than {MAX_TEXT} characters.")
    return Query(message.model, message.rank, message.role, message.key_id)


def _failed(error: CompanionError) -> Any:
    return messages.AttachEvent(failed=messages.Failed(code=error.code, message=sendable(str(error))))


async def _abort(context: Any, error: CompanionError) -> None:
    await context.abort(
        getattr(grpc.StatusCode, error.grpc_status),
        sendable(str(error)[:MAX_ERROR_TEXT]),
        trailing_metadata=((ERROR_METADATA, error.code),),
    )
