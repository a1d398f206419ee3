"""Which fields of vLLM's configuration, of those that the key leaves out, a model's own code reads.

The key leaves out limits and what belongs to requests (`configuration`), because vLLM's own models load the same with
any of them. Code outside vLLM may make weights or sizes of one. So what such code reads while it loads counts, and of
what it reads while it builds, each number that loading leaves in the model. An engine with another value is a variant.
What post-processing reads does not count, as each engine does that for itself.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

import torch

from vllm_companion_plugin.core.module_tree import Manifest
from vllm_companion_plugin.engine.identity import configuration, openers, places
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.threads import Threads
from vllm_companion_plugin.errors import ParityError

_ROWS = {
    "model": patches.READS_OF_MODEL,
    "scheduler": patches.READS_OF_SCHEDULER,
    "cache": patches.READS_OF_CACHE,
    "lora": patches.READS_OF_LORA,
    "multimodal": patches.READS_OF_MULTIMODAL,
    "model.pooler_config": patches.READS_OF_POOLER,
    "compilation": patches.READS_OF_COMPILATION,
    "parallel": patches.READS_OF_PARALLEL,
    "load": patches.READS_OF_LOAD,
    "speculative": patches.READS_OF_SPECULATIVE,
    "attention": patches.READS_OF_ATTENTION,
    "kernel": patches.READS_OF_KERNEL,
}
_OF_MODEL = {"multimodal": "multimodal_config", "model.pooler_config": "pooler_config"}
_WHOLE = ("copy.py", "copyreg.py", "pickle.py")
"""Code of Python that asks for all fields, to copy or to show them. Who reads the copy is seen."""
_NUMBER = re.compile(r"\d+")
_LEAST = 2
"""Smaller numbers say nothing about where they come from."""


class FlagReads:
    """The fields that code outside vLLM read, by name ("scheduler.max_num_seqs")."""

    def __init__(self) -> None:
        self._building: set[str] = set()
        self._loading: set[str] = set()
        self._reads = self._building
        self._watch = ExitStack()

    @contextmanager
    def watching(self, threads: Threads) -> Iterator[None]:
        """While open, reads of those threads are noted, until loading ends."""

        def wrap(kind: str) -> Callable[[Any], Any]:
            def of(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
                def get(config: Any, name: str) -> Any:
                    found = read(config, name)
                    if threads.is_here and not callable(found):  # a method reads by itself
                        self._note(kind, list(found) if name == "__dict__" else [name], sys._getframe(1).f_code)
                    return found

                return get

            return of

        with self._watch:
            for kind, row in _ROWS.items():
                self._watch.enter_context(row.on(row.find_owner(), wrap(kind)))
            yield

    def begin_loading(self) -> None:
        """The model was built, and will be loaded."""
        self._reads = self._loading

    def end_loading(self) -> None:
        """The model was loaded, and will be post-processed. What that compiles may read configurations."""
        self._watch.close()

    def _note(self, kind: str, fields: list[str], reader: types.CodeType) -> None:
        names = (f"{kind}.{field}" for field in fields)
        new = [name for name in names if name not in self._reads and configuration.is_left_to_engines(name)]
        if new and not _asks_for_all(reader.co_filename, reader.co_name) and openers.is_outside(acting=_acts):
            self._reads.update(new)

    def flags(self, manifest: Manifest, vllm_config: Any, model_config: Any) -> dict[str, str]:
        """The fields that count for the model of `manifest`, with their texts here."""
        building = {name: _text(vllm_config, model_config, name) for name in self._building - self._loading}
        left = _numbers(manifest) if building else set()
        counts = {name for name, text in building.items() if text.isdecimal() and text in left and int(text) >= _LEAST}
        return {name: _text(vllm_config, model_config, name) for name in sorted(self._loading | counts)}


@functools.cache
def _asks_for_all(path: str, function: str) -> bool:
    """Whether a function asks for all fields. It goes by where that is: codes of two files may be equal."""
    name = os.path.basename(path)
    if name == "<string>":  # as `dataclasses` makes it
        return function == "__repr__"
    if name == "dataclasses.py":
        return function in ("replace", "_replace") and places.is_pythons(path)
    return name in _WHOLE and places.is_pythons(path)


def _acts(code: types.CodeType) -> bool:
    """Whether it is code of a configuration that answers its caller, and neither makes nor copies configurations."""
    is_making = code.co_name.startswith("_") or code.co_name in ("replace", "with_hf_config", "compute_hash")
    return places.is_vllms_configuration(code.co_filename) and not is_making


def check(flags: Mapping[str, str], vllm_config: Any, model_config: Any) -> None:
    """Raises `ParityError` if a field of `flags` has another text here."""
    for name, there in flags.items():
        if (here := _text(vllm_config, model_config, name)) != there:
            text = f"{name}, which the model's code loads by, is {there} there and {here} here."
            raise ParityError(text, f"flag {name}", here)


def _text(vllm_config: Any, model_config: Any, name: str) -> str:
    kind, _, field = name.rpartition(".")
    if kind in _OF_MODEL:
        config = getattr(model_config, _OF_MODEL[kind], None)
    else:
        config = model_config if kind == "model" else getattr(vllm_config, f"{kind}_config", None)
    value = getattr(config, field, None)
    return configuration.shortened(configuration.text(value)) if _is_plain(value) else "not comparable"


def _is_plain(value: Any) -> bool:
    """Whether it is a flag. A configuration may also hold layers, and other objects of the process."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name, None)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype, os.PathLike))


def _numbers(manifest: Manifest) -> set[str]:
    """The whole numbers that loading left in values, and the sizes of tensors that it added, as texts."""
    found = {str(size) for module in manifest.modules for slot in module.observed.added for size in slot.shape}
    for module in manifest.modules:
        for _, after in module.observed.values.values():
            found.update(_NUMBER.findall(after or ""))
    for value in manifest.common_values:
        found.update(_NUMBER.findall(value.after))
    return found
