"""What a Transformers model is made of, where that is in an entry, and the model that is made of it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_utils

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.core.placements import Placed, Source, View
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import NotShareableError, SettingsError
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.training.names import Part, parts_of
from vllm_companion_plugin.training.whole import whole_view
from vllm_companion_plugin.wire.manifest import sources_from_bytes

_ELSEWHERE = "is laid out differently, or is spread over ranks"
_WARMUP = "caching_allocator_warmup"
_one_at_a_time = threading.RLock()
_SHOWN = 8
"""Most names in an error."""


@dataclass(frozen=True)
class Blueprint:
    """A model without memory, and where its tensors are in an entry.

    Attributes:
        name: of the model, as engines have it.
        bare: the model, on the meta device.
        where: the checkpoint's directory, or its name.
        parts: of each tensor in its state, by name.
        sources: where tensors of the checkpoint are in the entry, by their names.
    """

    name: str
    bare: Any
    config: Any
    options: Mapping[str, Any]
    dtype: torch.dtype
    where: str
    parts: Mapping[str, Sequence[Part]]
    sources: Mapping[str, Source]

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has of it: parameters and persistent buffers, by name."""
        return dict(self.bare.state_dict())

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; those that are tied once."""
        return dict(self.bare.named_parameters())

    @functools.cached_property
    def tied(self) -> set[str]:
        """Names under which Transformers puts another parameter of the model."""
        keys = getattr(self.bare, "all_tied_weights_keys", None)
        if keys is None:
            keys = self.bare._tied_weights_keys if self.bare.config.tie_word_embeddings else ()
        return set(keys or ())

    def missing(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Of `reasons` why tensors are no views, those of tensors that nothing else is tied to."""
        return {name: why for name, why in reasons.items() if name not in self.tied}

    def buffers(self, views: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of those of `views` that are buffers."""
        there = {*self.parameters, *self.tied}
        return {name: view.clone() for name, view in views.items() if name not in there}

    def make(self, state: Mapping[str, torch.Tensor], device: torch.device) -> Any:
        """The model with these tensors for its own. Raises `NotShareableError` if others than these are in it."""
        # Transformers wants accelerate for any device that is named, the default one too.
        where = {} if device.type == "cpu" else {"device_map": {"": device}}
        options = {**_dtype_option(self.dtype), **where, **self.options}
        with _nothing_reserved():
            made, info = type(self.bare).from_pretrained(
                None,
                config=self.config,
                state_dict=dict(state),
                output_loading_info=True,
                **options,
            )
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        left = sorted({str(name) for kind in kinds for name in info[kind]} - self.tied)
        if left:
            raise NotShareableError(
                f"Transformers {transformers.__version__} has made {', '.join(left[:_SHOWN])} of {self.name} of "
                "nothing that is in the checkpoint."
            )
        made.name_or_path = made.config.name_or_path = self.name  # for what is saved beside it, as PEFT does
        if made.can_generate():
            with contextlib.suppress(OSError):  # a checkpoint need not have one
                made.generation_config = transformers.GenerationConfig.from_pretrained(self.where)
        return made


@contextlib.contextmanager
def _nothing_reserved() -> Iterator[None]:
    """While open, Transformers takes no memory of a GPU before it loads.

    It takes as much as the whole model has, and leaves it to PyTorch for what it is about to load: here that is there
    already, and such a block would be a second copy's worth of the GPU.
    """
    with _one_at_a_time:
        inner = getattr(modeling_utils, _WARMUP, None)
        if inner is not None:
            setattr(modeling_utils, _WARMUP, lambda *_, **__: None)
        try:
            yield
        finally:
            if inner is not None:
                setattr(modeling_utils, _WARMUP, inner)


def blueprint_of(attachment: Attachment, auto_class: Any, given: Mapping[str, Any] | None) -> Blueprint:
    """The model that a checkpoint makes in the entry's dtype. Other arguments as of `from_companion`."""
    options, auto_class = dict(given or {}), auto_class or transformers.AutoModelForCausalLM
    key = attachment.held.key
    where = key.source if os.path.isdir(key.source) else key.model
    sources = sources_from_bytes(attachment.manifest.sources)
    dtype = _main_dtype(sources)
    if {"dtype", "torch_dtype"} & options.keys():
        raise SettingsError("options: the dtype is that of the engines.", remedy="Start them with another --dtype.")
    revision = {name: options.pop(name) for name in ("revision",) if name in options}
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(
        where, **revision, **{name: options[name] for name in ("trust_remote_code",) if name in options}
    )
    with torch.device("meta"):
        bare = auto_class.from_config(config, **_dtype_option(dtype), **options)
    return Blueprint(key.model, bare, config, options, dtype, where, parts_of(bare, sources), sources)


def _main_dtype(sources: Mapping[str, Source]) -> torch.dtype:
    """In which most of the elements are that vLLM has copied."""
    count = Counter[str]()
    for source in sources.values():
        for placed in source.copies:
            count[placed.dtype] += math.prod(placed.shape)
    return dtype_of(count.most_common(1)[0][0]) if count else torch.get_default_dtype()


def _dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}


def views_of(blueprint: Blueprint, of: ArenaViews) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor of a model's state as a view of the entry's memory; or why it is none."""
    views: dict[str, torch.Tensor] = {}
    reasons: dict[str, str] = {}
    for name, tensor in blueprint.state.items():
        parts, is_parameter = blueprint.parts[name], name in blueprint.parameters
        dtype, why = _dtype_of(parts, blueprint.sources, tensor.dtype if is_parameter else None)
        pieces, why = ([], why) if why else _pieces(parts, blueprint.sources, dtype)
        view = None if why else whole_view(tuple(tensor.shape), pieces, dtype.itemsize)
        if view is None:
            reasons[name] = why or _ELSEWHERE
            continue
        last = sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
        part = of.bytes_at(view.offset * dtype.itemsize, (last + 1) * dtype.itemsize).view(dtype)
        views[name] = part.as_strided(view.shape, view.stride)
    return views, reasons


def _dtype_of(
    parts: Sequence[Part], sources: Mapping[str, Source], wanted: torch.dtype | None
) -> tuple[torch.dtype, str]:
    """In which engines have a tensor's parts; or why they are of no use.

    Args:
        wanted: of a parameter, which vLLM casts when it copies, as Transformers does. None: a buffer, of which the
            model has its own copy in whatever dtype Transformers wants, so that it must not have been cast before.
    """
    none = torch.uint8
    if not parts:
        return none, "is not in the checkpoint, or under another name"
    if any(not sources[part.name].copies for part in parts):
        return none, "was computed when vLLM loaded it"
    types = {placed.dtype for part in parts for placed in sources[part.name].copies}
    before = {sources[part.name].dtype for part in parts}
    if wanted is None and types != before:
        return none, f"is a buffer of {' and '.join(sorted(before))}, and {' and '.join(sorted(types))} in engines"
    if len(types) > 1 or (wanted is not None and types != {str(wanted).removeprefix("torch.")}):
        return none, f"is {' and '.join(sorted(types))} in engines, and {wanted or 'of one dtype'} here"
    return dtype_of(types.pop()), ""


def _pieces(parts: Sequence[Part], sources: Mapping[str, Source], dtype: torch.dtype) -> tuple[list[Placed], str]:
    """All copies of a tensor's parts; or why there are none."""
    pieces: list[Placed] = []
    for part in parts:
        source = sources[part.name]
        whole = whole_view(source.shape, source.copies, dtype.itemsize)
        if whole is None:
            return [], _ELSEWHERE
        # Transformers may leave out axes with one element where it takes a parameter apart.
        stride = [step for size, step in zip(whole.shape, whole.stride, strict=True) if size != 1]
        shape = [size for size in whole.shape if size != 1]
        if shape != [size for size in part.shape if size != 1]:
            return [], f"has the shape {source.shape} in the checkpoint"
        last = part.steps[-1]
        steps = [(size, step) for size, step in zip(last.shape, last.stride, strict=True) if size != 1]
        view = View(tuple(size for size, _ in steps), tuple(step for _, step in steps), last.offset)
        pieces.append(
            Placed(
                (*part.steps[:-1], view),
                whole.offset * dtype.itemsize,
                tuple(shape),
                tuple(stride),
                str(dtype),
            )
        )
    return pieces, ""


def refuse(problems: Mapping[str, str], blueprint: Blueprint, label: str, remedy: str) -> None:
    """Raise `NotShareableError` if there are tensors that are no views; it names them and why."""
    if not problems:
        return
    state = blueprint.state
    shown = [f"{name} ({state[name].nbytes} bytes) {why}" for name, why in problems.items()]
    what = several(shown, _SHOWN, "; ")
    raise NotShareableError(f"{label} has no view of {len(problems)} tensors: {what}.", remedy=remedy)


def bind(
    made: nn.Module,
    views: Mapping[str, torch.Tensor],
    own: Collection[str],
    as_parameter: Callable[[str, nn.Parameter], nn.Parameter],
) -> tuple[list[str], dict[str, str]]:
    """Put `as_parameter(name, parameter)` in place of what Transformers has put on the views.

    Returns:
        The names; and why others than `own` are not on their views.
    """
    frozen: dict[int, nn.Parameter] = {}
    names: list[str] = []
    problems: dict[str, str] = {}
    for name, parameter in list(made.named_parameters(remove_duplicate=False)):
        path, _, attribute = name.rpartition(".")
        module = made.get_submodule(path)
        view = views.get(name)
        if id(parameter) not in frozen:
            if view is None or view.data_ptr() != parameter.data_ptr() or view.dtype != parameter.dtype:
                if name not in own:
                    problems[name] = f"was made {parameter.dtype} by Transformers {transformers.__version__}"
                continue
            frozen[id(parameter)] = as_parameter(name, parameter)
        module._parameters[attribute] = frozen[id(parameter)]
        names.append(name)
    return names, problems
