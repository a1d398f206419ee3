"""An engine serves on while another model's memory comes to the addresses of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import architectures
from tests.vllm.test_turns import Process, start

__all__ = ["start"]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def pair(directory: Path, *, tiny: bool) -> list[str]:
    """Two models of the same shape, with other weights."""
    paths = [directory / name for name in ("first", "second")]
    for path in paths:
        architectures.llama(path, tiny, name=path.name)
    return [str(path) for path in paths]


def check(start: Callable[..., Process], models: list[str], **options: Any) -> None:
    """Tokens are those of whatever is mapped; `models` are published by engines of their own first."""
    publisher = start(models=models, **options)
    first, second = (result["tokens"] for result in publisher.result())
    publisher.end()
    assert first != second
    process = start("tests.vllm.replace_child", models=models, **options)
    assert process.result() == [first, second, first, second, first]
    process.end()


def test_another_models_memory_gives_that_models_tokens(start: Callable[..., Process], tmp_path: Path) -> None:
    """And its own gives its own after the way back. Nothing in the engine was told."""
    check(start, pair(tmp_path, tiny=True), flags={"dtype": "float32", "enforce_eager": True})
