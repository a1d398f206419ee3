"""The generated and enumerated parts of the docs are complete."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_companion_plugin import settings
from vllm_companion_plugin.cli import exits, parser, table, verify
from vllm_companion_plugin.cli.doctor.check import OK, Check
from vllm_companion_plugin.core import metrics
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
)
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.errors import BY_CODE
from vllm_companion_plugin.holder.registry import table as registry_table

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


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
    entry = EntryStatus(EntryKey("ab", "m"), EntryState.LOADING, 1, 0, 0, "", 0.0, 0.0, loader, (lease,))
    [companion] = table.to_json([CompanionStatus("cpu", 1, "v", 1, 1.0, 1.0, 0.0, (entry,))])
    [shown] = companion["entries"]
    assert fields_of("`status --json`") == companion.keys()
    assert fields_of("An entry:") == shown.keys()
    text = (DOCS / "guide" / "cli.md").read_text()
    for name in ("loader", "leases"):
        row = re.search(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
        inner = shown[name] if name == "loader" else shown[name][0]
        assert row is not None
        assert inner.keys() <= set(re.findall(r"`(\w+)`", row[1]))
    assert fields_of("`doctor --json`") == asdict(Check("", OK, "")).keys()
    verdict = verify.Verdict("m", [], {}, [verify.Rank("single")], "equal", True, 1.0).to_json()
    assert fields_of("`verify --json`") == verdict.keys()
    assert fields_of("A rank of `verify --json`") == verdict["ranks"][0].keys()


def test_probes_are_commands_whose_status_is_documented() -> None:
    """What is held is asked by `status`, which tells "none runs" from "one does not answer"."""
    found = []
    for name in ("docker-compose.yml", "kubernetes.yaml", "kubernetes-restricted.yaml"):
        for document in yaml.safe_load_all((DOCS / "deploy" / name).read_text()):
            pod = document.get("spec", {}).get("template", document).get("spec", {})
            for container in [*pod.get("containers", ()), *document.get("services", {}).values()]:
                if "serve" in container.get("command", ()) or "serve" in container.get("entrypoint", ()):
                    probes = [container[kind]["exec"]["command"] for kind in PROBES if kind in container]
                    probes += [container["healthcheck"]["test"][1:]] if "healthcheck" in container else []
                    assert probes, name
                    found += probes
    assert len(found) == 5
    for command in found:
        assert command[0] == "vllm-companion"
        assert parser.parse(command[1:])[0].command == "status"


@pytest.mark.parametrize("name", ["docker-compose.yml", "kubernetes.yaml", "kubernetes-restricted.yaml"])
def test_manifests_share_the_runtime_directory_and_nothing_else(name: str) -> None:
    (*documents,) = yaml.safe_load_all((DOCS / "deploy" / name).read_text())
    pods = [x["spec"].get("template", x)["spec"] for x in documents if "spec" in x]
    containers: list[dict[str, Any]] = [c for pod in pods for c in pod["containers"]]
    containers += [c for x in documents for c in x.get("services", {}).values()]
    assert len(containers) >= 2
    assert not any(pod.get("hostIPC") or pod.get("hostPID") for pod in pods)
    for container in containers:
        assert container.get("ipc", "private") == "private"
        assert "pid" not in container
        assert not container.get("privileged")
        environment = container.get("environment") or {e["name"]: e["value"] for e in container["env"]}
        assert environment["COMPANION_RUNTIME_DIR"] == "/run/vllm-companion/r"
        assert "/run/vllm-companion" in str(container.get("volumes") or container["volumeMounts"])
