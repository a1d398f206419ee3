"""The commands `status`, `watch`, `unload` and `stop`, which ask running companions."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator

from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.devices import running
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus
from vllm_companion_plugin.core.text import one_line
from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.spawn import listener_pid
from vllm_companion_plugin.keeper.client import keeper_pid
from vllm_companion_plugin.settings import Settings

_News = tuple[str, CompanionStatus | CompanionError | KeyboardInterrupt | None]
"""A device with a status of its companion; or, once the companion has ended, with the error or None."""


def status(parsed: argparse.Namespace) -> int:
    statuses: list[CompanionStatus] = []
    keepers: dict[str, int] = {}

    def ask(connection: CompanionConnection) -> None:
        connection.check_protocol()
        statuses.append(connection.status())
        keepers[connection.device] = keeper_pid(connection.paths)

    code = _each(parsed, ask)
    if parsed.json:
        print(json.dumps(table.to_json(statuses, keepers), indent=2))
        return code
    print(table.to_text(statuses, time.time()))
    for device, pid in keepers.items():
        if pid:
            print(f"Memory of {device} is exported by its keeper (pid {pid}). New engines cannot map it if that ends.")
    return code


def _each(parsed: argparse.Namespace, act: Callable[[CompanionConnection], None]) -> int:
    """Act on all named companions; return 1 if one failed. A companion that hangs must not keep us from the others."""
    code = 0
    with running(settings_of(parsed), parsed.device) as connections:
        if len(connections) == 1:
            _act(connections[0], act)
            return 0
        for connection in connections:
            try:
                _act(connection, act)
            except CompanionError as error:
                say(f"vllm-companion: error: {one_line(str(error))}", error=True)
                code = 1
    return code


def _act(connection: CompanionConnection, act: Callable[[CompanionConnection], None]) -> None:
    try:
        act(connection)
    except (CompanionUnavailableError, WaitTimeoutError) as error:
        pid = listener_pid(connection.paths)
        if pid is None:
            return  # the companion ended just now
        who = f"pid {pid}" if pid else "in another container"
        remedy = error.remedy or (f"End it: kill -9 {pid}" if pid else "")
        what = f"The companion of {connection.device} ({who}) does not answer. {error.what}"
        raise WaitTimeoutError(what, remedy=remedy) from error


def watch(parsed: argparse.Namespace) -> int:
    """Print the status at every change, until Ctrl-C or until the last companion has ended."""
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    latest: dict[str, CompanionStatus] = {}
    with running(settings_of(parsed), parsed.device) as connections, _interrupts(news):
        if not connections:
            raise CompanionUnavailableError(table.NOBODY, remedy="Start one: vllm-companion serve")
        for connection in connections:
            connection.check_protocol()
            threading.Thread(target=_follow, args=(connection, news), daemon=True).start()
        missing = {connection.device for connection in connections}
        while missing:
            device, item = news.get()
            if isinstance(item, KeyboardInterrupt):
                raise item
            if isinstance(item, CompanionStatus):
                latest[device] = item
            else:
                missing.discard(device)
                latest.pop(device, None)
                print(f"{time.strftime('%H:%M:%S')} The companion of {device} has ended.", flush=True)
                if isinstance(item, CompanionError) and not isinstance(item, CompanionUnavailableError):
                    raise item
            if missing == latest.keys() and missing:
                now = time.time()
                print(f"{time.strftime('%H:%M:%S')}\n{table.to_text(list(latest.values()), now)}\n", flush=True)
    return 0


@contextlib.contextmanager
def _interrupts(news: queue.SimpleQueue[_News]) -> Iterator[None]:
    """Turn Ctrl-C into news. An exception could be raised where other code swallows it, as in a callback of gRPC."""
    before = signal.signal(signal.SIGINT, lambda *_: news.put(("", KeyboardInterrupt())))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _follow(connection: CompanionConnection, news: queue.SimpleQueue[_News]) -> None:
    try:
        for item in connection.watch():
            news.put((connection.device, item))
    except CompanionError as error:
        news.put((connection.device, error))
    else:
        news.put((connection.device, None))


def unload(parsed: argparse.Namespace) -> int:
    if (parsed.model is None) == (not parsed.all):
        raise SettingsError("unload: which model?", remedy="Name one MODEL, or give --all.")
    found = 0
    missing: EntryNotFoundError | None = None
    with running(settings_of(parsed), parsed.device) as connections:
        if not connections:
            raise CompanionUnavailableError(table.NOBODY)
        for connection in connections:
            connection.check_protocol()
            try:
                gone = connection.unload(
                    model=parsed.model or "", rank=parsed.rank or "", key_id=parsed.key or "", force=parsed.force
                )
            except EntryNotFoundError as error:
                missing = error
                continue
            for entry in gone:
                found += 1
                say(f"Unloaded {entry.key.title} ({entry.key.rank}) from {connection.device}.")
                for lease in entry.leases:
                    say(f"  {lease.client} (pid {lease.pid}) keeps its mapping; its end frees the memory.")
    if not found and missing is not None:
        if not parsed.all:
            raise missing
        say("Nothing was loaded.")
    return 0


def stop(parsed: argparse.Namespace) -> int:
    found: list[str] = []

    def end(connection: CompanionConnection) -> None:
        found.append(connection.device)
        _stop(connection)

    code = _each(parsed, end)
    if not found:
        say(table.NOBODY)
    return code


def stop_all(settings: Settings) -> None:
    """End every companion of this runtime directory, without output."""
    with running(settings, None) as connections:
        for connection in connections:
            shut_down(connection)


def _stop(connection: CompanionConnection) -> None:
    leases = []
    with contextlib.suppress(CompanionError, ValueError):  # the status of another version may be unreadable
        leases = [(entry, lease) for entry in connection.status().entries for lease in entry.leases]
    pid = shut_down(connection)
    say(f"Stopped the companion of {connection.device} (pid {pid}).")
    for entry, lease in leases:
        say(f"  {lease.client} (pid {lease.pid}) keeps serving {entry.key.model} from its mapping.")
