"""Observing which files a process opens in Python while it builds and loads a model.

Decisions before loading use the file names that are known at that time (`checkpoint`). Model code may read more files.
So the loader notes each file that was opened and is none of these weights, with its content, and an attaching engine
compares them (`differences`). The interpreter does not see files that Rust or C++ open (safetensors, tokenizers,
sentencepiece). `checkpoint` knows the weights, and tokenizers count with the files beside them that Python opens.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from vllm_companion_plugin.engine.identity.checkpoint import WEIGHT_SUFFIXES
from vllm_companion_plugin.engine.identity.digest import digest_of
from vllm_companion_plugin.host.files import Lasts, look, whole_digest_of

LARGEST_BYTES = 16 << 20
"""Limit of a small file, in bytes. If a larger one below the checkpoint holds weights, `checkpoint` knows that file."""

_HUB = "hub:"
"""Prefix of the name of a file in the hub's cache, wherever that cache is."""
_SHORT = 16
# A tokenizer's own files. Rust or C++ reads the others once Python has opened the first.
_TOKENIZER_SEEN = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
# Files of the machine, not of the model.
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/run", "/var", "/opt/nvidia")
_CODE = (".py", ".pyc", ".pyi", ".so", ".pxd", ".h", ".cu", ".cuh", ".cpp", ".ptx", ".cubin")
_active: list[Reading] = []
_adding = threading.Lock()
_installed = False


class Reading:
    """The files that a process opened during an observation."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = _directory_of(checkpoint)
        self._read: set[str] = set()
        self._written: set[str] = set()

    def note(self, path: str, flags: int) -> None:
        """Note an opened file. The interpreter calls this, in any thread."""
        (self._read if flags & os.O_ACCMODE == os.O_RDONLY else self._written).add(path)

    def files(self) -> dict[str, str]:
        """Return the identities of the files that were read and not written, by name.

        A name is a path below the checkpoint, `hub:` and a path below the hub's cache, or an absolute path.
        """
        found = {}
        opened = {os.path.abspath(path) for path in list(self._read)}
        for path in sorted(opened):
            if os.path.basename(path) in _TOKENIZER_SEEN:
                opened |= {os.path.join(os.path.dirname(path), name) for name in _TOKENIZER}
        written = {os.path.abspath(path) for path in list(self._written)}
        for path in sorted(opened - written):
            name = _name(path, self._checkpoint)
            if name is not None and (identity := _identity(name, path)) is not None:
                found[name] = identity
        return found


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
    here = {name: _identity(name, _path(name, base)) for name in sorted(recorded)}
    return {name: identity for name, identity in here.items() if identity != recorded[name]}


def differences(recorded: Mapping[str, str], checkpoint: Path) -> list[str]:
    """Describe how the files of `recorded` differ from those of `checkpoint` and this machine.

    Returns one text for each file, with both values; no text if all files are the same.
    """
    return [
        f"{name} has content {_shown(recorded[name])} there and {_shown(identity) if identity else 'is absent'} here"
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
    if not _active or event != "open":
        return
    path, _, flags = arguments
    if isinstance(path, (str, bytes)) and isinstance(flags, int):
        for reading in _active:
            reading.note(os.fsdecode(path), flags)


def _directory_of(checkpoint: Path) -> str:
    return os.path.abspath(checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint))


def _name(path: str, checkpoint: str) -> str | None:
    """Return a file's name for other processes; None if the file does not belong to the model."""
    if _is_below(path, checkpoint):
        return os.path.relpath(path, checkpoint)
    if path.endswith(_CODE):  # the key identifies code, which may be gone after an update
        return None
    hub = _hub()
    if _is_below(path, hub):
        return _HUB + os.path.relpath(path, hub)
    hidden = any(part.startswith(".") for part in Path(path).parts)
    return None if hidden or any(_is_below(path, place) for place in _not_models()) else path


def _path(name: str, checkpoint: str) -> str:
    return os.path.join(_hub(), name.removeprefix(_HUB)) if name.startswith(_HUB) else os.path.join(checkpoint, name)


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")


def _hub() -> str:
    from huggingface_hub import constants

    return os.path.abspath(str(constants.HF_HUB_CACHE))


@cache
def _not_models() -> tuple[str, ...]:
    """Return the directories of the machine, of Python and its packages, and of caches that processes fill."""
    from vllm import envs

    caches = (os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"))
    pythons = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values())
    ours = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))), envs.VLLM_CACHE_ROOT, envs.VLLM_CONFIG_ROOT)
    inductor = os.path.join(tempfile.gettempdir(), "torchinductor_")
    found = (*_SYSTEM, *pythons, *ours, *(place for place in caches if place), inductor)
    return tuple({os.path.abspath(place) for place in found} - {"/"})


def _identity(name: str, path: str) -> str | None:
    """Return the identity of a regular file; None for anything else, and for weights that `checkpoint` knows.

    It is the digest of the content. For a large file elsewhere it is a look, where that proves the content.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size <= LARGEST_BYTES:
            return digest_of(Path(path))
        if os.path.isabs(name) or name.startswith(_HUB):
            seen = look(path)
            return seen.text if seen.lasts is Lasts.EVER else whole_digest_of(Path(path))
        return None if name.endswith(WEIGHT_SUFFIXES) else whole_digest_of(Path(path))
    except (OSError, ValueError):  # ValueError: the text names no file
        return None
