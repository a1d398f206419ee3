"""The generated and enumerated parts of the docs are complete."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_companion_plugin import settings
from vllm_companion_plugin.core import metrics
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import BY_CODE
from vllm_companion_plugin.holder.registry import table

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_the_settings_table_is_the_generated_one() -> None:
    assert settings.to_markdown() in (DOCS / "settings.md").read_text()


def test_the_metrics_table_is_the_generated_one() -> None:
    assert metrics.to_markdown() in (DOCS / "operations.md").read_text()


def test_the_diagrams_of_states_are_the_generated_ones() -> None:
    assert table.to_markdown() in (DOCS / "architecture.md").read_text()


def test_the_table_of_patches_is_the_generated_one() -> None:
    assert (DOCS / "patches.md").read_text().endswith(patches.to_markdown())


def test_every_error_code_is_explained() -> None:
    text = (DOCS / "errors.md").read_text()
    assert [code for code in BY_CODE if f"`{code}`" not in text] == []


def test_every_threat_has_a_test() -> None:
    text = (DOCS / "security.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    threats = [(threat, re.findall(r"`(test_\w+)`", test)) for threat, _, test in rows if threat.strip() != "threat"]
    assert len(threats) > 15
    assert [threat for threat, tests in threats if not tests] == []
    code = "\n".join(path.read_text() for path in (DOCS.parent / "tests").rglob("test_*.py"))
    assert [test for _, tests in threats for test in tests if f"def {test}(" not in code] == []
