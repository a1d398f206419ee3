"""Proving that two checkpoints have the same content, with as little reading as possible.

Identities settle most questions without reading. Sizes tell most other files apart, and samples nearly
all that remain, because a fine-tune changes tensors everywhere. Only files that still agree are read
whole, once for each version of a file: its digest is kept under a look at the file (`files.look`), for
as long as such a look proves anything. A file whose looks prove nothing elsewhere has its digest as its
identity, so two containers of one image give the file the same identity.
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
from pathlib import Path

from blake3 import blake3
from filelock import FileLock, Timeout
from vllm.logger import init_logger

from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.host.files import CONTENT, Lasts, file_identity, open_file, whole_digest_of
from vllm_companion_plugin.host.runtime_dir import read_file, replace_file

logger = init_logger("vllm.companion.digest")

_FILES_AT_ONCE = 8
_SAMPLES = 16
_SAMPLE_BYTES = 16 << 10
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_MOST_KEPT = 4096
"""Limit of kept digests: enough for a checkpoint of 200 files on each of 20 mounts."""
# Two writes within one tick of the file system's clock leave a file's identity unchanged.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class File:
    """One version of a file. The file may be gone or replaced by now.

    Attributes:
        identity: `CONTENT` and a digest, or the text of a look.
        lasts: how long that look proves the content.
    """

    path: Path
    identity: str
    lasts: Lasts = Lasts.EVER

    def is_there(self) -> bool:
        try:
            return self.path.is_file() and file_identity(self.path) == self.identity  # reading a pipe would never end
        except (OSError, ValueError):  # ValueError: the text names no file
            return False


class Digests:
    """Digests of file contents by looks at files, kept on disk for all processes of a user.

    Args:
        directory: an existing private directory. Without one, only this object keeps the digests.
        timeout_s: longest wait for another process that computes digests.
    """

    def __init__(self, directory: str | None = None, timeout_s: float = 0.0) -> None:
        self._directory = Path(directory) if directory is not None else None
        self._timeout_s = timeout_s
        self._own: dict[str, str] = {}

    def known(self, identity: str) -> str | None:
        """Return the digest of the file version `identity`, or None if no process has computed it."""
        if identity.startswith(CONTENT):
            text = identity.removeprefix(CONTENT).encode()
            return text.decode() if _DIGEST.fullmatch(text) else None
        if identity in self._own or self._directory is None:
            return self._own.get(identity)
        try:
            text = read_file(str(self._at(identity)), 100)
        except OSError:
            return None
        return text.decode() if _DIGEST.fullmatch(text) else None  # after a crash the file may hold anything

    def of(self, file: File) -> str | None:
        """Return the digest of `file`, reading the file if necessary; None if that version is gone."""
        known = self.known(file.identity)
        if known is not None or not file.is_there():
            return known
        try:
            status = file.path.stat()
            digest = whole_digest_of(file.path)
        except OSError:
            return None
        if not file.is_there():
            return None
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S:
            self._keep(file, digest)
        return digest

    def of_all(self, files: Sequence[File]) -> list[str | None]:
        """Return the digests of `files`; reads several files at once."""
        if all(file.lasts is not Lasts.NOT for file in files):
            known = [self.known(file.identity) for file in files]
            if None not in known:
                return known
        with self.alone(), ThreadPoolExecutor(_FILES_AT_ONCE) as executor:
            return list(executor.map(self.of, files))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Make other processes wait for our digests while open, instead of reading the same files."""
        if self._directory is None:
            yield
            return
        lock = FileLock(self._directory / "lock", thread_local=False)
        with contextlib.suppress(Timeout, OSError):  # on a timeout both processes read
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
        with contextlib.suppress(OSError):  # with a full disk the file is read again later
            replace_file(str(self._at(file.identity)), digest)
            _forget_oldest(self._directory)


def _forget_oldest(directory: Path) -> None:
    """Keep only the newest digests, half of the limit, if too many exist. Each mount of an image brings new ones."""
    names = [entry.path for entry in os.scandir(directory) if len(entry.name) == 64]
    if len(names) > _MOST_KEPT:
        for path in sorted(names, key=os.path.getmtime)[: -_MOST_KEPT // 2]:
            os.unlink(path)


def same_content(mine: EntryKey, held: EntryKey, digests: Digests) -> bool:
    """Prove that the checkpoint of `mine` has the content from which `held` was loaded.

    Returns False also if no proof is possible any more, because the files of `held` were removed or edited since.
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
    """Return False if the two files are known to differ, or if `held` cannot be examined."""
    known = digests.known(mine.identity), digests.known(held.identity)
    if None not in known:
        return known[0] == known[1]
    if not held.is_there():
        return known[1] is not None
    return _sample(mine.path) == _sample(held.path)


def _sample(path: Path) -> tuple[int, bytes]:
    """Return the size and a digest of some evenly spread pieces; `(-1, b"")` if the file cannot be read."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            pieces = (os.pread(file.fileno(), _SAMPLE_BYTES, size * i // _SAMPLES) for i in range(_SAMPLES))
            return size, blake3(b"".join(pieces)).digest()
    except OSError:
        return -1, b""


def digest_of(path: Path) -> str:
    """Return the digest of a small file's content."""
    return blake3(path.read_bytes()).hexdigest()
