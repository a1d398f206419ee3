"""What failures of gRPC mean here."""

from __future__ import annotations

import pytest

from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, LimitError, WaitTimeoutError
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import typed_error


class Failure(grpc.RpcError):
    """A call that gRPC ended, and not the companion: no metadata says why."""

    def __init__(self, status: str) -> None:
        self._status = grpc.StatusCode[status]

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return "words of gRPC"

    def trailing_metadata(self) -> None:
        return None


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
def test_failures_of_grpc_itself(status: str, expected: type[CompanionError]) -> None:
    error = typed_error(Failure(status), "Status of the companion of cpu")
    assert type(error) is expected
    assert str(error).startswith("Status of the companion of cpu failed: ")
    assert "words of gRPC" not in str(error)
