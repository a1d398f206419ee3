"""Errors of adapters as vLLM answers them over HTTP: its own types decide the status."""

from __future__ import annotations

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from vllm_companion_plugin.errors import BadRequestError, CompanionError, EntryNotFoundError, StaleError


class AdapterNotFoundError(EntryNotFoundError, VLLMNotFoundError, ValueError):
    """No companion has the adapter, or the generation of it, that a request asks for: 404."""


class AdapterRefusedError(BadRequestError, VLLMValidationError):
    """This engine cannot serve the adapter that a request asks for: 400."""


def refusal_of(error: CompanionError) -> CompanionError:
    """The same error, of a type that vLLM answers with 4xx if the request is what is wrong."""
    if isinstance(error, (EntryNotFoundError, StaleError)):
        return AdapterNotFoundError(error.what, remedy=error.remedy)
    if isinstance(error, BadRequestError):
        return AdapterRefusedError(error.what, remedy=error.remedy)
    return error
