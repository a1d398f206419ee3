"""Whether two checkpoints have the same content, proved with as little reading as it takes.

Identities settle most questions without reading. Then sizes tell most files apart, and samples
nearly all others: a fine-tune changes tensors everywhere. Only what still agrees is read whole,
once for each version of a file: its digest is kept under a look at the file (`files.look`), for as
long as such a look can be believed. A file whose looks are not believed elsewhere has its digest as
its identity: two containers of one image name it alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3
from filelock import FileLock, Timeout
from vllm.logger import init_logger

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine.identity.files import Lasts, file_identity
from vllm_companion_plugin.host.runtime_dir import read_file, replace_file

logger = init_logger("vllm.companion.digest")

_FILES_AT_ONCE = 8
_READ_BYTES = 16 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 16 << 10
_DIGEST = re.compile(rb"[0-9a-f]{64}")
CONTENT = "blake3 "
"""Begins an identity that is the content's digest."""
_MOST_KEPT = 4096
"""A checkpoint of 200 files for each of 20 mounts."""
# A file may be written twice within one tick of its file system's clock, and keep its identity.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class File:
    """One version of a file, which may be gone or replaced by now.

    Attributes:
        identity: `CONTENT` and a digest, or the text of a look.
        lasts: how long that look is believed.
    """

    path: Path
    identity: str
    lasts: Lasts = Lasts.EVER

    def is_there(self) -> bool:
        try:
            return self.path.is_file() and file_identity(self.path) == self.identity  # a pipe would never end
        except (OSError, ValueError):  # ValueError: no name of a file
            return False


class Digests:
    """Digests of file contents by looks at files, on disk, for all processes of a user.

    Args:
        directory: exists and is private; without one, digests are kept by this object alone.
        timeout_s: longest wait for another process that computes digests.
    """

    def __init__(self, directory: str | None = None, timeout_s: float = 0.0) -> None:
        self._directory = Path(directory) if directory is not None else None
        self._timeout_s = timeout_s
        self._own: dict[str, str] = {}

    def known(self, identity: str) -> str | None:
        """The digest of the file version `identity`, if somebody has computed it."""
        if identity.startswith(CONTENT):
            text = identity.removeprefix(CONTENT).encode()
            return text.decode() if _DIGEST.fullmatch(text) else None
        if identity in self._own or self._directory is None:
            return self._own.get(identity)
        try:
            text = read_file(str(self._at(identity)), 100)
        except OSError:
            return None
        return text.decode() if _DIGEST.fullmatch(text) else None  # a crash may leave anything

    def of(self, file: File) -> str | None:
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
            self._keep(file, digest)
        return digest

    def of_all(self, files: Sequence[File]) -> list[str | None]:
        """The digests of `files`, several at once."""
        if all(file.lasts is not Lasts.NOT for file in files):
            known = [self.known(file.identity) for file in files]
            if None not in known:
                return known
        with self.alone(), ThreadPoolExecutor(_FILES_AT_ONCE) as executor:
            return list(executor.map(self.of, files))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, other processes wait for our digests instead of reading the same files."""
        if self._directory is None:
            yield
            return
        lock = FileLock(self._directory / "lock", thread_local=False)
        with contextlib.suppress(Timeout, OSError):  # then both read
            lock.acquire(timeout=self._timeout_s)
        try:
            yield
        finally:
            lock.release()

    def _at(self, identity: str) -> Path:
        assert self._directory is not None
        return self._directory / hashlib.sha256(identity.encode()).hexdigest()

    def _keep(self, file: File, digest: str) -> None:
        if file.lasts is Lasts.NOT:
            return
        self._own[file.identity] = digest
        if self._directory is None or file.lasts is Lasts.LOAD:
            return
        with contextlib.suppress(OSError):  # a full disk costs another reading
            replace_file(str(self._at(file.identity)), digest)
            _forget_oldest(self._directory)


def _forget_oldest(directory: Path) -> None:
    """Leave half of the digests if there are too many. A new mount of an image brings new ones."""
    names = [entry.path for entry in os.scandir(directory) if len(entry.name) == 64]
    if len(names) > _MOST_KEPT:
        for path in sorted(names, key=os.path.getmtime)[: -_MOST_KEPT // 2]:
            os.unlink(path)


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
    both = digests.of_all([file for pair in pairs for file in pair])
    ours, theirs = both[::2], both[1::2]
    return None not in ours and ours == theirs


def _file(key: EntryKey, name: str) -> File:
    source = Path(key.source)
    return File((source.parent if os.path.isfile(source) else source) / name, key.files[name])


def _may_be_equal(mine: File, held: File, digests: Digests) -> bool:
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


def digest_of(path: Path) -> str:
    """Digest of a small file's content."""
    return blake3(path.read_bytes()).hexdigest()


def _read(path: Path) -> str:
    """Digest of a whole file, on all cores."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_READ_BYTES))
    with _open(path) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()
