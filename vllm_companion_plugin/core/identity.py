"""What makes two loads interchangeable: the key of an entry."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_companion_plugin.core.entry_kinds import ENTRY_KINDS, WEIGHTS, EntryKind
from vllm_companion_plugin.core.text import several, short_name

_MAX_DIFFERENCES = 8

_KEY_ID = re.compile(r"[0-9a-f]{1,64}")

MAX_TEXT = 4096

MAX_KEY_CHARACTERS = 256 << 10
"""Limit of characters in all texts of a key together; a checkpoint of 1000 files needs about half of them."""

CHECKPOINT = "checkpoint"
"""The field that holds the digest of `EntryKey.files`. All other fields say how the model was made of these files."""

VARIANT = "variant"
"""The field of a key that holds `EntryKey.variant`."""


@dataclass(frozen=True)
class EntryKey:
    """What makes two loads interchangeable.

    Attributes:
        id: hex sha256 over all `fields`. Equal ids mean the same entry, and byte-equal tensors until a client writes.
        model: name that users see and ask for: `model_name` of what the user wrote. Not part of the identity.
        role: "target" or "draft".
        rank: this rank among all parallel groups, e.g. "tp0/2"; "single" without parallel groups.
        fields: everything that went into `id`, for messages that explain a mismatch.
        source: where its loader found the checkpoint. Not part of the identity.
        files: identity of each file of the checkpoint, by relative name; `id` holds their digest.
        kind: what the entry holds, a name in `ENTRY_KINDS`.
    """

    id: str
    model: str
    role: str = "target"
    rank: str = "single"
    fields: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    kind: str = WEIGHTS

    @property
    def rules(self) -> EntryKind:
        """What follows from the kind."""
        return ENTRY_KINDS[self.kind]

    @property
    def title(self) -> str:
        """The model's name; followed by its kind unless that is weights, by its role unless that is "target", and by
        "variant" for a variant."""
        return self.titled(self.model)

    @property
    def short_title(self) -> str:
        """As `title`, of the last part of the model's name."""
        return self.titled(short_name(self.model))

    def titled(self, name: str) -> str:
        """As `title`, of another name for the model."""
        notes = [self.kind] if self.kind != WEIGHTS else []
        notes += [self.role] if self.role != "target" else []
        notes += ["variant"] if self.variant else []
        return f"{name} ({', '.join(notes)})" if notes else name

    @property
    def which(self) -> str:
        """Which entry of its model this is; of a kind without ranks, what it is."""
        return f"{self.role}, {self.rank}" if self.rules.has_ranks else self.kind

    @property
    def variant(self) -> str:
        """How the model differs from the first one published under an otherwise equal key; empty for that first one."""
        return self.fields.get(VARIANT, "")

    def problem(self) -> str | None:
        """Say what is wrong with another process's key; None if the key is valid. Ids become parts of file names."""
        texts = {name: getattr(self, name) for name in ("id", "model", "role", "rank")}
        for name, text in texts.items():
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT:
                return f"{name!r} is not a text of 1 to {MAX_TEXT} characters"
            if not text.isprintable():
                return f"{name!r} is {text[:200]!r}, which cannot be printed"
        if not _KEY_ID.fullmatch(self.id):
            return f"'id' is no hex digest but {self.id[:80]!r}"
        if not isinstance(self.kind, str) or self.kind not in ENTRY_KINDS:
            return f"'kind' is {str(self.kind)[:80]!r}, and this version knows {', '.join(ENTRY_KINDS)}"
        maps = (self.fields, self.files)
        if not all(isinstance(one, Mapping) for one in maps):
            return "'fields' or 'files' is no mapping"
        try:
            "".join(self._parts())
            "".join(self.fields.values()).encode()
        except (TypeError, UnicodeEncodeError):
            return "it holds a value that is no text"
        if not all(map(str.isprintable, self.fields)):
            return "a field has a name that cannot be printed"
        if self.characters > MAX_KEY_CHARACTERS:
            return f"it has {self.characters} characters; at most {MAX_KEY_CHARACTERS} are allowed"
        return None

    @functools.cached_property
    def characters(self) -> int:
        """The length of all its texts together."""
        return sum(map(len, self._parts()))

    def _parts(self) -> Iterator[str]:
        yield from (self.source, self.id, self.model, self.role, self.rank)
        for texts in (self.fields, self.files):
            for pair in texts.items():
                yield from pair

    def is_draft_of(self, target: EntryKey) -> bool:
        """Tell whether this is a draft for `target`: its fields hold the target's fields."""
        mine = {name: self.fields.get(f"target.{name}") for name in target.fields}
        return self.role == "draft" and mine == dict(target.fields)

    def differences(self, published: EntryKey) -> list[str]:
        """List how `published` was loaded differently: each differing field and weight file with both values."""
        return [_line(name, *values) for name, values in self._changed(published).items()]

    def _changed(self, published: EntryKey) -> dict[str, tuple[str | None, str | None]]:
        """The value there and the one here of each differing field and weight file, by name; None: it is absent."""
        fields = self.fields.keys() | published.fields.keys()
        files = [name for name in self.files.keys() | published.files.keys() if f"file.{name}" not in fields]
        sides = (self.fields, published.fields), (_named(self, files), _named(published, files))
        changed = {
            name: (there.get(name), here.get(name))
            for here, there in sides
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        }
        if len(changed) > 1 and any(name in changed for name in files):
            changed.pop(CHECKPOINT, None)
        return {name: changed[name] for name in sorted(changed)}

    def nearest_text(self, published: Sequence[EntryKey]) -> str:
        """Say in one line how the most similar of `published` differs."""
        nearest = min(published, key=lambda key: len(self.differences(key)))
        lines = _by_weight(self._changed(nearest)) or [f"its key is {nearest.id[:12]}"]
        return several(lines, _MAX_DIFFERENCES, "; ")


def _line(name: str, there: str | None, here: str | None) -> str:
    values = ["absent" if value is None else value for value in (there, here)]
    return f"{name} is {values[0]!r} there and {values[1]!r} here"


def _by_weight(changed: Mapping[str, tuple[str | None, str | None]]) -> list[str]:
    """Lines for people: other values first, as many fields come and go with one flag. Those are one line together."""
    lines = [_line(name, *values) for name, values in changed.items() if None not in values]
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, values in changed.items():
        if None in values:
            groups.setdefault((name.partition(".")[0], values[0] is None), []).append(name)
    for (group, is_absent_there), names in groups.items():
        if len(names) == 1:
            lines.append(_line(names[0], *changed[names[0]]))
        else:
            lines.append(f"{group} ({len(names)} fields) is 'absent' {'there' if is_absent_there else 'here'}")
    return lines


def _named(key: EntryKey, names: Sequence[str]) -> dict[str, str]:
    return {name: key.files[name] for name in names if name in key.files}
