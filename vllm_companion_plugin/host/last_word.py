"""What a companion that ends on purpose leaves in its lock file, for a `serve` that does not hear its last words.

A stream can break before they arrive. To whoever owns the companion, that would look like its death, and a companion
that a user has just stopped would be followed by another one.
"""

from __future__ import annotations

import contextlib
import os

from vllm_companion_plugin.host.runtime_dir import DevicePaths, read_file

_ENDED = b"-"
"""Instead of a pid, which stays there after a death. An empty file is one of a companion that has just begun."""


def leave(lock_fd: int) -> None:
    """Say in the lock file behind this descriptor that its companion ends on purpose. Never fails."""
    with contextlib.suppress(OSError):  # whoever hears the words themselves knows
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, _ENDED + b"\n", 0)


def was_left(paths: DevicePaths) -> bool:
    """Whether the last companion of a device has ended on purpose, and none has begun since."""
    with contextlib.suppress(OSError):
        return read_file(paths.companion_lock, len(_ENDED)) == _ENDED
    return False
