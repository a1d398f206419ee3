"""Finding entries by query, and the texts that say why nothing was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vllm_companion_plugin.core.entry_kinds import WEIGHTS
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.holder.registry.entries import Entry


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
        return "The query for " + (", ".join(named) or "anything")


def describe(entries: Sequence[Entry]) -> str:
    """The entries in a few words each, e.g. "Qwen/Qwen3-8B (target, tp0/2, ready, key 3f2a...)"."""
    return ", ".join(f"{e.key.model} ({_which(e.key)}, {e.current.shown.value}, key {e.key.id[:12]})" for e in entries)


def _which(key: EntryKey) -> str:
    return f"{key.role}, {key.rank}" if key.rules.has_ranks else key.kind


def no_match_text(select: EntryKey | Query, entries: Sequence[Entry]) -> str:
    """Why `select` found nothing: what there is, and for a key how the nearest entry differs."""
    if isinstance(select, EntryKey):
        asked = f"{select.model} ({select.role}, {select.rank}, key {select.id[:12]})"
        same = [e for e in entries if (e.key.model, e.key.role, e.key.rank) == (select.model, select.role, select.rank)]
        if same:
            return f"{asked} is published, but loaded differently: {select.nearest_text([e.key for e in same])}."
        prefix = f"{asked} is not published, nor is it being loaded"
    else:
        prefix = f"{select} matches nothing"
    return f"{prefix}. Here: {describe(entries) or 'nothing'}."
