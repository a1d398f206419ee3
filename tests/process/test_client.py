"""Clients of a real companion: leases, publications, descriptors, and everybody's death."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.support.left import none_left_open
from tests.support.place import KEY, Place, alive, answering, arena_of, memfd, speaking, until
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Publication, Ready, connect
from vllm_companion_plugin.client.publication import REPORT_INTERVAL_S
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.status import EntryState, LeaseState, Progress, Published, Report
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    EntryInUseError,
    EntryNotFoundError,
    LeaseLostError,
    ManifestError,
    NotShareableError,
    ProtocolMismatchError,
    TicketError,
    WaitTimeoutError,
)
from vllm_companion_plugin.holder.service import tickets as ticket_module
from vllm_companion_plugin.holder.service.tickets import Tickets
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.wire import codec, fd_channel, messages


@pytest.fixture
def connection(place: Place) -> Iterator[CompanionConnection]:
    place.companion()
    with connect("cpu", place.settings, spawn=False) as made:
        yield made


def elected(connection: CompanionConnection, **changes: Any) -> tuple[Lease, Publication]:
    lease = connection.attach(replace(KEY, **changes), may_load=True, client_name="loader")
    outcome = lease.wait(30)
    assert isinstance(outcome, Granted)
    return lease, outcome.publication


def publish(connection: CompanionConnection, *contents: bytes, manifest: bytes = b"manifest", **changes: Any) -> Lease:
    lease, publication = elected(connection, **changes)
    arena, fds = arena_of(*(contents or (b"weights",)))
    publication.publish(arena, fds, manifest, 3)
    fds.close()
    return lease


def attached(connection: CompanionConnection) -> tuple[Lease, Ready]:
    lease = connection.attach(KEY, may_load=False, client_name="reader")
    outcome = lease.wait(30)
    assert isinstance(outcome, Ready)
    return lease, outcome


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize("blocks", [1, 3, 600], ids=lambda n: f"{n}-blocks")
@pytest.mark.parametrize("manifest_bytes", [0, 100_000, 5 << 20])
def test_what_was_published_is_what_is_redeemed(
    connection: CompanionConnection, blocks: int, manifest_bytes: int
) -> None:
    contents = [f"block {i}".encode() for i in range(blocks)]
    manifest = os.urandom(manifest_bytes)
    publish(connection, *contents, manifest=manifest)
    with none_left_open():
        _, ready = attached(connection)
        assert (ready.key, ready.generation, ready.manifest) == (KEY, 1, manifest)
        fds = ready.redeem()
        assert [os.pread(fd, 100, 0) for fd in fds] == contents
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
        fds.close()


def test_of_two_clients_at_once_exactly_one_is_elected(place: Place) -> None:
    place.companion()
    connections = [connect("cpu", place.settings, spawn=False) for _ in range(2)]
    barrier = threading.Barrier(2)

    def attach(connection: CompanionConnection) -> Granted | Ready:
        barrier.wait(30)
        outcome = connection.attach(KEY, may_load=True, client_name="racer").wait(30)
        if isinstance(outcome, Granted):
            arena, fds = arena_of(b"weights")
            outcome.publication.publish(arena, fds, b"m", 1)
            fds.close()
        return outcome

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(attach, connections))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Granted", "Ready"]
    for connection in connections:
        connection.close()


@pytest.mark.alone
def test_when_the_loader_is_killed_the_next_is_elected_within_a_second(
    place: Place, connection: CompanionConnection
) -> None:
    loader = place.client("loader", "attach")
    assert (line(loader), line(loader)) == ("connected", "granted")
    heir = place.client("heir", "attach")
    assert (line(heir), line(heir)) == ("connected", f"waiting {loader.pid}")
    loader.kill()
    began = time.monotonic()
    assert line(heir) == "granted"
    assert time.monotonic() - began < 1


@pytest.mark.alone
def test_the_lease_of_a_killed_client_ends_within_a_second(place: Place, connection: CompanionConnection) -> None:
    publish(connection)
    child = place.client("reader", "attach", "reader")
    assert (line(child), line(child)) == ("connected", "ready")
    assert {x.pid for x in connection.status().entries[0].leases} == {os.getpid(), child.pid}
    child.kill()
    ended = lambda: [x.pid for x in connection.status().entries[0].leases] == [os.getpid()]  # noqa: E731
    assert until(ended, 1, "the lease has ended") < 1


def test_a_client_that_exits_without_closing_anything_does_not_hang(place: Place) -> None:
    place.companion()
    child = place.client("careless", "attach", "exit")
    _, err = child.communicate(timeout=100)
    assert (child.returncode, err) == (0, "")


def test_progress_restarts_the_timeout_and_silence_ends_the_wait(connection: CompanionConnection) -> None:
    _, publication = elected(connection)
    seen: list[Progress] = []
    waiter = connection.attach(KEY, may_load=True, client_name="waiter")

    def report() -> None:
        for done in range(7):
            publication.report(Progress("reading", done << 30, 8 << 30))
            time.sleep(0.4)

    reporting = threading.Thread(target=report)
    reporting.start()
    began = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=rf"pid {os.getpid()}.*'reading', 6.00 of 8.00 GiB") as caught:
        waiter.wait(2.0, lambda loader: seen.append(loader.progress))
    reporting.join(30)
    assert time.monotonic() - began > 4
    assert "2 s without progress" in str(caught.value)
    assert [p.done_bytes >> 30 for p in seen if p.phase == "reading"] == [0, 1, 2, 3, 4, 5, 6]


def test_reports_are_limited_in_rate_and_never_block(connection: CompanionConnection) -> None:
    _, publication = elected(connection)
    sent, inner = 0, publication._begin

    def begin() -> Any:
        nonlocal sent
        sent += 1
        return inner()

    publication._begin = begin  # type: ignore[method-assign]
    began = time.monotonic()
    for done in range(10_000):
        publication.report(Progress("reading", done, 10_000))
    seconds = time.monotonic() - began
    assert sent <= 1 + seconds / REPORT_INTERVAL_S
    assert seconds < 10  # 2,500, if each one waited for its turn


def test_a_declined_model_is_refused_to_all_waiters_with_the_reason(connection: CompanionConnection) -> None:
    loader, publication = elected(connection)
    waiter = connection.attach(KEY, may_load=True, client_name="waiter")
    publication.decline("layer 3 is not shareable")
    with pytest.raises(NotShareableError, match="layer 3"):
        waiter.wait(30)
    assert not loader.lost.is_set()
    assert connection.status().entries == ()


def test_after_its_publication_the_loader_counts_as_attached(connection: CompanionConnection) -> None:
    lease = publish(connection)
    (entry,) = connection.status().entries
    assert entry.state is EntryState.READY
    assert [x.state for x in entry.leases] == [LeaseState.ATTACHED]
    assert connection.wait_ready(KEY.model, rank="single", timeout_s=5).generation == 1
    lease.release()
    lease.release()
    until(lambda: not connection.status().entries[0].leases, 2, "the lease has ended")


def test_waiting_for_a_model_ends_when_it_is_published_or_time_is_over(connection: CompanionConnection) -> None:
    with pytest.raises(WaitTimeoutError, match="the companion has: nothing"):
        connection.wait_ready(KEY.model, timeout_s=0.2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connection.wait_ready, KEY.model, timeout_s=10)
        publish(connection)
        assert waiting.result(30).key == KEY


def test_an_unload_in_use_is_refused_and_a_forced_one_gives_a_new_generation(connection: CompanionConnection) -> None:
    publish(connection)
    with pytest.raises(EntryInUseError, match=f"pid {os.getpid()}"):
        connection.unload(model=KEY.model)
    _, ready = attached(connection)
    assert connection.unload(model=KEY.model, force=True)[0].generation == 1
    with pytest.raises(TicketError, match="dropped"):
        ready.redeem()
    publish(connection)
    assert attached(connection)[1].generation == 2


def test_what_is_not_there_is_a_typed_error(connection: CompanionConnection) -> None:
    with pytest.raises(EntryNotFoundError):
        connection.unload(model="nothing")
    with pytest.raises(EntryNotFoundError, match="nothing"):
        connection.attach(model="none", may_load=False, client_name="x").wait(30)
    publish(connection)
    other = replace(KEY, id="cd" * 32, fields={"dtype": "half"})
    with pytest.raises(EntryNotFoundError, match="dtype is 'bfloat16' there and 'half' here"):
        connection.attach(other, may_load=False, client_name="x").wait(30)


def test_a_connection_that_another_thread_has_closed_is_a_typed_error(connection: CompanionConnection) -> None:
    lease = publish(connection)
    connection.close()
    uses = (connection.status, lambda: next(connection.watch()), lease.stage, lambda: attached(connection))
    for use in uses:
        with pytest.raises(CompanionUnavailableError, match="was closed"):
            use()
    connection.report(Report())


@pytest.mark.parametrize("how", ["kill", "shutdown"])
def test_a_companion_that_goes_away_is_noticed_by_idle_clients(place: Place, how: str) -> None:
    process = place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        lease, errors = publish(connection), []
        lease.on_lost(errors.append)
        if how == "kill":
            process.kill()
        else:
            assert connection.shutdown() == process.pid
        assert lease.lost.wait(30)
        process.wait(30)
        until(lambda: errors, 1, "the callback is called")
        lease.on_lost(errors.append)
        assert len(errors) == 2
        if how == "kill":
            assert isinstance(errors[0], CompanionUnavailableError)
        else:
            assert isinstance(errors[0], LeaseLostError)
            assert "was stopped" in str(errors[0])
        with pytest.raises(CompanionUnavailableError):
            connection.status()


def test_a_client_goes_on_looking_for_the_next_companion(place: Place, connection: CompanionConnection) -> None:
    """gRPC by itself would wait the longer the more often it has found nobody: for a seventh look, half a minute."""
    looks, pid = list[float](), place.companion_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), 5, "the companion is dead")
    os.unlink(place.paths.grpc_socket)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(place.paths.grpc_socket)
        nobody.listen()

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    nobody.accept()[0].close()
                    looks.append(time.monotonic())

        thread = threading.Thread(target=hang_up)
        thread.start()
        began = time.monotonic()
        while len(looks) < 7:
            with pytest.raises(CompanionUnavailableError):
                connection.status()
            time.sleep(0.01)
        nobody.shutdown(socket.SHUT_RDWR)
        thread.join(30)
    assert time.monotonic() - began < 15


def test_nothing_is_left_in_the_client_after_many_leases(connection: CompanionConnection) -> None:
    publish(connection)
    lease, _ = attached(connection)
    lease.release()
    threads = threading.active_count()
    with none_left_open():
        for _ in range(20):
            lease, ready = attached(connection)
            ready.redeem().close()
            lease.release()
    until(lambda: threading.active_count() <= threads, 2, "threads are gone")


# ---- what the companion refuses


@pytest.mark.parametrize(
    ("make", "sizes", "text"),
    [
        pytest.param(lambda: memfd(b"12345", seals=0), (5,), "not sealed", id="unsealed"),
        pytest.param(lambda: memfd(b"12345", seals=8), (5,), "not sealed", id="can-shrink"),
        pytest.param(lambda: memfd(b"1234"), (5,), "has 4", id="too-small"),
        pytest.param(lambda: os.open("/etc/hostname", os.O_RDONLY), (1,), "not a memfd|should have", id="a-file"),
    ],
)
def test_descriptors_that_could_change_under_a_reader_are_refused(
    connection: CompanionConnection, make: Callable[[], int], sizes: tuple[int, ...], text: str
) -> None:
    lease, publication = elected(connection)
    fd = make()
    with pytest.raises(BadRequestError, match=text):
        publication.publish(ArenaInfo("memfd", sizes), [fd], b"m", 1)
    os.close(fd)
    assert connection.status().entries[0].state is EntryState.LOADING
    lease.release()


def test_a_publication_whose_manifest_is_damaged_is_refused(connection: CompanionConnection) -> None:
    lease, publication = elected(connection)
    arena, fds = arena_of(b"x")
    steps = list(publication._steps(arena, b"manifest", Published(1), 0))
    steps[1].manifest_chunk = b"manifesT"
    fd_channel.deposit(connection._paths.fd_socket, publication._ticket, fds, 5)
    with pytest.raises(BadRequestError, match="damaged"):
        publication._send(iter(steps), "publishing")
    fds.close()
    lease.release()


def test_a_ticket_works_once(connection: CompanionConnection) -> None:
    publish(connection)
    _, ready = attached(connection)
    ready.redeem().close()
    with pytest.raises(TicketError, match="spent"):
        ready.redeem()


def test_a_guessed_ticket_and_one_of_the_other_kind_are_refused(connection: CompanionConnection, place: Place) -> None:
    _, publication = elected(connection)
    for ticket in (b"0" * 16, publication._ticket):
        with pytest.raises(TicketError, match="unknown or spent"):
            fd_channel.redeem(place.paths.fd_socket, ticket, 1, 5)


def test_a_ticket_of_an_ended_lease_is_refused(connection: CompanionConnection) -> None:
    publish(connection)
    lease, ready = attached(connection)
    lease.release()
    until(lambda: len(connection.status().entries[0].leases) == 1, 2, "the lease has ended")
    with pytest.raises(TicketError):
        ready.redeem()


def test_a_redeem_ticket_expires_and_a_deposit_ticket_lasts_as_long_as_its_lease() -> None:
    class FakeLease:
        ended = False

    now = [0.0]
    tickets = Tickets(lambda: now[0])
    lease: Any = FakeLease()
    redeem, deposit = tickets.issue(fd_channel.REDEEM, lease), tickets.issue(fd_channel.DEPOSIT, lease)
    now[0] = ticket_module.EXPIRY_S + 1
    with pytest.raises(TicketError, match="expired"):
        tickets.spend(fd_channel.REDEEM, redeem)
    assert tickets.spend(fd_channel.DEPOSIT, deposit).lease is lease


def test_fewer_descriptors_than_announced_are_an_error_and_none_stays_open(connection: CompanionConnection) -> None:
    publish(connection)
    _, ready = attached(connection)
    with none_left_open(), pytest.raises(CompanionError):
        fd_channel.redeem(ready._fd_socket, ready._ticket, 2, 5)


@pytest.mark.parametrize("packet", [b"", b"hello", b"R" + b"0" * 15, b"D" + b"0" * 16, b"x" * 4000])
def test_nonsense_on_the_fd_socket_harms_nobody(connection: CompanionConnection, place: Place, packet: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(place.paths.fd_socket)
        sock.send(packet)
        answer = sock.recv(4096)
    assert answer == b"" or answer.startswith(b"Ebad_request")
    publish(connection)
    attached(connection)[1].redeem().close()


def test_a_client_that_says_nothing_on_the_fd_socket_does_not_block_others(
    connection: CompanionConnection, place: Place
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(place.paths.fd_socket)
        publish(connection)
        attached(connection)[1].redeem().close()


def test_an_attach_of_another_protocol_version_is_refused_naming_both(connection: CompanionConnection) -> None:
    request = messages.AttachRequest(protocol_version=99, client="future")
    request.query.SetInParent()
    (event,) = connection._stub.Attach(request, timeout=5)
    assert event.failed.code == "protocol_mismatch"
    assert "protocol 99" in event.failed.message
    assert f"speaks {PROTOCOL_VERSION}" in event.failed.message


@pytest.mark.parametrize(
    ("version", "older"), [(PROTOCOL_VERSION - 1, "companion is older"), (PROTOCOL_VERSION + 1, "client is older")]
)
def test_a_companion_of_another_protocol_version_is_refused(place: Place, version: int, older: str) -> None:
    with (
        answering(place, version),
        pytest.raises(ProtocolMismatchError, match=f"protocol {version}.*{older}"),
    ):
        connect("cpu", place.settings, spawn=False)


# ---- the election of one loader a device


def test_what_was_not_asked_for_is_not_used(place: Place) -> None:
    class Confused:
        def __getattr__(self, name: str) -> Any:
            return lambda request, context: messages.CompanionStatus(protocol_version=PROTOCOL_VERSION)

        def Attach(self, request: Any, context: Any) -> Iterator[Any]:
            key = codec.key_to_message(replace(KEY, id="cd" * 32))
            arena = codec.arena_to_message(ArenaInfo("memfd", (4096,)))
            empty = hashlib.sha256(b"").digest()
            yield messages.AttachEvent(ready=messages.Ready(key=key, generation=1, arena=arena, manifest_sha256=empty))

    with speaking(place, Confused()), connect("cpu", place.settings, spawn=False) as connection:
        lease = connection.attach(KEY, may_load=True, client_name="test")
        with pytest.raises(ManifestError, match="asked for abababababab, and got cdcdcdcdcdcd"):
            lease.wait(30)


def test_the_loader_lock_is_exclusive_and_names_its_holder(place: Place) -> None:
    first, second = LoaderElection(place.paths), LoaderElection(place.paths)
    heard: list[str] = []
    with first.acquire(1, "model A"):
        with pytest.raises(WaitTimeoutError, match=f"pid {os.getpid()} \\(model A\\)"):
            second.acquire(0.2, "model B", heard.append)
        with pytest.raises(RuntimeError, match="not reentrant"):
            first.acquire(1)
    assert heard == [f"pid {os.getpid()} (model A)"]
    with second.acquire(1, "model B"):
        assert first.holder().endswith("(model B)")


def test_waiting_for_the_loader_lock_is_bounded_by_silence(place: Place) -> None:
    holder = LoaderElection(place.paths).acquire(1, "slow")
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            holder.sign_of_life()
        holder.release()

    thread = threading.Thread(target=work)
    thread.start()
    threading.Timer(6.0, stop.set).start()
    began = time.monotonic()
    heard: list[str] = []
    LoaderElection(place.paths).acquire(3.0, "next", heard.append).release()
    assert len(heard) > 5  # who waits for the next one is told of each sign of life
    assert set(heard) == {f"pid {os.getpid()} (slow)"}
    assert time.monotonic() - began > 5
    thread.join(30)


def test_the_loader_lock_may_be_released_by_another_thread(place: Place) -> None:
    election = LoaderElection(place.paths).acquire(1)
    thread = threading.Thread(target=election.release)
    thread.start()
    thread.join(30)
    LoaderElection(place.paths).acquire(1).release()


def test_the_loader_lock_falls_with_a_killed_holder(place: Place) -> None:
    code = (
        "import sys\n"
        "from vllm_companion_plugin.host.election import LoaderElection\n"
        "from vllm_companion_plugin.host.runtime_dir import device_paths\n"
        "from vllm_companion_plugin.settings import resolve\n"
        "held = LoaderElection(device_paths('cpu', resolve())).acquire(5, 'child')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    child = place.run("-c", code)
    assert line(child) == "held"
    with pytest.raises(WaitTimeoutError):
        LoaderElection(place.paths).acquire(0.1)
    child.kill()
    with LoaderElection(place.paths).acquire(30):
        pass
