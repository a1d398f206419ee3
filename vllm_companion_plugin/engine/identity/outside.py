"""Code that no version identifies, such as plugins and code that came with a checkpoint.

This module finds such code from the modules of a model's classes: what it imports at whatever time, the packages with
a version that it uses, and the data beside it. It imports none of this code.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.engine.identity import checkpoint, places
from vllm_companion_plugin.engine.identity.digest import Digests
from vllm_companion_plugin.engine.identity.mentions import mentions_of, version_of

_OWN = __name__.partition(".")[0]
# The key has the version of vLLM, and Python's libraries lay out no weights.
_NEVER = {"vllm", _OWN, *sys.stdlib_module_names}
KNOWN = {"torch", "transformers", "numpy", *_NEVER}
"""Packages that their versions identify."""
# Code of checkpoints, each in its own folder of transformers' cache.
_REMOTE = "transformers_modules"
_MOST_FIELDS = 40
_SHORT = 16
_MOST_READ_BYTES = 256 << 20
"""Limit of the data of a package that is read whenever a process computes a key. Looks identify more than this."""
_PATTERN = re.compile(r"[\w./+@-]*[*?][\w./+@*?-]*")
"""Patterns of names, and no regular expressions."""
_SWITCH = re.compile(r"[\w.,:+/ -]{0,31}", re.ASCII)
"""Values of variables that are shown. Secrets are longer, or have other characters."""
_NOTES = (".log", ".lock", ".pid", ".tmp")
"""Files that programs write for themselves, also beside their code."""
_ANY_DEPTH = "**"
_VARIABLE = re.compile(rb"""["']([A-Za-z_][A-Za-z0-9_.-]+)["']""")
"""Names of variables, also those of a Kubernetes ConfigMap, which need not be identifiers."""
_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9]+_(\w*_)?", re.ASCII)
"""Texts that variables may begin with: code asks for those that do, or puts the rest of the name behind it."""
_ASKING = re.compile(rb"getenv|environ|env_?prefix|envvar", re.IGNORECASE)
"""In sources that read variables. Elsewhere a text like `layer_` begins other names."""
_NAMES = re.compile(r"[A-Z][A-Z0-9_]*_\*[A-Z0-9_]*|\*_[A-Z0-9_]{2,}[A-Z0-9]", re.ASCII)
"""Names of variables in an f-string, with values in them."""
# Variables that say who a process is, where things are, or a secret of a service: they differ between engines and make
# no weights. Launchers have exact names for ranks, because a model may have a rank as well; of replicas only the rank
# differs, and a model may split by their number.
_OF_THE_PROCESS = re.compile(
    r"((LOCAL|GLOBAL|NODE|MACHINE|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|DP_RANK|(OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI|PMIX)_(\w+_)?(RANK|SIZE)"
    r"|(SLURM|TORCHELASTIC|FLUX|KUBERNETES)_.*"
    r"|.*(VISIBLE_DEVICES|VISIBLE_MODULES|_ADDR|_HOST|_IP|_PORT|_URL|_PID|_DEBUG|LOG_LEVEL|LOGGING_LEVEL)"
    r"|(.*_)?(PASSWORD|PASSWD|CREDENTIALS?)(_ID|_FILE|_PATH)?|.*(API_?KEY|ACCESS_?KEY|SECRET).*|TOKENIZERS_.*"
    r"|(.*_)?(HF|HUGGING_?FACE|HUB|GITHUB|GH|GITLAB|AUTH|ACCESS|BEARER|SESSION|SECURITY|OIDC|WEB_IDENTITY|JOB)_TOKEN(_FILE|_PATH)?"
    r"|(AWS|AZURE|VAULT)_(.*_)?(TOKEN|KEY)(_FILE|_PATH)?"
    r"|.*_PROXY|COMPANION_.*|HF_(HOME|HUB_.*|ENDPOINT)|XDG_.*|POD_.*|NODE_NAME|HOME|HOSTNAME"
    r"|PATH|PYTHONPATH|LD_LIBRARY_PATH|PWD|USER|TMPDIR|TERM|LANG|SHELL|OMP_NUM_THREADS",
    re.IGNORECASE,
)
_MAY_BE_SECRET = re.compile(r"(.*_)?(TOKEN|KEY)(_ID|_FILE|_PATH)?", re.IGNORECASE)
"""Variables that may be of a model (a token's id), or a secret: they count, and only a digest of them is shown."""


def fields(modules: Iterable[str], files: Iterable[str] = ()) -> dict[str, str]:
    """Return the fields of a key that identify such code among `modules` and `files`, and what that code uses.

    `code.` names a source file, `data.` a file beside it, `env.` a variable, `version.` an installed package.

    Args:
        files: sources that no loaded module has.
    """
    units, versions = _followed(modules, files)
    found: dict[str, set[str]] = {}
    for unit in units:
        for name, value in (unit.code() | unit.data() | unit.variables()).items():
            found.setdefault(name if name.isprintable() else ascii(name), set()).add(value)
    return {name: " and ".join(sorted(values)) for name, values in found.items()} | versions


class Names:
    """Names of files by the loaded packages and modules that they belong to, wherever these are (`path_of`)."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        for name, module in list(sys.modules.items()):
            if packages.top(name) in KNOWN or name.startswith(_REMOTE) or _is_installed(file := _file(module)):
                continue
            folders = _folders(module)
            if file is not None and not folders and ("." in name or _is_on_path(name, file)):
                self._files[file] = "/".join([*name.split(".")[:-1], os.path.basename(file)])
            if "." not in name:
                self._folders |= dict.fromkeys(folders, name)

    def of(self, path: str) -> str | None:
        """Return the name of a file, or of a folder with a slash at its end; None if nothing loaded has it."""
        folder = os.path.dirname(path)
        while folder not in self._folders and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        return self._folders[folder] + path[len(folder) :] if folder in self._folders else self._files.get(path)


def _is_on_path(module: str, file: str) -> bool:
    """Tell whether other processes would find the file by the module's name. It may have been loaded by its path."""
    try:
        spec = PathFinder.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and os.path.abspath(spec.origin) == file


def path_of(name: str) -> str | None:
    """Return where the file of a name (`Names`) is here, without an import; None if nothing is."""
    top, slash, inner = name.partition("/")
    file, folders = _place(packages.top(top))  # to find a part of a package would import the package
    if not slash:
        return file
    return next((path for folder in folders if os.path.exists(path := os.path.join(folder, inner))), None)


def loaded_since(before: Iterable[str]) -> set[str]:
    """Return the files of such modules that are loaded and are not among `before`."""
    new = (
        name
        for name in sys.modules.keys() - set(before)
        if packages.top(name) not in KNOWN and not name.startswith(_REMOTE)
    )
    files = (_file(sys.modules.get(name)) for name in new)
    return {path for path in files if path and not _is_installed(path) and not places.is_no_models(path)}


def has_file(module: str) -> bool:
    """Tell whether a file, or a version, identifies the code of a module. It does not if that was typed in, or made."""
    return packages.top(module) in KNOWN or _source_of(module) is not None


def is_installed(module: str) -> bool:
    """Tell whether `module` is of a package with a version, which does not belong to the model."""
    return _is_installed(_file(sys.modules.get(module)) or "")


# ---- where it is


@dataclass(frozen=True)
class _Unit:
    """The files that belong together: those of a package, or a module that is one file.

    Attributes:
        module: full name of the package or module.
        place: the package's folder, or the file.
        shown: first part of the files' names.
    """

    module: str
    place: str
    shown: str

    @property
    def _is_folder(self) -> bool:
        return os.path.isdir(self.place)

    @cached_property
    def _files(self) -> dict[str, str]:
        """All files by the names to show."""
        if not self._is_folder:
            return {self.shown: self.place}
        return {f"{self.shown}/{os.path.relpath(path, self.place)}": path for path in _below(self.place)}

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {name: path for name, path in self._files.items() if path.endswith(".py") or path == self.place}

    def code(self) -> dict[str, str]:
        digests = {name: sha256_of(path).hex()[:_SHORT] for name, path in self._sources.items()}
        return _shown("code", self.shown, digests)

    def data(self) -> dict[str, str]:
        """Return the identities of the files in the package that are no sources, and of those that sources name."""
        texts = {text for path in self._sources.values() for text in mentions_of(path).texts}
        files = {name: path for name, path in self._files.items() if name not in self._sources}
        if not self._is_folder:
            here, shown = os.path.dirname(self.place), os.path.dirname(self.shown)
            beside = [(path, os.path.relpath(path, here)) for path in _beside(self.place, texts)]
            files |= {os.path.normpath(os.path.join(shown, name)): path for path, name in beside}
        files |= {path: path for path in _elsewhere(texts | self._places_in_variables())}
        known = _identities(set(files.values()) - set(self._sources.values()))
        return _shown("data", self.shown, {name: known[path] for name, path in sorted(files.items()) if path in known})

    def variables(self) -> dict[str, str]:
        """Return what is shown of the variables of the environment that count."""
        return {
            f"env.{name if name.isprintable() else ascii(name)}": _digest_of(value)
            if _MAY_BE_SECRET.fullmatch(name)
            else _value_shown(value)
            for name, value in self._variables.items()
        }

    @cached_property
    def _variables(self) -> dict[str, str]:
        """The variables of the environment that sources name in quotation marks, except those of the process.

        So do those whose first part, or a pattern of which, sources name. Those that begin with VLLM_ are compared
        anyway (`configuration`).
        """
        named: set[str] = set()
        parts: set[str] = set()
        for path in self._sources.values():
            source = _bytes(path)
            names = {name.decode() for name in _VARIABLE.findall(source)}
            named |= names
            if _ASKING.search(source):
                parts |= {rf"(?i:{name}).*" for name in names if _PREFIX.fullmatch(name)}
                parts |= {text.replace("*", r"\w*") for text in mentions_of(path).texts if _NAMES.fullmatch(text)}
        pattern = re.compile("|".join(sorted(parts)) or "(?!)")
        return {
            name: value
            for name, value in os.environ.items()
            if (name in named or pattern.fullmatch(name))
            and not name.startswith("VLLM_")
            and not _OF_THE_PROCESS.fullmatch(name)
        }

    def _places_in_variables(self) -> set[str]:
        """Return the files and folders that variables name in full: code finds there what it names itself."""
        return {text for value in self._variables.values() for text in value.split(os.pathsep) if _is_place(text)}

    def uses(self) -> set[str]:
        """Return the names of modules that the code imports, or that its loaded modules have something of."""
        package = self.module.rpartition(".")[0]
        named = {name for path in self._sources.values() for name in mentions_of(path).modules}
        found = {name for name in named if not name.startswith(".")}
        if not self._is_folder and package:  # in a namespace; a package has all its files
            for name in named - found:
                with contextlib.suppress(ImportError):  # as its import would fail
                    found.add(importlib.util.resolve_name(name, package))
        within = [one for name, one in list(sys.modules.items()) if f"{name}.".startswith(f"{self.module}.")]
        values = {packages.module_of(value) for one in within for value in list(packages.dictionary(one).values())}
        return found | {name for name in values if not is_installed(name)}


def _followed(modules: Iterable[str], files: Iterable[str]) -> tuple[list[_Unit], dict[str, str]]:
    """Return these units and those of what they use, and the versions of installed packages that they use."""
    known = (name for name in modules if name in sys.modules or _source_of(name) is not None)
    waiting = sorted(_full_name(name) for name in known if packages.top(name) not in KNOWN)
    # These count by their files though they may be installed: a plugin may be made anew under its old version.
    ours = {unit.place for unit in map(_unit, waiting) if unit is not None}
    # No module has the name of a path.
    units = {path: _Unit(path, path, os.path.basename(path)) for path in files if path not in ours}
    waiting += [name for unit in units.values() for name in unit.uses()]
    versions: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or packages.top(name) in seen or packages.top(name) in _NEVER:
            continue
        unit = _unit(name)
        seen |= {name, unit.module if unit is not None else name}
        if unit is None or unit.place in units:
            continue
        installed = _versions(packages.top(name), unit.place) if unit.place not in ours else {}
        versions |= installed
        if not installed and packages.top(name) not in KNOWN:
            units[unit.place] = unit
            waiting += unit.uses()
    return sorted(units.values(), key=lambda unit: unit.place), versions


def _source_of(module: str) -> str | None:
    """Return the file of a module that is loaded, or of a checkpoint's own code.

    A class of such code comes to another process by its value, without the module.
    """
    file = _file(sys.modules.get(module))
    if file is None and module.startswith(f"{_REMOTE}."):
        path = f"{os.path.join(places.remote_code(), *module.split('.'))}.py"
        return path if os.path.isfile(path) else None
    return file


def _full_name(module: str) -> str:
    """Return the name by which others import a module, also if it runs as a program (`python -m`)."""
    spec = getattr(sys.modules[module], "__spec__", None) if module in ("__main__", "__mp_main__") else None
    return module if spec is None else str(spec.name)


def _unit(module: str) -> _Unit | None:
    """Find the outermost package around `module` that is no namespace, or its file, without an import."""
    if module.startswith(f"{_REMOTE}."):
        file = _source_of(module)
        return _Unit(module.rpartition(".")[0], os.path.dirname(file), _REMOTE) if file is not None else None
    parts = module.split(".")
    folders: list[str] | None = None
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        file, folders = _place(name, folders)
        if file is not None and folders:
            return _Unit(name, _existing(os.path.dirname(file)), "/".join(parts[:count]))
        if file is not None:
            return _Unit(name, _existing(file), "/".join([*parts[: count - 1], os.path.basename(file)]))
        if not folders:
            return None
    return None


def _place(module: str, inside: list[str] | None = None) -> tuple[str | None, list[str]]:
    """Return the file of a module, if it has one, and the folders of its modules, if it is a package."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return _file(loaded), _folders(loaded)
    try:
        spec = importlib.util.find_spec(module) if inside is None else PathFinder.find_spec(module, inside)
    except (ImportError, ValueError):  # as its import would fail
        return None, []
    if spec is None:
        return None, []
    file = os.path.abspath(spec.origin) if spec.has_location and spec.origin else None
    return file, [*map(os.path.abspath, spec.submodule_search_locations or ())]


def _existing(place: str) -> str:
    """Return the archive that a place is in, if it is in one; otherwise the place."""
    above = next(filter(os.path.exists, map(str, (Path(place), *Path(place).parents))), place)
    return above if os.path.isfile(above) else place


def _is_installed(file: str | None) -> bool:
    return not file or packages.is_installed(file)


def _file(module: ModuleType | None) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) else None


def _folders(module: ModuleType) -> list[str]:
    try:
        return [os.path.abspath(folder) for folder in getattr(module, "__path__", ())]
    except TypeError:  # it means something else by this name
        return []


@cache
def _providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


@cache
def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _versions(package: str, place: str) -> Mapping[str, str]:
    """Return fields with the versions of the distributions that installed at `place` what is of `package`."""
    names = _providers().get(package, [package])
    found = [one for one in map(_distribution, names) if one is not None and _has_installed(one, place)]
    return {f"version.{one.metadata['Name']}": one.version for one in found if one.version}


def _has_installed(one: metadata.Distribution, place: str) -> bool:
    """Tell whether a distribution put there what is at `place`. It has not, where that is a folder of sources."""
    is_put = packages.is_installed(place) or one.read_text("RECORD") is not None
    return is_put and places.is_below(place, os.path.abspath(str(one.locate_file(""))))


# ---- what it contains


def _is_place(text: str) -> bool:
    return text.startswith(("/", "~")) and text.isprintable()


def _value_shown(value: str) -> str:
    """Return a switch as it is, and a digest of what may be a secret, or no text."""
    return value if _SWITCH.fullmatch(value) else _digest_of(value)


def _digest_of(value: str) -> str:
    return hashlib.sha256(os.fsencode(value)).hexdigest()[:_SHORT]


def _below(folder: str) -> Iterator[str]:
    for path in sorted(map(str, checkpoint.files_below(Path(folder)))):
        if "/__pycache__/" not in path and os.path.isfile(path) and not path.endswith(_NOTES):
            yield path


def _beside(file: str, texts: Iterable[str]) -> Iterator[str]:
    """Yield the files beside `file` that texts name: by name or pattern, in a folder, or by another suffix."""
    here = os.path.dirname(file)
    for text in texts:
        if os.path.isabs(text) or not text.strip("./*?"):
            continue
        path = os.path.normpath(os.path.join(here, text))
        if os.path.isdir(path) and not places.is_below(file, path) and not packages.is_installed(file):
            yield from _below(path)
        yield from _matching(here, text)
        if text.startswith("."):
            yield from filter(os.path.isfile, [os.path.splitext(file)[0] + text])


def _elsewhere(texts: Iterable[str]) -> Iterator[str]:
    """Yield the files that texts name in full, and those that they name in a folder that a text names in full."""
    texts = set(texts)
    full = {os.path.normpath(os.path.expanduser(text)) for text in texts if text.startswith(("/", "~"))}
    full = {path for path in full if os.path.isabs(path) and not places.is_no_models(path)}
    yield from filter(os.path.isfile, full)
    for folder in filter(os.path.isdir, full):
        for text in texts:
            if places.is_anybodys(folder) and _PATTERN.fullmatch(text):  # "/" mostly is none, and others write there
                continue
            if not os.path.isabs(text) and text.strip("./*?"):
                yield from (path for path in _matching(folder, text) if not places.is_no_models(path))


def _matching(folder: str, text: str) -> Iterator[str]:
    if not _PATTERN.fullmatch(text):
        found: Iterable[str] = [text]
    elif _ANY_DEPTH in (parts := text.split("/")):
        found = _at_any_depth(folder, parts)
    else:
        found = glob.iglob(text, root_dir=folder)
    paths = (os.path.normpath(os.path.join(folder, one)) for one in found)
    return (path for path in paths if os.path.isfile(path) and not path.endswith(_NOTES))


def _at_any_depth(folder: str, pattern: list[str]) -> Iterator[str]:
    """Yield the files that a pattern means, each folder once: by links a tree can be endless for `glob`."""
    start = pattern.index(_ANY_DEPTH)
    for top in glob.iglob(os.path.join(glob.escape(folder), *pattern[:start], "")):
        yield from (path for path in _below(top) if _fits(os.path.relpath(path, top).split("/"), pattern[start:]))


def _fits(parts: list[str], patterns: list[str]) -> bool:
    """Tell whether a path has the parts that a pattern of any depth describes."""
    if not patterns or not parts:
        return not parts and all(pattern == _ANY_DEPTH for pattern in patterns)
    if patterns[0] == _ANY_DEPTH:
        return _fits(parts, patterns[1:]) or _fits(parts[1:], patterns)
    return fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def _shown(kind: str, name: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return a field for each file; if these are many, for each folder; if these are many, for all files."""
    folders = {one: os.path.dirname(one) or name for one in values}
    groups: dict[str, list[str]] = {}
    for group_of in ({one: one for one in values}, folders, dict.fromkeys(values, name)):
        groups = {}
        for one, value in values.items():
            groups.setdefault(group_of[one], []).append(f"{one} {value}")
        if len(groups) <= _MOST_FIELDS:
            break
    return {f"{kind}.{group}": _together(lines, group) for group, lines in groups.items()}


def _together(lines: list[str], name: str) -> str:
    if len(lines) == 1 and lines[0].startswith(f"{name} "):
        return lines[0].removeprefix(f"{name} ")
    return f"{len(lines)} files {hashlib.sha256(repr(lines).encode()).hexdigest()[:_SHORT]}"


def _identities(paths: Iterable[str]) -> dict[str, str]:
    """Return what identifies each file: its content; or, if these are many bytes, what `checkpoint` says of weights."""
    sizes = {}
    for path in paths:
        with contextlib.suppress(OSError):  # it has gone meanwhile
            sizes[path] = os.path.getsize(path)
    if sum(sizes.values()) <= _MOST_READ_BYTES:
        return {path: sha256_of(path).hex()[:_SHORT] for path in sizes}
    return {str(path): identity for path, identity in checkpoint.identities_of(map(Path, sizes), Digests()).items()}


_read: dict[str, tuple[tuple[int, ...], bytes]] = {}


def sha256_of(path: str) -> bytes:
    """Return the digest of a file, empty if the file cannot be read. This process reads each version once."""
    try:
        version = version_of(path)
        if _read.get(path, ((),))[0] != version:
            _read[path] = version, hashlib.sha256(_bytes(path)).digest()
        return _read[path][1]
    except OSError:
        return b""


def has_read(path: str) -> bool:
    """Tell whether this process has identified a file by its content, as it does sources that a key names."""
    return path in _read


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
