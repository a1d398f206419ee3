"""Pages: every block is tried or says why not, links lead somewhere, quoted messages exist, pictures are current."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.docs.blocks import BLOCKS, KINDS, PAGES, ROOT, Block

DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]


def anchor(title: str) -> str:
    """The anchor that a heading gets, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


class TestBlocks:
    """Command blocks."""

    @pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
    def test_says_how_it_is_tried(self, block: Block) -> None:
        """A block is of a known kind; one that nobody tries says why."""
        assert block.kind in KINDS
        assert bool(block.reason) == (block.kind == "no")

    def test_there_are_some(self) -> None:
        """Each kind has a block, and most blocks are tried."""
        assert {block.kind for block in BLOCKS} == set(KINDS)
        assert sum(block.kind == "no" for block in BLOCKS) < len(BLOCKS) / 2

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_no_other_fence(self, page: Path) -> None:
        """Commands are in `sh` fences, and not where no test looks for them."""
        fences = re.findall(r"^```(\w*)\n", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"sh", "python", "py", "text", ""}
        assert not re.findall(r"^(?: {4}|\$ )(?:pip|vllm|vllm-companion|make|docker|kubectl) ", page.read_text(), re.M)


class TestLinks:
    """Links between pages."""

    @pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
    def test_lead_somewhere(self, page: Path) -> None:
        """A relative link names a file, and a heading in that file."""
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lost = []
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|mailto:", link):
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                lost.append(link)
            elif heading:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                lost += [link] * (heading not in map(anchor, titles))
        assert lost == []


@cache
def messages() -> str:
    """All texts in the package's code, with what is filled in as `…`; implicit concatenation joined, as Python does."""
    found = []
    for path in (ROOT / "vllm_companion_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-+.\d]*[sdfg]", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return "\n".join(found)


QUOTES = re.findall(r"^\| `([^`]+)`(?: … `([^`]+)`)? \|", (ROOT / "docs/guide/troubleshooting.md").read_text(), re.M)


class TestTroubleshooting:
    """Messages that the page quotes."""

    def test_there_are_some(self) -> None:
        """The table is found."""
        assert len(QUOTES) > 30

    @pytest.mark.parametrize("quote", [part for quote in QUOTES for part in quote if part])
    def test_is_a_message(self, quote: str) -> None:
        """Each piece of a quoted text between two `…` stands in the code as it is quoted."""
        pieces = [piece.strip() for piece in quote.split("…")]
        assert [piece for piece in pieces if len(piece) > 3 and piece not in messages()] == []


class TestPictures:
    """Pictures that scripts draw."""

    @pytest.mark.parametrize("script", ["make_pictures.py", "record.py"])
    def test_are_current(self, script: str) -> None:
        """Made again from the committed results or recording, it is the committed one, and so is the README."""
        done = subprocess.run([sys.executable, str(ROOT / "tools" / script), "--check"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
