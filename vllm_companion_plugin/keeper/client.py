"""Asking a device's keeper for memory, and starting a keeper if none runs."""

from __future__ import annotations

import os
import socket
import struct

from vllm_companion_plugin.errors import ArenaError
from vllm_companion_plugin.host import peer
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.host.spawn import child_environment, log_end, start_detached, starting, why_not
from vllm_companion_plugin.memory.descriptors import Descriptors, receive
from vllm_companion_plugin.settings import Settings

SIZE = struct.Struct("!Q")
OK, FAILED = b"O", b"F"
ANSWER_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 4096


def allocate(device: str, size_bytes: int, settings: Settings) -> Descriptors:
    """Return a descriptor that keeps `size_bytes` of memory of `device` until its last copy is closed.

    The caller owns the descriptor.

    Raises:
        ArenaError: the device has too little memory, or no keeper could be started; the text says why.
        RuntimeDirError: the runtime directory is unsafe or not writable.
    """
    paths = device_paths(device, settings)
    if (fds := _ask(paths, size_bytes)) is not None:
        return fds
    with starting(paths.keeper_lock, f"the keeper of {device}", paths.keeper_log, settings, ArenaError) as deadline:
        if (fds := _ask(paths, size_bytes)) is None:
            _start(paths, settings, deadline)
            fds = _ask(paths, size_bytes)
    if fds is None:
        raise ArenaError(f"The keeper of {device} ended at once. {log_end(paths.keeper_log)}")
    return fds


def keeper_pid(paths: DevicePaths) -> int:
    """Return the pid of the keeper that listens there; 0 if no keeper listens, or if it is in another container."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(1)
        try:
            sock.connect(paths.keeper_socket)
            return peer.credentials(sock)[0]
        except OSError:
            return 0


def _ask(paths: DevicePaths, size_bytes: int) -> Descriptors | None:
    """Return a descriptor from the keeper; None if no keeper runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            peer.connect(sock, paths.keeper_socket, ANSWER_TIMEOUT_S)
            sock.settimeout(ANSWER_TIMEOUT_S)
            peer.check_listener(sock, paths.keeper_socket)
            sock.send(SIZE.pack(size_bytes))
            answer, fds, _ = receive(sock, _MAX_ANSWER_BYTES, 1)
        except (FileNotFoundError, ConnectionError):
            return None
        except OSError as error:  # a timeout is one, too
            raise ArenaError(
                f"The keeper of {paths.device} does not answer: {error}. Log: {paths.keeper_log}"
            ) from error
    if answer == OK and len(fds) == 1:
        return fds
    fds.close()
    if answer[:1] == FAILED:
        raise ArenaError(f"The keeper of {paths.device}: {answer[1:].decode(errors='replace')}")
    return None  # the keeper ended before it answered


def _start(paths: DevicePaths, settings: Settings, deadline: float) -> None:
    environment = child_environment(settings, imports=("cuda.bindings",))
    environment |= {name: value for name, value in os.environ.items() if name.startswith("CUDA_MPS_")}
    environment["CUDA_VISIBLE_DEVICES"] = paths.device
    arguments = ["vllm_companion_plugin.keeper", "--device", paths.device]
    try:
        answer = start_detached(arguments, environment, paths.keeper_log, deadline)
    except OSError as error:
        raise ArenaError(f"Cannot start a keeper of {paths.device}: {error}.") from error
    if answer != "ok":
        raise ArenaError(
            f"The keeper of {paths.device} could not be started: {why_not(answer)}\n{log_end(paths.keeper_log)}"
        )
