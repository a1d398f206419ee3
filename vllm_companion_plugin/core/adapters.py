"""LoRA adapters: the entry that one is, and the text by which a request of an engine names one generation of it.

An adapter's user gives it a name. `companion:NAME` is the path that a request asks for; a path that also says which
generation, and which content, is what the request is bound to. The content is named because numbers of generations
begin anew with a companion that nobody handed anything to.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.entry_kinds import ADAPTER
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import BadRequestError

SCHEME = "companion:"
MAX_NAME = 512
MANIFEST = b'{"adapter": 1}'
"""What is in the place of a model's manifest: an adapter's file says all else about itself."""

_PIN = re.compile(r"\?generation=([1-9][0-9]{0,15})(?:&content=([0-9a-f]{16}))?$")
_PIN_BEGINS = "?generation="
_LEAST_NUMBER, _MOST_NUMBER = 1 << 24, (1 << 31) - 1
"""vLLM keeps an adapter's number in 32 bits with a sign, and its servers count their own ones from 1."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        generation: 0: the current one.
        content: as of `Bound`; empty: whichever.
    """

    name: str
    generation: int = 0
    content: str = ""

    @property
    def path(self) -> str:
        """By which an engine is asked for it, and by which its workers find it."""
        pin = f"{_PIN_BEGINS}{self.generation}" if self.generation else ""
        return f"{SCHEME}{self.name}{pin}" + (f"&content={self.content}" if self.content else "")

    def __str__(self) -> str:
        return f"Adapter {self.name}" + (f", generation {self.generation}" if self.generation else "")


@dataclass(frozen=True)
class Bound(Asked):
    """One generation of an adapter, by its content: what a request is computed with from its first token to its last.

    Attributes:
        content: `content_of` its bytes.
    """

    @property
    def label(self) -> str:
        """A name that no other generation or content has: vLLM's prefix cache goes by it."""
        return f"{self.name}@{self.generation}-{self.content}"

    def number(self, attempt: int = 0) -> int:
        """The adapter's number in an engine; another one for another `attempt`, should two have the same."""
        digest = hashlib.sha256(f"{attempt} {self.path}".encode()).digest()
        return _LEAST_NUMBER + int.from_bytes(digest[:8], "big") % (_MOST_NUMBER - _LEAST_NUMBER)


def is_path(path: str) -> bool:
    """Whether this is the path of an adapter that a companion holds."""
    return path.startswith(SCHEME)


def asked_by(path: str) -> Asked:
    """What a path names: a `Bound` if it says the content, too. Raises `BadRequestError` for a name that is none."""
    name = path.removeprefix(SCHEME)
    pin = _PIN.search(name)
    if pin is None:
        return Asked(check_name(name))
    name = check_name(name[: pin.start()])
    return Bound(name, int(pin[1]), pin[2]) if pin[2] else Asked(name, int(pin[1]))


def check_name(name: str) -> str:
    """Return `name`; raise `BadRequestError` unless an adapter can have it."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise BadRequestError(
            f"{str(name)[:80]!r} is no name of an adapter, which has 1 to {MAX_NAME} printable characters."
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"{name[:80]!r} is no name of an adapter: it is no valid text.") from error
    if _PIN_BEGINS in name:
        raise BadRequestError(f"{name!r} is no name of an adapter: {_PIN_BEGINS!r} begins the number of a generation.")
    return name


def key_of(name: str) -> EntryKey:
    """The key of the adapter with this name. Raises `BadRequestError` for a name that is none."""
    identity = json.dumps([ADAPTER, check_name(name)]).encode()
    return EntryKey(hashlib.sha256(identity).hexdigest(), name, fields={ADAPTER: name}, kind=ADAPTER)


def content_of(arena: ArenaInfo) -> str:
    """16 hex digits that tell an adapter's bytes from others."""
    parts = [arena.checksums.algorithm, *map(str, (*arena.block_sizes, *arena.checksums.values))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
