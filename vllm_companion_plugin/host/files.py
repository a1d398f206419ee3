"""What a look at a file proves without reading the file, and for how long.

If the kernel itself sets and keeps the time of change, then inode, size and times tell one version of a file from all
others, and a look proves the content for ever. Other file systems prove less. Image tools write any times
(`mksquashfs -all-time 0`), and the next image gets the same device number. FUSE, 9p, virtiofs and network shares show
what their server says. An overlay is another device in each container. On these a look proves the content within one
mount at most, and a digest identifies the content. The kernel numbers mounts uniquely for a boot
(`STATX_MNT_ID_UNIQUE`, Linux 6.8).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import struct
from dataclasses import dataclass
from enum import Enum
from functools import cache
from io import FileIO
from pathlib import Path

_NFS = 0x6969
# File systems by magic number (linux/magic.h). These set a true time of change.
_TRUE_TIMES = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    _NFS: "nfs",
}
# Nothing in these file systems changes while they are mounted.
_IMAGES = {0x73717368: "squashfs", 0xE0F5E1E2: "erofs", 0x9660: "iso9660", 0x28CD3D45: "cramfs", 0x7275: "romfs"}
_OTHERS = {
    0x794C7630: "overlay",
    0x65735546: "FUSE or virtiofs",
    0x01021997: "9p",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
}
# Earlier times of change are not true: 0, 1, 1980 (the first year of FAT and zip), and times near these.
_EARLIEST_NS = 631152000 * 10**9  # 1990
_SECOND_NS = 10**9
_READ_BYTES = 16 << 20
CONTENT = "blake3 "
"""Prefix of an identity that is the digest of the content."""
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_MNT_ID_AT = 144
_AT_FDCWD = -100


class Lasts(Enum):
    """How long an equal look means equal content."""

    EVER = "ever"
    MOUNT = "while it is mounted"
    # ENGINE is for mounts without unique numbers: no user mounts another image while one engine starts.
    ENGINE = "while the processes of an engine live"
    LOAD = "while a model is loaded"
    NOT = "not at all"


@dataclass(frozen=True)
class Look:
    """One look at a file: `text` is equal for equal looks."""

    text: str
    lasts: Lasts
    file_system: str


def look(path: str | os.PathLike[str]) -> Look:
    """Look at device, inode, size and times of the file itself, with links resolved. Raises OSError.

    A blob of the hub cache has its content's hash as its name. The look does not rely on the name, because a process
    can write to a blob as to any other file.
    """
    magic, number = _file_system(path)
    status = _revalidated(path) if magic == _NFS else os.stat(path)
    kind = _TRUE_TIMES.get(magic) or _IMAGES.get(magic) or _OTHERS.get(magic) or f"a file system 0x{magic:x}"
    text = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    # Tools such as mke2fs write whole seconds. A kernel that writes whole seconds has coarse times, which prove less.
    whole = status.st_ctime_ns % _SECOND_NS == 0
    if magic in _TRUE_TIMES and not whole:
        return Look(f"stat {number:x}:{text}", Lasts.EVER, kind)
    if magic not in _IMAGES and (status.st_ctime_ns < _EARLIEST_NS or (whole and _all_alike(path, status))):
        return Look(f"look {text}", Lasts.NOT, kind)
    mount = _mount(path)
    if mount is not None:
        return Look(f"mount {_boot()}:{mount}:{text}", Lasts.MOUNT, kind)
    engine = _engine()
    if engine is not None:
        return Look(f"engine {_boot()}:{engine}:{text}", Lasts.ENGINE, kind)
    return Look(f"look {text}", Lasts.LOAD, kind)


def file_identity(path: Path) -> str:
    """Return the text of a look at `path`."""
    return look(path).text


def is_version(path: Path, identity: str) -> bool:
    """Whether the file has the content that `identity` says: the text of a look, or `CONTENT` and a digest."""
    try:
        if identity.startswith(CONTENT):
            return CONTENT + whole_digest_of(path) == identity
        return file_identity(path) == identity
    except OSError:
        return False


def whole_digest_of(path: Path) -> str:
    """Return the digest of a large file's content, computed on all cores."""
    from blake3 import blake3  # of vLLM: whoever compares looks alone need not have it

    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_READ_BYTES))
    with open_file(path) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def open_file(path: Path) -> FileIO:
    """Open a file for reading. Does not wait on a pipe, because another process chose the path."""
    return FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _all_alike(path: str | os.PathLike[str], status: os.stat_result) -> bool:
    """Tell whether the directory has the same time of change. If so, a tool set one time for all files."""
    return os.stat(os.path.dirname(os.path.realpath(path))).st_ctime_ns == status.st_ctime_ns


def _revalidated(path: str | os.PathLike[str]) -> os.stat_result:
    """Open the file before looking, because only then the NFS client asks its server instead of its cache."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _file_system(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return magic number and id of the file system of `path`; Python's statvfs gives only the id."""
    buffer = ctypes.create_string_buffer(256)
    if _libc().statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(path))
    magic = struct.unpack_from("@l", buffer)[0] & 0xFFFFFFFF
    return magic, struct.unpack_from("@Q", buffer, 7 * struct.calcsize("@l"))[0]


def _mount(path: str | os.PathLike[str]) -> int | None:
    """Return the number of the mount of `path`, unique in this boot; None if the kernel has no such numbers."""
    statx = getattr(_libc(), "statx", None)
    buffer = ctypes.create_string_buffer(512)
    if statx is None or statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_MNT_ID_UNIQUE, buffer) != 0:
        return None
    mask = struct.unpack_from("=I", buffer)[0]
    return int(struct.unpack_from("=Q", buffer, _STATX_MNT_ID_AT)[0]) if mask & _STATX_MNT_ID_UNIQUE else None


@cache
def _engine() -> str | None:
    """Return a name, unique in this boot, of the process that started the workers of all ranks."""
    parent = multiprocessing.parent_process()
    try:
        status = Path(f"/proc/{parent.pid}/stat").read_text() if parent is not None else ""
        return f"{parent.pid}-{status.rpartition(')')[2].split()[19]}" if parent is not None else None
    except (OSError, IndexError):
        return None


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {os.getpid()}"
