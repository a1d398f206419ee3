"""Observing which files a process opens in Python, and which variables it sets, while it builds and loads a model.

Decisions before loading use the file names that are known at that time (`checkpoint`). Model code may read more files.
So the loader notes each file that was opened and is none of these weights, with its content, and an attaching engine
compares them (`differences`). Caches and code elsewhere count only if code outside vLLM reads them (`openers`). Modules
that the model's code imports meanwhile are files, too.

The interpreter does not see files that Rust or C++ open (safetensors, tokenizers, sentencepiece). `checkpoint` knows
the weights, tokenizers count with the files beside them that Python opens, and a folder that code outside vLLM lists
counts with the weights in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from vllm_companion_plugin.core.text import sendable
from vllm_companion_plugin.engine.identity import openers, outside, places
from vllm_companion_plugin.engine.identity.checkpoint import WEIGHT_SUFFIXES
from vllm_companion_plugin.engine.identity.digest import digest_of
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host.files import Lasts, look, whole_digest_of

LARGEST_BYTES = 16 << 20
"""Limit of a small file, in bytes. If a larger one below the checkpoint holds weights, `checkpoint` knows that file."""

_HUB = "hub:"
"""Prefix of the name of a file in the hub's cache, wherever that cache is."""
ABSENT = "absent"
"""Identity of a file that was asked for and was not there: it would have been read."""
_PACKAGE = "package:"
"""Prefix of the name of a file in a package that is no part of vLLM, wherever that package is."""
_ESCAPED = "bytes:"
"""Prefix of a name in which some bytes are escaped by `%`, because they are no UTF-8."""
_CWD = "cwd:"
_HOME = "home:"
"""Prefixes of a file's second name: code may have found it by the working directory, or by the user's home."""
_SHORT = 16
# A tokenizer's own files. Rust or C++ reads the others once Python has opened the first.
_TOKENIZER_SEEN = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
_CODE = (".py", ".pyc", ".pyi", ".so", ".pxd", ".h", ".cu", ".cuh", ".cpp", ".ptx", ".cubin")
_RECORDS = (".dist-info/", ".egg-info/")
_EVENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.mkdir", "import", "os.putenv", "os.unsetenv")
# What these open, a library of C opens: which Python only says in its own words.
_OPENED_BY_LIBRARIES = {"sqlite3.connect": os.O_RDWR, "ctypes.dlopen": os.O_RDONLY}
_HEARD = frozenset({*_EVENTS, *_OPENED_BY_LIBRARIES})
_active: list[Reading] = []
_adding = threading.Lock()
_hearing: set[int] = set()
"""Threads that are in the hook. What it does itself is not heard."""
_installed = False


class Reading:
    """The files that a process opened during an observation."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = _directory_of(checkpoint)
        self._places = _places()  # a model's code may change the working directory
        self._read: set[str] = set()
        self._versions: dict[str, list[_Version | None]] = {}
        self._began_ns = time.time_ns()
        self._written: set[str] = set()
        self._read_to_write: set[str] = set()
        self._read_outside: set[str] = set()
        self._listed: set[str] = set()
        self._modules = set(sys.modules)
        self.variables: set[str] = set()
        """Those of the environment that code outside vLLM set or removed."""

    def note(self, path: str, flags: int, is_outside: bool) -> None:
        """Note an opened file. The interpreter calls this, in any thread.

        Args:
            is_outside: code outside vLLM opens the file.
        """
        may_write = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_ACCMODE == os.O_RDWR and not flags & (os.O_CREAT | os.O_TRUNC):
            self._read_to_write.add(path)  # as `numpy.memmap` opens what it is to read
            may_write = False
        if not may_write:
            self._read.add(path)
            seen, version = self._versions.setdefault(path, []), _version(path)
            if version not in seen[-1:]:
                seen.append(version)
        else:
            self._written.add(path)
        if is_outside:
            self._read_outside.add(path)

    def note_made(self, path: str) -> None:
        """Note a folder that the process made, a name that it gave to something, or what a compiler loads of its own.

        Called as `note` is.
        """
        self._written.add(path)

    def note_listed(self, folder: str) -> None:
        """Note a folder that code outside vLLM lists. The interpreter calls this, in any thread."""
        self._listed.add(folder)

    def files(self) -> dict[str, str]:
        """Return the identities of the files that were read and not written, by name.

        A name is a path below the checkpoint; `hub:` and a path below the hub's cache; `package:` and a path below a
        package; or an absolute path. The name of a folder that was listed ends with a slash.

        Raises:
            NotShareableError: such a file is not what it was when it was opened.
        """
        asked_for = {os.path.abspath(path) for path in list(self._read)}
        opened = set(asked_for)
        for path in sorted(asked_for):
            if os.path.basename(path) in _TOKENIZER_SEEN:
                opened |= {os.path.join(os.path.dirname(path), name) for name in _TOKENIZER}
        written = {os.path.abspath(path) for path in list(self._written)}
        to_write = {os.path.abspath(path) for path in list(self._read_to_write)}
        imported = outside.loaded_since(self._modules)
        listed = {
            os.path.join(folder, "")
            for folder in map(os.path.abspath, list(self._listed))
            if folder not in written  # as a new folder for temporary files
        }
        # `checkpoint` knows the weights beside config.json.
        weights = {
            path for folder in listed if not _is_in(folder[:-1], self._checkpoint) for path in _weights_in(folder)
        }
        listed = {folder for folder in listed if not places.is_anybodys(os.path.dirname(folder) or "/")}
        by_outside = {os.path.abspath(path) for path in list(self._read_outside)} | imported | listed | weights
        names = outside.Names()
        found = {}
        for path in sorted((opened | by_outside) - written):
            name = _name(path, self._checkpoint, names, path in by_outside)
            if name is None:
                continue
            identity = _identity(name, path)
            if identity is None and path in asked_for and not os.path.lexists(path):
                identity = ABSENT
            if identity is None:
                continue
            seen = self._versions.get(path, [])
            # What loading itself made and removed, as a program does that a model calls, is no file of the model.
            is_changed = any(map(self._is_older, seen)) if identity == ABSENT else not _is_as_opened(path, seen)
            if is_changed and path in to_write:  # it was written
                continue
            if is_changed:
                raise NotShareableError(f"{sendable(name)} changed while the model was loaded")
            found[_escaped(name)] = identity
            if path in by_outside and os.path.isabs(name):
                found |= {_escaped(one): identity for one in _by_process(path, self._places)}
        return found

    def _is_older(self, version: _Version | None) -> bool:
        """Whether a file was there, as it was when it was opened, before loading began."""
        return version is not None and version.ctime_ns < self._began_ns


@contextmanager
def observed_reading(checkpoint: Path) -> Iterator[Reading]:
    """Yield a `Reading` that notes, while open, the files that this process opens for reading.

    Args:
        checkpoint: directory of the model, or its only file; files below this directory get relative names.
    """
    _install()
    reading = Reading(checkpoint)
    with _adding:
        _active.append(reading)
    try:
        yield reading
    finally:
        with _adding:
            _active.remove(reading)


def changed(recorded: Mapping[str, str], checkpoint: Path) -> dict[str, str | None]:
    """Return the files of `recorded` (from `Reading.files`) whose content differs in `checkpoint` or on this machine.

    Returns:
        The identity of the file here, by name; None for an absent file.
    """
    base = _directory_of(checkpoint)
    plain = {name: _unescaped(name) for name in sorted(recorded)}
    here = {name: _identity(one, path) if (path := _path(one, base)) else None for name, one in plain.items()}
    return {name: identity for name, identity in here.items() if (identity or ABSENT) != recorded[name]}


def differences(recorded: Mapping[str, str], checkpoint: Path) -> list[str]:
    """Describe how the files of `recorded` differ from those of `checkpoint` and this machine.

    Returns one text for each file, with both values; no text if all files are the same.
    """
    return [
        f"{name} is absent there and has content {_shown(identity or '')} here"
        if recorded[name] == ABSENT
        else f"{name} has content {_shown(recorded[name])} there and {_shown(identity or '') or 'is absent'} here"
        for name, identity in changed(recorded, checkpoint).items()
    ]


def _shown(identity: str) -> str:
    return identity if " " in identity else identity[:_SHORT]  # a look, or a digest


def _install() -> None:
    """Install the hook once. Python cannot remove hooks; this one returns at once while nothing is observed."""
    global _installed
    with _adding:
        if not _installed:
            sys.addaudithook(_heard)
            _installed = True


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active or event not in _HEARD or (thread := threading.get_ident()) in _hearing:
        return
    _hearing.add(thread)
    try:
        _note(event, arguments)
    finally:
        _hearing.discard(thread)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.putenv", "os.unsetenv"):
        if openers.is_outside():
            for reading in _active:
                reading.variables.add(os.fsdecode(arguments[0]))
        return
    path = arguments[1 if event in ("os.rename", "import") else 0]
    if path is None:
        if event == "import":  # Python says where it is only of a module of machine code
            return
        path = os.curdir
    if not isinstance(path, (str, bytes)):  # a number of an open file
        return
    path = os.fsdecode(path)
    if event in _OPENED_BY_LIBRARIES:
        path = path.removeprefix("file:").partition("?")[0]
        if os.sep not in path:  # a library of the system, or a database in memory
            return
        event, arguments = "open", (path, "r", _OPENED_BY_LIBRARIES[event])
    if not os.path.isabs(path):  # the working directory may be another one later
        try:
            path = os.path.abspath(path)
        except OSError:  # it is gone, and so nothing is below it
            return
    if event == "import":
        if openers.is_compiler():
            for reading in _active:
                reading.note_made(path)
    elif event in ("os.rename", "os.mkdir"):
        # What will fail, as for a folder that is there already, makes nothing.
        if os.path.lexists(arguments[0]) is (event == "os.rename"):
            for reading in _active:
                reading.note_made(path)
    elif event == "open":
        flags = arguments[2]
        is_outside = openers.is_outside(by_packages=not places.is_systems(path))
        if isinstance(flags, int):
            for reading in _active:
                reading.note(path, flags, is_outside)
    elif openers.is_outside():
        for reading in _active:
            reading.note_listed(path)


@dataclass(frozen=True)
class _Version:
    """One look at a file while it is opened. Cheaper than `look`, as loading may open thousands of files."""

    size: int
    mtime_ns: int
    ctime_ns: int
    number: int


def _version(path: str) -> _Version | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _Version(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _is_as_opened(path: str, seen: list[_Version | None]) -> bool:
    """Tell whether a file is what it was each time that it was opened; it may have been absent before."""
    if not seen:  # Rust or C++ opened it
        return True
    versions = [seen[-1], *filter(None, seen), _version(path)]
    if len(set(versions)) == 1:
        return True
    if None in versions or look(path).lasts is Lasts.EVER:
        return False
    # Servers and overlays may number a file anew.
    return len({(each.size, each.mtime_ns) for each in versions if each is not None}) == 1


def _directory_of(checkpoint: Path) -> str:
    return os.path.abspath(checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint))


def _name(path: str, checkpoint: str, names: outside.Names, is_outside: bool) -> str | None:
    """Return a file's name for other processes; None if the file does not belong to the model."""
    for prefix, place in (("", checkpoint), ("", os.path.realpath(checkpoint)), (_HUB, places.hub())):
        if places.is_below(path, place):  # the name of a folder ends with a slash
            return prefix + os.path.relpath(path, place) + ("/" if path.endswith("/") else "")
    if places.is_no_models(path) and not (is_outside and places.is_systems(path)):
        return None
    if _depends_on_opener(path) and not is_outside:
        return None
    name = names.of(path)
    return path if name is None else _PACKAGE + name


def _by_process(path: str, of_process: list[tuple[str, str]]) -> list[str]:
    """Return the names of a file by what belongs to a process: another one may find another file by them."""
    end = "/" if path.endswith("/") else ""  # of a folder
    return [prefix + os.path.relpath(path, place) + end for prefix, place in of_process if places.is_below(path, place)]


def _places() -> list[tuple[str, str]]:
    """Return the working directory, unless it is above everything or gone, and the user's home."""
    found = [(_HOME, os.path.abspath(os.path.expanduser("~")))]
    with contextlib.suppress(OSError):
        found.append((_CWD, os.getcwd()))
    return [(prefix, place) for prefix, place in found if place != "/"]


def _depends_on_opener(path: str) -> bool:
    """Tell whether a file may be one that compilers keep, or that Python imports or asks for what is installed."""
    return (
        path.endswith(_CODE)
        or places.is_systems(path)
        or places.may_be_cached(path)
        or any(part in path for part in _RECORDS)
    )


def _path(name: str, checkpoint: str) -> str | None:
    if name.startswith(_PACKAGE):
        return outside.path_of(name.removeprefix(_PACKAGE))
    for prefix in (_CWD, _HOME):
        if name.startswith(prefix):
            place = dict(_places()).get(prefix)
            return None if place is None else os.path.join(place, name.removeprefix(prefix))
    return os.path.join(places.hub() if name.startswith(_HUB) else checkpoint, name.removeprefix(_HUB))


def _escaped(name: str) -> str:
    """Return a name that UTF-8 can carry."""
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return _ESCAPED + quote(os.fsencode(name), safe="/:")
    return name if not name.startswith(_ESCAPED) else _ESCAPED + quote(name, safe="/:")


def _unescaped(name: str) -> str:
    return os.fsdecode(unquote_to_bytes(name.removeprefix(_ESCAPED))) if name.startswith(_ESCAPED) else name


def _is_in(path: str, directory: str) -> bool:
    return path == directory or places.is_below(path, directory)


def _weights_in(folder: str) -> list[str]:
    try:
        return [path for path in _entries(folder) if path.endswith(WEIGHT_SUFFIXES)]
    except OSError:
        return []


def _entries(folder: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(folder) if not entry.name.startswith("."))


def _identity(name: str, path: str) -> str | None:
    """Return the identity of a regular file or a listed folder; None for others, and for weights `checkpoint` knows.

    It is the digest of the content, or of the names in a folder. For a large file elsewhere it is a look, where that
    proves the content.
    """
    try:
        if name.endswith("/"):
            return hashlib.sha256(repr([*map(os.path.basename, _entries(path))]).encode()).hexdigest()
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size <= LARGEST_BYTES:
            return digest_of(Path(path))
        if os.path.isabs(name) or name.startswith((_HUB, _PACKAGE, _CWD, _HOME)):
            seen = look(path)
            return seen.text if seen.lasts is Lasts.EVER else whole_digest_of(Path(path))
        return None if name.endswith(WEIGHT_SUFFIXES) else whole_digest_of(Path(path))
    except (OSError, ValueError):  # ValueError: the text names no file
        return None
