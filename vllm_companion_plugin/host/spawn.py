"""Starting a companion that outlives the process that needed it first."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import site
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import count

from filelock import FileLock, Timeout

from vllm_companion_plugin.core import logs
from vllm_companion_plugin.core.polling import readable
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, RuntimeDirError
from vllm_companion_plugin.host import peer, systemd
from vllm_companion_plugin.host.locks import owner_text
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths, read_file
from vllm_companion_plugin.settings import Settings, to_environment

logger = logging.getLogger("vllm.companion.spawn")

# LD_LIBRARY_PATH is here because some Pythons need it to find libpython. Variables of CUDA and LD_PRELOAD are not:
# a companion must not be able to touch a GPU.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("LC_", "PYTHON")
LOG_TAIL_BYTES = 2000
LOG_LINE_CHARACTERS = 300
CONNECT_TIMEOUT_S = 5.0
RETRY_S = 0.2
POLL_S = 0.05
SPAWN_TRIALS = 3
"""Number of starts of a companion that ends without an answer: somebody may have killed it."""


def is_listening(paths: DevicePaths) -> bool:
    """Tell whether a process accepts connections at the companion's socket; a leftover file does not count.

    Raises:
        CompanionUnavailableError: the connection failed, or took longer than 5 s.
        RuntimeDirError: a process of another user listens there.
    """
    return listener_pid(paths) is not None


def listener_pid(paths: DevicePaths) -> int | None:
    """Return the pid of the process that listens at the companion's socket.

    The pid is 0 if the process is in another container; None means that no process listens. The kernel gives the
    pid, because a number in a file may belong to another process by now.

    Raises:
        CompanionUnavailableError, RuntimeDirError: as `is_listening`.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return _listener_pid(paths)
        except OSError as error:
            # ENOTCONN: a signal interrupted the wait.
            if error.errno != errno.ENOTCONN or time.monotonic() > deadline:
                raise CompanionUnavailableError(f"Cannot connect to {paths.grpc_socket}: {error.strerror}.") from error


def _listener_pid(paths: DevicePaths) -> int | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            peer.connect(sock, paths.grpc_socket, CONNECT_TIMEOUT_S)
            return peer.check_listener(sock, paths.grpc_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except BlockingIOError:
            raise CompanionUnavailableError(
                f"Waited {CONNECT_TIMEOUT_S:g} s to connect to the companion of {paths.device}, and its queue is full: "
                f"{owner_text(paths.companion_lock)} is stopped or hangs.",
                remedy="End that process with kill -9.",
            ) from None


def who_is_silent(paths: DevicePaths) -> str:
    """Name the companion that did not answer, and what a user can do about it."""
    pid = 0
    with contextlib.suppress(CompanionError):
        pid = listener_pid(paths) or 0
    if not pid:
        return (
            f"the companion of {paths.device}, which has ended or cannot be reached; `vllm-companion status` shows it."
        )
    return (
        f"the companion of {paths.device} (pid {pid}). If it was stopped, let it go on: kill -CONT {pid}. If it hangs, "
        f"end it: kill -9 {pid}; engines keep what they map, and start another one."
    )


def ensure_companion(device: str, settings: Settings, *, linger_s: float | None = None) -> None:
    """Return once a companion of `device` answers; start one if none runs.

    Args:
        linger_s: linger time in seconds of a companion started here, instead of the setting; negative: until stopped.

    Raises:
        RuntimeDirError: the runtime directory is unsafe or not writable.
        CompanionUnavailableError: no companion started within `settings.spawn_timeout_s`; the text says why and ends
            with the end of its log.
    """
    paths = device_paths(device, settings)
    if is_listening(paths):
        return
    with starting(paths.spawn_lock, f"the companion of {device}", paths.log, settings) as deadline:
        if not is_listening(paths):
            _spawn(paths, settings, settings.linger_s if linger_s is None else linger_s, deadline)


def replace_companion(device: str, settings: Settings, end: Callable[[], object], linger_s: float) -> None:
    """End the running companion with `end()`, then start one of this installation. Keeps others from starting one.

    Raises:
        CompanionError: as `ensure_companion`, and what `end` raises; in that case nothing was started.
    """
    paths = device_paths(device, settings)
    with starting(paths.spawn_lock, f"the companion of {device}", paths.log, settings) as deadline:
        end()
        _spawn(paths, settings, linger_s, deadline)


@contextlib.contextmanager
def starting(
    lock_path: str,
    what: str,
    log: str,
    settings: Settings,
    error: type[CompanionError] = CompanionUnavailableError,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[float]:
    """Hold the right to start `what`, which logs to `log`; yields the monotonic time at which the start must be done.

    Args:
        pause: lets the given number of seconds pass; an exception from it ends the wait.

    Raises:
        RuntimeDirError: the lock file cannot be opened.
        CompanionError: of type `error`; another process kept the right to start `what` all the time.
    """
    deadline = time.monotonic() + settings.spawn_timeout_s
    lock = FileLock(lock_path, thread_local=False)
    while True:
        try:
            with contextlib.suppress(Timeout):
                lock.acquire(blocking=False)
                break
        except OSError as reason:
            raise RuntimeDirError(f"Cannot lock {lock_path}: {reason.strerror or reason}.") from reason
        if time.monotonic() > deadline:
            raise error(
                f"Waited {settings.spawn_timeout_s:g} s for {owner_text(lock_path)}, which has been starting {what}. "
                f"Its log: {log}"
            )
        pause(POLL_S)
    try:
        yield deadline
    finally:
        lock.release()


def child_environment(settings: Settings, *, imports: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment of a companion: what it needs of ours, and the paths of its packages and of `imports`."""
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    environment.update(to_environment(settings))
    given = [os.path.abspath(p) for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    wanted = given + [root for root in _import_roots(imports) if root not in given]
    if wanted:
        environment["PYTHONPATH"] = os.pathsep.join(wanted)
    # The child's working directory is "/". That must not become an import path.
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def _import_roots(more: Sequence[str]) -> list[str]:
    """Return directories, besides the interpreter's own, where this process found the packages that the child needs."""
    own = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
    own.add(sysconfig.get_path("platlib"))
    roots: list[str] = []
    for name in ("vllm_companion_plugin", "grpc", "google.protobuf", "filelock", *more):
        spec = None
        with contextlib.suppress(ModuleNotFoundError):  # a parent of a dotted name is missing
            spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        root = os.path.abspath(spec.origin)
        for _ in range(name.count(".") + 2):
            root = os.path.dirname(root)
        if root not in own and root not in roots:
            roots.append(root)
    return roots


def _spawn(paths: DevicePaths, settings: Settings, linger_s: float, deadline: float) -> None:
    started = time.monotonic()
    arguments = ["vllm_companion_plugin.holder", "--device", paths.device, f"--linger-s={linger_s}"]
    for trial in count(1):
        try:
            answer = start_detached(arguments, child_environment(settings), paths.log, deadline)
        except OSError as error:
            raise CompanionUnavailableError(f"Cannot start a companion of {paths.device}: {error}.") from error
        if answer == "ok":
            logger.info("Started the companion of %s in %.1f s.", paths.device, time.monotonic() - started)
            if service := systemd.own_service():
                logger.warning(
                    "The companion of %s runs in %s, which started it: when systemd stops or restarts that service, it "
                    "ends the companion as well, and engines load its weights again. Run the companion as a service of "
                    "its own: docs/deploy/vllm-companion@.service",
                    *(paths.device, service),
                )
            return
        busy = answer is not None and answer.startswith("already_running ")
        if (not busy and (answer != "" or trial == SPAWN_TRIALS)) or time.monotonic() > deadline:
            break
        # The companion was killed while it started; or another one holds the lock and does not listen, because a user
        # started it a moment ago or because it is ending.
        time.sleep(RETRY_S)
        if is_listening(paths):
            return
    raise CompanionUnavailableError(
        f"The companion of {paths.device} could not be started: {why_not(answer)}\n{log_end(paths.log)}"
    )


def start_detached(arguments: list[str], environment: dict[str, str], log: str, deadline: float) -> str | None:
    """Run `python -m arguments... --detach` in the background; return when it has reported its start.

    Args:
        arguments: module name, then its arguments.
        log: the file that receives its output.
        deadline: monotonic time, in seconds.

    Returns:
        The child's report: "ok" or an error, "" if it ended without a report; None if the time is over.

    Raises:
        OSError: Python cannot be run.
    """
    if not sys.executable:
        raise OSError("this process does not know its Python interpreter (sys.executable)")
    logs.shorten(log)
    read_fd, write_fd = os.pipe()
    try:
        try:
            with open(log, "ab", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW, 0o600)) as out:
                child = subprocess.Popen(
                    [sys.executable, "-m", *arguments, "--detach", "--ready-fd", str(write_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd="/",
                    env=environment,
                    pass_fds=(write_fd,),
                    start_new_session=True,
                )
        finally:
            os.close(write_fd)
        answer = _read_until_closed(read_fd, deadline)
        _reap(child)
        return answer
    finally:
        os.close(read_fd)


def why_not(answer: str | None) -> str:
    """Return the reason in an answer of `start_detached` that is not "ok"."""
    return "gave no answer in time" if answer is None else answer.partition(" ")[2] or "ended at once"


def _read_until_closed(fd: int, deadline: float) -> str | None:
    """Return what the child wrote until it closed its end, "" if it wrote nothing; None if the time is over."""
    data = b""
    while readable([fd], max(0.0, deadline - time.monotonic())):
        chunk = os.read(fd, 4096)
        if not chunk:
            return data.decode(errors="replace")
        data += chunk
    return None


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Collect the intermediate process, which ends as soon as it has forked."""
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def log_tail(path: str) -> str:
    """Return the end of a log, for messages."""
    with contextlib.suppress(OSError):
        return read_file(path, LOG_TAIL_BYTES, end=True).decode(errors="replace").strip()
    return "(no log)"


def log_end(path: str) -> str:
    """Name a log and its last line, for messages; the traceback stays in the log."""
    last = (log_tail(path).splitlines() or ["(empty)"])[-1].strip(" |")
    return f"Its log {path} ends: {last[:LOG_LINE_CHARACTERS]}"
