"""A Transformers model on the memory of an entry, made without a second copy."""

from __future__ import annotations

import fnmatch
import logging
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from vllm_companion_plugin.client.api import CompanionClient, torch_device_of
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.children import environment_of
from vllm_companion_plugin.errors import (
    CompanionUnavailableError,
    EntryNotFoundError,
    NotShareableError,
)
from vllm_companion_plugin.host.files import is_version
from vllm_companion_plugin.settings import Given
from vllm_companion_plugin.training.blueprint import Blueprint, bind, blueprint_of, refuse, views_of
from vllm_companion_plugin.training.frozen import freeze
from vllm_companion_plugin.training.names import Part
from vllm_companion_plugin.training.sharing import Sharing

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("vllm.companion.training")

LOADER = "vllm_companion_plugin.engine.run.warm"
"""The module that loads and publishes a model, and needs vLLM."""
_COPY = "Name those that may be copies: copy=[NAME or PATTERN]."


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
    try:
        return client.attach(model, rank, key_id=key_id, name=name)
    except (EntryNotFoundError, CompanionUnavailableError):
        if key_id:  # of one load among others, that nothing tells how to repeat
            raise
    _load(client, model, flags)
    return client.attach(model, rank, key_id=key_id, name=name)


def _load(client: CompanionClient, model: str, flags: tuple[str, ...]) -> None:
    """Have vLLM load and publish a model. Raises `CompanionUnavailableError` if it does not."""
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
