"""The dashboards as data: what each panel asks of Prometheus, and in which unit it answers.

`deploy.dashboards_grafana` makes Grafana's JSON of them, `deploy.preview` a page of its own, and
tests/deploy/test_monitoring_expressions.py asks every expression of a real Prometheus.

Expressions use Grafana's variables `$server`, `$model` and `$__rate_interval`; `with_variables` puts values in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lines", "stacked", "number", "states", "heatmap"]

UNITS: Mapping[str, str] = {
    "reqps": "requests a second",
    "ops": "a second",
    "s": "seconds",
    "percentunit": "share",
    "bytes": "bytes",
    "Bps": "bytes a second",
    "d": "days",
    "watt": "watts",
    "none": "number",
}
"""Grafana's name of a unit -> what a reader calls it."""


@dataclass(frozen=True)
class Query:
    """One expression of a panel.

    Attributes:
        expr: PromQL, with Grafana's variables.
        legend: name of a series, `{{label}}` in place of a label's value.
        needs_gpu: answered only by a server with a GPU; not asked of a real Prometheus by our tests.
    """

    expr: str
    legend: str
    needs_gpu: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: shown above it.
        about: what it shows and how to read it; Grafana shows it on the panel's corner.
        unit: a key of UNITS.
        queries: what it asks.
        kind: `lines` and `stacked` over time, `number` of now, `states` over time (1 good, 0 bad), `heatmap` of a histogram.
        width: of Grafana's 24 columns.
        highest: end of the axis; None: that of the data.
    """

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    highest: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels below one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice above a dashboard: the values of a label of a metric."""

    name: str
    label: str
    metric: str
    of_label: str


@dataclass(frozen=True)
class Mark:
    """A line across all panels: what happened then. The value of `expr` is the time, in milliseconds since 1970."""

    name: str
    expr: str
    title: str
    text: str


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; its file is `uid`.json."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    model: Variable

    @property
    def variables(self) -> tuple[Variable, ...]:
        """In their order: the second may use the first."""
        return (SERVER, self.model)

    def panels(self) -> Iterator[Panel]:
        """All panels."""
        for row in self.rows:
            yield from row.panels


SERVER = Variable("server", "Server", 'up{job="triton"}', "server")
PUBLIC_MODEL = Variable("model", "Model", 'clotline_release_info{server=~"$server"}', "model")
ANY_MODEL = Variable("model", "Model", 'nv_inference_request_success{server=~"$server"}', "model")

RELEASE_MARK = Mark(
    name="Releases",
    expr=(
        '1000 * clotline_release_switch_timestamp_seconds{server=~"$server"} * on (server, instance) group_right () '
        "max by (server, instance, number, release_id) (clotline_release_info)"
    ),
    title="release {{number}}",
    text="{{server}} answers with release {{release_id}}",
)


def dashboards() -> tuple[Dashboard, ...]:
    """All of them."""
    from deploy.dashboards_answers import ANSWERS
    from deploy.dashboards_server import SERVER_DASHBOARD
    from deploy.dashboards_service import SERVICE

    return SERVICE, SERVER_DASHBOARD, ANSWERS


def with_variables(expr: str, *, rate_interval: str, server: str = ".*", model: str = ".*") -> str:
    """An expression that Prometheus takes."""
    for name, value in (("$__rate_interval", rate_interval), ("$server", server), ("$model", model)):
        expr = expr.replace(name, value)
    return expr
