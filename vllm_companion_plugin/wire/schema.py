"""Message classes, client stub and service registration, from the committed descriptor set.

protoc's Python code runs only with its own protobuf major version and the next, while the
vLLM versions that we support admit protobuf 5 to 7. So `make stubs` commits the compiled
descriptors (`schema.binpb`), the list of messages (`messages.py`) and their types (`messages.pyi`), and protobuf's
public API makes the classes here. docs/adr/0002-descriptor-set.md has the reasons.
"""

from __future__ import annotations

import os
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from vllm_companion_plugin.errors import CompanionUnavailableError
from vllm_companion_plugin.wire.forking import check, grpc
from vllm_companion_plugin.wire.signals import undisturbed

_FILES = descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("vllm_companion_plugin.wire").joinpath("schema.binpb").read_bytes()
)
# A pool of our own: the default pool is shared with every other library of the process.
_POOL = descriptor_pool.DescriptorPool()
for _file in _FILES.file:
    _POOL.AddSerializedFile(_file.SerializeToString())

SERVICE = "vllm_companion.v1.Companion"
HEALTH = "grpc.health.v1.Health"


def message_class(name: str) -> Any:
    """The class of message `name`, e.g. "vllm_companion.v1.AttachRequest", with those of the messages inside it."""
    descriptor = _POOL.FindMessageTypeByName(name)
    made: Any = message_factory.GetMessageClass(descriptor)
    for inner in descriptor.nested_types:  # protobuf's pure Python leaves them out
        if not hasattr(made, inner.name):
            setattr(made, inner.name, message_factory.GetMessageClass(inner))
    return made


def _methods(service: str) -> list[tuple[str, Any, Any, bool, bool]]:
    """Name, request, response, and whether client and server stream, of each method.

    Read from the files, because the descriptors that protobuf's pure Python makes of a service cannot be copied.
    """
    methods = [
        method
        for file in _FILES.file
        for one in file.service
        if f"{file.package}.{one.name}" == service
        for method in one.method
    ]
    return [
        (
            method.name,
            message_class(method.input_type.lstrip(".")),
            message_class(method.output_type.lstrip(".")),
            method.client_streaming,
            method.server_streaming,
        )
        for method in methods
    ]


class Method:
    """A call, not in a fork of the process that opened its channel, and not after that was closed."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._pid = os.getpid()

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._begin(self._call, *args, **named)

    def future(self, *args: Any, **named: Any) -> Any:
        return self._begin(self._call.future, *args, **named)

    def _begin(self, call: Any, *args: Any, **named: Any) -> Any:
        check(self._pid)
        try:
            return undisturbed(lambda: call(*args, **named), _cancel)
        except ValueError as error:  # all that gRPC says of a channel that another thread, too, may have closed
            raise CompanionUnavailableError("This connection to a companion was closed.") from error


def _cancel(answer: Any) -> None:
    """Nobody waits any more for the answer of a call, or for what it streams."""
    if isinstance(answer, grpc.Call):
        answer.cancel()


class Stub:
    """Client side of the service: one callable a method, on a `grpc.Channel`.

    Each of them raises `ForkedError` in a fork of the process that opened the channel, and `CompanionUnavailableError`
    after that was closed.
    """

    Attach: Method
    Publish: Method
    Sleep: Method
    Stage: Method
    CommitStaged: Method
    GetGeneration: Method
    Advance: Method
    MakeCurrent: Method
    Status: Method
    Watch: Method
    Unload: Method
    MakeRoom: Method
    Shutdown: Method
    Report: Method
    Metrics: Method

    def __init__(self, channel: Any) -> None:
        for name, request, response, client_streams, server_streams in _methods(SERVICE):
            kind = ("stream" if client_streams else "unary") + "_" + ("stream" if server_streams else "unary")
            call = getattr(channel, kind)(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            setattr(self, name, Method(call))


def handlers(servicer: object, service: str = SERVICE) -> grpc.GenericRpcHandler:
    """gRPC handlers that call the methods of `servicer` by the service's names."""
    table = {}
    for name, request, response, client_streams, server_streams in _methods(service):
        kind = ("stream" if client_streams else "unary") + "_" + ("stream" if server_streams else "unary")
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        table[name] = make(
            getattr(servicer, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service, table)
