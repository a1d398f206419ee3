"""Install lines, in a copy of the sources and environments that are made for them: `make test-docs`.

What pip would fetch of CUDA's gigabytes is only resolved (`--dry-run`); everything else is done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, of_kind

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

IGNORED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache")
INSTALLS = of_kind("install")
KEPT = ("HOME", "LANG", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")
"""Variables of a reader's shell, besides those that tell pip where its index is."""


def shell(text: str, clone: Path, venv: Path) -> str:
    """Run commands in the copy, with an environment activated; what they print."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PIP_")}
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=clone,
        env=kept
        | {"PATH": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(venv), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy(directory: Path) -> Path:
    return Path(shutil.copytree(ROOT, directory, ignore=IGNORED, symlinks=True))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a clone has them."""
    return copy(tmp_path_factory.mktemp("clone") / "vllm-companion")


@pytest.fixture(scope="module")
def cpu(clone: Path) -> Path:
    """The environment of the command that makes one for a CPU."""
    (block,) = [block for block in INSTALLS if "make_venv" in block.text]
    shell(block.text + "vllm --version\nvllm-companion doctor\n", clone, Path("/nonexistent"))
    return clone / ".venv"


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """An environment with the PyTorch that a vLLM would have brought."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([venv / "bin/pip", "--quiet", "install", "torch==2.13.0"], check=True, timeout=900)
    return venv


class TestInstall:
    """Blocks of kind `install`."""

    @pytest.mark.parametrize(
        "block",
        [b for b in INSTALLS if "make_venv" not in b.text and "uninstall" not in b.text],
        ids=lambda block: block.id,
    )
    def test_beside_cuda(self, block: Block, clone: Path, clean: Path) -> None:
        """The versions exist and fit, the package installs, and vLLM would find the plugin."""
        lines = [
            line.replace("pip install", "pip install --dry-run") if '"vllm' in line else line for line in block.lines
        ]
        shell("\n".join(lines), clone, clean)
        found = "from importlib.metadata import entry_points; print(*entry_points(group='vllm.general_plugins'))"
        shown = shell(f'cd /; vllm-companion --version; python -c "{found}"', clone, clean)
        assert "vllm_companion_plugin.engine.register:register" in shown

    def test_cpu(self, cpu: Path, clone: Path) -> None:
        """One command makes an environment in which `doctor` finds no fault and the engine can be imported."""
        shown = shell("python -c 'import vllm; print(vllm.__version__)'; vllm-companion --version", clone, cpu)
        assert "0.32.0" in shown

    @pytest.mark.parametrize("block", [b for b in INSTALLS if "uninstall" in b.text], ids=lambda block: block.id)
    def test_uninstall(self, block: Block, clone: Path, cpu: Path) -> None:
        """Afterwards nothing of the package is in the environment."""
        shell(block.text, clone, cpu)
        shell("cd /; ! python -c 'import vllm_companion_plugin' 2>/dev/null; ! command -v vllm-companion", clone, cpu)
