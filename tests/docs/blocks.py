"""The blocks of code in README.md and in the pages of the documentation."""

import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A page that says this is one program; in all other pages each block stands alone.
CONTINUES = "Each example continues the one before it."

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^ *```", re.M | re.S)


class Block(NamedTuple):
    """A block of code, or all blocks of a page that is one program."""

    page: str
    line: int
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return the blocks in a language, page by page."""
    return [block for page in PAGES for block in _blocks_of(page, language)]


def programs() -> list[Block]:
    """Return the Python code that runs by itself: single blocks, and pages of one program."""
    found = []
    for page in PAGES:
        parts = _blocks_of(page, "python")
        if parts and CONTINUES in page.read_text():
            parts = [parts[0]._replace(code="\n".join(part.code for part in parts))]
        found += parts
    return found


def _blocks_of(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text.count("\n", 0, match.start()) + 1,
            dedent(match["code"]),
        )
        for match in _BLOCK.finditer(text)
        if match["language"] == language
    ]
