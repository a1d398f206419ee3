"""The generated and enumerated parts of the docs are complete."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from vllm_companion_plugin import settings
from vllm_companion_plugin.cli import exits, generation_table, table, verify
from vllm_companion_plugin.cli.doctor.check import OK, Check
from vllm_companion_plugin.core import metrics
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    GenerationStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
)
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import BY_CODE
from vllm_companion_plugin.holder.registry import table as registry_table

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_the_settings_table_is_the_generated_one() -> None:
    assert settings.to_markdown() in (DOCS / "settings.md").read_text()


def test_the_metrics_table_is_the_generated_one() -> None:
    assert metrics.to_markdown() in (DOCS / "operations.md").read_text()


def test_the_diagrams_of_states_are_the_generated_ones() -> None:
    assert registry_table.to_markdown() in (DOCS / "architecture.md").read_text()


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


def test_the_table_of_exit_statuses_is_the_generated_one() -> None:
    assert exits.to_markdown() in (DOCS / "guide" / "cli.md").read_text()


def fields_of(heading: str) -> set[str]:
    """Fields that docs/guide/cli.md lists below a line that begins with `heading`."""
    _, _, rest = (DOCS / "guide" / "cli.md").read_text().partition(f"\n{heading}")
    table = rest.split("\n\n")[1]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_json_has_the_fields_that_the_guide_lists() -> None:
    """In `status`, `doctor` and `verify`."""
    loader = LoaderInfo(1, "c", 1.0, Progress("loading"))
    lease = LeaseStatus(1, "c", LeaseState.ATTACHED, 1.0)
    generation = GenerationStatus(1, "v", 1.0, 1, True, ())
    entry = EntryStatus(
        EntryKey("ab", "m"), EntryState.LOADING, 1, 0, 0, "", 0.0, 0.0, loader, (lease,), generations=(generation,)
    )
    [companion] = table.to_json([CompanionStatus("cpu", 1, "v", 1, 1.0, 1.0, 0.0, (entry,))])
    [shown] = companion["entries"]
    assert fields_of("`status --json`") == companion.keys()
    assert fields_of("An entry:") == shown.keys()
    text = (DOCS / "guide" / "cli.md").read_text()
    [written] = generation_table.to_json([("cpu", entry)])
    assert fields_of("`generations --json`") == written.keys()
    for name in ("loader", "leases", "generations"):
        row = re.search(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
        inner = shown[name] if name == "loader" else shown[name][0]
        assert row is not None
        assert inner.keys() <= set(re.findall(r"`(\w+)`", row[1]))
    assert fields_of("`doctor --json`") == asdict(Check("", OK, "")).keys()
    verdict = verify.Verdict("m", [], {}, [verify.Rank("single")], "equal", True, 1.0).to_json()
    assert fields_of("`verify --json`") == verdict.keys()
    assert fields_of("A rank of `verify --json`") == verdict["ranks"][0].keys()
