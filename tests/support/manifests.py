"""Manifests as protobuf has them, changed for tests."""

from __future__ import annotations

from typing import Any

from vllm_companion_plugin.wire import messages


def type_of(message: Any, tensor: Any) -> Any:
    """What a tensor of the manifest `message` has in common with others."""
    return message.types[tensor.type]


def change(message: Any, tensor: Any, **values: Any) -> None:
    """Set fields of `tensor` alone, those of its type, too."""
    own = messages.TensorType()
    own.CopyFrom(type_of(message, tensor))
    for name, value in values.items():
        set_field(own if name in own.DESCRIPTOR.fields_by_name else tensor, name, value)
    if own != type_of(message, tensor):
        tensor.type = len(message.types)
        message.types.append(own)


def set_field(message: Any, name: str, value: Any) -> None:
    if isinstance(value, list):
        del getattr(message, name)[:]
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)
