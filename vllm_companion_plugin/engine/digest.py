"""Whether two checkpoints have the same content, proved with as little reading as it takes.

Identities settle most questions without reading. Then sizes tell most files apart, and samples
nearly all others: a fine-tune changes tensors everywhere. Only what still agrees is read whole,
once for each version of a file: its digest is kept under the file's identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3
from filelock import FileLock, Timeout
from vllm.logger import init_logger

from vllm_companion_plugin.engine.checkpoint import file_identity
from vllm_companion_plugin.launch.runtime_dir import read_file, replace_file
from vllm_companion_plugin.types import EntryKey

logger = init_logger("vllm.companion.digest")

_FILES_AT_ONCE = 8
_READ_BYTES = 16 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 16 << 10
_DIGEST = re.compile(rb"[0-9a-f]{64}")
# A file may be written twice within one tick of its file system's clock, and keep its identity.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class _File:
    """One version of a file, which may be gone or replaced by now."""

    path: Path
    identity: str

    def is_there(self) -> bool:
        try:
            return self.path.is_file() and file_identity(self.path) == self.identity  # a pipe would never end
        except (OSError, ValueError):  # ValueError: no name of a file
            return False


class Digests:
    """Digests of file contents by file identity, on disk, for all processes of a user.

    Args:
        directory: exists and is private.
        timeout_s: longest wait for another process that computes digests.
    """

    def __init__(self, directory: str, timeout_s: float) -> None:
        self._directory = Path(directory)
        self._timeout_s = timeout_s

    def known(self, identity: str) -> str | None:
        """The digest of the file version `identity`, if somebody has computed it."""
        try:
            text = read_file(str(self._at(identity)), 100)
        except OSError:
            return None
        return text.decode() if _DIGEST.fullmatch(text) else None  # a crash may leave anything

    def of(self, file: _File) -> str | None:
        """The digest of `file`, read if need be; None if that version of it is gone."""
        known = self.known(file.identity)
        if known is not None or not file.is_there():
            return known
        try:
            status = file.path.stat()
            digest = _read(file.path)
        except OSError:
            return None
        if not file.is_there():
            return None
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S:
            self._keep(file.identity, digest)
        return digest

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, other processes wait for our digests instead of reading the same files."""
        lock = FileLock(self._directory / "lock", thread_local=False)
        with contextlib.suppress(Timeout, OSError):  # then both read
            lock.acquire(timeout=self._timeout_s)
        try:
            yield
        finally:
            lock.release()

    def _at(self, identity: str) -> Path:
        return self._directory / hashlib.sha256(identity.encode()).hexdigest()

    def _keep(self, identity: str, digest: str) -> None:
        with contextlib.suppress(OSError):  # a full disk costs another reading
            replace_file(str(self._at(identity)), digest)


def same_content(mine: EntryKey, held: EntryKey, digests: Digests) -> bool:
    """Whether the checkpoint of `mine` is proved to have the content that `held` was loaded from.

    False as well where it cannot be known any more: the other files were removed or edited since.
    """
    if mine.files.keys() != held.files.keys() or not mine.files:
        return False
    names = [name for name in mine.files if mine.files[name] != held.files[name]]
    pairs = [(_file(mine, name), _file(held, name)) for name in names]
    if not all(_may_be_equal(one, other, digests) for one, other in pairs):
        return False
    if not pairs:
        return True
    logger.info("Comparing %d files of %s with those of %s", len(pairs), mine.source, held.source)
    with digests.alone(), ThreadPoolExecutor(_FILES_AT_ONCE) as executor:
        ours = list(executor.map(digests.of, (one for one, _ in pairs)))
        theirs = list(executor.map(digests.of, (other for _, other in pairs)))
    return None not in ours and ours == theirs


def _file(key: EntryKey, name: str) -> _File:
    source = Path(key.source)
    return _File((source.parent if os.path.isfile(source) else source) / name, key.files[name])


def _may_be_equal(mine: _File, held: _File, digests: Digests) -> bool:
    """False if the two are known to differ, or nothing can be known about `held`."""
    known = digests.known(mine.identity), digests.known(held.identity)
    if None not in known:
        return known[0] == known[1]
    if not held.is_there():
        return known[1] is not None
    return _sample(mine.path) == _sample(held.path)


def _open(path: Path) -> FileIO:
    """For reading, without waiting if it is a pipe: others named the path."""
    return FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _sample(path: Path) -> tuple[int, bytes]:
    """Size and digest of some evenly spread pieces; `(-1, b"")` if it cannot be read."""
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            pieces = (os.pread(file.fileno(), _SAMPLE_BYTES, size * i // _SAMPLES) for i in range(_SAMPLES))
            return size, blake3(b"".join(pieces)).digest()
    except OSError:
        return -1, b""


def _read(path: Path) -> str:
    """Digest of a whole file, on all cores."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_READ_BYTES))
    with _open(path) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()
