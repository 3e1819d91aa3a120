"""The dashboards as one page of HTML, drawn from the same expressions: to look at without Grafana."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from deploy.dashboards import RELEASE_MARK, UNITS, Dashboard, Panel, dashboards, with_variables
from deploy.preview_charts import COLOURS, Canvas, heatmap, lines, shown, states
from deploy.preview_prometheus import Prometheus, Series, legend
from deploy.whole_file import write_whole

STEPS = 120
PX_A_COLUMN = 46
MOST_IN_LEGEND = 24

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #1f2933; background: #f4f6f8; margin: 24px; }
h1 { font-size: 22px; margin: 32px 0 2px; } h2 { font-size: 15px; margin: 20px 0 8px; color: #616e7c; }
.row { display: grid; grid-template-columns: repeat(24, 1fr); gap: 10px; max-width: 1500px; }
.panel { background: #fff; border: 1px solid #dfe4ea; border-radius: 4px; padding: 8px 10px; min-width: 0; }
.panel h3 { font-size: 13px; margin: 0 0 4px; } .panel h3 span { font-weight: 400; color: #616e7c; }
.panel svg { width: 100%; height: auto; } .panel p { margin: 4px 0 0; color: #616e7c; font-size: 12px; }
.legend { font-size: 12px; color: #1f2933; } .legend b { font-weight: 600; } .legend i { display: inline-block;
  width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; } .legend span { margin-right: 14px; white-space: nowrap; }
.number { font-size: 22px; font-weight: 600; } .number small { font-size: 12px; font-weight: 400; color: #616e7c; }
.none { color: #b3261e; padding: 20px 0; }
"""


@dataclass(frozen=True)
class Span:
    """What is shown: the last `minutes`, of these servers and models (regular expressions), rates over `rate_interval`."""

    minutes: float = 60.0
    rate_interval: str = "1m"
    server: str = ".*"
    model: str = ".*"
    end_s: float = field(default_factory=time.time)

    @property
    def start_s(self) -> float:
        """Its beginning, seconds since 1970."""
        return self.end_s - 60 * self.minutes

    @property
    def step_s(self) -> float:
        """Seconds from one value to the next."""
        return max(1.0, round(60 * self.minutes / STEPS))

    def expr(self, expr: str) -> str:
        """An expression of a dashboard, for Prometheus."""
        return with_variables(expr, rate_interval=self.rate_interval, server=self.server, model=self.model)


@dataclass
class Page:
    """The page, and what could not be drawn on it."""

    html: str
    panels: int = 0
    empty: list[str] = field(default_factory=list)


def preview(prometheus: Prometheus, span: Span) -> Page:
    """Ask for every panel and draw it. Raises DeployError if Prometheus does not answer."""
    marks = [
        value / 1000
        for series in prometheus.over(span.expr(RELEASE_MARK.expr), span.start_s, span.end_s, span.step_s)
        for _, value in series.points
    ]
    page = Page("")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Clotline: dashboards</title>",
        f"<style>{STYLE}</style>",
        f"<p>The last {span.minutes:g} minutes before {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(span.end_s))} UTC. "
        "Dashed violet lines: another release began to answer.</p>",
    ]
    for dashboard in dashboards():
        parts += _dashboard(prometheus, dashboard, span, sorted(set(marks)), page)
    page.html = "\n".join(parts) + "\n"
    return page


def _dashboard(
    prometheus: Prometheus, dashboard: Dashboard, span: Span, marks: Sequence[float], page: Page
) -> list[str]:
    parts = [f"<h1>{escape(dashboard.title)}</h1><p>{escape(dashboard.about)}</p>"]
    for row in dashboard.rows:
        parts.append(f'<h2>{escape(row.title)}</h2><div class="row">')
        for panel in row.panels:
            canvas = Canvas(PX_A_COLUMN * panel.width, span.start_s, span.end_s, marks)
            drawn = _drawn(prometheus, panel, span, canvas)
            page.panels += 1
            if not drawn:
                page.empty.append(f"{dashboard.title}: {panel.title}")
            parts.append(
                f'<div class="panel" style="grid-column: span {panel.width}"><h3>{escape(panel.title)} '
                f"<span>{UNITS[panel.unit]}</span></h3>{drawn or '<div class=none>no data</div>'}"
                f"<p>{escape(panel.about)}</p></div>"
            )
        parts.append("</div>")
    return parts


def _drawn(prometheus: Prometheus, panel: Panel, span: Span, canvas: Canvas) -> str:
    """Chart and legend; empty without data."""
    if panel.kind == "number":
        return _numbers(prometheus, panel, span)
    named: list[tuple[str, Series]] = []
    for query in panel.queries:
        found = prometheus.over(span.expr(query.expr), span.start_s, span.end_s, span.step_s)
        named += [(legend(query.legend, series.labels) or "all", series) for series in found]
    named = [(name, series) for name, series in named if series.latest is not None]
    if not named:
        return ""
    if panel.kind == "states":
        return states(canvas, named)
    if panel.kind == "heatmap":
        return heatmap(canvas, [series for _, series in named], span.step_s)
    named.sort(key=lambda entry: entry[0])
    chart = lines(canvas, named, panel.unit, highest=panel.highest, stacked=panel.kind == "stacked")
    return chart + _legend(named, panel.unit)


def _numbers(prometheus: Prometheus, panel: Panel, span: Span) -> str:
    told = []
    for query in panel.queries:
        for series in prometheus.now(span.expr(query.expr)):
            if series.latest is not None:
                name = escape(legend(query.legend, series.labels))
                told.append(
                    f'<div class="number">{shown(series.latest, panel.unit)} <small>{name}</small></div>'
                )
    return "".join(told)


def _legend(named: Sequence[tuple[str, Series]], unit: str) -> str:
    told = [
        f'<span><i style="background:{COLOURS[place % len(COLOURS)]}"></i>{escape(name)} '
        f"<b>{shown(series.latest or 0.0, unit)}</b></span>"
        for place, (name, series) in enumerate(named[:MOST_IN_LEGEND])
    ]
    more = f"<span>and {len(named) - MOST_IN_LEGEND} more</span>" if len(named) > MOST_IN_LEGEND else ""
    return f'<div class="legend">{"".join(told)}{more}</div>'


def write(page: Page, path: Path) -> None:
    """Write the page whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.html)
