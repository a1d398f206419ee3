"""Message classes, client stub and service registration, from the committed descriptor set.

protoc's Python code runs only with its own protobuf major version and the next, while the
vLLM versions that we support admit protobuf 5 to 7. So `make stubs` commits the compiled
descriptors (`schema.binpb`) and the list of messages (`messages.py`), and protobuf's public API makes
the classes here. docs/adr/0002-descriptor-set.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FILES = descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("vllm_companion_plugin.protocol").joinpath("schema.binpb").read_bytes()
)
# A pool of our own: the default pool is shared with every other library of the process.
_POOL = descriptor_pool.DescriptorPool()
for _file in _FILES.file:
    _POOL.AddSerializedFile(_file.SerializeToString())

PACKAGE = "vllm_companion.v1"
SERVICE = f"{PACKAGE}.Companion"


def message_class(name: str) -> Any:
    """The class of message `name`, e.g. "AttachRequest" or "PublishRequest.Begin"."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def _methods() -> list[tuple[str, Any, Any, bool, bool]]:
    service = _POOL.FindServiceByName(SERVICE)
    found = []
    for method in service.methods:
        proto = descriptor_pb2.MethodDescriptorProto()
        method.CopyToProto(proto)
        found.append(
            (
                method.name,
                message_factory.GetMessageClass(method.input_type),
                message_factory.GetMessageClass(method.output_type),
                proto.client_streaming,
                proto.server_streaming,
            )
        )
    return found


class Stub:
    """Client side of the service: one callable a method, on a `grpc.Channel` or `grpc.aio.Channel`."""

    Attach: Callable[..., Any]
    Publish: Callable[..., Any]
    Status: Callable[..., Any]
    Watch: Callable[..., Any]
    Unload: Callable[..., Any]
    MakeRoom: Callable[..., Any]
    Shutdown: Callable[..., Any]
    Report: Callable[..., Any]
    Metrics: Callable[..., Any]

    def __init__(self, channel: Any) -> None:
        for name, request, response, client_streams, server_streams in _methods():
            kind = ("stream" if client_streams else "unary") + "_" + ("stream" if server_streams else "unary")
            call = getattr(channel, kind)(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            setattr(self, name, call)


def handlers(servicer: object) -> grpc.GenericRpcHandler:
    """gRPC handlers that call the methods of `servicer` by the service's names."""
    table = {}
    for name, request, response, client_streams, server_streams in _methods():
        kind = ("stream" if client_streams else "unary") + "_" + ("stream" if server_streams else "unary")
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        table[name] = make(
            getattr(servicer, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, table)
