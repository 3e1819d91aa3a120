"""Every relative link and anchor of README and docs leads somewhere."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.markdown_pages import PAGES, Page


def broken_links(page: Page) -> list[str]:
    broken = []
    for link in page.links:
        parts = urlsplit(link.text)
        if parts.scheme:
            continue
        target = page.path.parent / unquote(parts.path) if parts.path else page.path
        if not target.exists():
            broken.append(f"{page.name}:{link.line}: {link.text}: there is no such file")
        elif parts.fragment and (target.suffix != ".md" or parts.fragment not in Page(target).anchors):
            broken.append(f"{page.name}:{link.line}: {link.text}: there is no such heading")
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(Page(path)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading: `code`\n[a](#one-heading-code) [b](#two) [c](gone.md) [d](page.md#three)\n"
    )
    assert [line.split(": ")[1] for line in broken_links(Page(page))] == ["#two", "gone.md", "page.md#three"]
