"""README and docs as tests read them: code blocks, links, headings."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "notebooks"),  # those are made
]


class Block(NamedTuple):
    """A block of code."""

    language: str
    code: str
    not_run: str | None
    """Why tests do not run it: what a comment in front of it says, ``<!-- not run: why -->``."""

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined, without those that leave something out."""
        lines = self.code.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        return [part.strip() for line in lines if " ... " not in line for part in line.split("&&")]


def name(page: Path) -> str:
    """Of a page in test ids."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The blocks of code with a language, in their order."""
    pattern = r"(?:<!-- not run: ([^>]*?) -->\n\n?)?```(\w+)\n(.*?)```"
    found = re.findall(pattern, page.read_text("utf-8"), re.DOTALL)
    return [Block(language, code, why or None) for why, language, code in found]


def without_code(page: Path) -> str:
    """The text of a page but for its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links to headings of a page may end in, as GitHub and MkDocs make it."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
