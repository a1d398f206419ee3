"""Checks of `doctor`: the states of companions, keepers, locks and limits, what each state means, and the repair.

The checks change nothing, except that they remove notes of holders that have gone. Some states may end in a moment (a
start, a hand-over); a check watches such a state for `LASTING_S` before it reports a fault.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.cli.doctor.check import FAIL, OK, WARN, Check
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.status import CompanionStatus
from vllm_companion_plugin.core.text import did_you_mean
from vllm_companion_plugin.errors import CompanionError, ProtocolMismatchError
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.locks import is_locked
from vllm_companion_plugin.host.peer import credentials
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths, list_devices
from vllm_companion_plugin.host.spawn import log_tail
from vllm_companion_plugin.settings import BY_NAME, Settings, unknown_variables, xdg_problem

LASTING_S = 3.0
ANSWER_S = 3.0
SILENT_S = 60.0
"""Silence of a loading process before a warning. Long phases report nothing, so silence alone is no fault."""
MIN_FILES = 4096
"""A companion keeps a descriptor for each block of at most 960 MiB, and one or two for each client."""


def check_companions(settings: Settings) -> Iterator[Check]:
    """Check every device of the runtime directory, and find companions outside it."""
    try:
        for device in list_devices(settings):
            paths = device_paths(device, settings)
            yield from _check_companion(paths)
            yield from _check_loader(paths)
            for path, what in ((paths.spawn_lock, "companion"), (paths.keeper_lock, "keeper")):
                yield from _check_start(path, f"start of a {what} of {device}")
            yield from _check_keeper(paths)
    except CompanionError as error:
        yield Check("companions", WARN, f"could not be looked for: {error}", "repair the runtime directory")
    yield from _check_elsewhere(settings)


# ---- the companion


def _check_companion(paths: DevicePaths) -> Iterator[Check]:
    name = f"companion of {paths.device}"
    pid = _listener(paths.grpc_socket, socket.SOCK_STREAM)
    if pid is None:
        yield from _check_absent(name, paths)
        return
    with CompanionConnection(paths) as connection:
        pid = pid or connection.recorded_pid()
        try:
            connection.check_protocol(ANSWER_S)
            status = connection.status(ANSWER_S)
        except ProtocolMismatchError as error:
            yield Check(name, FAIL, error.what, error.remedy)
        except CompanionError as error:
            yield _silent(name, paths, pid, error)
        else:
            yield _answering(name, paths, status)
            yield from _check_entries(paths, status, connection)


def _silent(name: str, paths: DevicePaths, pid: int, error: CompanionError) -> Check:
    if not _is_locked(paths.companion_lock):
        text = f"pid {pid} ({_command(pid)}) listens at {paths.grpc_socket} and is no companion"
        return Check(name, FAIL, text, f"kill {pid}; rm -f {paths.grpc_socket}")
    if _is_stopped(pid):
        return Check(name, FAIL, f"pid {pid} is stopped (SIGSTOP, or a debugger)", f"kill -CONT {pid}")
    text = f"pid {pid} holds the memory and does not answer: {error} Engines keep serving, and hand it to the next one"
    return Check(name, FAIL, text, f"kill -9 {pid}")


def _answering(name: str, paths: DevicePaths, status: CompanionStatus) -> Check:
    pid = status.pid
    if _listener(paths.fd_socket, socket.SOCK_SEQPACKET) is None:
        text = (
            f"answers (pid {pid}), but {paths.fd_socket} is gone, so nobody can attach. Engines hand over to the next"
        )
        return Check(name, FAIL, text, f"kill -9 {pid}")
    used, limit = _files(pid)
    if limit and used > 0.8 * limit:
        text = f"pid {pid} has {used} of {limit} possible files open; new weights may not be taken"
        return Check(name, WARN, text, f"prlimit --pid {pid} --nofile=65536:65536")
    if status.version != __version__:
        text = f"answers (pid {pid}), version {status.version}; installed is {__version__}"
        return Check(name, WARN, text, f"vllm-companion upgrade --device {paths.device}")
    return Check(name, OK, f"answers (pid {pid})")


def _check_absent(name: str, paths: DevicePaths) -> Iterator[Check]:
    """Find out why no process listens at the companion's socket."""
    if _lasting(lambda: _is_locked(paths.companion_lock) and _listener(paths.grpc_socket) is None):
        pid = _holder_pid(paths.companion_lock)
        text = f"pid {pid} holds the memory, but cannot be reached: it hangs at its start, or its socket was removed"
        yield Check(name, FAIL, text, f"kill -CONT {pid}" if _is_stopped(pid) else f"kill -9 {pid}")
    elif _lasting(lambda: any(notes.held(paths)) and _listener(paths.grpc_socket) is None):
        names = ", ".join(f"{key.title}, generation {generation}" for key, generation in notes.held(paths))
        last = (log_tail(paths.log).splitlines() or ["(nothing)"])[-1]
        text = f"none runs, and none can be started for those who map {names}. Its log ends: {last}"
        yield Check(name, FAIL, text, f"vllm-companion serve --device {paths.device}")
    elif os.path.lexists(paths.grpc_socket):
        yield Check(name, OK, "none runs; the last one was killed, and the next one replaces its socket")


def _check_entries(paths: DevicePaths, status: CompanionStatus, connection: CompanionConnection) -> Iterator[Check]:
    now = time.time()
    for entry in status.entries:
        if entry.loader is None or not entry.loader.pid:
            continue
        pid, silent_s = entry.loader.pid, now - (entry.loader.changed_unix_s or entry.loader.since_unix_s)
        name = f"loading of {entry.key.title} ({entry.key.rank})"
        if _is_stopped(pid):
            yield Check(name, FAIL, f"pid {pid}, which loads it, is stopped", f"kill -CONT {pid}")
        elif silent_s > SILENT_S:
            text = f"pid {pid} has reported no progress for {silent_s:.0f} s; the next one that waits would load it"
            yield Check(name, WARN, text, f"kill {pid}")

    def unknown() -> list[tuple[str, str]]:
        entries = connection.status(ANSWER_S).entries
        known = {(entry.key.id, entry.generation) for entry in entries}
        known |= {(entry.key.id, each.number) for entry in entries for each in entry.generations}
        return [
            (key.title, os.path.join(paths.holders, f"{key.id}.{generation}"))
            for key, generation in notes.held(paths)
            if (key.id, generation) not in known
        ]

    with contextlib.suppress(CompanionError):  # the companion ended meanwhile
        for title, path in unknown() if _lasting(lambda: bool(unknown())) else ():
            pid = _holder_pid(path)
            text = f"pid {pid} maps a copy that this companion does not have, so the memory may be used twice"
            yield Check(f"{title} on {paths.device}", WARN, text, f"kill {pid}, and start it again")


# ---- locks


def _check_loader(paths: DevicePaths) -> Iterator[Check]:
    name = f"loading on {paths.device}"
    if not _is_locked(paths.loader_lock):
        return
    pid, text, age_s = _holder_pid(paths.loader_lock), "", 0.0
    with contextlib.suppress(OSError):
        with open(paths.loader_lock + ".holder", encoding="utf-8", errors="replace") as file:
            text = file.read(500)
        age_s = time.time() - os.stat(file.name).st_mtime
    who = text or f"pid {pid}"
    if _is_stopped(pid):
        yield Check(name, FAIL, f"{who} keeps all others from loading, and is stopped", f"kill -CONT {pid}")
    elif age_s > SILENT_S:
        text = f"{who} keeps all others from loading, and gave no sign of life for {age_s:.0f} s"
        yield Check(name, WARN, text, f"kill {pid}")
    else:
        yield Check(name, OK, f"{who} loads")


def _check_start(lock: str, name: str) -> Iterator[Check]:
    if _lasting(lambda: _is_locked(lock)):
        pid = _holder_pid(lock)
        mend = f"kill -CONT {pid}" if _is_stopped(pid) else f"kill {pid}"
        yield Check(name, WARN, f"pid {pid} ({_command(pid)}) has the right to start one, and makes no progress", mend)


def _check_keeper(paths: DevicePaths) -> Iterator[Check]:
    name = f"keeper of {paths.device}"
    pid = _listener(paths.keeper_socket, socket.SOCK_SEQPACKET)
    if pid is None:  # the keeper has ended: the next loader starts another one
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(paths.keeper_socket)
            sock.send(b"?")  # no valid request: the keeper closes the connection
            sock.recv(1)
        except (TimeoutError, BlockingIOError):
            mend = f"kill -CONT {pid}" if _is_stopped(pid) else f"kill -9 {pid}"
            text = f"pid {pid} does not answer, so nobody can load. Engines keep what they map; the next one loads anew"
            yield Check(name, FAIL, text if mend.startswith("kill -9") else f"pid {pid} is stopped", mend)
            return
        except OSError:
            pass
    yield Check(name, OK, f"answers (pid {pid})")


# ---- the surroundings


def _check_elsewhere(settings: Settings) -> Iterator[Check]:
    """Find companions of this user that `status` does not show."""
    root = os.path.abspath(settings.runtime_dir)
    for pid, lock in _companions():
        if lock.endswith(" (deleted)"):
            # The companion notices this by itself, unless it hangs.
            if _lasting(lambda pid=pid, lock=lock: (pid, lock) in _companions(), 2 * LASTING_S):  # type: ignore[misc]
                text = f"pid {pid} holds memory, and its runtime directory was removed, so nobody can reach it"
                yield Check("lost companion", WARN, text, f"kill -9 {pid}")
        elif not lock.startswith(root + os.sep):
            other = os.path.dirname(os.path.dirname(lock))
            text = f"pid {pid} serves the runtime directory {other}; it shares with nobody here"
            yield Check("companion elsewhere", OK, text, f"to see it: vllm-companion status --runtime-dir {other}")


def _companions() -> list[tuple[int, str]]:
    """Return pid and lock file of every companion process that this user may inspect."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if b"vllm_companion_plugin.holder" not in file.read(4096).split(b"\0"):
                    continue
            for link in _open_files(int(name)):
                if re.search(r"/companion\.lock( \(deleted\))?$", link):
                    found.append((int(name), link))
    return found


def check_limits() -> Iterator[Check]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_FILES:
        text = f"at most {files} open files; a companion keeps one for each block of weights and each client"
        yield Check("open files", WARN, text, "ulimit -Hn 65536 (as root; for a container: --ulimit nofile=65536)")
    else:
        yield Check("open files", OK, f"at most {files}")
    try:
        fd = os.memfd_create("vllm-companion-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 1 << 20)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        finally:
            os.close(fd)
    except OSError as error:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        mend = "ulimit -f unlimited" if limit != resource.RLIM_INFINITY else "sysctl vm.memfd_noexec=0 (as root)"
        yield Check("shared memory", FAIL, f"memfd: {error.strerror}; weights on CPU cannot be shared", mend)
    else:
        yield Check("shared memory", OK, "memfd can be made and sealed")


def check_metrics(settings: Settings) -> Iterator[Check]:
    port = settings.metrics_port
    if not port:
        return
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=ANSWER_S) as answer:
                if b"vllm_companion_up" in answer.read(1 << 20):
                    yield Check("metrics port", OK, f"metrics are served on {port}")
                    return
        text = f"{port} of 127.0.0.1 cannot be used: {error.strerror}. `ss -ltnp sport = :{port}` shows by whom"
        yield Check("metrics port", FAIL, text, f"export {BY_NAME['metrics_port'].env}=ANOTHER_PORT")
    else:
        text = f"no process serves metrics on {port}; `serve` would, too"
        yield Check("metrics port", OK, text, f"vllm-companion metrics {BY_NAME['metrics_port'].option} {port}")


def check_variables() -> Iterator[Check]:
    if problem := xdg_problem():
        text = f"{os.environ['XDG_RUNTIME_DIR']} {problem}, and is not used"
        yield Check("XDG_RUNTIME_DIR", WARN, text, "unset XDG_RUNTIME_DIR")
    for name in unknown_variables():
        meant = did_you_mean(name, [setting.env for setting in BY_NAME.values()])
        yield Check(name, WARN, f"is set, and is no setting{meant}", f"unset {name}")


# ---- looking


def _lasting(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Tell whether the condition stays true for `seconds`, by default `LASTING_S`."""
    deadline = time.monotonic() + (LASTING_S if seconds is None else seconds)
    while condition():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def _listener(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> int | None:
    """Return the pid of the process that listens at a socket, 0 if it is hidden from us; None if no process listens."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(path)
            return credentials(sock)[0]
        except (TimeoutError, BlockingIOError):
            return 0  # the listener's queue is full
        except OSError:
            return None


def _is_locked(path: str) -> bool:
    """Tell whether some process holds the flock of a file."""
    with contextlib.suppress(OSError):
        return is_locked(path)
    return False


def _holder_pid(path: str) -> int:
    """Return the pid of a process that holds the flock of a file; 0 if it is hidden from us."""
    with contextlib.suppress(OSError):
        inode = str(os.stat(path).st_ino)
        with open("/proc/locks", encoding="ascii") as file:
            for line in file:
                words = line.split()
                if "FLOCK" in words and words[-3].rpartition(":")[2] == inode and path in _open_files(int(words[-4])):
                    return int(words[-4])
    return 0


def _open_files(pid: int) -> list[str]:
    links = []
    with contextlib.suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(fd.path))
    return links


def _files(pid: int) -> tuple[int, int]:
    """Return how many files a process has open and may have open; 0 for a number that is hidden from us."""
    with contextlib.suppress(OSError):
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        return len(os.listdir(f"/proc/{pid}/fd")), max(0, soft)
    return 0, 0


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _command(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
    return "?"
