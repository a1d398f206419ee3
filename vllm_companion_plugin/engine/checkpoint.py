"""What a checkpoint contains, known without reading it.

A file is named by device, inode, size and times: a different file, or a file edited in place,
never has the same identity. Copies of one file have different identities; `digest` tells
whether their content is the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import envs

from vllm_companion_plugin.errors import NotShareableError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy", ".tensors", ".ckpt")
# Code, and what vLLM reads about quantization besides config.json.
_OTHER_SUFFIXES = (".py", ".index.json", "quantize_config.json", "quant_config.json")


def checkpoint_dir(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Local directory (or single file) of `model`, or None if it is not on this machine yet."""
    local = Path(model)
    if local.exists():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def files_of(checkpoint: Path) -> list[Path]:
    """The files whose content decides the weights, in a stable order."""
    if checkpoint.is_file():
        return [checkpoint]
    suffixes = WEIGHT_SUFFIXES + _OTHER_SUFFIXES
    # A link into nothing is no file: vLLM would fail on it, or never look at it.
    return sorted(path for path in _walk(checkpoint) if path.name.endswith(suffixes) and os.path.isfile(path))


def _walk(directory: Path) -> Iterator[Path]:
    """All that is not hidden, through links to directories, each directory once."""
    seen = set()
    for root, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(root)
        directories[:] = [] if real in seen else sorted(name for name in directories if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield from (Path(root, name) for name in names if not name.startswith("."))


def is_complete(checkpoint: Path) -> bool:
    """Whether all weight files are here. The hub cache makes a snapshot's directory with its first file."""
    files = files_of(checkpoint)
    if not any(path.name.endswith(WEIGHT_SUFFIXES) for path in files):
        return False
    for index in (path for path in files if path.name.endswith(".index.json")):
        try:
            shards = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
            if not all((index.parent / shard).is_file() for shard in shards):
                return False
        except (ValueError, TypeError, AttributeError, RecursionError, OSError):  # a download that was cut short
            return False
    return True


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of the weight files, for progress."""
    return sum(path.stat().st_size for path in files_of(checkpoint) if path.name.endswith(WEIGHT_SUFFIXES))


def identity(checkpoint: Path) -> dict[str, str]:
    """Identity of each file of the checkpoint by its relative name.

    Raises:
        NotShareableError: there are no weight files, so nothing is known about the content.
    """
    files = files_of(checkpoint)
    if not any(path.name.endswith(WEIGHT_SUFFIXES) for path in files):
        raise NotShareableError(f"{checkpoint} has no weight files, so two of them cannot be told apart.")
    base = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return {str(path.relative_to(base)): file_identity(path) for path in files}


def file_identity(path: Path) -> str:
    """Device, inode, size and times of the file itself, links resolved.

    The hub cache names its blobs by their content, but a blob can be written to like any other file.
    """
    status = path.stat()
    return f"stat {status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


@contextmanager
def pinned(model_config: Any, checkpoint: Path | None) -> Iterator[None]:
    """While open, vLLM reads the snapshot `checkpoint` of the hub cache, wherever the branch has moved since."""
    revision = model_config.revision
    if checkpoint is not None and not Path(model_config.model).exists() and checkpoint.parent.name == "snapshots":
        model_config.revision = checkpoint.name
    try:
        yield
    finally:
        model_config.revision = revision


def ensure_downloaded(source: Any, model_config: Any, load_config: Any) -> Path:
    """The checkpoint's directory, downloaded by vLLM's own loader if it is not here yet.

    Raises:
        NotShareableError: the checkpoint is not in a local directory even then.
    """
    name = getattr(model_config, "model_weights", "") or model_config.model
    if envs.VLLM_USE_MODELSCOPE and not Path(name).exists():
        raise NotShareableError(f"{name} comes from ModelScope, whose cache is not known here; name its directory.")
    for attempt in range(2):
        found = checkpoint_dir(name, model_config.revision, load_config.download_dir)
        if found is not None and (attempt or Path(name).exists() or is_complete(found)):
            return found
        if attempt == 0:
            source.download_model(model_config)
    raise NotShareableError(f"checkpoint {name!r} is neither a local directory nor in the hub cache.")
