"""`python -m vllm_companion_plugin.keeper` owns device memory that engines share by CUDA IPC.

A device has one keeper if its memory cannot leave a process as a descriptor. The keeper allocates, exports
and frees memory; it runs no kernel and reads no weights. The first loader starts it (`keeper/client.py`). The
keeper ends by itself once no process uses its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm_companion_plugin.core import logs
from vllm_companion_plugin.core.process import raise_file_limit
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.host.detach import detach, report
from vllm_companion_plugin.host.peer import credentials
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.keeper.client import FAILED, OK, SIZE
from vllm_companion_plugin.memory.kinds import ipc_tag
from vllm_companion_plugin.settings import BY_NAME, resolve

logger = logging.getLogger("vllm.companion.keeper")

LINGER_S = 10.0
"""Seconds that a keeper stays without an allocation. Its context takes memory, and loaders can start another keeper."""

RETRY_S = 0.1
MAX_SILENT = 64
"""Limit of clients that have sent no request yet. Beyond it the keeper disconnects the oldest."""


class Keeper:
    """Answers requests for memory on a listening socket, and frees memory that no process uses any more.

    Args:
        listener: a SOCK_SEQPACKET socket; the keeper owns it from now on.
        allocate: takes a size in bytes, returns address and IPC handle; raises `CompanionError`.
        free: frees the memory at an address from `allocate`.
    """

    def __init__(
        self, listener: socket.socket, allocate: Callable[[int], tuple[int, bytes]], free: Callable[[int], None]
    ) -> None:
        self._allocate = allocate
        self._free = free
        self._listener = listener
        self._used: dict[socket.socket, tuple[int, int]] = {}
        self._silent: dict[socket.socket, None] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._watch(listener, self._accept)

    def run(self, linger_s: float) -> None:
        """Serve until no allocation has existed for `linger_s` seconds. A client's end does not end the keeper."""
        idle_until = time.monotonic() + linger_s
        while self._used or time.monotonic() < idle_until:
            for key, _ in self._selector.select(None if self._used else max(0.0, idle_until - time.monotonic())):
                try:
                    key.data()
                except Exception:
                    logger.exception("A request failed.")
                    time.sleep(RETRY_S)  # a lasting fault must not fill the log
                idle_until = time.monotonic() + linger_s

    def _watch(self, sock: socket.socket, on_readable: Callable[..., None], *arguments: Any) -> None:
        self._selector.register(sock, selectors.EVENT_READ, lambda: on_readable(*arguments))

    def _forget(self, sock: socket.socket) -> None:
        self._silent.pop(sock, None)
        self._selector.unregister(sock)
        sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            if credentials(peer)[1] != os.getuid():
                peer.close()
                return
            if len(self._silent) >= MAX_SILENT:
                self._forget(next(iter(self._silent)))
            self._silent[peer] = None
            peer.setblocking(False)
            self._watch(peer, self._answer, peer)

    def _answer(self, peer: socket.socket) -> None:
        """Answer one request, then close the connection."""
        try:
            request = peer.recv(SIZE.size + 1)
            if len(request) == SIZE.size:
                self._allocate_for(peer, *SIZE.unpack(request))
        finally:
            self._forget(peer)

    def _allocate_for(self, peer: socket.socket, size_bytes: int) -> None:
        try:
            tag_fd = self._new(size_bytes)
        except CompanionError as error:
            peer.send(FAILED + str(error).encode(errors="backslashreplace"))
            return
        try:
            # If the client has gone, its descriptor is closed as well, and the keeper frees the memory.
            socket.send_fds(peer, [OK], [tag_fd])
        finally:
            os.close(tag_fd)

    def _new(self, size_bytes: int) -> int:
        address, handle = self._allocate(size_bytes)
        try:
            end, tag_fd = ipc_tag.make(ipc_tag.Tag(size_bytes, os.getpid(), handle))
        except OSError:
            self._free(address)
            raise
        self._used[end] = address, size_bytes
        self._watch(end, self._end_if_unused, end)
        logger.info("Allocated %.2f GiB.", size_bytes / 2**30)
        return tag_fd

    def _end_if_unused(self, end: socket.socket) -> None:
        try:
            if end.recv(4096):  # no client is expected to write here
                return
        except BlockingIOError:
            return
        except ConnectionResetError:  # how a stream ends with unread data: no client reads the tag
            pass
        address, size_bytes = self._used.pop(end)
        self._forget(end)
        self._free(address)
        logger.info("Freed %.2f GiB.", size_bytes / 2**30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a keeper of `--device`. Returns the exit status: 0 once no process uses its memory, 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m vllm_companion_plugin.keeper", description=__doc__)
    parser.add_argument("--device", required=True, help="GPU or MIG UUID; must be the only visible device")
    parser.add_argument("--runtime-dir", help=BY_NAME["runtime_dir"].help)
    parser.add_argument("--detach", action="store_true", help="run in the background, with init as parent")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write 'ok' or the error to")
    parsed = parser.parse_args(arguments)
    try:
        settings = resolve({"runtime_dir": parsed.runtime_dir})
        paths = device_paths(parsed.device, settings)
        if parsed.detach:
            detach(paths.keeper_log)
        logs.configure("INFO", settings.log_format, paths.device, bounded=parsed.detach)
        _keep(paths, parsed.ready_fd)
    except (CompanionError, ImportError, OSError) as error:
        logs.fatal(error)
        return 1
    return 0


def _keep(paths: DevicePaths, ready_fd: int | None) -> None:
    try:
        listener = _listen(paths)
    except (CompanionError, ImportError, OSError) as error:
        report(ready_fd, f"failed {error}")
        raise
    ours = os.stat(paths.keeper_socket)
    report(ready_fd, "ok")
    from vllm_companion_plugin.memory.kinds import cuda_ipc

    try:
        Keeper(listener, cuda_ipc.allocate, cuda_ipc.free).run(LINGER_S)
    finally:
        # Unlink before closing: a client that finds no listener starts another keeper, and its socket must stay.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(paths.keeper_socket), ours):
                os.unlink(paths.keeper_socket)
        listener.close()


def _listen(paths: DevicePaths) -> socket.socket:
    """Return the listening socket. Makes a context on the device first."""
    from vllm_companion_plugin.memory.cuda_driver import primary_context

    raise_file_limit()  # a descriptor stays open for every allocation
    primary_context(0)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The process that starts us holds the lock, and has found that no process listens here.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(paths.keeper_socket)
    listener.bind(paths.keeper_socket)
    listener.listen(64)
    return listener
