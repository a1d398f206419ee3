"""Client side of gRPC: the channel's options, and RpcError as our typed errors."""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import quote

from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    LimitError,
    WaitTimeoutError,
    from_code,
)
from vllm_companion_plugin.wire.forking import grpc, use

logger = logging.getLogger("vllm.companion.rpc")

CHUNK_BYTES = 1 << 20
"""Of a manifest on its way, in either direction."""
MAX_REQUEST_BYTES = 4 << 20
MAX_ANSWER_BYTES = 256 << 20
"""A status has the keys of all entries."""
RECONNECT_MS = 100
"""Between two looks whether there is another companion: on this host a look costs next to nothing."""
ERROR_METADATA = "companion-error-code"


_FAILURES: dict[grpc.StatusCode, tuple[type[CompanionError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (CompanionUnavailableError, "it has ended, or is not reachable at its socket"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (WaitTimeoutError, "no answer came in time"),
    # By the companion: what this side has cancelled, nobody asks about.
    grpc.StatusCode.CANCELLED: (CompanionUnavailableError, "it ended before it had answered"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (LimitError, "a message is larger than the protocol allows"),
}
"""What failures of gRPC itself mean here. Its own words are about addresses and sockets, and go to the debug log."""


def address(socket_path: str) -> str:
    """What gRPC calls a Unix socket. It reads a URI, in which some characters of a path mean something."""
    return f"unix:{quote(os.fsencode(socket_path))}"


def open_channel(socket_path: str) -> grpc.Channel:
    """A channel of its own, whatever else in the process uses gRPC. Connects at the first call.

    Raises:
        ForkedError: this process was forked from one that has opened any.
    """
    use()
    return grpc.insecure_channel(
        address(socket_path),
        options=[
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
            # Shared subchannels would bring another channel's connection backoff with them.
            ("grpc.use_local_subchannel_pool", 1),
            # gRPC's own would leave the next companion alone for a second, and for two minutes if none comes for long.
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.enable_http_proxy", 0),
        ],
    )


def is_answer(error: grpc.RpcError) -> bool:
    """Whether the companion said this. If gRPC did, the companion may have done what it was asked."""
    call: Any = error
    return any(name == ERROR_METADATA for name, _ in call.trailing_metadata() or ())


def typed_error(error: grpc.RpcError, doing: str) -> CompanionError:
    """`error` as the companion meant it, or by its status where gRPC itself failed.

    Args:
        doing: what was tried, and of which companion; begins the message of gRPC's own failures.
    """
    call: Any = error  # every RpcError that reaches a caller is a grpc.Call too
    for name, value in call.trailing_metadata() or ():
        if name == ERROR_METADATA:
            return from_code(value, call.details() or value)
    logger.debug("%s failed: %s: %s", doing, call.code(), call.details())
    kind, words = _FAILURES.get(call.code(), (CompanionError, f"gRPC reported {call.code().name}"))
    return kind(f"{doing} failed: {words}.")
