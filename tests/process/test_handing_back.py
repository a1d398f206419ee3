"""A companion dies, and those who map its entries hand them to the next one."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.left import none_left_open, settle
from tests.support.place import KEY, Place, alive, arena_of, until
from tests.support.publishing import Small, load
from vllm_companion_plugin.client import mirror
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.client.mirror import Held, Mirror
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, LeaseState
from vllm_companion_plugin.errors import (
    ArenaError,
    CompanionError,
    CompanionReplacedError,
    EntryInUseError,
    EntryNotFoundError,
    RuntimeDirError,
)
from vllm_companion_plugin.host import notes, peer
from vllm_companion_plugin.wire import fd_channel

pytestmark = pytest.mark.timeout(300)


class Engines:
    """Stand-ins for engines: each maps the entry, holds it, and ends."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.holders: list[Mirror] = []
        self.owned: list[Sequence[int]] = []
        self._undo: list[Callable[[], object]] = []

    def connect(self) -> CompanionConnection:
        connection = connect("cpu", self.place.settings, spawn=True)
        self._undo.append(connection.close)
        return connection

    def start(self, content: bytes = b"weights", **changes: str) -> Ready | None:
        """One more engine, which loads or attaches; what it attached to."""
        connection, key = self.connect(), replace(KEY, **changes)
        lease = connection.attach(key, may_load=True, client_name="engine")
        outcome = lease.wait(30)
        if isinstance(outcome, Granted):
            arena, fds = arena_of(content)
            generation = outcome.publication.publish(arena, fds, b"manifest", 3, {"hide": 7})
            self._hold(lease, Held(key, generation, arena, fds, b"manifest", outcome.publication.published))
            return None
        fds = outcome.redeem()
        assert os.pread(fds[0], 100, 0) == content
        held = Held(outcome.key, outcome.generation, outcome.arena, fds, outcome.manifest, outcome.published)
        self._hold(lease, held)
        return outcome

    def _hold(self, lease: Lease, held: Held) -> None:
        self.owned.append(held.fds)
        self.holders.append(Mirror("cpu", self.place.settings, held, lease, "engine"))
        self._undo += [self.holders[-1].close, held.fds.close]

    def deafen(self, number: int) -> Callable[[], None]:
        """Engine `number` does not notice the next death; what it would have done then."""
        holder = self.holders[number]
        noticed = holder._hand_back
        holder._hand_back = lambda: None  # type: ignore[method-assign]
        return noticed

    def kill_companion(self) -> int:
        pid = self.place.companion_pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), 5, "the companion is dead")
        return pid

    def status(self) -> CompanionStatus | None:
        """Of a companion, should one answer."""
        try:
            with connect("cpu", self.place.settings, spawn=False) as connection:
                return connection.status()
        except CompanionError:
            return None

    def all_attached(self, leases: int) -> bool:
        status = self.status()
        return status is not None and [(e.state, len(e.leases)) for e in status.entries] == [(EntryState.READY, leases)]

    def close(self) -> None:
        for undo in reversed(self._undo):
            undo()


@pytest.fixture
def engines(place: Place) -> Iterator[Engines]:
    made = Engines(place)
    yield made
    made.close()


def test_a_killed_companion_is_replaced_and_its_entry_comes_back_as_it_was(engines: Engines) -> None:
    began = time.monotonic()
    engines.start()
    start_s = time.monotonic() - began  # most of it is the companion's
    for _ in range(2):
        engines.start()
    for _ in range(2):  # what was handed back can be handed back again
        before = engines.status()
        assert before is not None
        killed, began = engines.kill_companion(), time.monotonic()
        until(lambda: engines.all_attached(3), 10, "all three are attached again")
        assert time.monotonic() - began < 2 + 5 * start_s
        after = engines.status()
        assert after is not None
        assert after.pid != killed
        assert replace(after.entries[0], leases=()) == replace(before.entries[0], leases=())
        assert {lease.state for lease in after.entries[0].leases} == {LeaseState.ATTACHED}
    fourth = engines.start()
    assert fourth is not None
    assert (fourth.generation, fourth.manifest) == (1, b"manifest")


def test_whatever_fails_it_is_handed_back(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """This may be the last copy: an error that nobody thought of ends no attempt."""
    engines.start()
    inner, failed = mirror.connect, threading.Event()

    def connect_later(*arguments: Any, **named: Any) -> CompanionConnection:
        if not failed.is_set():
            failed.set()
            raise ValueError("filedescriptor out of range in select()")
        return inner(*arguments, **named)

    monkeypatch.setattr(mirror, "connect", connect_later)
    engines.kill_companion()
    until(lambda: engines.all_attached(1), 10, "it is attached again")
    assert failed.is_set()


def test_a_hold_whose_connection_was_closed_is_known_again(engines: Engines) -> None:
    """Its lease was released, and not lost: nothing else would tell."""
    engines.start()
    (holder,) = engines.holders
    (connection,) = [undo.__self__ for undo in engines._undo if isinstance(undo.__self__, CompanionConnection)]  # type: ignore[attr-defined]
    connection.close()
    until(lambda: engines.all_attached(0), 5, "the companion knows of none")
    assert not holder.lost
    holder.attach_again()
    until(lambda: engines.all_attached(1), 10, "it is attached again")


def test_who_comes_in_between_waits_instead_of_loading_again(engines: Engines) -> None:
    """The holder is kept from noticing, so that the newcomer is the one who starts the companion."""
    engines.start()
    noticed = engines.deafen(0)
    engines.kill_companion()
    lease = engines.connect().attach(KEY, may_load=True, client_name="newcomer")
    status = engines.status()
    assert status is not None
    (entry,) = status.entries
    assert (entry.state, entry.loader and entry.loader.progress.phase) == (EntryState.LOADING, "about to hand it back")
    assert [x.state for x in entry.leases] == [LeaseState.WAITING]
    noticed()
    outcome = lease.wait(30)
    assert isinstance(outcome, Ready)
    assert outcome.generation == 1
    lease.release()


def test_what_nobody_hands_back_in_time_is_loaded_anew_as_the_next_generation(engines: Engines) -> None:
    engines.start()
    noticed = engines.deafen(0)
    engines.kill_companion()
    began = time.monotonic()
    assert engines.start(b"again") is None
    assert 3 < time.monotonic() - began < 60
    noticed()  # too late: it keeps its own, and has no lease
    status = engines.status()
    assert status is not None
    assert [(e.generation, len(e.leases)) for e in status.entries] == [(2, 1)]


def test_a_reader_of_what_nobody_hands_back_is_told(engines: Engines) -> None:
    engines.start()
    engines.deafen(0)
    engines.kill_companion()
    with pytest.raises(EntryNotFoundError, match="handed back"):
        engines.connect().attach(model=KEY.model, may_load=False, client_name="reader").wait(30)


def test_a_companion_that_is_stopped_stays_away(engines: Engines) -> None:
    engines.start()
    pid = engines.place.companion_pid()
    engines.connect().shutdown()
    until(lambda: not alive(pid), 5, "the companion has ended")
    until(lambda: engines.holders[0].lost, 5, "the engine has noticed")
    time.sleep(1)
    assert engines.status() is None


def test_what_is_unloaded_is_not_handed_back(engines: Engines) -> None:
    engines.start(model="gone/model", id="cd" * 32)
    engines.start()
    engines.connect().unload(model="gone/model", force=True)
    engines.kill_companion()
    until(lambda: engines.all_attached(1), 10, "the other is attached again")
    status = engines.status()
    assert status is not None
    assert [entry.key.model for entry in status.entries] == [KEY.model]


HOLDER = """
import sys
from tests.process.test_handing_back import Engines
from tests.support.place import Place
place = Place(sys.argv[1]); engines = Engines(place)
print("ready" if engines.start() else "loaded", flush=True)
sys.stdin.read()
"""


def child(place: Place, code: str = HOLDER) -> subprocess.Popen[str]:
    process = place.run("-c", code, str(Path(place.settings.runtime_dir).parent))
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("ready", "loaded"), process.communicate()[1]
    return process


def test_a_holder_that_dies_while_it_hands_back_is_followed_by_the_next(engines: Engines) -> None:
    first, second = child(engines.place), child(engines.place)
    os.kill(second.pid, signal.SIGSTOP)
    engines.kill_companion()
    os.kill(first.pid, signal.SIGKILL)
    os.kill(second.pid, signal.SIGCONT)
    until(lambda: engines.all_attached(1), 10, "the second handed it back")


FREEZES = """
import os, signal
from vllm_companion_plugin.client.publication import Publication
inner = Publication.hand_back
def hand_back(self, arena, fds, manifest, published, generation):
    if generation:
        Publication.hand_back = inner
        os.kill(os.getpid(), signal.SIGSTOP)
    return inner(self, arena, fds, manifest, published, generation)
Publication.hand_back = hand_back
"""


def frozen(process: subprocess.Popen[str]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_holder_that_hangs_when_it_may_hand_back_loses_its_turn_and_keeps_its_own(engines: Engines) -> None:
    """Of one entry another holder is left, of the other one none."""
    place, other = engines.place, {"id": "cd" * 32, "model": "other/model"}
    hang = [child(place, FREEZES + HOLDER), child(place, FREEZES + HOLDER.replace("start()", f"start(**{other})"))]
    engines.start()
    noticed = engines.deafen(0)
    engines.kill_companion()
    connection = engines.connect()
    until(lambda: all(map(frozen, hang)), 10, "both were elected, and hang")
    began = time.monotonic()
    noticed()  # returns when it has handed back
    outcome = connection.attach(replace(KEY, **other), may_load=True, client_name="newcomer").wait(30)
    assert isinstance(outcome, Granted)
    assert time.monotonic() - began < 60
    arena, fds = arena_of(b"anew")
    assert outcome.publication.publish(arena, fds, b"manifest", 3) == 2
    fds.close()
    for process in hang:
        os.kill(process.pid, signal.SIGCONT)

    def shown() -> list[tuple[str, EntryState, int, int]]:
        status = engines.status()
        entries = status.entries if status is not None else ()
        return sorted((e.key.model, e.state, e.generation, len(e.leases)) for e in entries)

    wanted = [("other/model", EntryState.READY, 2, 1), (KEY.model, EntryState.READY, 1, 2)]
    until(lambda: shown() == wanted, 10, "one is attached again, the other one was loaded anew")
    for content, changes in ((b"weights", {}), (b"anew", other)):
        assert engines.start(content, **changes) is not None
    assert hang[1].poll() is None
    hang[1].terminate()
    assert re.search(r"(?<!other/)model was loaded anew; this process keeps its own copy", hang[1].communicate()[1])


def test_what_is_mapped_survives_the_runtime_directory(engines: Engines) -> None:
    for _ in range(2):
        engines.start()
    pid = engines.place.companion_pid()
    shutil.rmtree(engines.place.settings.runtime_dir)
    until(lambda: not alive(pid), 5, "the companion has noticed")
    until(lambda: engines.all_attached(2), 10, "both are attached again")
    assert list(notes.held(engines.place.paths)) == [(KEY, 1)]
    attached = engines.start()
    assert attached is not None
    assert attached.generation == 1


FORKS = HOLDER.replace(
    "sys.stdin.read()", "import os; pid = os.fork(); pid and print(pid, flush=True); sys.stdin.read()"
)


def test_a_child_of_a_dead_holder_holds_nothing(engines: Engines) -> None:
    process = child(engines.place, FORKS)
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    try:
        process.kill()
        process.wait(30)
        until(lambda: not list(notes.held(engines.place.paths)), 5, "the child has let go, too")
        assert alive(forked)
    finally:
        os.kill(forked, signal.SIGKILL)


@pytest.mark.parametrize("of", ["_mutex", "_closed"])
def test_a_child_waits_for_no_lock_of_a_thread_that_did_not_come_along(engines: Engines, of: str) -> None:
    """Neither in `fork` itself, nor when it closes what it inherits."""
    engines.start()
    holder = engines.holders[0]
    lock = getattr(holder, of)
    with getattr(lock, "_cond", lock):  # as another thread may have it at any time
        child = os.fork()
        if not child:
            holder.close()
            os._exit(0)
    try:
        until(lambda: os.waitpid(child, os.WNOHANG)[0], 5, "the child ends")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    assert not holder.ended


def test_a_question_goes_to_the_companion_that_knows_of_this_hold(engines: Engines) -> None:
    """Also if another thread is attached again while it is asked, which closes the connection of before."""
    engines.start()
    holder, asked = engines.holders[0], list[Lease]()
    holder.know_again()

    def question(lease: Lease) -> int:
        asked.append(lease)
        if len(asked) == 1:
            holder.know_again()
        return lease.generation(0, b"manifest").generation

    began = time.monotonic()
    assert holder.ask(question) == 1
    assert len(asked) == 2
    assert time.monotonic() - began < 8  # it would have waited for 10 s for the next companion


def test_of_what_nobody_maps_any_more_nothing_is_expected(engines: Engines) -> None:
    process = child(engines.place)
    os.kill(process.pid, signal.SIGSTOP)  # or it might hand back before we kill it
    engines.kill_companion()
    process.kill()
    process.wait()
    engines.connect()
    status = engines.status()
    assert status is not None
    assert status.entries == ()
    assert engines.start(b"again") is None


def test_holds_are_seen_while_they_last_and_forgotten_afterwards(place: Place) -> None:
    first, second = notes.hold(place.paths, KEY, 3), notes.hold(place.paths, KEY, 3)
    assert list(notes.held(place.paths)) == [(KEY, 3)]
    os.close(first)
    assert list(notes.held(place.paths)) == [(KEY, 3)]
    os.close(second)
    assert list(notes.held(place.paths)) == []
    assert os.listdir(place.paths.holders) == []


def test_who_only_looks_holds_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits for an adapter looks again and again, and may just do so when a companion starts."""
    os.close(notes.hold(place.paths, KEY, 3))
    looker = os.open(os.path.join(place.paths.holders, f"{KEY.id}.3"), os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_EX)
    monkeypatch.setattr(notes.time, "sleep", lambda seconds: os.close(looker))
    assert list(notes.held(place.paths)) == []
    assert os.listdir(place.paths.holders) == []


def test_what_was_dismissed_is_told_from_what_was_cleaned_away(place: Place) -> None:
    first, second = (notes.hold(place.paths, KEY, generation) for generation in (3, 4))
    notes.dismiss(place.paths, KEY, 3)
    shutil.rmtree(place.settings.runtime_dir)
    assert [(notes.is_dismissed(fd), notes.is_removed(fd)) for fd in (first, second)] == [
        (True, True),
        (False, True),
    ]
    os.close(first)
    os.close(second)


def test_a_note_says_what_was_current_as_long_as_somebody_holds_the_entry(place: Place) -> None:
    """What nobody holds has no current generation, and a file that says something else says nothing."""
    note = notes.hold(place.paths, KEY, 3)
    assert notes.rolled_back_to(place.paths, KEY) == 0
    for generation in (3, 12, 2):
        notes.roll_back(place.paths, KEY, generation)
        assert notes.rolled_back_to(place.paths, KEY) == generation
    assert list(notes.held(place.paths)) == [(KEY, 3)]
    assert notes.rolled_back_to(place.paths, KEY) == 2
    for text in ("", "-1", "0", "one", "9" * 40, "\u0663"):
        Path(notes._rolled_back_path(place.paths, KEY)).write_text(text)
        assert notes.rolled_back_to(place.paths, KEY) == 0
    notes.roll_back(place.paths, KEY, 0)
    notes.roll_back(place.paths, KEY, 0)
    assert notes.rolled_back_to(place.paths, KEY) == 0
    notes.roll_back(place.paths, KEY, 3)
    os.close(note)
    assert list(notes.held(place.paths)) == []
    assert notes.rolled_back_to(place.paths, KEY) == 0
    assert os.listdir(place.paths.holders) == []


def test_a_hold_that_is_not_written_yet_is_no_hold(place: Place) -> None:
    os.close(notes.hold(place.paths, KEY, 3))
    path = os.path.join(place.paths.holders, f"{KEY.id}.3")
    Path(path).write_text("{")
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert list(notes.held(place.paths)) == []
    assert os.path.exists(path)


def test_what_is_handed_back_is_what_was_held_whatever_its_numbers_mean_by_now(engines: Engines) -> None:
    engines.start()
    (fd,) = engines.owned[0]
    with arena_of(b"others!")[1] as others:
        os.dup2(others[0], fd)
    engines.kill_companion()
    until(lambda: engines.all_attached(1), 10, "it is attached again")
    assert engines.start() is not None  # and reads "weights"


def test_a_companion_that_is_stopped_while_its_engine_cannot_hear_it_stays_away(engines: Engines) -> None:
    process = child(engines.place)
    os.kill(process.pid, signal.SIGSTOP)
    pid = engines.place.companion_pid()
    engines.connect().shutdown()
    until(lambda: not alive(pid), 5, "the companion has ended")
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1.5)
    assert engines.status() is None


def test_an_older_generation_does_not_come_back_over_a_newer_one(engines: Engines) -> None:
    engines.start()
    noticed = engines.deafen(0)
    engines.kill_companion()
    assert engines.start(b"again") is None  # after five seconds
    engines.holders[1].close()
    engines.connect().unload(model=KEY.model)
    noticed()
    status = engines.status()
    assert status is not None
    assert status.entries == ()


def upgrade(place: Place) -> tuple[int, str]:
    process = place.run("-m", "vllm_companion_plugin.cli.main", "upgrade")
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err


def test_an_upgrade_takes_over_what_engines_map_and_what_nobody_does(engines: Engines) -> None:
    for identity in ("cd" * 32, KEY.id):
        engines.start(id=identity, model=f"model/{identity[:2]}")
    engines.start(id=KEY.id, model="model/ab")
    engines.holders[0].close()  # its entry stays, used by nobody

    def settled() -> CompanionStatus:
        """What the companion shows once both engines hold the one entry, and nobody the other."""
        seen: list[CompanionStatus] = []

        def is_settled() -> bool:
            status = engines.status()
            seen[:] = [status] if status is not None else []
            return [sorted(len(entry.leases) for entry in shown.entries) for shown in seen] == [[0, 2]]

        until(is_settled, 5, "two engines hold one entry, and nobody the other")
        return seen[0]

    before = settled()
    code, text = upgrade(engines.place)
    assert code == 0, text
    after = settled()
    assert f"is now pid {after.pid}" in text
    assert after.pid != before.pid
    assert after.linger_s == before.linger_s
    shown = {entry.key.id: replace(entry, leases=(), expires_at_unix_s=0) for entry in after.entries}
    assert shown == {entry.key.id: replace(entry, leases=(), expires_at_unix_s=0) for entry in before.entries}


def test_a_companion_that_makes_room_lets_nobody_in_any_more(engines: Engines) -> None:
    connection = engines.connect()
    engines.start()
    engines.holders[0].close()
    until(lambda: engines.all_attached(0), 5, "nobody holds it")
    with pytest.raises(EntryInUseError, match="published meanwhile"):
        connection.shutdown(replaced=True)
    connection.unload()
    connection.shutdown(replaced=True)
    assert not os.path.exists(engines.place.paths.grpc_socket)
    with pytest.raises(CompanionReplacedError):
        connection.attach(KEY, may_load=True, client_name="late").wait(30)


def test_an_upgrade_waits_for_no_load_and_changes_nothing_then(engines: Engines) -> None:
    connection = engines.connect()
    lease = connection.attach(KEY, may_load=True, client_name="loader")
    assert isinstance(lease.wait(30), Granted)
    pid = engines.place.companion_pid()
    code, text = upgrade(engines.place)
    assert (code, "is being loaded" in text) == (1, True), text
    assert engines.place.companion_pid() == pid
    assert not lease.lost.is_set()
    lease.release()


def test_who_has_no_descriptors_left_is_told_so_and_keeps_none(place: Place) -> None:
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, Small())
        lease = connection.attach(KEY, may_load=False, client_name="holder")
        outcome = lease.wait(30)
        assert isinstance(outcome, Ready)
        fds = outcome.redeem()
        many = list(fds) * 2000  # more than there are free numbers below the limit
        held = Held(KEY, 1, outcome.arena, many, outcome.manifest, outcome.published)
        settle()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, limits[1]))
        with none_left_open():
            try:
                with pytest.raises(ArenaError, match="cannot be held: Too many open files"):
                    Mirror("cpu", place.settings, held, lease, "holder")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        fds.close()


def test_a_hold_whose_file_vanishes_while_it_is_made_closes_nothing_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is cleaned between the locking and the look at it, and is gone at the next try."""
    real_stat = os.stat

    def stat(path: object, **options: object) -> os.stat_result:
        if str(path).endswith(".3"):
            shutil.rmtree(place.paths.holders)
        return real_stat(path, **options)  # type: ignore[call-overload, no-any-return]

    paths = place.paths
    monkeypatch.setattr(notes.os, "stat", stat)
    with pytest.raises(RuntimeDirError, match="Cannot note in"):
        notes.hold(paths, KEY, 3)  # a second close would be EBADF, which has no type of ours


def test_a_connect_that_a_signal_interrupted_is_no_connection() -> None:
    """Python takes it for done; the kernel knows nobody at the other end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, pytest.raises(OSError, match="not connected"):
        peer.check_listener(sock, "/nowhere")


class TestHoldInstead:
    """An engine advances while one of its threads hands the generation of before to the next companion."""

    @pytest.fixture
    def next_one(self, engines: Engines) -> Iterator[Held]:
        """The generation that an engine advances to; no engine but the first one has it."""
        engines.start()
        arena, fds = arena_of(b"next wt")
        held = engines.holders[0]._held
        yield replace(held, generation=2, arena=arena, fds=fds, published=replace(held.published, version="step-1"))
        fds.close()

    def test_in_use(self, engines: Engines, next_one: Held, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is on its way to the next companion arrives, whatever the numbers of before mean by now."""
        holder, real, others = engines.holders[0], fd_channel.pack_fds, []

        def pack_fds(count: int) -> bytes:
            """Called when the numbers are about to be sent."""
            monkeypatch.undo()
            holder.hold_instead(next_one)
            others.append(arena_of(*[b"others!"] * 20)[1])  # under the numbers that are free by now
            return real(count)

        monkeypatch.setattr(fd_channel, "pack_fds", pack_fds)
        engines.kill_companion()
        until(lambda: engines.all_attached(1), 10, "it is attached again")
        others.pop().close()
        attached = engines.start()  # and reads "weights"
        assert attached is not None
        assert attached.generation == 1
        assert list(notes.held(engines.place.paths)) == [(KEY, 1), (KEY, 2)]
        until(lambda: self.mapped(engines) == {1: 1}, 5, "the companion knows that the first one has gone on")

    def test_elected(self, engines: Engines, next_one: Held, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is held when the next companion asks for it is handed over, and under its own number."""
        holder, real = engines.holders[0], CompanionConnection.attach

        def attach(self: CompanionConnection, *arguments: Any, **options: Any) -> Lease:
            lease = real(self, *arguments, **options)
            monkeypatch.undo()
            holder.hold_instead(next_one)
            return lease

        monkeypatch.setattr(CompanionConnection, "attach", attach)
        engines.kill_companion()
        until(lambda: engines.all_attached(1), 10, "it is attached again")
        attached = engines.start(b"next wt")
        assert attached is not None
        assert attached.generation == 2
        assert self.mapped(engines) == {2: 2}

    def test_no_note(self, engines: Engines, next_one: Held) -> None:
        """Who cannot note the next generation keeps the hold of before, and no descriptors of the other."""
        holders = Path(engines.place.paths.holders)
        shutil.rmtree(holders)
        holders.touch()
        with none_left_open(), pytest.raises(RuntimeDirError):
            engines.holders[0].hold_instead(next_one)
        holders.unlink()
        engines.kill_companion()
        until(lambda: engines.all_attached(1), 10, "it is attached again")
        attached = engines.start()
        assert attached is not None
        assert attached.generation == 1

    def test_closed(self, engines: Engines, next_one: Held) -> None:
        """After its end a hold holds nothing, also of another generation."""
        engines.holders[0].close()
        with none_left_open():
            engines.holders[0].hold_instead(next_one)
        assert list(notes.held(engines.place.paths)) == []

    @staticmethod
    def mapped(engines: Engines) -> dict[int, int]:
        """How many clients map each generation that the companion has, as far as it knows."""
        status = engines.status()
        assert status is not None
        return {each.number: len(each.pids) for entry in status.entries for each in entry.generations}


def test_a_hold_that_ends_while_it_is_handed_back_takes_nothing_from_the_thread_that_does(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine closes its attachment just then."""
    engines.start()
    holder, real, arrived = engines.holders[0], fd_channel.pack_fds, threading.Event()

    def pack_fds(count: int) -> bytes:
        monkeypatch.undo()
        holder._let_go()
        arrived.set()
        return real(count)

    monkeypatch.setattr(fd_channel, "pack_fds", pack_fds)
    engines.kill_companion()
    assert arrived.wait(60)
    until(lambda: engines.all_attached(0), 10, "it was handed back, and is used no more")
    assert holder._fds.closed
