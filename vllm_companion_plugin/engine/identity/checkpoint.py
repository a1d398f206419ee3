"""The identity of a checkpoint, found with as little reading as possible.

A checkpoint's identity is that of the files that a loader reads: weights beside config.json, folders that
`modules.json` names, and folders that the model's code names. Other files below, such as checkpoints of a training or
adapters, do not belong to the model. A look (`files`) identifies a weight file; where looks prove nothing, its content
does. The content always identifies a small file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_companion_plugin.engine.identity.digest import Digests, File, digest_of
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host.files import CONTENT, Lasts, look
from vllm_companion_plugin.host.files import file_identity as file_identity

logger = init_logger("vllm.companion.checkpoint")

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy", ".tensors", ".ckpt")
# The state of a training, which vLLM's loaders leave out (weight_utils.filter_files_not_needed_for_inference).
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_INDEX = ".index.json"
# Code, and what vLLM reads about quantization. config.json is absent here because the key holds its values.
_SMALL_SUFFIXES = (".py", "quantize_config.json", "quant_config.json", "quantization_config.json")
_MODULES = "modules.json"
SMALL = "text "
"""Prefix of a small file's identity. The rest is the file's digest, and the key has a field for each small file."""


def checkpoint_dir(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Return the local directory (or single file) of `model`, or None if the model is not on this machine yet."""
    local = Path(model)
    if local.exists():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def files_of(checkpoint: Path, folders: Iterable[str] = ()) -> list[Path]:
    """List the files whose content decides the weights, in a stable order.

    Args:
        folders: folders below `checkpoint` that the model's code also reads.
    """
    if checkpoint.is_file():
        return [checkpoint]
    found = {checkpoint / _MODULES, *_top_level(checkpoint, _SMALL_SUFFIXES)}
    for name in _modules(checkpoint):
        found.update(_top_level(checkpoint / name, ("config.json",)))
    for name in folders:
        found |= {
            path for path in files_below(checkpoint / name) if path.name.endswith((*WEIGHT_SUFFIXES, ".json", ".py"))
        }
    if not any(map(_is_weight, found)):  # vLLM's loader knows a place that this module does not
        found |= {path for path in files_below(checkpoint) if path.name.endswith((*WEIGHT_SUFFIXES, *_SMALL_SUFFIXES))}
    # A dangling link is no file: vLLM would fail on such a link, or never look at it.
    return sorted(path for path in found if os.path.isfile(path))


def _top_level(directory: Path, small: tuple[str, ...]) -> list[Path]:
    suffixes = (*WEIGHT_SUFFIXES, _INDEX, *small)
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    wanted = (name for name in names if name.endswith(suffixes) and not name.startswith("."))
    return [directory / name for name in wanted if not name.endswith(_NOT_WEIGHTS)]


def _modules(checkpoint: Path) -> list[str]:
    """List the folders of the modules of a sentence-transformers model."""
    try:
        names = [module.get("path") for module in json.loads((checkpoint / _MODULES).read_bytes())]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    paths = [Path(name) for name in names if isinstance(name, str)]
    return [str(path) for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts]


def _is_weight(path: Path) -> bool:
    return path.name.endswith(WEIGHT_SUFFIXES)


def _is_small(path: Path) -> bool:
    return not path.name.endswith((*WEIGHT_SUFFIXES, _INDEX))


def files_below(directory: Path) -> Iterator[Path]:
    """Yield all files that are not hidden. Follows links to directories, and visits each directory once."""
    seen = set()
    for root, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(root)
        directories[:] = [] if real in seen else sorted(name for name in directories if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield from (Path(root, name) for name in names if not name.startswith("."))


def is_complete(checkpoint: Path) -> bool:
    """Tell whether all weight files are here. The hub cache makes a snapshot's directory with its first file."""
    files = files_of(checkpoint)
    if not any(map(_is_weight, files)):
        return False
    for index in (path for path in files if path.name.endswith(_INDEX)):
        try:
            shards = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
            if not all((index.parent / shard).is_file() for shard in shards):
                return False
        except (ValueError, TypeError, AttributeError, RecursionError, OSError):  # a download was cut short
            return False
    return True


def weight_bytes(checkpoint: Path) -> int:
    """Return the bytes of the weight files, for progress."""
    return sum(path.stat().st_size for path in files_of(checkpoint) if _is_weight(path))


def identity(checkpoint: Path, digests: Digests | None = None, folders: Iterable[str] = ()) -> dict[str, str]:
    """Return the identity of each file of the checkpoint by its relative name.

    Args:
        digests: keeps the digests of files that had to be read.
        folders: as in `files_of`.

    Raises:
        NotShareableError: the checkpoint has no weight files, so its content is unknown; or a file changed meanwhile.
    """
    paths = files_of(checkpoint, folders)
    if not any(map(_is_weight, paths)):
        raise NotShareableError(f"{checkpoint} has no weight files, so nothing tells two such checkpoints apart.")
    base = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = {path: str(path.relative_to(base)) for path in paths}
    found = {names[path]: SMALL + digest_of(path) for path in paths if _is_small(path)}
    large = identities_of([path for path in paths if not _is_small(path)], digests or Digests())
    return dict(sorted((found | {names[path]: identity for path, identity in large.items()}).items()))


def identities_of(paths: Iterable[Path], digests: Digests) -> dict[Path, str]:
    """Return the identity of each large file: by a look where that proves the content for ever, else by the content.

    Raises:
        NotShareableError: a file changed meanwhile.
    """
    looks = {path: look(path) for path in paths}
    found = {path: seen.text for path, seen in looks.items() if seen.lasts is Lasts.EVER}
    unsure = [File(path, seen.text, seen.lasts) for path, seen in looks.items() if seen.lasts is not Lasts.EVER]
    if unsure:
        found |= {path: CONTENT + digest for path, digest in _contents(unsure, digests).items()}
    return found


def _contents(files: list[File], digests: Digests) -> dict[Path, str]:
    unknown = [file for file in files if digests.known(file.identity) is None]
    if unknown:
        size = sum(file.path.stat().st_size for file in unknown)
        logger.info(
            "Reading %d files (%.1f GiB) of %s, because times of files prove nothing on %s.",
            *(len(unknown), size / (1 << 30), unknown[0].path.parent, look(unknown[0].path).file_system),
        )
    found = dict(zip((file.path for file in files), digests.of_all(files), strict=True))
    if changed := sorted(str(path) for path, digest in found.items() if digest is None):
        raise NotShareableError(f"{', '.join(changed)} changed while it was read.")
    return {path: digest for path, digest in found.items() if digest is not None}


@contextmanager
def pinned(model_config: Any, checkpoint: Path | None) -> Iterator[None]:
    """Make vLLM read the snapshot `checkpoint` of the hub cache while open, even if the branch has moved since."""
    revision = model_config.revision
    if checkpoint is not None and not Path(model_config.model).exists() and checkpoint.parent.name == "snapshots":
        model_config.revision = checkpoint.name
    try:
        yield
    finally:
        model_config.revision = revision


def ensure_downloaded(source: Any, model_config: Any, load_config: Any) -> Path:
    """Return the checkpoint's directory. Lets vLLM's own loader download a checkpoint that is not here yet.

    Raises:
        NotShareableError: the checkpoint is in no local directory, even after the download.
    """
    name = getattr(model_config, "model_weights", "") or model_config.model
    if envs.VLLM_USE_MODELSCOPE and not Path(name).exists():
        raise NotShareableError(
            f"{name} comes from ModelScope, whose cache is not known here.", remedy="Name the model's directory."
        )
    for attempt in range(2):
        found = checkpoint_dir(name, model_config.revision, load_config.download_dir)
        if found is not None and (attempt or Path(name).exists() or is_complete(found)):
            return found
        if attempt == 0:
            source.download_model(model_config)
    raise NotShareableError(f"checkpoint {name!r} is neither a local directory nor in the hub cache.")
