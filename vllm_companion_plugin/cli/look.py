"""The commands `status`, `watch`, `unload` and `stop`, which ask running companions."""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from vllm_companion_plugin.cli import table
from vllm_companion_plugin.cli.devices import running
from vllm_companion_plugin.cli.exits import Exit, NothingRunsError
from vllm_companion_plugin.cli.selecting import asked
from vllm_companion_plugin.cli.settings_options import settings_of
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus, LeaseState, LeaseStatus
from vllm_companion_plugin.core.text import one_line, wrapped
from vllm_companion_plugin.errors import (
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.locks import is_locked
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening, listener_pid
from vllm_companion_plugin.keeper.client import keeper_pid
from vllm_companion_plugin.settings import Settings

SUCCESSOR_S = 3.0
"""How long `watch` waits for the companion that follows one that has ended: clients hand back within two seconds."""

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
    elif parsed.quiet:
        if ids := table.ids_text(statuses):
            print(ids)
    else:
        print(_text(statuses, wide=parsed.wide))
        for device, pid in keepers.items():
            if pid:
                text = f"{device}: keeper {pid} exports the memory. New engines cannot map it if that ends."
                print("\n".join([text] if parsed.wide else wrapped(text, columns_of_output())))
    return code if statuses or code else Exit.NOTHING_RUNS


def _text(statuses: list[CompanionStatus], *, wide: bool = False) -> str:
    columns = None if wide else columns_of_output()
    return table.to_text(statuses, time.time(), columns=columns, encoding=encoding_of_output())


def columns_of_output() -> int:
    """Return the width of the terminal, or 80 where there is none and `COLUMNS` is not set."""
    return shutil.get_terminal_size((80, 24)).columns


def encoding_of_output() -> str:
    """Return the encoding of standard output; any will do if the parent process closed that."""
    return (sys.stdout.encoding if sys.stdout is not None else None) or "utf-8"


def _each(parsed: argparse.Namespace, act: Callable[[CompanionConnection], None]) -> int:
    """Act on all named companions; return `FAILED` if one failed. One that hangs must not keep us from the others."""
    code = Exit.DONE
    with running(settings_of(parsed), parsed.device) as connections:
        if len(connections) == 1:
            _act(connections[0], act)
            return Exit.DONE
        for connection in connections:
            try:
                _act(connection, act)
            except CompanionError as error:
                say(f"vllm-companion: error: {one_line(str(error))}", error=True)
                code = Exit.FAILED
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
    """Print the status at every change, until Ctrl-C or until the last companion has ended without a successor."""
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    latest: dict[str, CompanionStatus] = {}
    settings = settings_of(parsed)
    with running(settings, parsed.device) as connections, _interrupts(news):
        if not connections:
            raise NothingRunsError(table.NOBODY, remedy="Start one: vllm-companion serve")
        for connection in connections:
            connection.check_protocol()
        missing = {connection.device for connection in connections}
        for device in missing:
            threading.Thread(target=_follow, args=(device, settings, news), daemon=True).start()
        while missing:
            device, item = news.get()
            if isinstance(item, KeyboardInterrupt):
                raise item
            if isinstance(item, CompanionStatus):
                before = latest.get(device)
                latest[device] = item
                if before is not None and before.pid != item.pid:
                    _say_now(f"The companion of {device} is now pid {item.pid}, version {item.version}.")
            else:
                missing.discard(device)
                latest.pop(device, None)
                _say_now(f"The companion of {device} has ended.")
                if isinstance(item, CompanionError) and not isinstance(item, CompanionUnavailableError):
                    raise item
            if missing == latest.keys() and missing:
                _say_now(f"\n{_text(list(latest.values()))}\n")
    return Exit.DONE


def _say_now(text: str) -> None:
    print(time.strftime("%H:%M:%S") + (text if text.startswith("\n") else f" {text}"), flush=True)


@contextlib.contextmanager
def _interrupts(news: queue.SimpleQueue[_News]) -> Iterator[None]:
    """Turn Ctrl-C into news. An exception could be raised where other code swallows it, as in a callback of gRPC."""
    before = signal.signal(signal.SIGINT, lambda *_: news.put(("", KeyboardInterrupt())))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _follow(device: str, settings: Settings, news: queue.SimpleQueue[_News]) -> None:
    """Follow a companion, and the one that replaces it: after an upgrade, or because clients handed back."""
    ended: CompanionError | None = None
    try:
        while True:
            with CompanionConnection(device_paths(device, settings)) as connection:
                try:
                    for item in connection.watch():
                        news.put((device, item))
                except CompanionUnavailableError as error:
                    ended = error
            if not _is_followed(device, settings):
                break
    except CompanionError as error:
        ended = error
    except Exception as error:  # the main thread waits for this news, whatever it is
        ended = CompanionError(f"The companion of {device} cannot be followed: {type(error).__name__}: {error}")
    news.put((device, ended))


def _is_followed(device: str, settings: Settings) -> bool:
    """Wait for the companion that comes after one that has ended, as long as somebody may be starting it."""
    paths = device_paths(device, settings)
    deadline = time.monotonic() + SUCCESSOR_S
    while not is_listening(paths):
        left_s = deadline - time.monotonic()
        # Whoever starts one that long hangs.
        if left_s < -settings.spawn_timeout_s or (left_s < 0 and not is_locked(paths.spawn_lock)):
            return False
        time.sleep(0.05)
    return True


def unload(parsed: argparse.Namespace) -> int:
    if (parsed.model is None and parsed.key is None) == (not parsed.all):
        raise SettingsError("unload: which model?", remedy="Name one MODEL, or give --all.")
    with running(settings_of(parsed), parsed.device) as connections:
        query, _ = asked(parsed, connections)
        found = 0
        missing: EntryNotFoundError | None = None
        for connection in connections:
            try:
                gone = connection.unload(model=query.model, rank=query.rank, key_id=query.key_id, force=parsed.force)
            except EntryNotFoundError as error:
                missing = error
                continue
            for entry in gone:
                found += 1
                say(f"Unloaded {entry.key.title} ({entry.key.rank}) from {connection.device}.")
                for lease in entry.leases:
                    say(_left_with(lease, "keeps its mapping; its end frees the memory"))
    if not found and missing is not None:
        if not parsed.all:
            raise missing
        say("Nothing was loaded.")
    return Exit.DONE


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
        say(_left_with(lease, f"keeps serving {entry.key.model} from its mapping"))


def _left_with(lease: LeaseStatus, mapping: str) -> str:
    """What becomes of a client whose entry is gone; `mapping`: of one that maps it."""
    asleep = lease.state is LeaseState.ASLEEP  # then it has nothing, and what was in host memory is gone, too
    what = "sleeps, and has to find or load the weights again when it wakes" if asleep else mapping
    return f"  {lease.client} (pid {lease.pid}) {what}."
