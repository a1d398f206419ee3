"""The companion process: one a device, from its lock to its exit.

It imports grpc and protobuf and never torch, CUDA or vLLM: it cannot crash on a CUDA error, holds
no GPU memory of its own, and survives every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.errors import AlreadyRunningError, CompanionUnavailableError, RuntimeDirError
from vllm_companion_plugin.holder.service.fd_server import FdServer
from vllm_companion_plugin.holder.service.health import Health
from vllm_companion_plugin.holder.service.service import CompanionService
from vllm_companion_plugin.host import last_word, notes
from vllm_companion_plugin.host.runtime_dir import DevicePaths
from vllm_companion_plugin.wire import schema
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, address

logger = logging.getLogger("vllm.companion.process")

STOP_GRACE_S = 0.3
STOP_LIMIT_S = 1.8
CHECK_INTERVAL_S = 2.0
HANDSHAKE_MS = 10_000
LOOKS, LOOK_S = 10, 0.01
MAX_RPCS = 8192
"""More than all leases, watches and publications that the registry allows, so that it is the registry that refuses."""


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
            pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise AlreadyRunningError(
                f"A companion of {paths.device} runs already (pid {pid if pid.isdecimal() else 'unknown'}); "
                "`vllm-companion stop` ends it."
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

    def leave_last_word(self) -> None:
        """The companion ends on purpose, and nobody shall start another one for that."""
        last_word.leave(self._fd)

    def release(self) -> None:
        os.close(self._root_fd)
        os.close(self._fd)


def _locked_soon(fd: int) -> bool:
    """Take the lock. Several tries, as `doctor`, which looks whether it is taken, holds it for an instant."""
    for _ in range(LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOOK_S)
    return False


async def serve(
    paths: DevicePaths,
    lock: InstanceLock,
    linger_s: float,
    grace_s: float = 0.0,
    on_ready: asyncio.Event | None = None,
    keep_previous: int = 1,
) -> None:
    """Run the companion until a signal, a Shutdown call or the end of its linger time.

    Ends also if somebody removes the runtime directory, with status 1: nobody could reach us any more. Those who
    map our entries hand them to a companion in a new directory.

    Args:
        lock: held by the caller.
        linger_s: seconds to stay while nobody uses anything; negative or infinite: until stopped.
        grace_s: seconds to stay at least, until the first user has come.
        on_ready: set once both sockets answer.
        keep_previous: as of `Registry`.

    Raises:
        CompanionUnavailableError: a socket cannot be made.
    """

    def hide() -> None:
        if lock.is_reachable():  # else the socket there is another companion's
            _remove(paths.grpc_socket)

    service = CompanionService(
        paths.device,
        linger_s,
        dismiss=partial(notes.dismiss, paths),
        roll_back=partial(notes.roll_back, paths),
        clear=partial(notes.clear, paths),
        hide=hide,
        grace_s=grace_s,
        keep_previous=keep_previous,
    )
    for key, generation in notes.held(paths):
        service.registry.expect(key, generation, rolled_back=notes.rolled_back_to(paths, key) == generation)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, _on_signal, number, service)
    fd_server = FdServer(paths.fd_socket, redeem=service.redeem, check_deposit=service.check_deposit, wake=service.wake)
    health = Health(schema.SERVICE)
    server = await _start_grpc(paths, service, health)
    try:
        fd_server.start()
        logger.info(
            "Companion %s of %s (pid %d) is ready at %s.", __version__, paths.device, os.getpid(), paths.grpc_socket
        )
        if on_ready is not None:
            on_ready.set()
        service.registry.open()
        clocks = (partial(_keep_time, service), partial(_stay_reachable, lock, service))
        watches = [loop.create_task(_go_on(clock)) for clock in clocks]
        await service.stop.wait()
        for watch in watches:
            watch.cancel()
    finally:
        # Whatever hangs below, the memory must be freed: the default action of SIGALRM ends us.
        signal.setitimer(signal.ITIMER_REAL, STOP_LIMIT_S)
        health.end()
        if not service.registry.lifetime.replaced:
            lock.leave_last_word()
        service.close()
        if not lock.is_reachable():
            # The usual way out would remove the sockets of a companion that has taken our place.
            os._exit(1)
        await fd_server.close()
        await server.stop(STOP_GRACE_S)
        _remove(paths.grpc_socket)
        signal.setitimer(signal.ITIMER_REAL, 0)
        logger.info("Companion of %s (pid %d) has ended. What engines map stays.", paths.device, os.getpid())


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


async def _go_on(clock: Callable[[], Awaitable[None]]) -> None:
    """Run one of the companion's clocks to its end, again and again if it fails: nobody else may have what is held."""
    while True:
        try:
            return await clock()
        except Exception:
            logger.exception("A regular task of this companion has failed; it will be tried again.")
            await asyncio.sleep(CHECK_INTERVAL_S)


async def _keep_time(service: CompanionService) -> None:
    """Let the registry do what is due, until the companion should end."""
    while not (due := service.registry.advance()).over:
        await service.changed(due.next_s)
    service.stop.set()


async def _stay_reachable(lock: InstanceLock, service: CompanionService) -> None:
    while lock.is_reachable():
        await service.changed(CHECK_INTERVAL_S)
    logger.error(
        "The runtime directory of this companion was removed, so nobody can reach it: ending. Engines that map its "
        "entries hand them to a companion in a new one; what nobody maps is lost."
    )
    service.end(replaced=True)
