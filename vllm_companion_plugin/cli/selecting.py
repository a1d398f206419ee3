"""Finding the entries that a command line names: by a name, the end of it, or an id."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.exits import NothingRunsError
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.query import Query
from vllm_companion_plugin.core.status import CompanionStatus
from vllm_companion_plugin.errors import SettingsError
from vllm_companion_plugin.host.models import model_name

ID_LEAST = 4
"""How many characters of an id tell it from a name."""


def asked(
    parsed: argparse.Namespace, connections: Sequence[CompanionConnection]
) -> tuple[Query, list[CompanionStatus]]:
    """Ask all companions; return what a command line names, and what they have.

    Raises:
        NothingRunsError: no companion answers.
        CompanionError: as `_query`, and of a companion of another protocol.
    """
    if not connections:
        raise NothingRunsError(table.NOBODY)
    statuses = []
    for connection in connections:
        connection.check_protocol()
        statuses.append(connection.status())
    return _query(parsed, statuses), statuses


def _query(parsed: argparse.Namespace, statuses: Sequence[CompanionStatus]) -> Query:
    """Return the query that MODEL, `--rank` and `--key` of a command make.

    Raises:
        SettingsError: as `find`, or MODEL and `--key` are two ids, or MODEL is empty, which would match any.
    """
    if parsed.model == "":
        raise SettingsError(
            f"{parsed.command}: MODEL is empty.", remedy="Name one as `vllm-companion status` shows it."
        )
    keys = [entry.key for status in statuses for entry in status.entries]
    model, key_id = find(parsed.command, parsed.model or "", keys)
    if parsed.key and key_id:
        raise SettingsError(f"{parsed.command}: {parsed.model} is an id already.", remedy="Leave out --key.")
    return Query(model, parsed.rank or "", key_id=key_id or parsed.key or "")


def find(command: str, word: str, keys: Sequence[EntryKey]) -> tuple[str, str]:
    """Find what `word` names; return the full name of the model, or "" and the digits of an id.

    A full name comes first, then the last parts of a name, then the first characters of an id. A word that names
    nothing is returned as the name of a model, so that the companion says what it has.

    Raises:
        SettingsError: several models have that end, or several ids that beginning.
    """
    full = model_name(word)
    models = sorted({key.model for key in keys})
    if not word or full in models:
        return full if word else "", ""
    if ends := [model for model in models if table.ends_with(model, word)]:
        if len(ends) > 1:
            raise SettingsError(f"{command}: {word} may be {' or '.join(ends)}.", remedy="Name more of it.")
        return ends[0], ""
    ids = sorted({key.id for key in keys if key.id.startswith(word)})
    if len(word) >= ID_LEAST and ids:
        if len(ids) > 1:
            raise SettingsError(f"{command}: {len(ids)} ids begin with {word}.", remedy="Give more characters of it.")
        return "", word
    return full, ""
