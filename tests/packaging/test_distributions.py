"""Wheel and source distribution: complete, accepted by an index, and the latter builds and tests itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.docs.test_install import copy

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build` makes: the source distribution, and the wheel from that; `twine check` accepts both."""
    place = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = str(place / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "--quiet", "install", "build", "twine"], check=True, timeout=300)
    sources = copy(place / "sources")
    subprocess.run([python, "-m", "build", "--outdir", str(place / "out"), str(sources)], check=True, timeout=300)
    made = sorted(map(str, (place / "out").iterdir()))
    subprocess.run([python, "-m", "twine", "check", "--strict", *made], check=True)
    return place / "out"


def names(directory: Path) -> set[str]:
    """The files below a directory of the sources, without what is made there."""
    files = (path for path in (ROOT / directory).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}


class TestWheel:
    """The wheel has the package and nothing else."""

    def test_content(self, dist: Path) -> None:
        """Every module, the schema, and the mark that it is typed."""
        (path,) = dist.glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            found = {name for name in wheel.namelist() if ".dist-info/" not in name}
            (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
            text = wheel.read(metadata).decode()
        assert found == names(Path("vllm_companion_plugin"))
        assert "Classifier: Typing :: Typed" in text
        assert "# vllm-companion" in text


class TestSource:
    """The source distribution."""

    def test_content(self, dist: Path) -> None:
        """Docs, tests, protos, tools and benchmarks are in it."""
        (path,) = dist.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        wanted = {
            name for part in ("docs", "tests", "protos", "tools", "benchmarks", ".github") for name in names(Path(part))
        }
        assert wanted - found == set()

    def test_tests_itself(self, dist: Path, tmp_path: Path) -> None:
        """Unpacked, its own tests pass over its own code."""
        (path,) = dist.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        (root,) = tmp_path.iterdir()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/unit", "tests/test_layering.py", "tests/docs"]
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=800
        )
        assert done.returncode == 0, done.stdout[-3000:]
