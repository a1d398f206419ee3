"""The companion process: one a device, from its lock to its exit.

It imports grpc and protobuf and never torch, CUDA or vLLM: it cannot crash on a CUDA error, holds
no GPU memory of its own, and survives every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from functools import partial

import grpc

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.errors import AlreadyRunningError, CompanionUnavailableError, RuntimeDirError
from vllm_companion_plugin.holder.service.fd_server import FdServer
from vllm_companion_plugin.holder.service.health import Health
from vllm_companion_plugin.holder.service.service import CompanionService
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.runtime_dir import DevicePaths
from vllm_companion_plugin.wire import schema
from vllm_companion_plugin.wire.rpc import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, address

logger = logging.getLogger("vllm.companion.process")

STOP_GRACE_S = 0.3
STOP_LIMIT_S = 1.8
CHECK_INTERVAL_S = 2.0
HANDSHAKE_MS = 10_000
LOOKS, LOOK_S = 10, 0.01
MAX_RPCS = 2048
"""More than all leases, watches and publications that the service allows, so that it is the service that refuses."""
HAND_BACK_S = 5.0
"""For those who map entries of the companion before. They need about a second; who wants an entry waits so long."""


class InstanceLock:
    """flock on companion.lock: held for the life of the process, freed by the kernel."""

    def __init__(self, paths: DevicePaths) -> None:
        """Raises `AlreadyRunningError` naming the pid that holds it, `RuntimeDirError` if it cannot be written."""
        self._path = paths.companion_lock
        try:
            self._fd = os.open(paths.companion_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RuntimeDirError(f"Cannot open {paths.companion_lock}: {error.strerror}.") from error
        if not _locked_soon(self._fd):
            pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunningError(
                f"A companion of {paths.device} runs already (pid {pid}); `vllm-companion stop` ends it."
            )
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(self._fd)
            raise RuntimeDirError(
                f"Cannot write {paths.companion_lock}: {error.strerror}. Free space there, or set "
                "COMPANION_RUNTIME_DIR to another directory."
            ) from error
        # systemd-tmpfiles removes old files from /tmp, but nothing below a directory that somebody has locked.
        self._root_fd = os.open(os.path.dirname(paths.directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.flock(self._root_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def is_reachable(self) -> bool:
        """Whether our lock file, and with it our sockets, are still where clients look for them."""
        try:
            there = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def release(self) -> None:
        os.close(self._root_fd)
        os.close(self._fd)


def _locked_soon(fd: int) -> bool:
    """Take the lock for ourselves. Who only looks whether it is taken (`doctor`) shares it for an instant."""
    for _ in range(LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOOK_S)
    return False


@dataclass(frozen=True)
class Lifetime:
    """How long a companion stays with nobody attached.

    Attributes:
        linger_s: seconds; negative or infinite: until stopped.
        grace_s: at least these until somebody attaches for the first time.
    """

    linger_s: float
    grace_s: float = 0.0


async def serve(paths: DevicePaths, lock: InstanceLock, life: Lifetime, on_ready: asyncio.Event | None = None) -> None:
    """Run the companion until a signal, a Shutdown call or the end of its linger time.

    Ends also if somebody removes the runtime directory, with status 1: nobody could reach us any more. Those who
    map our entries hand them to a companion in a new directory.

    Args:
        lock: held by the caller.
        on_ready: set once both sockets answer.

    Raises:
        CompanionUnavailableError: a socket cannot be made.
    """

    def hide() -> None:
        if lock.is_reachable():  # else the socket there is another companion's
            _remove(paths.grpc_socket)

    service = CompanionService(paths.device, _finite(life.linger_s), partial(notes.dismiss, paths), hide)
    for key, generation in notes.held(paths):
        logger.info("Expecting %s (%s), generation %d, from those who map it.", key.title, key.rank, generation)
        service.registry.expect(key, generation)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, _on_signal, number, service)
    fd_server = FdServer(paths.fd_socket, redeem=service.redeem, check_deposit=service.check_deposit)
    health = Health(schema.SERVICE)
    server = await _start_grpc(paths, service, health)
    try:
        fd_server.start()
        logger.info(
            "Companion %s of %s (pid %d) is ready at %s.", __version__, paths.device, os.getpid(), paths.grpc_socket
        )
        if on_ready is not None:
            on_ready.set()
        loop.call_later(HAND_BACK_S, _give_up_expected, service)
        running = (
            _linger(service, life.grace_s),
            _expire(service),
            _stay_reachable(lock, service),
            _end_overdue(service),
        )
        watches = [loop.create_task(watch) for watch in running]
        await service.stop.wait()
        for watch in watches:
            watch.cancel()
    finally:
        # Whatever hangs below, the memory must be freed: the default action of SIGALRM ends us.
        signal.setitimer(signal.ITIMER_REAL, STOP_LIMIT_S)
        health.end()
        service.close()
        if not lock.is_reachable():
            # The usual way out would remove the sockets of a companion that has taken our place.
            os._exit(1)
        await fd_server.close()
        await server.stop(STOP_GRACE_S)
        _remove(paths.grpc_socket)
        signal.setitimer(signal.ITIMER_REAL, 0)
        logger.info("Companion of %s (pid %d) has ended; its memory is free.", paths.device, os.getpid())


async def _start_grpc(paths: DevicePaths, service: CompanionService, health: Health) -> grpc.aio.Server:
    # We hold the lock, so a socket file is left over from a killed companion.
    _remove(paths.grpc_socket)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ],
        maximum_concurrent_rpcs=MAX_RPCS,
    )
    server.add_generic_rpc_handlers((schema.handlers(service), schema.handlers(health, schema.HEALTH)))
    try:
        server.add_insecure_port(address(paths.grpc_socket))
        await server.start()
        os.chmod(paths.grpc_socket, 0o600)
    except (OSError, RuntimeError) as error:
        raise CompanionUnavailableError(f"Cannot listen at {paths.grpc_socket}: {error}.") from error
    return server


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _on_signal(number: int, service: CompanionService) -> None:
    logger.info("%s: ending.", signal.Signals(number).name)
    service.stop.set()


def _finite(linger_s: float) -> float:
    return linger_s if math.isfinite(linger_s) else -1.0


def _give_up_expected(service: CompanionService) -> None:
    for entry in service.registry.give_up_expected():
        logger.warning("Nobody handed back %s within %g s.", entry.key.title, HAND_BACK_S)


async def _end_overdue(service: CompanionService) -> None:
    """Who hangs while it hands back must not keep all others waiting."""
    while True:
        late, next_s = service.registry.end_overdue(HAND_BACK_S)
        for lease in late:
            logger.warning(
                "%s (pid %d) was let to hand back %s and did not within %g s: the next one may.",
                *(lease.client, lease.pid, lease.entry.key.title, HAND_BACK_S),
            )
        await service.changed(next_s)


async def _stay_reachable(lock: InstanceLock, service: CompanionService) -> None:
    while lock.is_reachable():
        await service.changed(CHECK_INTERVAL_S)
    logger.error(
        "The runtime directory of this companion was removed, so nobody can reach it: ending. Engines that map its "
        "entries hand them to a companion in a new one; what nobody maps is lost."
    )
    service.end(replaced=True)


async def _expire(service: CompanionService) -> None:
    """An entry that nobody uses goes after its linger time, though the companion stays for others."""
    while True:
        await service.changed(service.expire())


async def _linger(service: CompanionService, grace_s: float) -> None:
    """Stop the service once nobody has been attached for its linger time."""
    while True:
        idle_since = service.registry.idle_since
        if idle_since is None or service.owner_pid:
            grace_s = 0.0  # somebody has come
        if idle_since is None or service.linger_s < 0:
            service.exits_at_unix_s = 0.0
            await service.changed()
            continue
        left = idle_since + max(service.linger_s, grace_s) - time.monotonic()
        if left <= 0:
            logger.info("Nobody was attached for %g s: ending.", service.linger_s)
            service.stop.set()
            return
        due = time.time() + left
        if abs(due - service.exits_at_unix_s) > 1:
            held = sum(entry.size_bytes for entry in service.registry.status()) / (1 << 30)
            logger.info(
                "Nobody is attached. %.2f GiB are held until %s, then the companion exits.",
                *(held, time.strftime("%m-%d %H:%M:%S", time.localtime(due))),
            )
        service.exits_at_unix_s = due
        await service.changed(left)
