"""The runtime directory: sockets, locks and logs of each device, private to one user.

A process that can write here can impersonate a companion. So the directory must be a real directory, belong to
this user, and be closed to others. We never repair it silently: a wrong owner or mode may mean that somebody
else prepared it. No other user may be able to rename the directory or anything above it, so the checked
directory is the one that is used afterwards. Processes of the same user in other containers may write here:
files are opened without following links and without waiting for a pipe.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import tempfile
from dataclasses import dataclass

from vllm_companion_plugin.errors import RuntimeDirError
from vllm_companion_plugin.settings import Settings

_DIGESTS = "digests"
MAX_SOCKET_PATH = 107
"""The size of sockaddr_un.sun_path in bytes, without its NUL (man 7 unix)."""

_UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_DEVICE = re.compile(rf"cpu|(GPU|MIG)-{_UUID}|MIG-GPU-{_UUID}/[0-9]{{1,3}}/[0-9]{{1,3}}")


@dataclass(frozen=True)
class DevicePaths:
    """The files of one device. `directory` exists; the files may not exist."""

    device: str
    directory: str

    def _at(self, name: str) -> str:
        return os.path.join(self.directory, name)

    @property
    def grpc_socket(self) -> str:
        return self._at("companion.sock")

    @property
    def fd_socket(self) -> str:
        return self._at("fd.sock")

    @property
    def companion_lock(self) -> str:
        return self._at("companion.lock")

    @property
    def spawn_lock(self) -> str:
        return self._at("spawn.lock")

    @property
    def loader_lock(self) -> str:
        return self._at("loader.lock")

    @property
    def holders(self) -> str:
        return self._at("holders")

    @property
    def keeper_socket(self) -> str:
        return self._at("keeper.sock")

    @property
    def keeper_lock(self) -> str:
        return self._at("keeper.lock")

    @property
    def keeper_log(self) -> str:
        return self._at("keeper.log")

    @property
    def log(self) -> str:
        return self._at("companion.log")


def check_device(device: str) -> str:
    """Return `device` if it is "cpu" or a GPU or MIG UUID; raise `RuntimeDirError` otherwise."""
    if not _DEVICE.fullmatch(device):
        raise RuntimeDirError(
            f"{device!r} is no device name.",
            remedy="Name 'cpu', GPU-<uuid> or MIG-<uuid>, as `nvidia-smi -L` shows them.",
        )
    return device


def device_paths(device: str, settings: Settings) -> DevicePaths:
    """Return the paths of `device`. Makes and checks its directory.

    Raises:
        RuntimeDirError: the device name is bad, the directory is unsafe or not writable, or its path is too long.
    """
    check_device(device)
    root = _root(settings)
    # MIG-GPU-<uuid>/<gi>/<ci> is one name, not three directories.
    paths = DevicePaths(device, os.path.join(root, device.replace("/", "_")))
    if len(os.fsencode(paths.grpc_socket)) > MAX_SOCKET_PATH:
        raise RuntimeDirError(
            f"The socket path {paths.grpc_socket} has {len(os.fsencode(paths.grpc_socket))} bytes; Linux allows "
            f"{MAX_SOCKET_PATH}.",
            remedy="Set COMPANION_RUNTIME_DIR to something shorter.",
        )
    ensure_private_directory(root)
    ensure_private_directory(paths.directory)
    return paths


def digests_directory(settings: Settings) -> str:
    """Make and check the directory of the digests of checkpoint files; return its path. Raises `RuntimeDirError`."""
    root = _root(settings)
    ensure_private_directory(root)
    ensure_private_directory(os.path.join(root, _DIGESTS))
    return os.path.join(root, _DIGESTS)


def _root(settings: Settings) -> str:
    """Resolve links above the runtime directory. Raises `RuntimeDirError` if another user could replace it."""
    above, name = os.path.split(os.path.abspath(settings.runtime_dir))
    above = os.path.realpath(above)
    path = above
    while True:
        _check_not_replaceable(path)
        if path == os.path.dirname(path):
            return os.path.join(above, name)
        path = os.path.dirname(path)


def _check_not_replaceable(path: str) -> None:
    try:
        info = os.lstat(path)
    except OSError:
        return  # our caller makes it, or reports that it cannot
    # The kernel shows an owner that this container does not know as 65534 (user_namespaces(7)): mostly the host's root.
    if info.st_uid not in (0, os.getuid(), 65534):
        raise RuntimeDirError(
            f"{path}, above the runtime directory, belongs to uid {info.st_uid}, who could replace what is in it.",
            remedy="Set COMPANION_RUNTIME_DIR to a directory elsewhere.",
        )
    # A group with our number is our own. Most distributions follow this custom, and OpenShift gives that group to
    # the volumes of a project as fsGroup.
    others = 0o002 if 0 < os.getuid() == info.st_gid and info.st_uid in (0, os.getuid()) else 0o022
    if info.st_mode & others and not info.st_mode & stat.S_ISVTX:
        raise RuntimeDirError(
            f"{path}, above the runtime directory, has mode {stat.S_IMODE(info.st_mode):04o}, so others could replace "
            "what is in it.",
            remedy="Set COMPANION_RUNTIME_DIR to a directory elsewhere; in a pod, to one of an emptyDir with "
            "`medium: Memory`, which is sticky.",
        )


def ensure_private_directory(path: str) -> None:
    """Make `path` with mode 0700 if it does not exist. Raises `RuntimeDirError` unless the directory is private."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise RuntimeDirError(
            f"Cannot make the runtime directory {path}: {error.strerror}.",
            remedy="Free space there, or set COMPANION_RUNTIME_DIR to a directory that you can write.",
        ) from error
    check_private_directory(path)


def check_private_directory(path: str) -> None:
    """Raise `RuntimeDirError` unless `path` is a real directory of this user with mode 0700, and writable."""
    try:
        info = os.lstat(path)
    except OSError as error:
        raise RuntimeDirError(f"Cannot look at the runtime directory {path}: {error.strerror}.") from error
    if stat.S_ISLNK(info.st_mode):
        raise RuntimeDirError(f"The runtime directory {path} is a symbolic link.", remedy=_instead(path, "rm"))
    if not stat.S_ISDIR(info.st_mode):
        raise RuntimeDirError(f"The runtime directory {path} is not a directory.", remedy=_instead(path, "rm"))
    if info.st_uid != os.getuid():
        raise RuntimeDirError(
            f"The runtime directory {path} belongs to uid {info.st_uid}, not to uid {os.getuid()}.",
            remedy="Set COMPANION_RUNTIME_DIR to another one.",
        )
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        raise RuntimeDirError(
            f"The runtime directory {path} has mode {mode:04o}, so others can reach it.",
            remedy=_instead(path, "chmod 0700"),
        )
    if mode & 0o700 != 0o700:
        raise RuntimeDirError(
            f"The runtime directory {path} has mode {mode:04o}; its owner needs all rights.",
            remedy=_instead(path, "chmod 0700"),
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise RuntimeDirError(
            f"The runtime directory {path} cannot be written (read-only file system?).",
            remedy="Set COMPANION_RUNTIME_DIR to a directory that you can write.",
        )


def _instead(path: str, command: str) -> str:
    """Return the remedy: `command` if only companions use `path`, another runtime directory if others may use it."""
    if _is_made_by_us(path):
        return f"Run: {command} {shlex.quote(path)}"
    return "Set COMPANION_RUNTIME_DIR to a directory for companions alone; a missing directory is created."


def _is_made_by_us(path: str) -> bool:
    """Tell whether only companions can use `path`.

    Everything in a runtime directory is ours. A user named the directory itself, and may have named one that others
    use: a directory that holds anything else, is mounted, is directly below the root or is shared (sticky).
    """
    if _is_our_name(os.path.basename(path)) and _is_all_ours(os.path.dirname(path)):
        return True
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_mode & stat.S_ISVTX:
        return False
    return not os.path.ismount(path) and os.path.dirname(path) != "/" and _is_all_ours(path)


def _is_all_ours(directory: str) -> bool:
    try:
        return all(map(_is_our_name, os.listdir(directory)))
    except OSError:
        return False


def _is_our_name(name: str) -> bool:
    return name == _DIGESTS or bool(_DEVICE.fullmatch(name.replace("_", "/")))


def list_devices(settings: Settings) -> list[str]:
    """Return the devices that have a directory, sorted; none if the runtime directory does not exist yet.

    Raises:
        RuntimeDirError: the runtime directory is not safe.
    """
    root = _root(settings)
    if not os.path.lexists(root):
        return []
    check_private_directory(root)
    names = (entry.name.replace("_", "/") for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    return sorted(name for name in names if _DEVICE.fullmatch(name))


def read_file(path: str, most: int, *, end: bool = False) -> bytes:
    """Return the first, or last, `most` bytes of a file of the runtime directory. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.pread(fd, most, max(0, os.fstat(fd).st_size - most) if end else 0)
    finally:
        os.close(fd)


def replace_file(path: str, text: str) -> None:
    """Write a file of the runtime directory at once: readers see the old text or the new one. Raises `OSError`."""
    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=os.path.basename(path) + ".")
    try:
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
