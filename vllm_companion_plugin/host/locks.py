"""Finding out whether a file is locked, and by which process, for the messages of processes that wait in vain."""

from __future__ import annotations

import fcntl
import os


def owner_text(path: str) -> str:
    """Name the processes that hold a lock on the file, e.g. "pid 123", as far as the kernel knows them."""
    try:
        status = os.stat(path)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        with open("/proc/locks", encoding="ascii") as file:
            locks = [line.split() for line in file]
    except OSError:
        return "another process"
    # "1: FLOCK ADVISORY WRITE 123 00:2a:456 0 EOF"; a waiting process has an arrow, one of another container no pid
    pids = {lock[4] for lock in locks if lock[1] != "->" and lock[5] == place and int(lock[4]) > 0}
    return " and ".join(f"pid {pid}" for pid in sorted(pids, key=int)) or "another process"


def is_locked(path: str) -> bool:
    """Tell whether some process holds the flock of a file. Raises `OSError` if the file exists and cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
