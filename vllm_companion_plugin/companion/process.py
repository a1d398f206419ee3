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
import resource
import signal
import time

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from vllm_companion_plugin import __version__
from vllm_companion_plugin.companion.fd_server import FdServer
from vllm_companion_plugin.companion.service import CompanionService
from vllm_companion_plugin.errors import AlreadyRunningError, CompanionUnavailableError
from vllm_companion_plugin.launch.runtime_dir import DevicePaths
from vllm_companion_plugin.protocol import schema
from vllm_companion_plugin.protocol.rpc import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

STOP_GRACE_S = 0.3
STOP_LIMIT_S = 1.8


class InstanceLock:
    """flock on companion.lock: held for the life of the process, freed by the kernel."""

    def __init__(self, paths: DevicePaths) -> None:
        """Raises `AlreadyRunningError` naming the pid that holds it."""
        self._fd = os.open(paths.companion_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunningError(
                f"A companion of {paths.device} runs already (pid {pid}); `vllm-companion stop` ends it."
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)


def raise_file_limit() -> None:
    """Soft limit of open files up to the hard one: a descriptor stays open for every block."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(paths: DevicePaths, linger_s: float, on_ready: asyncio.Event | None = None) -> None:
    """Run the companion until a signal, a Shutdown call or the end of its linger time.

    Args:
        linger_s: seconds to stay with nobody attached; negative or infinite: until stopped.
        on_ready: set once both sockets answer.

    Raises:
        CompanionUnavailableError: a socket cannot be made.
    """
    service = CompanionService(paths.device, linger_s if math.isfinite(linger_s) else -1.0)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, service)
    fd_server = FdServer(paths.fd_socket, redeem=service.redeem, check_deposit=service.check_deposit)
    server = await _start_grpc(paths, service)
    try:
        fd_server.start()
        logger.info(
            "Companion %s of %s (pid %d) is ready at %s.", __version__, paths.device, os.getpid(), paths.grpc_socket
        )
        if on_ready is not None:
            on_ready.set()
        lingering = loop.create_task(_linger(service))
        await service.stop.wait()
        lingering.cancel()
    finally:
        # Whatever hangs below, the memory must be freed: the default action of SIGALRM ends us.
        signal.setitimer(signal.ITIMER_REAL, STOP_LIMIT_S)
        service.close()
        await fd_server.close()
        await server.stop(STOP_GRACE_S)
        _remove(paths.grpc_socket)
        signal.setitimer(signal.ITIMER_REAL, 0)
        logger.info("Companion of %s (pid %d) has ended; its memory is free.", paths.device, os.getpid())


async def _start_grpc(paths: DevicePaths, service: CompanionService) -> grpc.aio.Server:
    # We hold the lock, so a socket file is left over from a killed companion.
    _remove(paths.grpc_socket)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers((schema.handlers(service),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", schema.SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        server.add_insecure_port(f"unix:{paths.grpc_socket}")
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


async def _linger(service: CompanionService) -> None:
    """Stop the service once nobody has been attached for its linger time."""
    if service.linger_s < 0:
        return
    while True:
        idle_since = service.registry.idle_since
        if idle_since is None:
            service.exits_at_unix_s = 0.0
            await service.changed()
            continue
        left = idle_since + service.linger_s - time.monotonic()
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
