"""A Transformers model on the memory of an entry, made without a second copy."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers
from torch import nn

from vllm_companion_plugin.client.api import CompanionClient, torch_device_of
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.children import environment_of
from vllm_companion_plugin.core.placements import Placed, Source, View
from vllm_companion_plugin.errors import (
    CompanionUnavailableError,
    EntryNotFoundError,
    NotShareableError,
    SettingsError,
)
from vllm_companion_plugin.host.files import is_version
from vllm_companion_plugin.memory.tensors.views import ArenaViews, dtype_of
from vllm_companion_plugin.settings import Given
from vllm_companion_plugin.training.frozen import freeze
from vllm_companion_plugin.training.names import Part, parts_of
from vllm_companion_plugin.training.sharing import Sharing
from vllm_companion_plugin.training.whole import whole_view
from vllm_companion_plugin.wire.manifest import sources_from_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("vllm.companion.training")

LOADER = "vllm_companion_plugin.engine.run.warm"
"""The module that loads and publishes a model, and needs vLLM."""
_COPY = "Name those that may be copies: copy=[NAME or PATTERN]."
_ELSEWHERE = "is laid out differently, or is spread over ranks"
_SHOWN = 8
"""Most names in an error."""


def from_companion(
    model: str,
    *,
    device: str | torch.device | None = None,
    rank: str | None = None,
    key_id: str = "",
    copy: Collection[str] = (),
    flags: Sequence[str] = (),
    auto_class: Any = None,
    name: str = "trainer",
    options: Mapping[str, Any] | None = None,
    **settings: Unpack[Given],
) -> Any:
    """A `PreTrainedModel` whose parameters are the entry's memory: read-only, `requires_grad=False`, no second copy.

    It is as `from_pretrained` would make it in the entry's dtype. Buffers are its own. Writing to a parameter raises
    `SharedWeightsError`; a parameter that has been replaced (`.to(dtype)`, FSDP) raises `NotSharedError` at the next
    forward pass. The memory stays mapped as long as a parameter exists.

    Args:
        model: as engines name it. If nobody has it, vLLM loads it in a process that ends then, as
            `vllm-companion serve MODEL` does.
        device: as of `CompanionClient`; None: torch's current CUDA device, or "cpu" without CUDA.
        rank, key_id: as of `CompanionClient.attach`.
        copy: names of parameters, or patterns as of `fnmatch`, that may be read from the checkpoint into memory of
            this process if they cannot be views. All others that cannot are an error.
        flags: of vLLM, with which it is loaded if nobody has it.
        auto_class: of Transformers; None: `AutoModelForCausalLM`.
        name: who we are, for `status`.
        options: for Transformers' `from_config` and `from_pretrained`, e.g. `attn_implementation`.

    Raises:
        NotShareableError: parameters cannot be views; it names them, their bytes and why.
        CompanionUnavailableError: nobody has the model, and it could not be loaded.
        CompanionError: as `CompanionClient.attach`.
    """
    client = CompanionClient(device, **settings)
    attachment = attached(client, model, rank, key_id, name, tuple(flags))
    try:
        return _build(attachment, copy, blueprint_of(attachment, auto_class, options))
    except BaseException:
        attachment.close()
        raise


def attached(
    client: CompanionClient, model: str, rank: str | None, key_id: str, name: str, flags: tuple[str, ...] = ()
) -> Attachment:
    """Attached to `model`, which vLLM loads if nobody has it. Raises as `from_companion`."""
    with contextlib.suppress(EntryNotFoundError, CompanionUnavailableError):
        return client.attach(model, rank, key_id=key_id, name=name)
    if not key_id:
        logger.info("Nobody has %s on %s: vLLM loads it.", model, client.device)
        environment = environment_of(torch_device_of(client.device), client.settings)
        status = subprocess.run(
            [sys.executable, "-m", LOADER, model, *flags], env=environment, stdin=subprocess.DEVNULL, stdout=2
        ).returncode
        if status:
            raise CompanionUnavailableError(
                f"{model} is not held on {client.device}, and was not loaded: vLLM ended with status {status}.",
                remedy="Its lines on standard error say why.",
            )
    return client.attach(model, rank, key_id=key_id, name=name)


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
        options = {**_dtype_option(self.dtype), **self.options}
        made, info = type(self.bare).from_pretrained(
            None,
            config=self.config,
            state_dict=dict(state),
            device_map={"": device},
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


def _build(attachment: Attachment, copy: Collection[str], blueprint: Blueprint) -> Any:
    views, problems = views_of(blueprint, attachment.views())
    problems, own = blueprint.missing(problems), set[str]()
    while True:  # once more, if Transformers wants another dtype of some than engines have
        more = {name for name in problems if any(fnmatch.fnmatchcase(name, pattern) for pattern in copy)}
        refuse({name: why for name, why in problems.items() if name not in more}, blueprint, attachment.label, _COPY)
        own |= more
        read = _read(attachment, {name: blueprint.parts[name] for name in own}, blueprint.where) if own else {}
        state = {name: view for name, view in {**views, **blueprint.buffers(views)}.items() if name not in own}
        state = {name: tensor for name, tensor in state.items() if name not in blueprint.tied}
        made = blueprint.make({**read, **state}, attachment.device)
        shared, problems = bind(made, views, own, freeze)
        if not problems:
            break
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    copied = {name: each.nbytes for name, each in made.named_parameters() if name not in shared}
    sharing = Sharing(made, shared, attachment, copied)
    logger.info(
        "%s uses %.2f GiB of %s, generation %d%s.",
        *(type(made).__name__, sharing.shared_bytes / 2**30, attachment.label, attachment.generation),
        f"; {len(copied)} parameters ({sum(copied.values()) / 2**30:.2f} GiB) are copies" if copied else "",
    )
    return made


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
    shown = [f"{name} ({state[name].nbytes} bytes) {why}" for name, why in list(problems.items())[:_SHOWN]]
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise NotShareableError(f"{label} has no view of {len(problems)} tensors: {'; '.join(shown)}{more}.", remedy=remedy)


def _read(attachment: Attachment, parts: Mapping[str, Sequence[Part]], where: str) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint, by its names, of which those are made that cannot be views.

    Raises:
        NotShareableError: they are not in the files that the entry was made of, or these have changed since.
    """
    named, held = ", ".join(parts), attachment.held
    if held.published.version:
        raise NotShareableError(
            f"{named} of {attachment.label} cannot be copied: a trainer has written {held.published.version}, "
            "which the checkpoint does not have."
        )
    wanted = {part.name for each in parts.values() for part in each}
    found: dict[str, torch.Tensor] = {}
    for name, identity in held.key.files.items():
        file = Path(where, name)
        if not name.endswith(".safetensors") or not file.is_file():
            continue
        with safetensors.safe_open(file, "pt", device=str(attachment.device)) as opened:
            here = wanted & set(opened.keys())
            if here and not is_version(file, identity):
                raise NotShareableError(
                    f"{named} of {attachment.label} cannot be copied: {file} has changed since engines read it."
                )
            for each in here:
                if each in found:
                    raise NotShareableError(f"{each} of {attachment.label} is in several files of {where}.")
                found[each] = opened.get_tensor(each)
        if here and not is_version(file, identity):
            raise NotShareableError(f"{file} was changed while {named} of {attachment.label} was read.")
    unknown = [name for name, each in parts.items() if not each or any(part.name not in found for part in each)]
    if unknown:
        raise NotShareableError(
            f"{', '.join(unknown)} of {attachment.label} are in no safetensors file of {where} that engines have read."
        )
    return found


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
