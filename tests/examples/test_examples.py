"""What the documentation shows runs: its programs and its Python, beside one companion.

The companion holds a small model under the name that the example says. tests/docs runs command lines.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import vllm_companion_plugin.client.api
from tests.support.place import KEY, Place
from tests.support.publishing import load
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.identity import EntryKey

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = ROOT / "docs" / "examples"
RUN_BY = {
    "attach.py": "this file",
    "advance.py": "tests/vllm/test_fleet.py",
    "tinker_service.py": "tests/vllm/test_training.py",
    "trl_grpo.py": "tests/docs/test_trl.py",
    "trl_lora_grpo.py": "tests/docs/test_trl.py",
}
"""What runs each program."""


def blocks(text: str) -> list[str]:
    """The Python in a page: fenced, or indented in a docstring."""
    text = re.sub(r"^<!-- try: no,[^\n]*-->\n```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced or re.findall(r"^with .*\n(?: {4}.*\n)+", text, re.MULTILINE)


SNIPPETS = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in [
        *((str(page.relative_to(ROOT)), page.read_text()) for page in PAGES if "```python" in page.read_text()),
        ("client/api.py", vllm_companion_plugin.client.api.__doc__ or ""),
    ]
    for number, block in enumerate(blocks(text))
]


class Tiny(nn.Module):
    """With the names that vLLM's models have."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(64, 16, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(16)


@pytest.fixture
def published(place: Place) -> Iterator[Callable[[str], None]]:
    """Let the companion hold a model under a name, for the length of the test."""
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        yield lambda name: load(connection, Tiny(), key=EntryKey(KEY.id, name, fields=KEY.fields))


class TestPrograms:
    """The files of docs/examples."""

    def test_all_run(self) -> None:
        """There is no program that nobody runs."""
        assert {path.name for path in EXAMPLES.glob("*.py")} == RUN_BY.keys()

    def test_lists(self, place: Place, published: Callable[[str], None]) -> None:
        """attach.py names each tensor of the model that it is given, as its first docstring says."""
        published("org/model")
        process = place.run(str(EXAMPLES / "attach.py"), "org/model", "cpu")
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, error
        assert "model.embed_tokens.weight: torch.bfloat16 (64, 16)" in out
        assert "norm.bias: torch.float32 (16,)" in out
        assert "the largest has 2048 bytes" in out


class TestPython:
    """Snippets in pages and in the docstring of the API."""

    @pytest.mark.parametrize("snippet", SNIPPETS)
    def test_runs(self, snippet: str, place: Place, published: Callable[[str], None]) -> None:
        """The Python of a page runs as it stands, beside a companion that holds the model it names."""
        names = re.findall(r"(?:attach|wait_ready(?:_async)?)\(\"([^\"]+)\"", snippet)
        assert names, snippet
        published(names[0])
        imported = "" if "import CompanionClient" in snippet else "from vllm_companion_plugin import CompanionClient\n"
        out, error = place.run("-c", imported + textwrap.dedent(snippet)).communicate(timeout=100)
        assert not error
        assert "[64, 16]" in out or "(64, 16)" in out
