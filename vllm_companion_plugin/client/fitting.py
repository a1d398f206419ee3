"""Whether a trainer's tensors fit what they shall replace: all that does not is named in one error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_companion_plugin.core.module_tree import TensorInfo
from vllm_companion_plugin.core.placements import Source
from vllm_companion_plugin.core.text import several
from vllm_companion_plugin.errors import BadRequestError

Weights = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
_SHOWN = 8
"""Most names in an error."""
_REMEDY = "`checkpoint_names` and `names` of the update are those that it has."
_ALWAYS_FINITE = ("torch.float4_e2m1fn_x2",)
"""Types of which no value is NaN or infinite."""


def never(name: str, other: str) -> bool:
    """Each name needs a tensor."""
    return False


def checked(
    weights: Weights,
    known: Collection[str],
    problem: Callable[[str, torch.Tensor], str],
    label: str,
    are_one: Callable[[str, str], bool] = never,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `weights`, each whole and detached, by name. Of a module, buffers are taken that are `known`.

    A parameter that a module has under several names is given under each one that is `known`, unless they `are_one`.

    Those of a module or a mapping are all looked at before the first one comes; those of an iterator one by one.

    Args:
        known: all names that can be right.
        problem: what is wrong with a tensor; empty if nothing is.
        label: what does not take it, for errors.
        are_one: whether a parameter that is given under the second name need not be given under the first, too.

    Raises:
        BadRequestError: with all problems; or a name that an iterator gives twice.
    """

    def refuse_misfits(given: Iterable[tuple[str, Any]]) -> None:
        found = [(name, _no_values(name, tensor) or problem(name, tensor)) for name, tensor in given]
        refuse((text for _, text in found), label, "" if all(name in known for name, _ in found) else _REMEDY)

    if isinstance(weights, nn.Module):
        buffers = {name: buffer for name, buffer in weights.named_buffers() if name in known}
        weights = {**_parameters(weights, known, are_one), **buffers}
    looked_at = isinstance(weights, Mapping)
    if isinstance(weights, Mapping):
        refuse_misfits(weights.items())
        weights = weights.items()
    names: set[str] = set()
    for name, shard in weights:
        if name in names:
            raise BadRequestError(f"{label} was given {name} twice.")
        names.add(name)
        gather = getattr(shard, "full_tensor", None)
        tensor = shard if gather is None else gather()  # of FSDP: all ranks take part
        if not looked_at or tensor is not shard:
            refuse_misfits([(name, tensor)])
        yield name, _plain(tensor)


def _parameters(
    model: nn.Module, known: Collection[str], are_one: Callable[[str, str], bool]
) -> dict[str, torch.Tensor]:
    """As `checked` says it, by name."""
    found: dict[str, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        others = names.setdefault(id(parameter), [])
        if not others or (name in known and not any(are_one(name, other) for other in others)):
            found[name] = parameter
            others.append(name)
    return found


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its memory has its values, all of them and as they are."""
    return not (hasattr(tensor, "full_tensor") or _is_wrapper(tensor) or tensor.is_neg() or tensor.is_conj())


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it is of a class whose values are computed when they are read, so that it has no memory."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return True
    return False


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, detached, in memory that has them."""
    tensor = tensor.detach()
    if _is_wrapper(tensor):
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        made.copy_(tensor)  # what this returns is a wrapper again
        tensor = made
    return tensor.resolve_conj().resolve_neg()


def _no_values(name: str, tensor: Any) -> str:
    """Why there is nothing to copy; empty if there is."""
    if not isinstance(tensor, torch.Tensor):
        return f"{name}, which is {type(tensor).__name__} and no tensor"
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"{name}, which has no values of its own: it is on the meta device, or sparse"
    return ""


def check_open(is_over: bool, label: str) -> None:
    """Raise `BadRequestError` if an update of that entry is over, so that nothing can be written by it."""
    if is_over:
        raise BadRequestError(f"This update of {label} is over.", remedy="Begin another one.")


def refuse(problems: Iterable[str], label: str, remedy: str = "") -> None:
    """Raise `BadRequestError` with those that are not empty, if there are any."""
    found = [text for text in problems if text]
    if found:
        raise BadRequestError(f"{label} cannot take {several(found, _SHOWN, '; ')}.", remedy=remedy)


def misfit(name: str, tensor: torch.Tensor, known: Sequence[TensorInfo | Source], *, check_finite: bool) -> str:
    """How `tensor` differs in shape or dtype from each that it may be like; empty if it is like one of them.

    Args:
        check_finite: a value that is not finite is a difference, too.
    """
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if shape not in [each.shape for each in known]:
        return f"{name} of shape {shape} instead of {known[0].shape}"
    if (shape, dtype) not in [(each.shape, each.dtype) for each in known]:
        return f"{name} of {tensor.dtype} instead of torch.{known[0].dtype}"
    # What is spread over ranks is looked at when they have gathered it, so that all of them find the same.
    if check_finite and not hasattr(tensor, "full_tensor") and not _is_finite(tensor.detach()):
        return f"{name}, which has values that are not finite"
    return ""


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Waits for the device."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or not tensor.numel() or str(tensor.dtype) in _ALWAYS_FINITE:
        return True
    if tensor.itemsize == 1:  # torch knows no order of fp8, of which bfloat16 has every value
        tensor = tensor.to(torch.bfloat16)
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())  # both are NaN if one element is
