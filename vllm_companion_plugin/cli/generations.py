"""The commands `generations` and `rollback`, about the weights that clients have written."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence

from vllm_companion_plugin.cli import generation_table, table
from vllm_companion_plugin.cli.devices import running
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.generation_table import current_of
from vllm_companion_plugin.cli.look import columns_of_output, encoding_of_output
from vllm_companion_plugin.cli.selecting import asked
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.cli.table import generation_name
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, EntryStatus
from vllm_companion_plugin.errors import CompanionError, EntryNotFoundError

_Found = list[tuple[CompanionConnection, EntryStatus]]


def generations(parsed: argparse.Namespace) -> int:
    """Print the generations of the entries that the command line names; of all, if it names none."""
    with running(settings_of(parsed), parsed.device) as connections:
        statuses, found = _find(parsed, connections)
        shown = [(connection.device, entry) for connection, entry in found]
    if parsed.json:
        print(json.dumps(generation_table.to_json(shown), indent=2))
        return Exit.DONE
    encoding = encoding_of_output()
    ids = table.short_ids(statuses)
    names = table.short_names(entry.key.model for status in statuses for entry in status.entries)
    print(generation_table.to_text(shown, ids, names, time.time(), columns=columns_of_output(), encoding=encoding))
    return Exit.DONE


def rollback(parsed: argparse.Namespace) -> int:
    """Make the generation before the current one current, or the one that `--to` names: of all entries, or of none.

    Entries that nobody has written to are left alone if there are others: a draft, which has its target's name.
    """
    with running(settings_of(parsed), parsed.device) as connections:
        _, all_found = _find(parsed, connections)
        found = [(connection, entry) for connection, entry in all_found if _is_written(entry)] or all_found
        targets = [_target(connection.device, entry, parsed.to) for connection, entry in found]
        with contextlib.ExitStack() as undo:
            for (connection, entry), number in zip(found, targets, strict=True):
                if number != entry.generation:
                    _make_current(connection, entry.key.id, number, entry.generation)
                    undo.callback(_take_back, connection, entry.key.id, entry.generation, number)
            undo.pop_all()
        for (connection, entry), number in zip(found, targets, strict=True):
            _say(connection.device, entry, number)
    return Exit.DONE


def _find(
    parsed: argparse.Namespace, connections: Sequence[CompanionConnection]
) -> tuple[list[CompanionStatus], _Found]:
    """Ask all companions.

    Returns:
        What they have, and the entries of it that the command line names.

    Raises:
        NothingRunsError: no companion answers.
        EntryNotFoundError: a model is named, and none of them has it.
    """
    query, statuses = asked(parsed, connections)
    there = [(c, e) for c, s in zip(connections, statuses, strict=True) for e in s.entries]
    meant = query.among(e for _, e in there if e.state is not EntryState.RETIRED)
    found = [(c, e) for c, e in there if any(e is each for each in meant)]
    if not found and (parsed.model or parsed.key or parsed.rank):
        raise EntryNotFoundError(
            f"Nothing that is held matches {query}.", remedy="`vllm-companion status` lists what is held."
        )
    return statuses, found


def _is_written(entry: EntryStatus) -> bool:
    """Tell whether a client has written a generation of it that is held."""
    return bool(entry.version) or len(entry.generations) > 1


def _target(device: str, entry: EntryStatus, to: int | None) -> int:
    """Return the number of the generation that shall be current. Raises `EntryNotFoundError` if it is not held."""
    what = f"{entry.key.title} ({entry.key.rank}) on {device}"
    if entry.state is not EntryState.READY:
        raise EntryNotFoundError(
            f"{what} is {entry.state.value}; the way back is only there while it is on the device."
        )
    current = current_of(entry)
    number = current.follows if to is None else to
    if any(each.number == number for each in entry.generations):
        return number
    others = [generation_name(each.number, each.version) for each in entry.generations if not each.is_current]
    missing = f"has no generation {number}" if number else "has no earlier one that is known"
    raise EntryNotFoundError(
        f"{what} {missing}; generation {generation_name(current.number, current.version)} is current.",
        remedy=f"Held besides it: {', '.join(others)}. Choose with --to." if others else "No other one is held.",
    )


def _make_current(connection: CompanionConnection, key_id: str, number: int, before: int) -> None:
    connection.make_current(number, key_id=key_id, base=before)


def _take_back(connection: CompanionConnection, key_id: str, number: int, before: int) -> None:
    with contextlib.suppress(CompanionError):  # the error that made it necessary is told
        _make_current(connection, key_id, number, before)


def _say(device: str, entry: EntryStatus, number: int) -> None:
    names = {each.number: generation_name(each.number, each.version) for each in entry.generations}
    what = f"Generation {names[number]} of {entry.key.title} ({entry.key.rank})"
    if number == entry.generation:
        say(f"{what} is current on {device} already.")
        return
    say(f"{what} is current on {device}, in place of {names[entry.generation]}.")
    clients = {lease.pid: lease.client for lease in entry.leases}
    for each in entry.generations:
        for pid in each.pids if each.number != number else ():
            say(f"  {clients[pid]} (pid {pid}) maps generation {names[each.number]} until it advances.")
