"""Mutations of real data: of bytes, and of the fields of a protobuf message. Deterministic by its `Random`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

NUMBERS = (
    0,
    1,
    2,
    7,
    63,
    64,
    255,
    4096,
    (1 << 31) - 1,
    1 << 32,
    1 << 40,
    1 << 50,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
FLOATS = (0.0, -0.0, -1.0, 1e308, -1e308, math.inf, -math.inf, math.nan)
TEXTS = (
    "", ".", "..", "a..b", "../../x", "/etc/x", "\0", "a\nb", "é", "\U0010ffff", "a" * 5000, "0", "-1", "1e999", "nan",
    "None", "True", "[" * 3000, "-" * 3000 + "1", "{[]: 1}", "__class__", "__dict__", "forward", "_parameters",
    "float8_e4m3fn", "complex128", "int3", "float7", "parameter", "attribute", "memfd", "ready", "dreaming", "weight",
)  # fmt: skip
PIECES = (
    b"\0",
    b"\xff",
    b"\x80" * 10,
    b"\xff" * 8,
    b'"',
    b"{",
    b"[",
    b"null",
    b"1e999",
    b"9" * 400,
    b"\\ud800",
    b"F",
    b"E",
)

_INT_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (31, True),
    FieldDescriptor.CPPTYPE_INT64: (63, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}


def mutated_bytes(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """`data` after one to eight small accidents; `other` is something to splice in."""
    out = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        at, end = sorted((rng.randint(0, len(out)), rng.randint(0, len(out))))
        accident = rng.randrange(7)
        if accident == 0 and out:
            out[at - 1] ^= 1 << rng.randrange(8)
        elif accident == 1 and out:
            out[at - 1] = rng.randrange(256)
        elif accident == 2:
            out[at:at] = rng.choice(PIECES)
        elif accident == 3:
            del out[at : min(end, at + 64)]
        elif accident == 4:
            out[at:at] = out[at : min(end, at + 256)]
        elif accident == 5:
            out[at : at + rng.randrange(8)] = other[(start := rng.randint(0, len(other))) : start + rng.randrange(64)]
        elif rng.randrange(8) == 0:
            del out[at:]
    return bytes(out)


def mutate_message(rng: random.Random, message: Any) -> None:
    """Change one to four fields anywhere in `message`, to values that its types allow."""
    for _ in range(1 << rng.randrange(3)):
        parent = rng.choice(list(_messages(message)))
        _change(rng, parent, rng.choice(parent.DESCRIPTOR.fields))


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for item in value if _repeated(field) else (value,):
            yield from _messages(item)


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated) if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED


def _change(rng: random.Random, parent: Any, field: Any) -> None:
    value = getattr(parent, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key_field, value_field = field.message_type.fields
        if value and rng.randrange(2):
            key = rng.choice(sorted(value))
            if rng.randrange(2):
                del value[key]
                return
        else:
            key = _value(rng, key_field, None)
        value[key] = _value(rng, value_field, None)
    elif _repeated(field):
        _change_repeated(rng, value, field)
    elif field.message_type is not None:
        if rng.randrange(2):
            parent.ClearField(field.name)
        else:
            value.SetInParent()
    else:
        setattr(parent, field.name, _value(rng, field, value))


def _change_repeated(rng: random.Random, value: Any, field: Any) -> None:
    at = rng.randrange(len(value)) if value else 0
    change = rng.randrange(4)
    if change == 0 and value:
        del value[at]
    elif field.message_type is not None:
        item = value.add()
        if len(value) > 1 and rng.randrange(4):
            item.CopyFrom(value[at])
        if change == 2:
            items = [type(x).FromString(x.SerializeToString()) for x in value]
            rng.shuffle(items)
            del value[:]
            value.extend(items)
    elif change == 1 and value:
        value[at] = _value(rng, field, value[at])
    elif change == 2 and value:
        value.append(value[at])
    else:
        value.extend(_value(rng, field, None) for _ in range(rng.choice((1, 1, 2, 70))))


def _value(rng: random.Random, field: Any, old: Any) -> Any:
    """A value of the field's type: an odd one, or one beside the `old` one."""
    kind = field.cpp_type
    if kind in _INT_BITS:
        bits, signed = _INT_BITS[kind]
        number = rng.choice(NUMBERS) if old is None or rng.randrange(2) else old + rng.choice((-1, 1, 2, -64, 64))
        if signed and rng.randrange(3) == 0:
            number = -number
        return max(-(1 << bits) if signed else 0, min(number, (1 << bits) - 1))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return bool(rng.randrange(2))
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutated_bytes(rng, old or b"", b"\0" * 64)
    return rng.choice(TEXTS) if not old or rng.randrange(4) else old[: rng.randrange(len(old))] + rng.choice(TEXTS)
