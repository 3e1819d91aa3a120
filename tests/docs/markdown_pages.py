"""What README and docs contain: links, anchors, code blocks, inline code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ]
)


@dataclass(frozen=True)
class Code:
    """A code block, or a piece of code within a sentence."""

    text: str
    line: int
    language: str = ""


class Page:
    """A Markdown file, read as CommonMark with tables."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        self.tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))

    @cached_property
    def blocks(self) -> list[Code]:
        """Fenced and indented code."""
        return [
            Code(token.content, (token.map or [0])[0] + 1, token.info.strip())
            for token in self.tokens
            if token.type in ("fence", "code_block")
        ]

    @cached_property
    def inline_code(self) -> list[Code]:
        return [
            Code(" ".join(token.content.split()), line)
            for token, line in self._inline()
            if token.type == "code_inline"
        ]

    @cached_property
    def links(self) -> list[Code]:
        """Targets of links and images."""
        found = [
            (token.attrGet("href") or token.attrGet("src"), line)
            for token, line in self._inline()
            if token.type in ("link_open", "image")
        ]
        return [Code(str(target), line) for target, line in found if target]

    @cached_property
    def headings(self) -> list[str]:
        return [
            "".join(child.content for child in self.tokens[number + 1].children or ())
            for number, token in enumerate(self.tokens)
            if token.type == "heading_open"
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """As GitHub makes them of headings."""
        seen: Counter[str] = Counter()
        anchors = set()
        for heading in self.headings:
            anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return anchors

    def _inline(self) -> Iterator[tuple[Token, int]]:
        for token in self.tokens:
            for child in token.children or ():
                yield child, (token.map or [0])[0] + 1
