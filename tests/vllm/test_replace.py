"""An engine serves on while another model's memory comes to the addresses of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import architectures
from tests.process.conftest import Place
from tests.vllm.test_turns import Process

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHILD = str(Path(__file__).with_name("replace_child.py"))


def pair(directory: Path, *, tiny: bool) -> list[str]:
    """Two models of the same shape, with other weights."""
    paths = [directory / name for name in ("first", "second")]
    for path in paths:
        architectures.llama(path, tiny, name=path.name)
    return [str(path) for path in paths]


def check(place: Place, environment: dict[str, str], logs: Path, models: list[str], **options: Any) -> None:
    """Tokens are those of whatever is mapped; `models` are published by engines of their own first."""
    publisher = Process(place, environment, logs / "published", models=models, **options)
    first, second = (result["tokens"] for result in publisher.result())
    publisher.end()
    assert first != second
    process = Process(place, environment, logs / "replaced", child=CHILD, models=models, **options)
    assert process.result() == [first, second, first, second]
    process.end()


def test_another_models_memory_gives_that_models_tokens(
    place: Place, engine_environment: dict[str, str], tmp_path: Path
) -> None:
    """And its own gives its own after the way back. Nothing in the engine was told."""
    flags = {"dtype": "float32", "enforce_eager": True}
    check(place, engine_environment, tmp_path, pair(tmp_path, tiny=True), flags=flags)
