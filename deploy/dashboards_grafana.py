"""Grafana's JSON of the dashboards, through grafana-foundation-sdk (builders generated from Grafana 11.6's schemas).

The SDK's releases carry Grafana's version behind an epoch (`1769699379!11.6.0`), so that pip's newest is the oldest Grafana:
the version is pinned in pyproject.toml. It needs Python 3.11, and is imported only here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.dashboards import RELEASE_MARK, UNITS, Dashboard, Mark, Panel, Query, Row, Variable, dashboards
from deploy.errors import DeployError, ProgramNotFound
from deploy.whole_file import write_whole

try:
    from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, statetimeline, timeseries
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.cog.builder import Builder
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as shapes
    from grafana_foundation_sdk.models import dashboard as model
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat
except ImportError as error:
    raise ProgramNotFound(
        "the dashboards are made with grafana-foundation-sdk, which is not installed here (Python 3.11 or newer): "
        "make install"
    ) from error

COLUMNS = 24
HEIGHT, NUMBER_HEIGHT = 8, 4
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
REFRESH = "30s"
WINDOW = "now-3h"


class PrometheusMark(model.AnnotationQuery):
    """An annotation with the fields of Prometheus' own, which the SDK's model lacks."""

    own: dict[str, Any]

    def to_json(self) -> dict[str, object]:
        """As Grafana reads it."""
        return {**super().to_json(), **self.own}


class _MarkBuilder(Builder[model.AnnotationQuery]):
    def __init__(self, mark: PrometheusMark) -> None:
        self._mark = mark

    def build(self) -> PrometheusMark:
        return self._mark


def dashboard_json(dashboard: Dashboard) -> str:
    """Text of the dashboard's file."""
    builder = (
        build.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.about)
        .tags(["clotline"])
        .timezone("browser")
        .refresh(REFRESH)
        .time(WINDOW, "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .annotation(_MarkBuilder(_mark(RELEASE_MARK)))
    )
    for variable in dashboard.variables:
        builder = builder.with_variable(_variable(variable))
    number = 0
    top = 0
    for row in dashboard.rows:
        number += 1
        builder = builder.with_row(
            build.Row(row.title).id(number).grid_pos(model.GridPos(h=1, w=COLUMNS, x=0, y=top))
        )
        top += 1
        places, rows_high = _places(row)
        for panel, (left, below, high) in zip(row.panels, places, strict=True):
            number += 1
            place = model.GridPos(h=high, w=panel.width, x=left, y=top + below)
            builder = builder.with_panel(_panel(panel).id(number).grid_pos(place))
        top += rows_high
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _places(row: Row) -> tuple[list[tuple[int, int, int]], int]:
    """Of each panel: column, lines below the row's heading, height; and the height of all."""
    places = []
    left = below = line_high = 0
    for panel in row.panels:
        high = NUMBER_HEIGHT if panel.kind == "number" else HEIGHT
        if left + panel.width > COLUMNS:
            left, below, line_high = 0, below + line_high, 0
        places.append((left, below, high))
        left += panel.width
        line_high = max(line_high, high)
    return places, below + line_high


def _panel(panel: Panel) -> Any:
    made: Any = {
        "lines": _lines,
        "stacked": _lines,
        "number": _number,
        "states": _states,
        "heatmap": _heatmap,
    }[panel.kind](panel)
    made = made.title(panel.title).description(panel.about).datasource(SOURCE)
    for place, query in enumerate(panel.queries):
        made = made.with_target(_query(query, chr(ord("A") + place), panel))
    return made


def _lines(panel: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
    )
    made = timeseries.Panel().unit(panel.unit).min(0).legend(legend).line_width(1)
    if panel.highest is not None:
        made = made.max(panel.highest)
    if panel.kind == "stacked":
        made = made.fill_opacity(40).stacking(
            common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A")
        )
    return made


def _number(panel: Panel) -> stat.Panel:
    latest = common.ReduceDataOptions().calcs(["lastNotNull"])
    made = stat.Panel().unit(panel.unit).reduce_options(latest)
    return made.text_mode(shapes.BigValueTextMode.VALUE_AND_NAME).color_mode(shapes.BigValueColorMode.NONE)


def _states(panel: Panel) -> statetimeline.Panel:
    told = {
        "1": model.ValueMappingResult(text="yes", color="green", index=0),
        "0": model.ValueMappingResult(text="no", color="red", index=1),
    }
    return statetimeline.Panel().unit(panel.unit).mappings([model.ValueMap(options=told)]).row_height(0.8)


def _heatmap(panel: Panel) -> heatmap.Panel:
    return heatmap.Panel().unit(panel.unit).calculate(False).show_legend()


def _query(query: Query, reference: str, panel: Panel) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(reference)
    made = made.datasource(SOURCE).range()
    if panel.kind == "heatmap":
        made = made.format(PromQueryFormat.HEATMAP)
    return made


def _variable(variable: Variable) -> build.QueryVariable:
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return (
        build.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(SOURCE)
        .query(f"label_values({variable.metric}, {variable.of_label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".*")
        .multi(True)
        .current(everything)
    )


def _mark(mark: Mark) -> PrometheusMark:
    made = PrometheusMark(
        name=mark.name, datasource=SOURCE, enable=True, icon_color="purple", expr=mark.expr, built_in=0
    )
    made.own = {
        "titleFormat": mark.title,
        "textFormat": mark.text,
        "useValueForTime": "on",
        "step": "60s",
    }
    return made


def files() -> dict[str, str]:
    """Name -> text of every dashboard's file.

    Raises:
        DeployError: dashboards that Grafana would not show as they are meant; all problems.
    """
    texts = {f"{dashboard.uid}.json": dashboard_json(dashboard) for dashboard in dashboards()}
    problems = [f"{name}: {problem}" for name, text in texts.items() for problem in problems_of(text)]
    if problems:
        raise DeployError("; ".join(problems))
    return texts


def problems_of(text: str) -> list[str]:
    """What is wrong with a dashboard's JSON: numbers given twice, panels over one another or off the grid, sources or units
    that are none."""
    told = json.loads(text)
    problems = []
    panels = told["panels"]
    numbers = [panel["id"] for panel in panels]
    if len(set(numbers)) != len(numbers):
        problems.append("two panels have the same id")
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place, title = panel["gridPos"], panel["title"]
        if place["x"] + place["w"] > COLUMNS:
            problems.append(f"{title} reaches beyond column {COLUMNS}")
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
            if taken.setdefault(cell, title) != title:
                problems.append(f"{title} lies over {taken[cell]}")
                break
        if panel["type"] == "row":
            continue
        if panel["datasource"]["uid"] != "${datasource}":
            problems.append(f"{title} asks a fixed data source")
        if panel["fieldConfig"]["defaults"]["unit"] not in UNITS:
            problems.append(f"{title} has no unit that this module knows")
        references = [target["refId"] for target in panel["targets"]]
        if not references or len(set(references)) != len(references):
            problems.append(f"{title} has no queries, or two of the same name")
    return problems


def out_of_date(directory: Path) -> list[str]:
    """Names of files in the directory that are not what `files` gives: changed, missing, or too many."""
    texts = files()
    there = {path.name: path.read_text() for path in sorted(directory.glob("*.json"))}
    return sorted(name for name in {*texts, *there} if texts.get(name) != there.get(name))


def write(directory: Path) -> list[str]:
    """Write the files, and remove those of dashboards that are no more. Returns what was changed."""
    changed = out_of_date(directory)
    texts = files()
    directory.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in texts:
            write_whole(directory / name, texts[name])
        else:
            (directory / name).unlink()
    return changed
