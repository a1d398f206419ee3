"""The gRPC service: conversations on one side, the registry's transitions on the other.

Every decision is the registry's: here messages are decoded, the registry is called, and its answers and errors are
encoded. The handlers write through the context instead of yielding: a cancelled handler is then told where it waits,
while an abandoned generator would keep its lease until it is collected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.core.identity import MAX_TEXT
from vllm_companion_plugin.core.metrics import BOUNDS_S
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import CompanionStatus, LeaseState
from vllm_companion_plugin.core.text import printable, sendable
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    EntryNotFoundError,
    ProtocolMismatchError,
    TicketError,
)
from vllm_companion_plugin.holder.registry.counting import Counting
from vllm_companion_plugin.holder.registry.entries import (
    CurrentEvent,
    Entry,
    Event,
    FailedEvent,
    Generation,
    GrantedEvent,
    Lease,
    ReadyEvent,
    RetiredEvent,
    WaitingEvent,
)
from vllm_companion_plugin.holder.registry.moves import Move, Observer
from vllm_companion_plugin.holder.registry.state import Registry
from vllm_companion_plugin.holder.service.descriptors import check_descriptors, close_aside, memory_is_lost
from vllm_companion_plugin.holder.service.fd_server import Woken
from vllm_companion_plugin.holder.service.incoming import IncomingManifest
from vllm_companion_plugin.holder.service.journal import Journal, Note, level_of
from vllm_companion_plugin.holder.service.tickets import Ticket, Tickets
from vllm_companion_plugin.memory.kinds import KINDS
from vllm_companion_plugin.wire import codec, fd_channel, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import ERROR_METADATA

logger = logging.getLogger("vllm.companion.service")

MAX_ERROR_TEXT = 1500  # gRPC percent-encodes it into metadata, which has 8 KiB


class CompanionService:
    """Servicer of one companion. All methods run on one event loop, so nothing is locked.

    Attributes:
        stop: set it to end the process.

    Args:
        linger_s, grace_s: as of `Lifetime`.
        keep_previous: as of `Registry`.
        dismiss, roll_back, clear: as of `Journal`.
        hide: removes us from where new clients look.
    """

    def __init__(
        self,
        device: str,
        linger_s: float,
        dismiss: Note = lambda key, generation: None,
        roll_back: Note = lambda key, generation: None,
        clear: Note = lambda key, generation: None,
        hide: Callable[[], None] = lambda: None,
        *,
        grace_s: float = 0.0,
        keep_previous: int = 1,
    ) -> None:
        self.device = device
        self._hide = hide
        self.stop = asyncio.Event()
        self._counting = Counting()
        self.registry = Registry(
            close_fds=close_aside,
            wall=time.time,
            monotonic=time.monotonic,
            device=device,
            pid=os.getpid(),
            linger_s=linger_s,
            grace_s=grace_s,
            keep_previous=keep_previous,
            # Half of them are left for connections.
            max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2,
            on_event=self._on_event,
            on_change=self._on_change,
            observers=(_harmless(self._counting.observe), _harmless(Journal(dismiss, roll_back, clear).observe)),
        )
        self.tickets = Tickets()
        self._started_unix_s = time.time()
        self._tokens: dict[bytes, Lease] = {}
        self._receiving: set[IncomingManifest] = set()
        self._wake: dict[int, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._version = 0

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
        spent = self._spend(fd_channel.REDEEM, ticket)
        return partial(_descriptors, spent.lease.entry, spent.generation, host=spent.host)

    def wake(self, token: bytes, known_manifest: bytes) -> Woken:
        """Wake the client whose lease has this token, if the bytes are on the device; else it sleeps on."""
        try:
            lease = self._lease_of(token)
            self.registry.lose(memory_is_lost)
            level = lease.level
            if not self.registry.sleeping.wake(lease, known_manifest):
                return Woken()
        except CompanionError as error:
            self._counting.refused(error)
            raise

        def settle(told: bool) -> None:
            if told:
                logger.info("%s woke on %s.", lease.who, lease.entry.key.model)
                return
            with suppress(CompanionError):  # it has gone
                self.registry.sleeping.sleep_on(lease, level)

        ready = self._ready(lease, known_manifest, token=token, is_woken=True)
        return Woken(ready.SerializeToString(), partial(_descriptors, lease.entry, ready.generation), settle)

    def check_deposit(self, ticket: bytes, count: int) -> Callable[[Sequence[int]], None]:
        lease = self._spend(fd_channel.DEPOSIT, ticket).lease
        self.registry.announce(lease, count)
        return partial(self.registry.deposit, lease)

    def _spend(self, verb: bytes, ticket: bytes) -> Ticket:
        try:
            return self.tickets.spend(verb, ticket)
        except TicketError as error:
            self._counting.refused(error)
            raise

    def status(self, key_id: str = "") -> CompanionStatus:
        return CompanionStatus(
            device=self.device,
            pid=os.getpid(),
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            started_unix_s=self._started_unix_s,
            linger_s=self.registry.lifetime.linger_s,
            exits_at_unix_s=self.registry.exits_at_unix_s,
            entries=self.registry.status(key_id),
            owner_pid=self.registry.lifetime.owner_pid,
        )

    # ---- RPCs

    async def Attach(self, request: Any, context: Any) -> None:
        """Errors are events here, as their texts may be too long for a gRPC status."""
        lease: Lease | None = None
        try:
            lease = self._attach(request)
            await self._serve_lease(lease, context, request.known_manifest_sha256)
        except CompanionError as error:
            # An engine that asks for its key before it asks to load has got its answer; nothing has failed.
            only_asks = request.WhichOneof("select") == "key" and not (request.may_load or request.held_generation)
            if not (only_asks and isinstance(error, EntryNotFoundError)):
                self._counting.refused(error)
            await context.write(_failed(error))
        finally:
            if lease is not None:
                self._wake.pop(lease.id, None)
                self._tokens = {token: x for token, x in self._tokens.items() if x is not lease}
                if not lease.ended:
                    logger.info("%s left %s.", lease.who, lease.entry.key.model)
                self.registry.end_lease(lease)

    def _attach(self, request: Any) -> Lease:
        if request.protocol_version != PROTOCOL_VERSION:
            older = "client" if request.protocol_version < PROTOCOL_VERSION else "companion"
            raise ProtocolMismatchError(
                f"The client speaks protocol {request.protocol_version}, the companion of {self.device} "
                f"(pid {os.getpid()}, version {__version__}) speaks {PROTOCOL_VERSION}. Upgrade the {older}: "
                "install the same vllm-companion-plugin everywhere, then `vllm-companion stop`."
            )
        selected = request.WhichOneof("select")
        if selected is None:
            raise BadRequestError("An attach needs a key or a query.")
        select = codec.key_from_message(request.key) if selected == "key" else _query(request.query)
        client = printable(request.client[:200]) or "client"
        self.registry.lose(memory_is_lost)
        holds = codec.generation_from_message(request.held_generation) if selected == "key" else 0
        lease = self.registry.attach(
            select,
            may_load=request.may_load,
            pid=request.pid,
            client=client,
            holds=holds,
            passive=request.passive,
            asleep=request.asleep if request.HasField("asleep") else None,
        )
        logger.info("%s asks for %s: %s.", lease.who, lease.entry.key.model, _answer(lease))
        return lease

    async def _serve_lease(self, lease: Lease, context: Any, known_manifest: bytes) -> None:
        wake = self._wake[lease.id] = asyncio.Event()
        while True:
            while lease.events:
                if await self._tell(lease, lease.events.popleft(), context, known_manifest):
                    return
            if lease.ended:
                return
            await wake.wait()
            wake.clear()

    async def _tell(self, lease: Lease, event: Event, context: Any, known_manifest: bytes) -> bool:
        """Send `event`; True if it is the last one."""
        if isinstance(event, WaitingEvent):
            waiting = messages.Waiting(loader=codec.loader_to_message(event.loader))
            await context.write(messages.AttachEvent(waiting=waiting))
        elif isinstance(event, GrantedEvent):
            ticket = self.tickets.issue(fd_channel.DEPOSIT, lease)
            granted = messages.Granted(
                lease_token=self._token_of(lease), deposit_ticket=ticket, generation=event.generation
            )
            if event.brings_back and (host := lease.entry.current.host) is not None:
                granted.host.CopyFrom(codec.arena_to_message(host))
                granted.parked.CopyFrom(self._ready(lease, known_manifest, host=True))
            await context.write(messages.AttachEvent(granted=granted))
            if granted.HasField("parked"):
                await self._send_manifest(lease, granted.parked, context)
        elif isinstance(event, ReadyEvent):
            self.registry.updates.told(lease)
            ready = self._ready(lease, known_manifest)
            await context.write(messages.AttachEvent(ready=ready))
            await self._send_manifest(lease, ready, context)
        elif isinstance(event, CurrentEvent):
            current = messages.Current(generation=event.generation, version=event.version)
            await context.write(messages.AttachEvent(current=current))
        elif isinstance(event, RetiredEvent):
            await context.write(messages.AttachEvent(retired=messages.Retired()))
        elif isinstance(event, FailedEvent):
            await context.write(_failed(event.error))
            return True
        return False

    def _token_of(self, lease: Lease) -> bytes:
        token = secrets.token_bytes(16)
        self._tokens[token] = lease
        return token

    def _ready(
        self,
        lease: Lease,
        known_manifest: bytes,
        generation: Generation | None = None,
        *,
        host: bool = False,
        token: bytes = b"",
        is_woken: bool = False,
    ) -> messages.Ready:
        """What a client maps.

        Args:
            token: of the lease, if the client has one already.
            is_woken: it has the key, and gets the descriptors without a ticket.
        """
        current = generation or lease.entry.current
        assert current.arena is not None
        assert current.manifest is not None
        ticket = b"" if is_woken else self.tickets.issue(fd_channel.REDEEM, lease, current.number, host=host)
        return messages.Ready(
            key=None if is_woken else codec.key_to_message(lease.entry.key),
            generation=current.number,
            arena=codec.arena_to_message(current.arena, ticket),
            manifest_bytes=current.manifest.size_bytes,
            manifest_sha256=current.manifest.sha256,
            published=codec.published_to_message(current.published),
            lease_token=token or self._token_of(lease),
            manifest_known=known_manifest == current.manifest.sha256,
        )

    async def _send_manifest(self, lease: Lease, ready: messages.Ready, context: Any) -> None:
        manifest = lease.entry.current.manifest
        if manifest is not None and not ready.manifest_known:
            for chunk in manifest.chunks:
                await context.write(messages.AttachEvent(manifest_chunk=chunk))

    def _lease_of(self, token: bytes) -> Lease:
        lease = self._tokens.get(token)
        if lease is None:
            raise BadRequestError("The lease token is unknown; the lease has ended.")
        return lease

    async def Stage(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            lease = self._lease_of(request.lease_token)
            if request.abort:
                self.registry.updates.abort(lease)
                return messages.StageResponse()
            base = codec.generation_from_message(request.base)
            generation = self.registry.updates.stage(lease, base)
            logger.info("%s writes generation %d of %s.", lease.who, generation, lease.entry.key.model)
            return messages.StageResponse(
                generation=generation, deposit_ticket=self.tickets.issue(fd_channel.DEPOSIT, lease)
            )

    async def CommitStaged(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            lease = self._lease_of(request.lease_token)
            arena, _ = codec.arena_from_message(request.arena)
            check_descriptors(arena, lease.deposited)
            version = codec.version_from_message(request.version)
            base = codec.generation_from_message(request.base)
            generation = self.registry.updates.commit(lease, arena, version, base, tensor_count=request.tensor_count)
            logger.info("%s committed generation %d of %s: %s.", lease.who, generation, lease.entry.key.model, version)
            return messages.CommitStagedResponse(generation=generation)

    async def GetGeneration(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            lease = self._lease_of(request.lease_token)
            generation = self.registry.updates.find(lease.entry, request.generation)
            assert generation.manifest is not None
            return self._ready(lease, generation.manifest.sha256, generation, token=request.lease_token)

    async def Advance(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            self.registry.updates.advance(self._lease_of(request.lease_token), request.generation)
            return messages.AdvanceResponse()

    async def MakeCurrent(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            base = codec.generation_from_message(request.base)
            entries = self.registry.make_current(_query(request.query), request.generation, base)
            return messages.MakeCurrentResponse(entries=[codec.entry_status_to_message(entry) for entry in entries])

    async def Sleep(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            lease = self._lease_of(request.lease_token)
            if request.stays_awake:
                self.registry.sleeping.stay_awake(lease)
                return messages.SleepResponse()
            if request.sleeps_on:
                self.registry.sleeping.sleep_on(lease, request.level)
                return messages.SleepResponse(residence=lease.entry.current.residence.value)
            host = None
            if request.HasField("host"):
                host, _ = codec.arena_from_message(request.host)
                if KINDS[host.kind].device_type != "cpu":
                    raise BadRequestError(f"A copy in host memory is no arena of kind {host.kind}.")
                check_descriptors(host, lease.deposited)
            try:
                wish = WhenAsleep(request.when_asleep)
            except ValueError as error:
                raise BadRequestError(f"when_asleep: {error}") from error
            asleep = self.registry.sleeping.sleep(lease, request.level, wish, host, request.host_generation)
            if asleep:
                logger.info("%s sleeps on %s: %s.", lease.who, lease.entry.key.model, lease.entry.current.shown.value)
                return messages.SleepResponse(residence=lease.entry.current.residence.value)
            return messages.SleepResponse(deposit_ticket=self.tickets.issue(fd_channel.DEPOSIT, lease))

    async def Publish(self, requests: AsyncIterator[Any], context: Any) -> Any:
        async with self._errors(context):
            with self.registry.receive(), self._incoming() as manifest:
                return await self._publish(requests, manifest)

    @contextmanager
    def _incoming(self) -> Iterator[IncomingManifest]:
        manifest = IncomingManifest()
        self._receiving.add(manifest)
        try:
            yield manifest
        finally:
            self._receiving.discard(manifest)

    async def _publish(self, requests: AsyncIterator[Any], manifest: IncomingManifest) -> Any:
        lease: Lease | None = None
        async for request in requests:
            step = request.WhichOneof("step")
            if (step == "begin") != (lease is None):
                raise BadRequestError("A publication begins with exactly one begin.")
            if lease is None:
                lease = self._lease_of(request.begin.lease_token)
            elif step == "progress":
                self.registry.progress(lease, codec.progress_from_message(request.progress))
            elif step == "manifest_chunk":
                incoming_bytes = sum(x.size_bytes for x in self._receiving)
                self.registry.check_manifests(incoming_bytes + len(request.manifest_chunk))
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

    def _commit(self, lease: Lease, commit: Any, manifest: IncomingManifest) -> Any:
        arena, _ = codec.arena_from_message(commit.arena)
        stored = manifest.finish(commit)
        # The loader's lease may have ended while chunks were on their way; the registry says so.
        if not lease.ended:
            check_descriptors(arena, lease.deposited)
        published = codec.published_from_message(commit.published)
        generation = self.registry.commit(lease, arena, stored, published, commit.generation)
        shown = codec.published_to_message(lease.entry.current.published)
        return messages.PublishResponse(generation=generation, published=shown)

    def _decline(self, lease: Lease, declined: Any) -> None:
        reason = printable(" ".join(declined.message[:MAX_ERROR_TEXT].split())) or "no reason given"
        self.registry.decline(lease, reason)

    async def Status(self, request: Any, context: Any) -> Any:
        self.registry.lose(memory_is_lost)
        return codec.companion_status_to_message(self.status(request.key_id))

    async def Watch(self, request: Any, context: Any) -> None:
        owned = request.HasField("own")
        lifetime = self.registry.lifetime
        async with self._errors(context):
            with self._owned(request.own) if owned else nullcontext(), self.registry.watch():
                while not lifetime.ending:
                    version = self._version
                    await context.write(codec.companion_status_to_message(self.status()))
                    while version == self._version and not lifetime.ending:
                        await self._changed.wait()
        await _abort(context, lifetime.end_error(to_spectator=not owned))

    @contextmanager
    def _owned(self, own: Any) -> Iterator[None]:
        """While open, we belong to a client, and stay as long as it says."""
        self.registry.own(own.pid, own.linger_s, from_first_client=own.from_first_client)
        try:
            yield
        finally:
            self.registry.disown()

    async def Unload(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            unloaded = self.registry.unload(_query(request.query), force=request.force)
            return messages.UnloadResponse(unloaded=[codec.entry_status_to_message(entry) for entry in unloaded])

    async def MakeRoom(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            dropped = self.registry.make_room(request.size_bytes)
            return messages.MakeRoomResponse(dropped=[codec.entry_status_to_message(entry) for entry in dropped])

    async def Shutdown(self, request: Any, context: Any) -> Any:
        if request.replaced:
            async with self._errors(context):
                self.registry.check_replaceable()
        logger.info("Shutdown was asked for%s.", "; another companion follows" if request.replaced else "")
        self.end(replaced=request.replaced)
        return messages.ShutdownResponse(pid=os.getpid())

    async def Report(self, request: Any, context: Any) -> Any:
        async with self._errors(context):
            report = codec.report_from_message(request)
            self._counting.reported(report, self.registry.key_of(report.key_id))
            return messages.ReportResponse()

    async def Metrics(self, request: Any, context: Any) -> Any:
        series = map(codec.series_to_message, self._counting.counters.all())
        return messages.MetricsResponse(bounds_s=BOUNDS_S, series=series)

    @asynccontextmanager
    async def _errors(self, context: Any) -> AsyncIterator[None]:
        try:
            yield
        except CompanionError as error:
            self._counting.refused(error)
            logger.log(level_of(error), "Refused: %s", str(error)[:MAX_ERROR_TEXT])
            await _abort(context, error)

    def end(self, *, replaced: bool = False) -> None:
        """Let nobody in any more, and set `stop` when answers that are being written are on their way.

        Args:
            replaced: another companion follows, to which clients shall hand back what they map.
        """
        self.registry.end(replaced=replaced)
        self._hide()
        asyncio.get_running_loop().call_later(0.02, self.stop.set)

    def close(self) -> None:
        """Tell all clients and close all descriptors."""
        self.registry.close()


def _answer(lease: Lease) -> str:
    """What became of a client's question, for the log."""
    if lease.state is not LeaseState.LOADING:
        return lease.state.value if lease.state else "ended"
    if lease.entry.current.host is not None:
        return "bringing it back from host memory"
    return "handing it back" if lease.holds else "loading"


def _descriptors(entry: Entry, number: int, *, host: bool = False) -> Sequence[int]:
    """Of a generation, or of its copy in host memory. Raises `TicketError` if it is not held any more."""
    there = next((each for each in (entry.current, *entry.others) if each.number == number), Generation())
    fds = there.host_fds if host else there.fds
    if not fds:
        raise TicketError(f"Generation {number} of {entry.key.model} was dropped before its descriptors were fetched.")
    return fds


def _harmless(observe: Observer) -> Observer:
    """`observe`, whose errors are logged: the registry calls it in the midst of a transition."""

    def harmless(move: Move) -> None:
        try:
            observe(move)
        except Exception:
            logger.exception("%s was not noted", type(move).__name__)

    return harmless


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
