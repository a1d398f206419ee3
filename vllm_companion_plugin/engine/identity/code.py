"""The identity of the code that makes weights: the model's classes, the code they use, and plugins that change vLLM.

This module compares vLLM's own files with the list in vLLM's wheel (RECORD). If they agree, the version of vLLM
identifies all of them. Versions identify the packages that lay out weights. `outside` identifies other code, such as
plugins and code that came with a checkpoint; `replaced` finds what stands in vLLM's modules. This module imports none
of this code.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from vllm_companion_plugin.core import packages
from vllm_companion_plugin.engine.identity import outside, replaced
from vllm_companion_plugin.errors import NotShareableError

# Names of distributions. The key leaves out those that are not installed.
_LAYING_OUT = (
    "transformers",
    "compressed-tensors",
    "flashinfer-python",
    "flashinfer-cubin",
    "triton",
    "torchao",
    "bitsandbytes",
    "deep-gemm",
    "deep-ep",
    "gguf",
    "amd-quark",
    "auto-round",
    "gptqmodel",
    "humming-kernels",
    "nvidia-cutlass-dsl",
    "flash-attn",
    "conch-triton-kernels",
    "petit-kernel",
    "zentorch",
    "aiter",
)
# Parts of vLLM's package that lay out and process weights of every model. Only the used models are added to these.
# Of the rest a look is enough: the key names what is no file of the release by its size, or was written later.
_LOADING = ("model_executor", "kernels", "platforms", "v1/attention", "_custom_ops.py", "scalar_type.py")
_MODELS = ("vllm.model_executor.models.", "vllm.models.")
_SHORT = 16
_MOST_SHOWN = 3
_RECORD_LINE = re.compile(r"^(vllm/[^,]+\.py|vllm/[^/,]+\.so),sha256=([^,]+),(\d+)", re.MULTILINE)
_FIRST = "vllm/__init__.py"
_IMPORT = re.compile(rb"^\s*(?:from(?= [\w.]+ import )|import) (\w+)", re.MULTILINE)


def versions() -> dict[str, str]:
    """Return the versions of the packages that lay out weights."""
    return {name: found for name in _LAYING_OUT if (found := _version(name)) is not None}


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fields(model_class: type, *involved: type) -> dict[str, str]:
    """Return the fields of a key that identify the code of a model of `model_class`.

    Args:
        involved: other classes that take part: of the configuration, the quantization, the worker and its loader.

    Raises:
        NotShareableError: code that takes part comes from no file.
    """
    found = {"class": " ".join(f"{one.__module__}.{one.__name__}" for one in _own_classes(model_class))}
    found |= _vllm_state(frozenset(_vllm_models(model_class.__mro__)))
    found |= _used_by(model_class.__module__)
    own = [
        one for kind in involved for one in _own_classes(kind)[1:] if packages.top(kind.__module__) not in outside.KNOWN
    ]
    for one in (*model_class.__mro__, *involved, *own):
        _check_has_file(one)
    put_in = replaced.found()
    names = {*_modules_of(model_class.__mro__), *_modules_of([*involved, *own]), *_plugins(), *put_in.modules}
    return found | outside.fields(names, put_in.files)


def _check_has_file(kind: type) -> None:
    if not outside.has_file(kind.__module__):
        raise NotShareableError(
            f"{kind.__module__}.{kind.__qualname__} comes from no file, so nothing tells two versions of it apart",
            remedy="Put that class into a module.",
        )


def folders(model_class: type, checkpoint: Path) -> list[str]:
    """List folders of `checkpoint` that the model's code names, such as jina's "adapters" or a "speech_tokenizer"."""
    try:
        there = {entry.name for entry in os.scandir(checkpoint) if entry.is_dir() and not entry.name.startswith(".")}
    except OSError:
        return []
    if not there:
        return []
    named: set[str] = set()
    for name in _modules_of(model_class.__mro__):
        module = sys.modules.get(name)
        if module is not None and not name.startswith(("torch.", "transformers.")):
            named |= {text.partition("/")[0] for text in _texts(module)}
    return sorted(there & named)


def _own_classes(kind: type) -> list[type]:
    """Return `kind` and its base classes up to the first class of a known package."""
    names = [packages.top(one.__module__) in outside.KNOWN for one in kind.__mro__]
    return [kind, *kind.__mro__[1 : max(1, names.index(True))]]


def _modules_of(classes: Iterable[type]) -> set[str]:
    """Return the modules that define the classes, or functions that other code put into the classes."""
    found = set()
    for one in classes:
        found.add(one.__module__)
        put_in = {value.__module__ for value in vars(one).values() if isinstance(value, FunctionType)}
        found |= {name for name in put_in if isinstance(name, str) and not outside.is_installed(name)}
    return found


def _plugins() -> set[str]:
    """Return the modules of vLLM's plugins, and what they registered: a plugin can change anything."""
    found = set(_entry_points(os.environ.get("VLLM_PLUGINS")))
    operations = sys.modules.get("vllm.model_executor.custom_op")
    registered: Mapping[str, type] = getattr(operations, "op_registry_oot", {})
    return found | _modules_of(registered.values())


@cache
def _entry_points(allowed: str | None) -> tuple[str, ...]:
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    points = metadata.entry_points(group="vllm.general_plugins")
    return tuple(point.module for point in points if names is None or point.name in names)


# ---- vLLM's own


def _vllm_models(classes: Iterable[type]) -> set[str]:
    """Return vLLM's modules of the model's classes, and the modules of other models that they use."""
    found: set[str] = set()
    waiting = [one.__module__ for one in classes]
    while waiting:
        name = waiting.pop()
        if name in found or not name.startswith(_MODELS) or name not in sys.modules:
            continue
        found.add(name)
        waiting += [one for one in map(packages.module_of, list(vars(sys.modules[name]).values())) if one]
    return found


@cache
def _vllm_state(models: frozenset[str]) -> Mapping[str, str]:
    """Return which of vLLM's files differ from the release. Cached, because a process keeps what it has imported."""
    root = os.path.dirname(str(sys.modules["vllm"].__file__))
    start = len(os.path.dirname(root)) + 1
    files = [*_common_files(root), *sorted(str(sys.modules[name].__file__) for name in models)]
    here = {path[start:]: _sha256_of(path) for path in files}
    # Sizes tell libraries apart, because libraries are too large to be read here.
    here |= {f"vllm/{one.name}": str(one.stat().st_size) for one in os.scandir(root) if one.name.endswith(".so")}
    release = _released(os.path.dirname(root))
    if not release.digests:  # an editable installation
        return _by_folder(here)
    here |= {name: _sha256_of(os.path.join(root[:start], name)) for name in release.touched(here)}
    released = release.digests | {name: str(size) for name, size in release.sizes.items() if name.endswith(".so")}
    changed = {name: value for name, value in here.items() if value != released.get(name)}
    shown = [f"{name} {value[:_SHORT]}" for name, value in changed.items()]
    if len(shown) > _MOST_SHOWN:
        more = f"and {len(shown) - _MOST_SHOWN} more ({hashlib.sha256(repr(shown).encode()).hexdigest()[:_SHORT]})"
        shown = [*shown[:_MOST_SHOWN], more]
    return {"code.vllm": ", ".join(shown) or "as released"}


@cache
def _used_by(module: str) -> Mapping[str, str]:
    """Return the versions of packages that vLLM's module of a model imports, at whatever time, such as terratorch."""
    if not module.startswith(_MODELS) or module not in sys.modules:
        return {}
    source = Path(str(sys.modules[module].__file__)).read_bytes()
    names = {name.decode() for name in _IMPORT.findall(source)} - outside.KNOWN
    return {f"version.{name}": found for name in sorted(names) if (found := _version(name)) is not None}


def _by_folder(digests: Mapping[str, str]) -> dict[str, str]:
    """Return one digest for the files of each folder, so that a message can name the folder."""
    folders: dict[str, list[str]] = {}
    for name, digest in digests.items():
        folders.setdefault(os.path.dirname(name), []).append(f"{name} {digest}")
    return {
        f"code.{name}": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_SHORT]
        for name, lines in folders.items()
    }


def _sha256_of(path: str) -> str:
    """Return the digest of a file, as RECORD writes it; empty if the file cannot be read.

    Nothing remembers it: the files that `outside` remembers are a plugin's (`has_read`).
    """
    try:
        with open(path, "rb", buffering=0) as file:
            digest = hashlib.sha256(file.read()).digest()
    except OSError:
        return ""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _common_files(root: str) -> Iterator[str]:
    for name in _LOADING:
        yield from _sources(os.path.join(root, name))


def _sources(root: str) -> Iterator[str]:
    if os.path.isfile(root):
        yield root
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in ("__pycache__", "models"))
        yield from (os.path.join(directory, name) for name in sorted(files) if name.endswith(".py"))


@dataclass
class _Release:
    """What vLLM's wheel says of its files, by name: digests, and sizes in bytes. An editable installation has none."""

    place: str
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    installed_ns: int = 0

    def touched(self, but: Container[str] = ()) -> set[str]:
        """Return the sources that are gone, have another size, or were written after the installation.

        Args:
            but: names of sources to leave out, because the caller has read them.
        """
        found = set()
        for name, size in self.sizes.items():
            if name in but:
                continue
            try:
                status = os.stat(f"{self.place}/{name}")
            except OSError:
                found.add(name)
                continue
            if name.endswith(".py") and (status.st_size != size or status.st_mtime_ns > self.installed_ns):
                found.add(name)
        return found


def _released(place: str) -> _Release:
    """Return what the wheel of vLLM in the folder `place` says. An upgrade may have left the list of another one."""
    found = [release for name in sorted(os.listdir(place)) if (release := _release(place, name)) is not None]
    version = "vllm/_version.py"
    here = _sha256_of(os.path.join(place, version))
    return next((one for one in found if one.digests.get(version) == here), found[0] if found else _Release(place))


def _release(place: str, name: str) -> _Release | None:
    """Return what a folder of an installed package says of vLLM; None if the package is not vLLM, as a plugin of it."""
    if not name.startswith("vllm") or not name.endswith(".dist-info"):
        return None
    try:
        with open(os.path.join(place, name, "RECORD"), errors="replace") as record:
            lines = _RECORD_LINE.findall(record.read())
            installed_ns = os.fstat(record.fileno()).st_mtime_ns
    except OSError:
        return None
    digests = {file: digest for file, digest, _ in lines}
    return (
        _Release(place, digests, {file: int(size) for file, _, size in lines}, installed_ns)
        if _FIRST in digests
        else None
    )


# ---- what code names


def _texts(module: ModuleType) -> Iterator[str]:
    """Yield strings in the code and among the constants of a module."""
    for value in list(vars(module).values()):
        if isinstance(value, str):
            yield value
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            yield from _texts_of(value.__code__)
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for part in vars(value).values():
                function = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(function, FunctionType):
                    yield from _texts_of(function.__code__)
                elif isinstance(part, str):
                    yield part


def _texts_of(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (one for one in constant if isinstance(one, str))
        elif isinstance(constant, CodeType):
            yield from _texts_of(constant)
