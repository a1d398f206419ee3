"""Attacks on a real companion, one for each threat of docs/security.md. Each was seen to succeed without its guard."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import KEY, Place, arena_of, listens, memfd, until
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.core.status import GENERATIONS, Published
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    EntryNotFoundError,
    LimitError,
    RuntimeDirError,
    TicketError,
)
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.wire import fd_channel, messages, schema
from vllm_companion_plugin.wire.forking import grpc

NOBODY = 65534
OTHER = 54321
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
FORGED = "INFO 01-01 00:00:00 [forged.py:1] all is well"
EVIL = f"evil\n{FORGED}\x1b[2J\x9b31m\u202e"

LIMITS = """
import resource, sys
from vllm_companion_plugin.holder.__main__ import main
from vllm_companion_plugin.holder.registry import limits
from vllm_companion_plugin.holder.service import fd_server
fd_server.MAX_CONNECTIONS = 16
limits.MAX_LEASES, limits.MAX_ENTRIES = 12, 8
limits.MAX_WATCHES = limits.MAX_PUBLICATIONS = 4
limits.MAX_MANIFESTS_BYTES, limits.MAX_KEYS_CHARACTERS = 6 << 20, 1_930_000
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
sys.exit(main(["--device", "cpu"]))
"""


class Victim:
    """A companion with small limits, its log in a file as when it is detached, and a client that must not suffer."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.log = Path(place.paths.log)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LIMITS], env=place.environment, stdout=out, stderr=out, text=True
            )
        place.processes.append(self.process)
        until(lambda: listens(place.paths.fd_socket), 20, "the companion listens")

    def connect(self) -> CompanionConnection:
        return connect("cpu", self.place.settings, spawn=False)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @staticmethod
    def leases(connection: CompanionConnection) -> int:
        return sum(len(entry.leases) for entry in connection.status().entries)

    def check_serves(self) -> None:
        """Another client publishes, attaches, maps and unloads."""
        with self.connect() as connection:
            mine = replace(KEY, id="fe" * 32, model="good/model")
            publish(connection, b"good", mine).release()
            lease, got = ready(connection, mine)
            with got.redeem() as fds:
                assert os.pread(fds[0], 10, 0) == b"good"
            lease.release()
            connection.unload(model=mine.model, force=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    root = tempfile.mkdtemp(prefix="vc", dir="/tmp")
    made = Place(root)
    try:
        yield made
    finally:
        made.clean()
        subprocess.run(["rm", "-rf", root], check=True)


@pytest.fixture(scope="module")
def companion(place: Place) -> Victim:
    return Victim(place)


@pytest.fixture
def victim(companion: Victim) -> Iterator[Victim]:
    """The one companion for all attacks; it must outlive each of them and serve others afterwards."""
    yield companion
    assert companion.process.poll() is None, companion.log.read_text()[-3000:]
    with companion.connect() as connection:
        until(lambda: not companion.leases(connection), 5, "the leases of the attack have ended")
    companion.check_serves()
    with companion.connect() as connection, contextlib.suppress(EntryNotFoundError):
        connection.unload(force=True)
    with companion.connect() as connection:
        until(lambda: not connection.status().entries, 5, "nothing is left of the attack")


def key(number: int, **changes: Any) -> EntryKey:
    return replace(KEY, id=f"{number:064x}", **changes)


def elected(connection: CompanionConnection, wanted: EntryKey = KEY, **options: Any) -> tuple[Lease, Publication]:
    lease = connection.attach(wanted, may_load=True, client_name="attacker", **options)
    outcome = lease.wait(30)
    assert isinstance(outcome, Granted)
    return lease, outcome.publication


def publish(connection: CompanionConnection, content: bytes, wanted: EntryKey = KEY) -> Lease:
    lease, publication = elected(connection, wanted)
    arena, fds = arena_of(content)
    publication.publish(arena, fds, b"manifest", 1)
    fds.close()
    return lease


def ready(connection: CompanionConnection, wanted: EntryKey = KEY) -> tuple[Lease, Ready]:
    lease = connection.attach(wanted, may_load=False, client_name="reader")
    outcome = lease.wait(30)
    assert isinstance(outcome, Ready)
    return lease, outcome


def dial(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(path)
    return sock


def as_nobody(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Python code that runs as another user; `sys.path` has what this process can import."""
    begin = "import os, socket, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    return subprocess.Popen(
        [sys.executable, "-c", begin + code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# ---- other users of the host


@as_root
def test_another_user_reaches_neither_directory_nor_sockets(victim: Victim) -> None:
    paths = victim.place.paths
    code = (
        "for path, kind in (sys.argv[1], socket.SOCK_STREAM), (sys.argv[2], socket.SOCK_SEQPACKET):\n"
        "    try: socket.socket(socket.AF_UNIX, kind).connect(path)\n"
        "    except PermissionError: print('refused')\n"
        "try: os.listdir(os.path.dirname(sys.argv[1]))\n"
        "except PermissionError: print('refused')\n"
    )
    said, _ = as_nobody(code, paths.grpc_socket, paths.fd_socket).communicate(timeout=100)
    assert said == "refused\n" * 3


@as_root
def test_another_user_who_was_let_in_gets_no_descriptor(victim: Victim) -> None:
    """As if the owner had opened directory and socket by mistake."""
    paths = victim.place.paths
    opened = [str(Path(victim.place.settings.runtime_dir).parent), victim.place.settings.runtime_dir, paths.directory]
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        publish(connection, b"secret")
        _, got = ready(connection)
        for path in (*opened, paths.fd_socket):
            undo.callback(os.chmod, path, os.stat(path).st_mode)
            os.chmod(path, 0o777)
        code = (
            "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.connect(sys.argv[1])\n"
            "try: sock.send(bytes.fromhex(sys.argv[2]))\n"
            "except BrokenPipeError: pass\n"  # refused already
            "try: answer, fds, _, _ = socket.recv_fds(sock, 4096, 4)\n"
            "except ConnectionResetError: answer, fds = b'E', []\n"  # closed before it read the ticket, and not told
            "print(fds, answer.decode(errors='replace'))\n"
        )
        ticket = fd_channel.REDEEM + got._ticket
        logged = victim.log.stat().st_size
        said, _ = as_nobody(code, paths.fd_socket, ticket.hex()).communicate(timeout=100)
        assert said.startswith("[] E"), said
        assert said == "[] E\n" or "the caller is uid 65534" in said
        assert "the caller is uid 65534" in victim.log.read_bytes()[logged:].decode()
        with pytest.raises(RuntimeDirError, match="mode 0777"):
            victim.connect()  # and the owner is told


@as_root
@pytest.mark.parametrize("plant", ["directory", "link", "device"])
def test_a_directory_that_somebody_planted_is_refused(place: Place, tmp_path: Path, plant: str) -> None:
    """A shared temp directory, where somebody else was first."""
    os.chmod(tmp_path, 0o1777)
    settings = replace(place.settings, runtime_dir=str(tmp_path / "r"))
    (tmp_path / "trap").mkdir(0o700)
    if plant == "link":
        (tmp_path / "r").symlink_to("trap")
        os.chown(tmp_path / "r", OTHER, OTHER, follow_symlinks=False)
    elif plant == "directory":
        (tmp_path / "r").mkdir(0o700)
        os.chown(tmp_path / "r", OTHER, OTHER)
    else:
        (tmp_path / "r").mkdir(0o700)
        (tmp_path / "r" / "cpu").symlink_to(tmp_path / "trap")
    with pytest.raises(RuntimeDirError, match="symbolic link" if plant != "directory" else f"uid {OTHER}"):
        connect("cpu", settings, spawn=True)
    assert not list((tmp_path / "trap").iterdir())


@as_root
@pytest.mark.parametrize("weakness", ["mode", "owner"])
def test_a_directory_that_others_could_replace_is_refused(place: Place, tmp_path: Path, weakness: str) -> None:
    """What is checked now could be another directory when it is used."""
    above = tmp_path / "above"
    above.mkdir()
    if weakness == "mode":
        os.chmod(above, 0o777)
    else:
        os.chown(above, OTHER, OTHER)
    with pytest.raises(RuntimeDirError, match=f"{above}, above the runtime directory"):
        connect("cpu", replace(place.settings, runtime_dir=str(above / "deeper" / "r")), spawn=True)
    os.chmod(above, 0o1777)
    if weakness == "mode":
        device_paths("cpu", replace(place.settings, runtime_dir=str(above / "r")))


def test_a_link_that_is_turned_after_the_check_leads_nowhere_else(place: Place, tmp_path: Path) -> None:
    for name in ("good", "trap"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("good")
    paths = device_paths("cpu", replace(place.settings, runtime_dir=str(tmp_path / "link" / "r")))
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("trap")
    assert os.path.realpath(paths.grpc_socket) == str(tmp_path / "good" / "r" / "cpu" / "companion.sock")


@as_root
def test_a_socket_that_somebody_planted_is_given_nothing(place: Place, tmp_path: Path) -> None:
    paths = device_paths("cpu", replace(place.settings, runtime_dir=str(tmp_path / "r")))
    code = (
        "grpc, fd = (socket.socket(fileno=int(n)) for n in sys.argv[1:])\n"
        "grpc.listen(); fd.listen(); print('listening', flush=True)\n"
        "peer, _ = fd.accept(); print(socket.recv_fds(peer, 4096, 4)[:2])\n"
    )
    listeners = [socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)]
    for listener, path in zip(listeners, (paths.grpc_socket, paths.fd_socket), strict=True):
        listener.bind(path)
    begin = "import os, socket, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    numbers = [listener.fileno() for listener in listeners]
    child = subprocess.Popen(
        [sys.executable, "-c", begin + code, *map(str, numbers)], stdout=subprocess.PIPE, text=True, pass_fds=numbers
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "listening\n"
    with pytest.raises(RuntimeDirError, match="uid 65534 listens"):
        is_listening(paths)
    fds = arena_of(b"secret")[1]
    with pytest.raises(RuntimeDirError, match="nothing was sent"):
        fd_channel.deposit(paths.fd_socket, b"t" * 16, fds, 5)
    assert child.communicate(timeout=100)[0] == "(b'', [])\n"
    fds.close()
    for listener in listeners:
        listener.close()


def test_it_opens_no_network_port(victim: Victim) -> None:
    mine = {os.readlink(f"/proc/{victim.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{victim.process.pid}/fd")}
    for protocol in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        lines = Path(f"/proc/{victim.process.pid}/net/{protocol}").read_text().splitlines()[1:]
        assert not [line for line in lines if f"socket:[{line.split()[9]}]" in mine]


# ---- tickets


def test_replayed_guessed_and_stolen_tickets_give_nothing(victim: Victim) -> None:
    path = victim.place.paths.fd_socket
    with victim.connect() as connection:
        publication = elected(connection)[1]
        token = messages.PublishRequest.Begin(lease_token=os.urandom(16))
        with pytest.raises(grpc.RpcError, match="token is unknown"):
            connection._stub.Publish(iter([messages.PublishRequest(begin=token)]), timeout=5)
        arena, fds = arena_of(b"secret")
        publication.publish(arena, fds, b"m", 1)
        with pytest.raises(TicketError, match="spent"):  # replayed
            fd_channel.deposit(path, publication._ticket, fds, 5)
        fds.close()
        got = ready(connection)[1]
        other, stolen = ready(connection)
        for guess in (os.urandom(16) for _ in range(100)):
            with pytest.raises(TicketError):
                fd_channel.redeem(path, guess, 1, 5)
        got.redeem().close()
        with pytest.raises(TicketError, match="spent"):
            got.redeem()
        assert len(stolen._ticket) == 16
        other.release()  # a ticket is worth nothing without the stream that it came on
        until(lambda: len(connection.status().entries[0].leases) == 2, 2, "the lease has ended")
        with pytest.raises(TicketError):
            stolen.redeem()


def test_guessed_and_stolen_tokens_wake_nobody(victim: Victim) -> None:
    """Only who has slept by a lease that goes on gets what it slept on."""
    path, known = victim.place.paths.fd_socket, hashlib.sha256(b"manifest").digest()
    with victim.connect() as connection:
        publish(connection, b"secret")
        awake = ready(connection)[0]
        sleeper, ended = ready(connection)[0], ready(connection)[0]
        for lease in (sleeper, ended):
            lease.fall_asleep(1, WhenAsleep.STAY, leave_copy=lambda: pytest.fail("it is asked for a copy"))
        ended.release()
        until(lambda: len(connection.status().entries[0].leases) == 3, 2, "the lease has ended")
        for token in (*(os.urandom(16) for _ in range(100)), ended._token):
            with pytest.raises(BadRequestError, match="token is unknown"):
                fd_channel.wake(path, token, known, 5)
        with pytest.raises(BadRequestError):  # and nobody gets twice what it maps
            fd_channel.wake(path, awake._token, known, 5)
        assert fd_channel.wake(path, sleeper._token, os.urandom(32), 5) is None
        states = sorted(lease.state.value for lease in connection.status().entries[0].leases)
        assert states == ["asleep", "attached", "attached"]
        woken = fd_channel.wake(path, sleeper._token, known, 5)
        assert woken is not None
        with woken[1] as fds:
            assert os.pread(fds[0], 10, 0) == b"secret"
        with pytest.raises(BadRequestError):  # replayed
            fd_channel.wake(path, sleeper._token, known, 5)


# ---- messages


@pytest.mark.parametrize("what", ["message", "metadata", "key", "query", "chunks", "packet"])
def test_an_oversized_message_is_refused(victim: Victim, what: str) -> None:
    big = "x" * (5 << 20)
    with victim.connect() as connection:
        if what == "message":
            request = messages.AttachRequest(protocol_version=PROTOCOL_VERSION, client=big)
            request.query.SetInParent()
            unlimited = grpc.insecure_channel(f"unix:{victim.place.paths.grpc_socket}")
            with unlimited as channel, pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                next(schema.Stub(channel).Attach(request, timeout=5))
        elif what == "metadata":
            with pytest.raises(grpc.RpcError):
                connection._stub.Status(messages.StatusRequest(), timeout=5, metadata=(("a", big[: 1 << 20]),))
        elif what == "key":
            wanted = key(1, fields={"a": big[: 1 << 20]})
            with pytest.raises(BadRequestError, match="at most"):
                connection.attach(wanted, may_load=True, client_name="attacker").wait(30)
        elif what == "query":
            with pytest.raises(BadRequestError, match="query"):
                connection.attach(model=big[: 1 << 20], may_load=False, client_name="attacker").wait(30)
        elif what == "chunks":  # many small ones take many times their size
            lease, publication = elected(connection)
            chunk = messages.PublishRequest(manifest_chunk=b"")
            with pytest.raises(BadRequestError, match="not the last"):
                publication._send(iter([publication._begin(), *[chunk] * 1000]), "attacking", 5)
            lease.release()
        else:
            with dial(victim.place.paths.fd_socket) as sock:
                sock.send(b"R" + b"x" * 100_000)
                assert sock.recv(4096).startswith(b"Ebad_request")


def test_keys_of_many_entries_do_not_make_the_status_unreadable(victim: Victim) -> None:
    with victim.connect() as connection:
        fields = {str(number): "x" * 20_000 for number in range(12)}
        leases = [elected(connection, key(number, fields=fields))[0] for number in range(8)]
        assert len(connection.status().entries) == 8
        victim.connect().close()
        leases.pop().release()
        until(lambda: len(connection.status().entries) == 7, 5, "there is room for one more")
        with pytest.raises(LimitError, match="keys of 1930000 characters"):
            elected(connection, key(9, fields=dict.fromkeys(fields, "x" * 21500)))
        for lease in leases:
            lease.release()


def test_manifests_that_are_never_finished_do_not_fill_the_memory(victim: Victim) -> None:
    chunk = messages.PublishRequest(manifest_chunk=b"x" * (1 << 20))
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        lease, publication = elected(connection)
        undo.callback(lease.release)

        def steps(count: int) -> Iterator[Any]:
            yield publication._begin()
            yield from [chunk] * count
            over.wait(100)

        calls, over = [], threading.Event()
        undo.callback(over.set)
        for _ in range(2):
            calls.append(connection._stub.Publish.future(steps(4), timeout=100))  # type: ignore[attr-defined]
        # 8 MiB in all, of which 6 are allowed.
        assert any_done(calls).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()


def any_done(calls: list[Any]) -> Any:
    until(lambda: any(call.done() for call in calls), 4, "one of the calls was refused")
    return next(call for call in calls if call.done())


def test_nonsense_and_silence_on_the_grpc_socket_end_nobody(victim: Victim) -> None:
    with contextlib.ExitStack() as undo:
        for text in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000,
            os.urandom(5000),
        ):
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(victim.place.paths.grpc_socket)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(text)
        victim.check_serves()


# ---- using things up


def test_silent_connections_do_not_keep_others_from_the_fd_socket(victim: Victim) -> None:
    with contextlib.ExitStack() as undo:
        for _ in range(3 * 16):
            undo.enter_context(dial(victim.place.paths.fd_socket))
        began = time.monotonic()
        victim.check_serves()
        assert time.monotonic() - began < 9  # each of them may be silent for 10 s


def test_streams_are_limited_and_the_companion_can_still_be_asked(victim: Victim) -> None:
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        publish(connection, b"x")
        for _ in range(11):
            undo.callback(ready(connection)[0].release)
        with pytest.raises(LimitError, match="12 clients"):
            connection.attach(KEY, may_load=False, client_name="attacker").wait(30)
        watches = [connection.watch(5) for _ in range(4)]
        for watch in watches:
            next(watch)
        with pytest.raises(LimitError, match="watch"):
            next(connection.watch(5))
        assert len(connection.status().entries[0].leases) == 12
        for watch in watches:
            watch.close()  # type: ignore[attr-defined]
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        until(lambda: not victim.leases(connection), 5, "the leases have ended")
        for number in range(7):
            undo.callback(elected(connection, key(number))[0].release)
        with pytest.raises(LimitError, match="8 entries"):
            connection.attach(key(9), may_load=True, client_name="attacker").wait(30)


def test_publications_at_once_are_limited(victim: Victim) -> None:
    done = threading.Event()
    with victim.connect() as connection:
        lease, publication = elected(connection)

        def steps() -> Iterator[Any]:
            yield publication._begin()
            done.wait(100)

        calls = [connection._stub.Publish.future(steps(), timeout=100) for _ in range(5)]  # type: ignore[attr-defined]
        assert any_done(calls).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        done.set()
        lease.release()


def test_deposits_leave_descriptors_for_others(victim: Victim) -> None:
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        answers = []
        for number in range(2):
            lease, publication = elected(connection, key(number))
            undo.callback(lease.release)
            sock = undo.enter_context(dial(victim.place.paths.fd_socket))
            sock.send(fd_channel.pack_deposit(publication._ticket, 600))
            answers.append(sock.recv(4096)[:6])
        assert answers == [b"O", b"Elimit"]


def test_a_companion_without_descriptors_waits_quietly_and_recovers(victim: Victim) -> None:
    pid, (soft, hard) = victim.process.pid, resource.prlimit(victim.process.pid, resource.RLIMIT_NOFILE)
    with victim.connect() as connection:
        publish(connection, b"x")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (victim.descriptors() + 5, hard))
        try:
            with contextlib.ExitStack() as undo:
                for _ in range(40):
                    undo.enter_context(dial(victim.place.paths.fd_socket))
                before, size = cpu_s(pid), victim.log.stat().st_size
                time.sleep(0.5)
                assert cpu_s(pid) - before < 0.25
                assert victim.log.stat().st_size - size < 10_000
                assert len(connection.status().entries[0].leases) == 1  # what is there stays
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("how", ["contradiction", "unasked", "unread", "deposited"])
def test_descriptors_that_block_when_they_are_closed_do_not_stop_the_companion(victim: Victim, how: str) -> None:
    """Closing a TCP socket whose peer does not read waits for as long as its owner has asked (SO_LINGER)."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as lingering,
        server.accept()[0],
        dial(victim.place.paths.fd_socket) as sock,
    ):
        lingering.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                lingering.send(b"x" * 65536)
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        fds = [lingering.fileno()]
        if how == "deposited":
            with victim.connect() as connection:
                fd_channel.deposit(victim.place.paths.fd_socket, elected(connection)[1]._ticket, fds, 5)
                lingering.close()
        else:
            os.kill(victim.process.pid, signal.SIGSTOP)  # so that ours is not the last one to be closed
            if how == "unread":
                sock.send(b"nonsense")
            if how == "unasked":
                socket.send_fds(sock, [fd_channel.pack_fds(1)], fds)
            else:
                socket.send_fds(sock, [b"R" + b"t" * 16], fds)
            lingering.close()
            os.kill(victim.process.pid, signal.SIGCONT)
        began = time.monotonic()
        victim.check_serves()
        assert time.monotonic() - began < 20  # closing it takes 30 s


def test_odd_descriptors_are_refused_and_closed(victim: Victim, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    makers: list[Callable[[], int]] = [
        lambda: os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY),
        lambda: os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(),
        lambda: os.open(tmp_path, os.O_PATH),
        lambda: memfd(b"12345", seals=0),
    ]
    for kind in ("memfd", "cuda_ipc"):
        for make in makers:
            with victim.connect() as connection:
                before = victim.descriptors()
                lease, publication = elected(connection)
                arena, fds = arena_of(b"12345")
                fds.close()
                fd = make()
                with pytest.raises(BadRequestError, match=r"memfd|sealed|socket"):
                    publication.publish(replace(arena, kind=kind), [fd], b"m", 1)
                os.close(fd)
                lease.release()
                until(lambda before=before: victim.descriptors() <= before, 2, "it is closed")  # type: ignore[misc]


# ---- what is kept and shown


def test_names_forge_no_log_line_and_command_no_terminal(victim: Victim) -> None:
    with victim.connect() as connection, contextlib.ExitStack() as undo:
        for name in ("model", "role", "rank"):
            with pytest.raises(BadRequestError, match="cannot be printed"):
                connection.attach(replace(KEY, **{name: EVIL}), may_load=True, client_name="attacker").wait(30)
        with pytest.raises(BadRequestError, match="cannot be printed"):
            connection.attach(key(1, fields={EVIL: "1"}), may_load=True, client_name="attacker").wait(30)
        lease = connection.attach(KEY, may_load=True, client_name=EVIL)
        outcome = lease.wait(30)
        assert isinstance(outcome, Granted)
        undo.callback(lease.release)
        begin = outcome.publication._begin()
        progress = messages.PublishRequest(progress=messages.Progress(phase=EVIL))
        connection._stub.Publish(iter([begin, progress]), timeout=5)
        (entry,) = connection.status().entries
        assert all(lease.client.isprintable() for lease in entry.leases)  # other engines log it, too
        shown = subprocess.run(
            [sys.executable, "-m", "vllm_companion_plugin.cli.main", "status", "--wide"],
            env=victim.place.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        assert "test/model" in shown
        assert all(line.isprintable() for line in shown.splitlines())
        waiting = connection.attach(KEY, may_load=False, client_name="reader")
        declined = messages.PublishRequest(declined=messages.Failed(code="not_shareable", message=EVIL))
        connection._stub.Publish(iter([begin, declined]), timeout=5)
        with pytest.raises(CompanionError) as told:
            waiting.wait(30)
        assert str(told.value).isprintable()
    text = victim.log.read_text()
    assert "evil" in text
    assert not [line for line in text.splitlines() if line.startswith(FORGED) or not line.isprintable()]


def test_a_key_id_that_is_a_path_removes_no_file(victim: Victim, tmp_path: Path) -> None:
    """A hold is a file named by key id and generation, which an unload removes."""
    (tmp_path / "libc.so.6").write_text("precious")
    wanted = replace(KEY, id=os.path.relpath(tmp_path / "libc.so", victim.place.paths.holders))
    with victim.connect() as connection:
        lease = connection.attach(wanted, may_load=True, client_name="attacker", held_generation=6)
        with contextlib.suppress(BadRequestError):
            outcome = lease.wait(30)
            assert isinstance(outcome, Granted)
            arena, fds = arena_of(b"x")
            outcome.publication.hand_back(arena, fds, b"m", Published(1), 6)
            connection.unload(force=True)
        assert (tmp_path / "libc.so.6").exists()
        with pytest.raises(BadRequestError, match="hex digest"):
            lease.wait(30)


def test_a_generation_that_no_message_can_carry_is_refused(victim: Victim) -> None:
    with victim.connect() as connection:
        lease = connection.attach(KEY, may_load=True, client_name="attacker", held_generation=(1 << 64) - 1)
        with pytest.raises(BadRequestError, match="out of range"):
            lease.wait(30)
        last = GENERATIONS[-1]
        lease = connection.attach(KEY, may_load=True, client_name="attacker", held_generation=last)
        outcome = lease.wait(30)
        assert isinstance(outcome, Granted)
        arena, fds = arena_of(b"x")
        assert outcome.publication.hand_back(arena, fds, b"m", Published(1), last) == last
        fds.close()
        connection.unload(force=True)
        publish(connection, b"good")  # what follows the last one can be shown, and attached to, as well
        assert len(connection.status().entries) == 2
        ready(connection)[1].redeem().close()


def test_bytes_that_were_published_cannot_be_changed_by_who_has_them(victim: Victim) -> None:
    with victim.connect() as connection:
        publish(connection, b"weights")
        fds = ready(connection)[1].redeem()
        fd, writable = fds[0], -1
        with contextlib.suppress(PermissionError):
            writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        for target in (fd, writable):
            for change in (
                lambda target: os.pwrite(target, b"x", 0),
                lambda target: os.ftruncate(target, 1),
                lambda target: mmap.mmap(target, 7, mmap.MAP_SHARED, mmap.PROT_WRITE),
                lambda target: fcntl.fcntl(target, fcntl.F_ADD_SEALS, 0),
            ):
                with pytest.raises((OSError, ValueError)):
                    change(target)
        assert os.pread(fd, 10, 0) == b"weights"
        fds.close()
        if writable >= 0:
            os.close(writable)


# ---- what a process of the same user, in another container, leaves in the shared directory


def test_planted_holds_do_not_keep_a_companion_from_starting(place: Place, tmp_path: Path) -> None:
    there = Place(str(tmp_path))
    holders = Path(there.paths.holders)
    holders.mkdir(0o700)
    good = asdict(KEY)
    planted = {
        f"{KEY.id}.1": "[" * 1_000_000,
        f"{KEY.id}.2": json.dumps({**good, "fields": [1]}),
        f"{KEY.id}.3": json.dumps({**good, "id": 7}),
        f"{KEY.id}.99999999999999999999999": json.dumps(good),
        f"{KEY.id}.-1": json.dumps(good),
        "x.1": json.dumps({**good, "id": "../../../etc/passwd"}),
        f"{'cd' * 32}.1": json.dumps({**good, "id": "cd" * 32, "model": EVIL}),
    }
    held = []
    for name, text in planted.items():
        (holders / name).write_text(text)
        held.append((holders / name).open())
        fcntl.flock(held[-1], fcntl.LOCK_SH)
    os.mkfifo(holders / "pipe.1")
    (holders / "link.1").symlink_to(place.paths.log)
    process = there.companion()
    with connect("cpu", there.settings, spawn=False) as connection:
        assert not connection.status().entries
        connection.shutdown()
    assert process.wait(30) == 0
    for file in held:
        file.close()


def test_planted_links_and_pipes_are_not_followed(place: Place, tmp_path: Path) -> None:
    """Files that processes in this container can write, but those in the other one cannot reach."""
    there = Place(str(tmp_path))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    starts: list[Callable[[], object]] = [
        lambda: LoaderElection(there.paths).acquire(1),
        *[lambda: connect("cpu", replace(there.settings, spawn_timeout_s=5), spawn=True)] * 3,
    ]
    names = ("loader.lock", "spawn.lock", "companion.lock", "companion.log")
    for name, start in zip(names, starts, strict=True):
        planted = Path(there.paths.directory, name)
        planted.unlink(missing_ok=True)
        planted.symlink_to(precious)
        with pytest.raises(CompanionError) as caught:
            start()
        assert "precious" not in str(caught.value)
        planted.unlink()
    holder = there.paths.loader_lock + ".holder"
    os.symlink(precious, f"{holder}.{os.getpid()}")
    os.mkfifo(holder)
    began = time.monotonic()
    assert LoaderElection(there.paths).holder() == ""
    with LoaderElection(there.paths).acquire(1, "me"):
        assert LoaderElection(there.paths).holder().endswith("(me)")
        Path(holder).write_text(EVIL)
        assert LoaderElection(there.paths).holder().isprintable()
    assert time.monotonic() - began < 60
    assert precious.read_text() == "precious"
