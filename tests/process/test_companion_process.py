"""The companion as a process: its start, its signals, its exit, what it is made of."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import KEY, Place, alive, arena_of, until
from vllm_companion_plugin.client.connection import Granted, Ready, connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionUnavailableError, EntryNotFoundError, RuntimeDirError
from vllm_companion_plugin.holder.process import InstanceLock
from vllm_companion_plugin.host.runtime_dir import device_paths, list_devices
from vllm_companion_plugin.host.spawn import ensure_companion
from vllm_companion_plugin.wire import schema
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.messages import HealthCheckRequest, HealthCheckResponse


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_two_seconds_with_streams_open(place: Place, number: int) -> None:
    process = place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        watching = connection.watch()
        next(watching)
        lease = connection.attach(KEY, may_load=True, client_name="test")
        assert isinstance(lease.wait(30), Granted)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 2
        assert lease.lost.wait(30)
        with pytest.raises(CompanionUnavailableError):
            list(watching)
    assert not os.path.exists(place.paths.grpc_socket)
    assert not os.path.exists(place.paths.fd_socket)


def test_one_without_linger_time_waits_for_whoever_spawned_it(place: Place) -> None:
    settings = replace(place.settings, linger_s=0.0)
    with connect("cpu", settings, spawn=True) as connection:
        assert isinstance(connection.attach(KEY, may_load=True, client_name="test").wait(30), Granted)
        pid = connection.status().pid
    until(lambda: not alive(pid), 5, "it has ended with its only client")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41", "a b"])
def test_a_path_that_means_something_in_a_uri_is_still_a_path(place: Place, name: str) -> None:
    settings = replace(place.settings, runtime_dir=f"{place.settings.runtime_dir}/{name}")
    with connect("cpu", settings, spawn=True) as connection:
        pid = connection.shutdown()
    until(lambda: not alive(pid), 5, "it has ended")


def test_its_directory_is_locked_against_those_who_clean_up(place: Place) -> None:
    """systemd-tmpfiles skips what is below a directory that it cannot lock so."""
    process = place.companion()
    root = os.open(place.settings.runtime_dir, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.wait(30)
    fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(root)


def test_one_whose_directory_was_removed_ends_and_leaves_its_successor_alone(place: Place) -> None:
    first = place.companion()
    shutil.rmtree(place.settings.runtime_dir)
    with connect("cpu", place.settings, spawn=True) as connection:
        second = connection.status().pid
        assert second != first.pid
        assert first.wait(30) == 1
        assert connection.status().pid == second
    with connect("cpu", place.settings, spawn=False) as connection:
        assert connection.status().pid == second


def test_a_redeem_takes_no_descriptors_of_the_companion(place: Place) -> None:
    process = place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        granted = connection.attach(KEY, may_load=True, client_name="loader").wait(30)
        assert isinstance(granted, Granted)
        arena, fds = arena_of(*[bytes([i]) for i in range(40)])
        granted.publication.publish(arena, fds, b"manifest", 40)
        fds.close()
        reader = connection.attach(KEY, may_load=False, client_name="reader").wait(30)
        assert isinstance(reader, Ready)
        held = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (held + 3, held + 3))
        reader.redeem().close()


def test_without_space_for_its_lock_it_says_so_and_what_to_do(place: Place) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # every write to a file fails
        "from vllm_companion_plugin.holder.__main__ import main\n"
        "sys.exit(main(['--device', 'cpu']))\n"
    )
    process = place.run("-c", code)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.fullmatch(r"vllm-companion: Cannot write .*companion.lock: File too large. Free space .*\n", said)


def test_a_second_one_is_refused_and_names_the_first(place: Place) -> None:
    first = place.companion()
    second = place.run("-m", "vllm_companion_plugin.holder", "--device", "cpu")
    _, text = second.communicate(timeout=100)
    assert second.returncode == 1
    assert f"runs already (pid {first.pid})" in text
    assert first.poll() is None


def test_who_looks_at_the_lock_just_then_does_not_prevent_a_start(place: Place) -> None:
    paths = place.paths
    InstanceLock(paths).release()
    looking = os.open(paths.companion_lock, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.04, os.close, (looking,)).start()
    InstanceLock(paths).release()


def test_it_is_no_descendant_of_its_spawner_and_survives_its_death(place: Place) -> None:
    spawner = place.client("spawner", "spawn")
    assert spawner.stdout is not None
    assert spawner.stdout.readline() == "connected\n"
    pid = place.companion_pid()
    ancestors, current = [], pid
    while current > 1:
        fields = Path(f"/proc/{current}/stat").read_text().rpartition(")")[2].split()
        current = int(fields[1])
        ancestors.append(current)
    assert spawner.pid not in ancestors
    assert os.getsid(pid) != os.getsid(spawner.pid)
    spawner.kill()
    spawner.wait(30)
    with connect("cpu", place.settings, spawn=False) as connection:
        assert connection.status().pid == pid


def test_its_environment_is_only_what_it_needs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("SOME_TOKEN", "x")
    ensure_companion("cpu", place.settings)
    names = {item.split(b"=")[0] for item in Path(f"/proc/{place.companion_pid()}/environ").read_bytes().split(b"\0")}
    assert not {b"CUDA_VISIBLE_DEVICES", b"LD_PRELOAD", b"SOME_TOKEN"} & names
    assert b"COMPANION_RUNTIME_DIR" in names


def test_many_spawners_at_once_get_one_companion(place: Place) -> None:
    children = [place.client(f"c{i}", "spawn", "exit") for i in range(4)]
    for child in children:
        out, err = child.communicate(timeout=100)
        assert out == "connected\n", err
    log = Path(place.paths.log).read_text()
    assert log.count("is ready at") == 1, log


def test_it_exits_after_its_linger_time_and_says_so(place: Place) -> None:
    process = place.companion("--linger-s", "3")
    with connect("cpu", place.settings, spawn=False) as connection:
        lease = connection.attach(KEY, may_load=True, client_name="test")
        lease.wait(30)
        time.sleep(3.5)
        assert process.poll() is None
        assert connection.status().exits_at_unix_s == 0
        lease.release()
        _, text = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "If nobody comes until" in text
    assert "Nobody was attached for 3 s" in text


def test_an_entry_that_nobody_uses_goes_though_another_one_is_used(place: Place) -> None:
    """A rolling restart piles up no copies: the old one goes after its own linger time."""
    process = place.companion("--linger-s=4")
    other = EntryKey("cd" * 32, "test/other")
    with (
        connect("cpu", place.settings, spawn=False) as user,
        connect("cpu", place.settings, spawn=False) as former,
    ):
        for connection, key in ((user, KEY), (former, other)):
            granted = connection.attach(key, may_load=True, client_name="engine").wait(30)
            assert isinstance(granted, Granted)
            arena, fds = arena_of(b"weights")
            granted.publication.publish(arena, fds, b"manifest", 3)
            fds.close()

        def arenas() -> int:
            return sum("memfd:arena" in link(process.pid, fd) for fd in os.listdir(f"/proc/{process.pid}/fd"))

        assert arenas() == 2
        former.close()
        expiring: list[float] = []

        def is_idle() -> bool:
            expiring[:] = [e.expires_at_unix_s for e in user.status().entries if e.expires_at_unix_s]
            return bool(expiring)

        until(is_idle, 5, "nobody uses the other one")
        until(lambda: [e.key.model for e in user.status().entries] == [KEY.model], 10, "the unused one has gone")
        until(lambda: arenas() == 1, 5, "its memory is free")
        assert 0 < time.time() - expiring[0] < 30
        assert user.status().exits_at_unix_s == 0


def link(pid: int, fd: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    return ""


@pytest.mark.parametrize("linger", ["never", "-1"])
def test_one_that_lingers_for_ever_has_no_exit_time(place: Place, linger: str) -> None:
    place.companion(f"--linger-s={linger}")
    with connect("cpu", place.settings, spawn=False) as connection:
        status = connection.status()
    assert (status.linger_s, status.exits_at_unix_s) == (-1, 0)


def test_a_socket_that_a_killed_one_left_does_not_disturb(place: Place) -> None:
    first = place.companion()
    first.kill()
    first.wait(30)
    assert os.path.exists(place.paths.grpc_socket)
    with pytest.raises(CompanionUnavailableError):
        connect("cpu", replace(place.settings, spawn_timeout_s=1), spawn=False)
    with connect("cpu", place.settings, spawn=True) as connection:
        assert connection.status().pid != first.pid


def test_a_start_that_fails_says_why_with_the_log(place: Place) -> None:
    os.mkdir(place.paths.grpc_socket)  # cannot be removed as a socket
    with pytest.raises(CompanionUnavailableError, match="could not be started") as caught:
        ensure_companion("cpu", place.settings)
    first, second = str(caught.value).splitlines()
    assert ("could not be started" in first, second.startswith(f"Its log {place.paths.log} ends: ")) == (True, True)


def health_calls(channel: grpc.Channel) -> tuple[Any, Any]:
    """Check and Watch, by the names under which gRPC's own clients know them."""
    kinds = {"Check": channel.unary_unary, "Watch": channel.unary_stream}
    check, watch = (
        call(
            f"/grpc.health.v1.Health/{name}",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        for name, call in kinds.items()
    )
    return check, watch


def test_its_sockets_are_for_the_owner_alone_and_health_is_served(place: Place) -> None:
    place.companion()
    for path in (place.paths.grpc_socket, place.paths.fd_socket):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with grpc.insecure_channel(f"unix:{place.paths.grpc_socket}") as channel:
        check, _ = health_calls(channel)
        for service in ("", schema.SERVICE):
            answer = check(HealthCheckRequest(service=service), timeout=5)
            assert answer.status == HealthCheckResponse.SERVING


def test_health_of_a_service_that_is_not_here(place: Place) -> None:
    """A check fails with NOT_FOUND and a watch begins with SERVICE_UNKNOWN, as gRPC's protocol wants."""
    place.companion()
    with grpc.insecure_channel(f"unix:{place.paths.grpc_socket}") as channel:
        check, watch = health_calls(channel)
        with pytest.raises(grpc.RpcError) as caught:
            check(HealthCheckRequest(service="other"), timeout=5)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert next(watch(HealthCheckRequest(service="other"), timeout=5)).status == HealthCheckResponse.SERVICE_UNKNOWN


def test_health_says_that_it_ends_before_it_ends(place: Place) -> None:
    process = place.companion()
    seen: dict[str, list[int]] = {"": [], schema.SERVICE: []}
    with grpc.insecure_channel(f"unix:{place.paths.grpc_socket}") as channel:
        _, watch_health = health_calls(channel)
        watches = {name: watch_health(HealthCheckRequest(service=name), timeout=20) for name in seen}
        for name, watch in watches.items():
            seen[name].append(next(watch).status)
        process.terminate()
        for name, watch in watches.items():
            with contextlib.suppress(grpc.RpcError):  # how a stream ends whose server is gone
                for answer in watch:
                    seen[name].append(answer.status)
    status = HealthCheckResponse
    assert set(map(tuple, seen.values())) == {(status.SERVING, status.NOT_SERVING)}
    assert process.wait(30) == 0


def test_its_log_is_json_on_request_and_a_name_forges_nothing(place: Place) -> None:
    process = place.companion("--log-format", "json")
    name = 'org/m"{"level": "CRITICAL"}'
    with connect("cpu", place.settings, spawn=False) as connection:
        granted = connection.attach(replace(KEY, model=name), may_load=True, client_name="x\ny").wait(30)
        assert isinstance(granted, Granted)
        granted.publication.decline("because\nof this")
    process.terminate()
    _, text = process.communicate(timeout=100)
    lines = [json.loads(line) for line in text.rstrip("\n").split("\n")]
    assert {(line["level"], line["device"], line["pid"]) for line in lines} == {("INFO", "cpu", process.pid)}
    assert any(line["message"] == f"x\\ny (pid {os.getpid()}) keeps {name}: because of this" for line in lines)


def test_its_log_is_bounded_and_says_how_it_was_started(place: Place) -> None:
    with connect("cpu", place.settings, spawn=True) as connection:
        for _ in range(4000):
            with pytest.raises(EntryNotFoundError):
                connection.unload(model="x" * 4000)  # each is refused with a long line
        lines = Path(place.paths.log).read_text().splitlines()
        assert 1 << 20 < sum(map(len, lines)) < (4 << 20) + (1 << 17)
        assert any("is ready at" in line for line in lines[:3])
        assert sum("This log was shortened" in line for line in lines) == 1
        assert "Refused" in lines[-1]


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_companion_plugin.holder.__main__, vllm_companion_plugin.holder.process\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'torch', 'cuda', 'vllm', 'numpy'}))\n"
        "package = 'vllm_companion_plugin.'\n"
        "heavy = tuple(package + part for part in ('memory.tensors', 'engine', 'tree'))\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n[]\n"


def test_it_is_small_and_maps_no_cuda_while_it_serves(place: Place) -> None:
    process = place.companion()
    arena, fds = arena_of(b"x" * 4096)
    with connect("cpu", place.settings, spawn=False) as connection:
        granted = connection.attach(KEY, may_load=True, client_name="test").wait(30)
        assert isinstance(granted, Granted)
        granted.publication.publish(arena, fds, b"m" * 1000, 1)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        status = Path(f"/proc/{process.pid}/status").read_text()
    fds.close()
    assert not [name for name in ("libtorch", "libcuda", "libcudart", "_multiarray") if name in maps]
    rss_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    assert rss_kib < 80 * 1024


def test_all_descriptors_are_closed_when_an_entry_is_unloaded(place: Place) -> None:
    process = place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        before = len(os.listdir(f"/proc/{process.pid}/fd"))
        arena, fds = arena_of(*[b"x" * 4096] * 5)
        lease = connection.attach(KEY, may_load=True, client_name="test")
        granted = lease.wait(30)
        assert isinstance(granted, Granted)
        granted.publication.publish(arena, fds, b"m", 1)
        held = [link(process.pid, fd) for fd in os.listdir(f"/proc/{process.pid}/fd")]
        assert sum("memfd:arena" in name for name in held) == 5
        connection.unload(force=True)
        until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) <= before, 2, "descriptors are closed")
    fds.close()


# ---- the runtime directory


def _root(place: Place) -> Path:
    return Path(place.settings.runtime_dir)


def test_a_directory_that_others_can_reach_is_refused_with_the_command_that_mends_it(place: Place) -> None:
    _root(place).mkdir(0o755)
    with pytest.raises(RuntimeDirError, match="chmod 0700"):
        connect("cpu", place.settings, spawn=True)


class TestWhatIsNotOurs:
    """No message proposes to change a directory that others may use."""

    @pytest.mark.parametrize("path", [tempfile.gettempdir(), "/", "/usr", "/proc/self", "/var/tmp", "/dev/shm"])
    def test_of_the_system(self, place: Place, path: str) -> None:
        self.refused(place, path)

    @pytest.mark.parametrize("kind", ["full", "sticky", "link", "file"])
    def test_of_somebody(self, place: Place, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "d"
        if kind == "link":
            path.symlink_to(tmp_path)
        elif kind == "file":
            path.write_text("")
        else:
            path.mkdir()
            path.chmod(0o1777 if kind == "sticky" else 0o755)
        if kind == "full":
            (path / "cpu").mkdir()
            (path / "thesis.tex").touch()
        self.refused(place, str(path))

    @staticmethod
    def refused(place: Place, path: str) -> None:
        with pytest.raises(RuntimeDirError, match="Set COMPANION_RUNTIME_DIR to ") as caught:
            device_paths("cpu", replace(place.settings, runtime_dir=path))
        assert not re.search(r"\b(chmod|rm|mv)\b", str(caught.value))

    def test_ours(self, place: Place) -> None:
        """What only companions use can be mended by a command, a device's directory by its name."""
        root = Path(place.paths.directory).parent
        root.chmod(0o755)
        with pytest.raises(RuntimeDirError, match=f"Run: chmod 0700 {root}$"):
            device_paths("cpu", place.settings)
        root.chmod(0o700)
        (root / "cpu").rename(root / "GPU-00000000-0000-0000-0000-000000000000")
        (root / "cpu").symlink_to("/tmp")
        with pytest.raises(RuntimeDirError, match=f"Run: rm {root}/cpu$"):
            device_paths("cpu", place.settings)


def test_a_symbolic_link_is_refused(place: Place, tmp_path: Path) -> None:
    _root(place).symlink_to(tmp_path)
    with pytest.raises(RuntimeDirError, match="symbolic link"):
        connect("cpu", place.settings, spawn=True)


def test_a_file_in_its_place_is_refused(place: Place) -> None:
    _root(place).write_text("")
    with pytest.raises(RuntimeDirError, match="not a directory"):
        connect("cpu", place.settings, spawn=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("which", ["root", "device"])
def test_a_directory_of_somebody_else_is_refused(place: Place, which: str) -> None:
    target = Path(place.paths.directory) if which == "device" else _root(place)
    target.mkdir(0o700, parents=True, exist_ok=True)
    os.chown(target, 12345, 12345)
    with pytest.raises(RuntimeDirError, match="belongs to uid 12345"):
        connect("cpu", place.settings, spawn=True)


def test_a_directory_that_cannot_be_made_is_refused(place: Place) -> None:
    with pytest.raises(RuntimeDirError, match="COMPANION_RUNTIME_DIR"):
        device_paths("cpu", replace(place.settings, runtime_dir="/proc/none/r"))


def test_a_directory_closed_to_its_owner_is_refused(place: Place) -> None:
    _root(place).mkdir(0o500)
    with pytest.raises(RuntimeDirError, match="its owner needs all"):
        device_paths("cpu", place.settings)


def test_a_socket_path_that_is_too_long_is_refused(place: Place) -> None:
    with pytest.raises(RuntimeDirError, match="COMPANION_RUNTIME_DIR to something shorter"):
        device_paths("cpu", replace(place.settings, runtime_dir=place.settings.runtime_dir + "x" * 100))


@pytest.mark.parametrize("name", ["", "..", "cpu/..", "0", "GPU-../../etc", "cpu\n", "GPU-1234"])
def test_a_device_name_that_is_none_is_refused(place: Place, name: str) -> None:
    with pytest.raises(RuntimeDirError, match="no device name"):
        device_paths(name, place.settings)


def test_devices_with_a_directory_are_listed(place: Place) -> None:
    assert list_devices(place.settings) == []
    names = ["GPU-12345678-1234-1234-1234-123456789abc", "cpu"]
    for name in names:
        device_paths(name, place.settings)
    (_root(place) / "other").mkdir()
    assert list_devices(place.settings) == names
    shutil.rmtree(_root(place))
