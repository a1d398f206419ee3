"""The generated and enumerated parts of the docs are complete."""

from __future__ import annotations

from pathlib import Path

from vllm_companion_plugin import settings
from vllm_companion_plugin.companion import counters
from vllm_companion_plugin.errors import BY_CODE

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_the_settings_table_is_the_generated_one() -> None:
    assert settings.to_markdown() in (DOCS / "settings.md").read_text()


def test_the_metrics_table_is_the_generated_one() -> None:
    assert counters.to_markdown() in (DOCS / "operations.md").read_text()


def test_every_error_code_is_explained() -> None:
    text = (DOCS / "errors.md").read_text()
    assert [code for code in BY_CODE if f"`{code}`" not in text] == []
