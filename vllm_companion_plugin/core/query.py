"""What a user or a client asks for without knowing its full key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.identity import EntryKey


class HasKey(Protocol):
    @property
    def key(self) -> EntryKey: ...


Keyed = TypeVar("Keyed", bound=HasKey)


@dataclass(frozen=True)
class Query:
    """Finds entries without their full key. Empty fields match anything, and `key_id` the ids it begins.

    A name means weights, if there are some: the names of adapters are their users', and may be a model's, too.
    """

    model: str = ""
    rank: str = ""
    role: str = ""
    key_id: str = ""

    def matches(self, key: EntryKey) -> bool:
        named = ((self.model, key.model), (self.rank, key.rank), (self.role, key.role))
        return all(wanted in ("", actual) for wanted, actual in named) and key.id.startswith(self.key_id)

    def among(self, entries: Iterable[Keyed]) -> list[Keyed]:
        """Those of `entries` that are meant."""
        found = [entry for entry in entries if self.matches(entry.key)]
        weights = [entry for entry in found if entry.key.kind == WEIGHTS]
        return weights if self.model and weights else found

    def __str__(self) -> str:
        named = [f"{name} {value!r}" for name, value in vars(self).items() if value]
        return ", ".join(named) or "anything"
