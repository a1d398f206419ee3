"""What failures of gRPC mean here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, LimitError, WaitTimeoutError
from vllm_companion_plugin.wire.rpc import address, open_channel, typed_error


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("CANCELLED", CompanionUnavailableError),  # of a server that ends, a call that it has not begun
        ("UNAVAILABLE", CompanionUnavailableError),
        ("DEADLINE_EXCEEDED", WaitTimeoutError),
        ("RESOURCE_EXHAUSTED", LimitError),
        ("UNIMPLEMENTED", CompanionError),
    ],
)
def test_failures_of_grpc_itself(tmp_path: Path, status: str, expected: type[CompanionError]) -> None:
    """A server that ends a call without saying why, as gRPC does."""

    def end(request: bytes, context: Any) -> bytes:
        context.abort(getattr(grpc.StatusCode, status), "words of gRPC")
        return b""

    methods = {"Status": grpc.unary_unary_rpc_method_handler(end)}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("companion", methods),))
    server.add_insecure_port(address(str(tmp_path / "s")))
    server.start()
    with open_channel(str(tmp_path / "s")) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/companion/Status")(b"", timeout=10)
    server.stop(0).wait()
    error = typed_error(raised.value, "Status of the companion of cpu")
    assert type(error) is expected
    assert str(error).startswith("Status of the companion of cpu failed: ")
    assert "words of gRPC" not in str(error)
