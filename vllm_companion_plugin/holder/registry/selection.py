"""Texts that say why nothing was found."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.holder.registry.entries import Entry

LOAD_IT = "`vllm-companion serve MODEL` loads it, and so does an engine with `--load-format companion`."
"""What to do if a model is not held."""


def describe(entries: Sequence[Entry]) -> str:
    """The entries in a few words each, e.g. "Qwen/Qwen3-8B (target, tp0/2, ready, key 3f2a...)"."""
    return ", ".join(f"{e.key.model} ({e.key.which}, {e.current.shown.value}, key {e.key.id[:12]})" for e in entries)


def no_match_text(select: EntryKey | Query, entries: Sequence[Entry]) -> str:
    """Why `select` found nothing: what there is, and for a key how the nearest entry differs."""
    if isinstance(select, EntryKey):
        asked = f"{select.model} ({select.role}, {select.rank}, key {select.id[:12]})"
        same = [e for e in entries if (e.key.model, e.key.role, e.key.rank) == (select.model, select.role, select.rank)]
        if same:
            return f"{asked} is published, but loaded differently: {select.nearest_text([e.key for e in same])}."
        prefix = f"{asked} is not published, nor is it being loaded"
    else:
        prefix = f"Nothing that is held matches {select}"
    return f"{prefix}. Here: {describe(entries) or 'nothing'}."
