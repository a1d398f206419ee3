"""The package beside others: it changes no version, and its messages load with every protobuf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent.parent

DECLARED = (
    "filelock>=3.20.1",
    "grpcio>=1.62",
    "grpcio-health-checking>=1.48,<1.63",
    "prometheus-client>=0.18",
    "protobuf>=5.29.6,<8",
    "torch",
)

ROUND_TRIP = """
import google.protobuf, sys, tempfile
from vllm_companion_plugin.client import connect
from vllm_companion_plugin.settings import resolve
with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as directory:
    with connect("cpu", resolve({"runtime_dir": directory + "/r"}), spawn=True) as companion:
        assert companion.status().device == "cpu"
        companion.shutdown()
print(google.protobuf.__version__)
"""


def pip(python: str, *arguments: str) -> None:
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        check=True,
        timeout=240,
        capture_output=True,
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("requirements", "major"),
    [
        (["protobuf==5.29.6", "grpcio==1.62.3", "grpcio-health-checking==1.62.3", "filelock"], "5"),
        (["protobuf>=7,<8", "grpcio", "grpcio-health-checking<1.63", "filelock"], "7"),
    ],
    ids=["oldest", "newest"],
)
def test_a_companion_serves_with_both_ends_of_the_protobuf_range(
    tmp_path: Path, requirements: list[str], major: str
) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip(python, "install", *requirements)
    done = subprocess.run(
        [python, "-W", "error::UserWarning", "-c", ROUND_TRIP],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(major + ".")


@pytest.mark.core
@pytest.mark.timeout(400)
def test_installing_beside_vllm_changes_no_version(tmp_path: Path) -> None:
    """What pip would do in an environment that has vLLM, asked with the companion's own needs missing."""
    report = tmp_path / "report.json"
    requirements = [
        "grpcio-health-checking<1.63,>=1.48",
        "filelock>=3.20.1",
        "grpcio>=1.62",
        "prometheus-client>=0.18",
        "protobuf>=5.29.6,<8",
        "torch",
    ]
    pip(sys.executable, "install", "--dry-run", "--report", str(report), *requirements)
    installed = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert installed <= {"grpcio-health-checking"}


def test_those_requirements_are_the_ones_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(declared) == sorted(DECLARED)
