"""The key of an entry: everything that decides the bytes of a rank's tensors.

The engine computes the key before it builds the model, because building changes vLLM's config objects. The key holds
vLLM's configuration except fields that leave bytes alone (`configuration`), the code that makes weights (`code`), the
versions and devices that lay weights out, and the files that loading reads (`checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_companion_plugin.core.identity import CHECKPOINT, VARIANT, EntryKey
from vllm_companion_plugin.engine.identity import checkpoint, code, configuration, places
from vllm_companion_plugin.engine.identity.digest import Digests, digest_of
from vllm_companion_plugin.engine.vllm import building, deployment, devices
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host.models import model_name

MAX_VARIANTS = 4
"""Limit of differences in one key, and of variants that differ at one place. The next engine loads alone."""

MANIFEST_VERSION = 11
"""Version of capture and packing. A change that makes older manifests fail raises it."""

_SHORT = 16
_LARGEST_SMALL_FILE = 16 << 20
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "tekken", "spiece", "sentencepiece")
_APART = "; "
"""Between the differences of a variant."""


def compute(
    vllm_config: Any,
    model_config: Any,
    device: devices.EngineDevice,
    source_format: str,
    source: Path | None,
    content: dict[str, str],
) -> EntryKey:
    """Compute the key of this rank's entry.

    Args:
        source: the checkpoint; None for a load format without one.
        content: identity of each file of the checkpoint.
    """
    ranks = deployment.ranks()
    fields = {
        "manifest": str(MANIFEST_VERSION),
        "source_format": source_format,
        "stage": device.stage.value,
        "device": deployment.device_kind(device),
        "lora": str(vllm_config.lora_config is not None),
    }
    fields |= configuration.engine_fields(vllm_config)
    # All but limits are in the key: building a model reads some, and which ones changes between versions.
    fields |= configuration.all_fields("lora", vllm_config.lora_config)
    loader = building.loading_classes(vllm_config, source_format.partition(" ")[0])
    fields |= _model_fields(vllm_config, model_config, *loader)
    fields |= {f"version.{name}": value for name, value in (deployment.versions() | code.versions()).items()}
    fields |= {f"rank.{name}": value for name, value in ranks.items()}
    speculative = vllm_config.speculative_config
    if getattr(model_config, "is_hybrid", False) and speculative is not None:
        # Gated delta nets keep the number, but no tensor depends on it.
        fields["speculative.num_speculative_tokens"] = configuration.text(speculative.num_speculative_tokens)
    split = [f"{name}{value}" for name, value in ranks.items() if not value.endswith("/1")]
    rank = " ".join(split) or "single"
    return _key(model_config, "target", rank, fields, source, content)


def variant(refused: EntryKey, where: str, here: str) -> EntryKey:
    """Return the key of the variant that a refused model is: its value at one place sets this model apart.

    Raises:
        NotShareableError: the model was refused more than `MAX_VARIANTS` times; or by the variant of this very
            difference, so that one more variant would be refused, too.
    """
    before = refused.fields.get(VARIANT, "")
    difference = _difference(where, here or "different")
    known = before.split(_APART) if before else []
    if difference in known:
        raise NotShareableError(f"what loading makes of {where} cannot be restored: a model like it was refused there")
    if len(known) >= MAX_VARIANTS:
        raise NotShareableError(f"it differs from {MAX_VARIANTS} published ones: {before}")
    fields = {**refused.fields, VARIANT: _APART.join([*known, difference])}
    return replace(refused, id=_digest(fields), fields=fields)


def check_variants(wanted: EntryKey, where: str, held: Iterable[EntryKey]) -> None:
    """Check that the variant `wanted`, which has another value at `where`, is not one of ever more.

    A time or the name of a temporary folder is another one in each engine: none would ever attach to such a variant.

    Raises:
        NotShareableError: `MAX_VARIANTS` variants of the same model with other values there are held.
    """
    keys = [*held]
    if any(key.id == wanted.id for key in keys):
        return
    before, _, _ = wanted.fields[VARIANT].rpartition(_APART)
    start = _APART.join([*([before] if before else []), _difference(where, "")])
    others = {name: value for name, value in wanted.fields.items() if name != VARIANT}
    alike = [
        key
        for key in keys
        if key.fields.get(VARIANT, "").startswith(start)
        and {name: value for name, value in key.fields.items() if name != VARIANT} == others
    ]
    if len(alike) >= MAX_VARIANTS:
        raise NotShareableError(
            f"{len(alike)} variants of it are held that differ at {where} alone, "
            "so each engine may have a value of its own there"
        )


def _difference(where: str, here: str) -> str:
    return " is ".join(configuration.shortened(text.replace(_APART, ", ")) for text in (where, here))


def draft_fields(vllm_config: Any, draft_config: Any) -> dict[str, str]:
    """Return what a draft's own configuration adds to its key. Call this before the target is built."""
    fields = configuration.all_fields("speculative", vllm_config.speculative_config)
    return fields | _model_fields(vllm_config, draft_config)


def compute_draft(
    fields: dict[str, str],
    draft_config: Any,
    target: EntryKey,
    source_format: str,
    source: Path | None,
    content: dict[str, str],
) -> EntryKey:
    """Compute a draft's key: `draft_fields`, its checkpoint (with MTP, the target's), and all fields of the target.

    The config that reaches the draft's loader differs between methods and versions of vLLM. Each follows from these.
    """
    fields = fields | {f"target.{name}": value for name, value in target.fields.items()}
    fields["source_format"] = source_format
    return _key(draft_config, "draft", target.rank, fields, source, content)


def _key(
    model_config: Any, role: str, rank: str, fields: dict[str, str], source: Path | None, content: dict[str, str]
) -> EntryKey:
    place = os.path.abspath(source) if source else ""
    small = {name: text for name, text in content.items() if text.startswith(checkpoint.SMALL)}
    weights = {name: identity for name, identity in content.items() if name not in small}
    small = {name if name.isprintable() else ascii(name): text for name, text in small.items()}
    fields = fields | {f"file.{name}": text.removeprefix(checkpoint.SMALL)[:_SHORT] for name, text in small.items()}
    fields |= _named_files(fields, place, content) | {CHECKPOINT: _digest(weights)}
    return EntryKey(_digest(fields), model_name(model_config.model), role, rank, fields, place, content)


def _model_fields(vllm_config: Any, model_config: Any, *involved: type) -> dict[str, str]:
    fields = configuration.model_fields(model_config)
    model_class = building.model_class(vllm_config, model_config)
    if model_class is not None:
        quantization = building.quantization_classes(vllm_config)
        fields |= code.fields(model_class, type(model_config.hf_config), *quantization, *involved)
    return fields | _remote_code(model_config) | _tokenizer(model_config)


def _remote_code(model_config: Any) -> dict[str, str]:
    """Return code that a checkpoint takes from another repository, as in "org/repo--modeling.Model".

    The checkpoint's own code is one of its files.
    """
    if not model_config.trust_remote_code:
        return {}
    named = (one for one in _strings(configuration.text(getattr(model_config.hf_config, "auto_map", None) or {})))
    fields = {}
    for repository in sorted({name.partition("--")[0] for name in named if "--" in name}):
        place = checkpoint.checkpoint_dir(repository, model_config.code_revision, None)
        for path in sorted(place.glob("*.py")) if place is not None else ():
            fields[f"code.{repository}/{path.name}"] = digest_of(path)[:_SHORT]
    return fields


def _tokenizer(model_config: Any) -> dict[str, str]:
    """Return the tokenizer of a model whose weights follow from tokens (a reranker made of a language model)."""
    hf = model_config.hf_config
    configs = (hf, hf.get_text_config())
    if all(getattr(one, name, None) is None for one in configs for name in ("classifier_from_token", "method")):
        return {}
    place = checkpoint.checkpoint_dir(model_config.tokenizer, model_config.tokenizer_revision, None)
    if place is None or not place.is_dir():
        return {"tokenizer": str(model_config.tokenizer)}
    names = sorted(one.name for one in place.iterdir() if one.is_file() and one.name.startswith(_TOKENIZER))
    mode = configuration.text(getattr(model_config, "tokenizer_mode", None))
    return {"tokenizer": mode} | {f"tokenizer.{name}": digest_of(place / name)[:_SHORT] for name in names}


def _named_files(fields: Mapping[str, str], place: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return identities of the files that values of fields name, by full path or by a path below the checkpoint.

    Of a folder these are the weights in it: Rust or C++ may read them, which nothing sees.

    Args:
        known: files of the checkpoint, by relative name, that the key holds anyway.
    """
    found = {}
    for field, value in fields.items():
        if "/" not in value and "." not in value:
            continue
        for number, name in enumerate(_strings(value)):
            path, called = os.path.join(place, name), f"named.{field}" + (f".{number}" if number else "")
            try:
                paths = {called: path} if os.path.isfile(path) else _weights_in(called, os.path.normpath(path), place)
                for one, each in paths.items():
                    if os.path.relpath(each, place or "/") not in known:
                        found[one] = _identity(Path(each))
            except (OSError, ValueError):  # the text names no file
                continue
    return found


def _weights_in(called: str, folder: str, place: str) -> dict[str, str]:
    is_around = folder == place or places.is_below(place, folder) or places.is_anybodys(folder)
    if is_around or places.is_no_models(folder) or not os.path.isdir(folder):
        return {}
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    return {
        f"{called}/{name}": os.path.join(folder, name) for name in names if name.endswith(checkpoint.WEIGHT_SUFFIXES)
    }


def _identity(path: Path) -> str:
    if path.stat().st_size <= _LARGEST_SMALL_FILE:
        return digest_of(path)[:_SHORT]
    return checkpoint.identities_of([path], Digests())[path]


def _strings(value: str) -> Iterator[str]:
    """Yield the texts in a field's JSON."""
    try:
        waiting = [json.loads(value)]
    except ValueError:
        waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and one:
            yield one
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
