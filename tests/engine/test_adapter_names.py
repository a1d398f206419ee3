"""Names of adapters over HTTP, with vLLM's own serving code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest

from vllm_companion_plugin.engine.vllm.adapters import serving

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With an adapter of a companion, and one that vLLM was told to take for pictures."""
    monkeypatch.setattr(BaseServing, "_get_message_types", serving._without_ours(BaseServing._get_message_types))
    known = {"text": LoRARequest("text", 1, "companion:text"), "image": LoRARequest("image", 2, "/adapters/image")}
    made: Any = object.__new__(BaseServing)
    made.models = SimpleNamespace(lora_requests=known, is_base_model=lambda name: name == "base")
    made._is_model_supported = made.models.is_base_model
    return made


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [("base", [], None), ("base", [PICTURE], "image"), ("text", [], "text"), ("text", [PICTURE], "text")],
)
def test_an_adapter_that_is_called_like_a_kind_of_content(
    server: Any, model: str, more: list[Any], expected: str | None
) -> None:
    """It answers who asks for it, and nobody else."""
    content = [{"type": "text", "text": "Hello"}, *more]
    request = ChatCompletionRequest(model=model, messages=[{"role": "user", "content": content}])
    found = server._maybe_get_adapters(request, supports_default_mm_loras=True)
    assert (found and found.lora_name) == expected
