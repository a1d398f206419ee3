"""Command blocks that need no engine, run in a shell beside a companion that holds a small model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, of_kind
from tests.support.place import KEY, Place
from tests.support.publishing import Small, load
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.identity import EntryKey

MODEL = "org/model"


def run(text: str, environment: dict[str, str], timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """Run commands as one pastes them, all of them, until one fails."""
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT,
        env={**environment, "PATH": path, "MODEL": MODEL},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.parametrize("block", of_kind("beside a companion"), ids=lambda block: block.id)
def test_beside_a_companion(block: Block, place: Place) -> None:
    """Every command succeeds, and what it names is there."""
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, Small(), key=EntryKey(KEY.id, MODEL, fields=KEY.fields))
    done = run(block.text, place.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if "doctor" in block.text:
        assert "ok " in done.stdout
    if "status" in block.text:
        assert MODEL.rpartition("/")[2] in done.stdout


@pytest.mark.parametrize("block", of_kind("cpu settings"), ids=lambda block: block.id)
def test_cpu_settings(block: Block, place: Place) -> None:
    """The variable leads to a checkpoint that is installed."""
    done = run(block.text + 'cat "$MODEL/config.json"\n', place.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "bert"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
@pytest.mark.parametrize("block", of_kind("kubectl"), ids=lambda block: block.id)
def test_kubectl(block: Block, place: Place) -> None:
    """The kustomization builds."""
    done = run(block.text, place.environment)
    assert done.returncode == 0, done.stderr
    assert "kind: Deployment" in done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("block", of_kind("systemd"), ids=lambda block: block.id)
def test_systemd(block: Block, place: Place) -> None:
    """The unit is valid, but for a program and a user that are not here."""
    done = run(block.text, place.environment)
    complaints = [line for line in done.stderr.splitlines() if "vllm-companion@" in line]
    assert [line for line in complaints if "/opt/vllm/bin/vllm-companion is not executable" not in line] == []
