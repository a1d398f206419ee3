"""What an elected loader does: report progress, then publish or decline."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.status import Progress, Published
from vllm_companion_plugin.core.text import sendable
from vllm_companion_plugin.errors import CompanionUnavailableError
from vllm_companion_plugin.wire import codec, fd_channel, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import CHUNK_BYTES, typed_error
from vllm_companion_plugin.wire.schema import Stub

logger = logging.getLogger("vllm.companion.publication")

REPORT_INTERVAL_S = 0.25
REPORT_TIMEOUT_S = 5.0
PUBLISH_TIMEOUT_S = 120.0
DECLINE_TIMEOUT_S = 10.0


class Publication:
    """The duty that comes with a granted lease. It ends with `publish`, `decline` or the lease.

    Attributes:
        generation: that it will have; with it, it can be handed to the next companion, should this one end first.
        published: what the companion shows of it, once it was asked to publish it.
    """

    def __init__(self, stub: Stub, fd_socket: str, token: bytes, ticket: bytes, label: str, generation: int) -> None:
        self.declined = False
        self.generation = generation
        self._since = time.monotonic()
        self.published = Published(0)
        self._stub = stub
        self._fd_socket = fd_socket
        self._token = token
        self._ticket = ticket
        self._label = label
        self._last: Progress | None = None
        self._next_report = 0.0
        self._in_flight: Any = None

    def report(self, progress: Progress) -> None:
        """Tell the waiters how far we are. Never blocks and never fails: about four a second
        are sent, and a new phase at once; others are dropped."""
        now = time.monotonic()
        new_phase = self._last is None or progress.phase != self._last.phase
        busy = self._in_flight is not None and not self._in_flight.done()
        if not new_phase and (busy or now < self._next_report):
            return
        self._last, self._next_report = progress, now + REPORT_INTERVAL_S
        step = messages.PublishRequest(progress=codec.progress_to_message(progress))
        with contextlib.suppress(CompanionUnavailableError):  # the channel was closed
            self._in_flight = self._stub.Publish.future(iter([self._begin(), step]), timeout=REPORT_TIMEOUT_S)
            self._in_flight.add_done_callback(_log_failed_report)

    def publish(
        self,
        arena: ArenaInfo,
        fds: Sequence[int],
        manifest: bytes,
        tensor_count: int,
        ways: Mapping[str, int] | None = None,
        layout: str = "",
        version: str = "",
    ) -> int:
        """Hand arena and manifest over; return the generation. The lease is attached from now on.

        Args:
            fds: one descriptor for each block, in order; borrowed, the companion gets duplicates.
            ways: modules by the way in which engines restore them, for the status.
            layout: `layout_digest` of both, to be shown.
            version: the user's name for it; empty: it is what the checkpoint has.

        Raises:
            BadRequestError: the companion refuses descriptors or manifest.
            TicketError: a second publication.
            CompanionUnavailableError, WaitTimeoutError: the companion does not answer.
        """
        self.published = Published(
            tensor_count, ways or {}, time.time(), time.monotonic() - self._since, layout, version
        )
        return self.hand_back(arena, fds, manifest, self.published, generation=0)

    def hand_back(
        self, arena: ArenaInfo, fds: Sequence[int], manifest: bytes, published: Published, generation: int
    ) -> int:
        """As `publish`, for what was published before under `generation` by a companion that is gone."""
        fd_channel.deposit(self._fd_socket, self._ticket, fds, PUBLISH_TIMEOUT_S)
        response = self._send(self._steps(arena, manifest, published, generation), "publishing")
        self.published = codec.published_from_message(response.published)
        return int(response.generation)

    def _steps(self, arena: ArenaInfo, manifest: bytes, published: Published, generation: int) -> Iterator[Any]:
        yield self._begin()
        for start in range(0, len(manifest), CHUNK_BYTES):
            yield messages.PublishRequest(manifest_chunk=manifest[start : start + CHUNK_BYTES])
        commit = messages.PublishRequest.Commit(
            arena=codec.arena_to_message(arena),
            manifest_bytes=len(manifest),
            manifest_sha256=hashlib.sha256(manifest).digest(),
            published=codec.published_to_message(published),
            generation=generation,
        )
        yield messages.PublishRequest(commit=commit)

    def decline(self, reason: str) -> None:
        """Keep the model to ourselves. All waiters are told `reason`; the lease has ended.

        Raises:
            BadRequestError: this lease does not load any more.
            CompanionUnavailableError, WaitTimeoutError: the companion does not answer.
        """
        self.declined = True
        declined = messages.Failed(code="not_shareable", message=sendable(reason))
        self._send(iter([self._begin(), messages.PublishRequest(declined=declined)]), "declining", DECLINE_TIMEOUT_S)

    def _begin(self) -> Any:
        return messages.PublishRequest(begin=messages.PublishRequest.Begin(lease_token=self._token))

    def _send(self, steps: Iterator[Any], doing: str, timeout_s: float = PUBLISH_TIMEOUT_S) -> Any:
        try:
            return self._stub.Publish(steps, timeout=timeout_s)
        except grpc.RpcError as error:
            raise typed_error(error, f"{self._label}: {doing}") from error


def _log_failed_report(call: Any) -> None:
    # A lost report costs nobody anything; the next call that matters tells what is wrong.
    if call.code() is not grpc.StatusCode.OK:
        logger.debug("A progress report was not taken: %s", call.details())
