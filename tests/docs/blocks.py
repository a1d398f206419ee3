"""The command blocks of the README and the user guide, each with how it is tried.

A block is fenced as `sh`. The line above says how it is tried: `<!-- try: KIND -->`, or `<!-- try: no, REASON -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]

KINDS = ("beside a companion", "cpu settings", "engines", "install", "kubectl", "systemd", "no")

_BLOCK = re.compile(
    r"(?:^<!-- try: (?P<kind>[^,>]+?)(?:, (?P<reason>[^>]+))? -->\n)?^```sh\n(?P<text>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One block: the page, its number there, how it is tried, why it is not, and its text."""

    page: Path
    number: int
    kind: str
    reason: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}-{self.number}"

    @property
    def lines(self) -> list[str]:
        """The commands, without comments; a line that ends with a backslash goes on in the next one."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()) if line]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page. The kind is empty if the page does not say it."""
    found = _BLOCK.finditer(page.read_text())
    return [Block(page, n, m["kind"] or "", m["reason"] or "", m["text"]) for n, m in enumerate(found)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_kind(kind: str) -> list[Block]:
    """The blocks that are tried in one way."""
    return [block for block in BLOCKS if block.kind == kind]
