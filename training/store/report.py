"""report.html of a tile store: those slides that failed, then every slide with its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def write_report(store: Path, summary: dict[str, Any]) -> Path:
    """Write report.html from what the index says; returns its path."""
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template).render(**summary)
    aside = store / ".report.html.partial"
    aside.write_text(page, encoding="utf-8")
    aside.replace(store / "report.html")
    return store / "report.html"
