"""Notes of the entries that processes still map, whatever happened to the companion of these entries.

A process that keeps an entry's descriptors holds a shared lock (flock) on a file of that entry. The
kernel frees the lock when the process ends, in whatever container it ran. A companion that starts and
finds such a lock waits until the process hands the entry back, and lets no engine load the entry again meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import GENERATIONS
from vllm_companion_plugin.errors import RuntimeDirError
from vllm_companion_plugin.host.locks import owner_text
from vllm_companion_plugin.host.runtime_dir import DevicePaths, ensure_private_directory

LOCK_TIMEOUT_S = 10.0
LOOK_S = 0.01
"""For longer than that nobody locks a file who only looks whether it is held."""
_MAX_BYTES = 4 << 20
_DIGITS = len(str(GENERATIONS.stop))
_ROLLED_BACK = ".current"
_DISMISSED = b"-"
"""The first byte of a dismissed file, instead of JSON. An unlinked file may merely mean a cleaned directory."""


def hold(paths: DevicePaths, key: EntryKey, generation: int) -> int:
    """Note that this process holds an entry. Returns a descriptor; the caller owns it and closes it to remove the note.

    Raises:
        RuntimeDirError: the file cannot be made.
    """
    fd = -1
    try:
        ensure_private_directory(paths.holders)
        path = _path(paths, key, generation)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            _lock(path, fcntl.flock, fd, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):  # `held` may have removed the file before we locked it
                if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                    break
            os.close(fd)
            fd = -1
        _lock(path, fcntl.lockf, fd, fcntl.LOCK_EX)  # independent of the flock: the first process writes
        if os.fstat(fd).st_size == 0:
            os.pwrite(fd, json.dumps(dataclasses.asdict(key)).encode(), 0)
        fcntl.lockf(fd, fcntl.LOCK_UN)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise RuntimeDirError(f"Cannot note in {paths.holders} what this process holds: {error.strerror}.") from error
    return fd


def dismiss(paths: DevicePaths, key: EntryKey, generation: int) -> None:
    """Tell all holders not to hand this entry back: a user unloaded the entry or stopped its companion."""
    path = _path(paths, key, generation)
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(fd, _DISMISSED, 0)
        finally:
            os.close(fd)
            os.unlink(path)


def clear(paths: DevicePaths, key: EntryKey, generation: int) -> None:
    """Remove the note of a generation that nobody is to hand back any more, unless a process still holds it."""
    path = _path(paths, key, generation)
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                os.unlink(path)
        finally:
            os.close(fd)


def roll_back(paths: DevicePaths, key: EntryKey, generation: int) -> None:
    """Tell the next companion that this generation is current, though processes may hold newer ones.

    Args:
        generation: 0: the newest one is.
    """
    path = _rolled_back_path(paths, key)
    if not generation:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    ensure_private_directory(paths.holders)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(fd, str(generation).encode(), 0)
    finally:
        os.close(fd)


def rolled_back_to(paths: DevicePaths, key: EntryKey) -> int:
    """Return what `roll_back` said of an entry; 0 if it said nothing, or another program wrote the file."""
    try:
        fd = os.open(_rolled_back_path(paths, key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        return _number(os.pread(fd, _DIGITS, 0).decode("ascii", "replace"))
    except OSError:
        return 0
    finally:
        os.close(fd)


def is_dismissed(fd: int) -> bool:
    """Tell whether `dismiss` cancelled the note behind a descriptor of `hold`."""
    return os.pread(fd, 1, 0) == _DISMISSED


def is_removed(fd: int) -> bool:
    """Tell whether the file behind a descriptor of `hold` was removed, so that no companion finds the note."""
    return os.fstat(fd).st_nlink == 0


def held(paths: DevicePaths) -> Iterator[tuple[EntryKey, int]]:
    """Yield the keys and generations that processes hold now. Removes the files of all others."""
    with contextlib.suppress(FileNotFoundError):
        if any(_taken(file) for file in _files(paths) if not file.name.endswith(_ROLLED_BACK)):
            time.sleep(LOOK_S)
        found: set[str] = set()
        files = _files(paths)
        for file in files:
            if not file.name.endswith(_ROLLED_BACK) and (note := _taken(file)) is not None:
                key, generation = note
                if key is not None and generation and file.path == _path(paths, key, generation):
                    found.add(key.id)
                    yield key, generation
        for file in files:
            if file.name.endswith(_ROLLED_BACK) and file.name.removesuffix(_ROLLED_BACK) not in found:
                os.unlink(file.path)


def _files(paths: DevicePaths) -> list[os.DirEntry[str]]:
    files = sorted(os.scandir(paths.holders), key=lambda file: file.name)
    return [file for file in files if file.is_file(follow_symlinks=False)]


def _taken(file: os.DirEntry[str]) -> tuple[EntryKey | None, int] | None:
    """What a file says that somebody has locked, to hold the entry or to look; a file that nobody has is removed."""
    with contextlib.suppress(FileNotFoundError):  # somebody else has removed it meanwhile
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(file.path, follow_symlinks=False), os.fstat(fd)):  # else it is another's by now
                os.unlink(file.path)
        except BlockingIOError:
            return _key(fd), _number(file.name.rpartition(".")[2])
        finally:
            os.close(fd)
    return None


def is_held(paths: DevicePaths, key_id: str) -> bool:
    """Tell whether a process holds a generation of the entry with this key now. Changes nothing."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(paths.holders):
            if not entry.name.startswith(f"{key_id}.") or entry.name.endswith(_ROLLED_BACK):
                continue
            with contextlib.suppress(OSError):  # it was removed meanwhile
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                finally:
                    os.close(fd)
    return False


def _number(text: str) -> int:
    """Return the generation that a text names; 0 if it names none."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else 0
    return number if number in GENERATIONS else 0


def _key(fd: int) -> EntryKey | None:
    """Read the key in a holder's file; None if the holder has not written it yet, or another program wrote the file."""
    try:
        key = EntryKey(**json.loads(os.pread(fd, _MAX_BYTES, 0)))
    except (ValueError, TypeError, RecursionError):
        return None
    return None if key.problem() else key


def _lock(path: str, lock: Callable[[int, int], object], fd: int, kind: int) -> None:
    """Take a lock that others hold for a moment only. Raises `OSError` if a stopped process keeps it."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            lock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                why = f"{owner_text(path)} has kept {path} locked for {LOCK_TIMEOUT_S:g} s"
                raise OSError(errno.ETIMEDOUT, why) from None
            time.sleep(0.005)


def _path(paths: DevicePaths, key: EntryKey, generation: int) -> str:
    return os.path.join(paths.holders, f"{key.id}.{generation}")


def _rolled_back_path(paths: DevicePaths, key: EntryKey) -> str:
    return os.path.join(paths.holders, f"{key.id}{_ROLLED_BACK}")
